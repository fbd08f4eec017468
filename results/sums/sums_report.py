"""The text and the picture of results/sums, from the files in data/: see study.py.

In README.template.md `{{...}}` is a Python expression over the public functions of Report, and
README.md is what comes out. Intervals are 95 % intervals of a bootstrap over problems, paired where
two arms are compared. They hold for these checkpoints: another seed may differ by more. Where an
arm has several seeds their mean counts.
"""

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np

from machinery.files import read_jsonl, write
from machinery.metrics import UNLIKELY, smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
TRAINED, NEW = ("2x2", "2x3", "3x2"), ("3x3", "4x2")
WORDS = {
    "2x2": "2 numbers of 2 digits",
    "2x3": "2 of 3 digits",
    "3x2": "3 of 2 digits",
    "3x3": "3 of 3 digits",
    "4x2": "4 of 2 digits",
    "trained": "mean of the three",
    "new": "mean of the two",
}
GROUPS = {"2x2": ("2x2",), "2x3": ("2x3",), "3x2": ("3x2",), "trained": TRAINED}
GROUPS |= {"3x3": ("3x3",), "4x2": ("4x2",), "new": NEW}
DRAWS = 4000
STYLES = {  # apart in grey, too
    "luffy": dict(color="black", linestyle="-", marker="o"),
    "on_policy": dict(color="#0072b2", linestyle="--", marker="v"),
    "sft_then_on_policy": dict(color="#777777", linestyle="--", marker="D"),
    "mixed": dict(color="#e69f00", linestyle="--", marker="s"),
    "hpt": dict(color="#009e73", linestyle="-.", marker="^"),
    "opd": dict(color="#cc79a7", linestyle=":", marker="x"),
}


def name(arm: str) -> str:
    return {"base": "base", "sft_then_on_policy": "`sft`, then `on_policy`"}.get(arm, f"`{arm}`")


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """0.5 -> .50"""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text) if float(text) else text.strip("+-")[-digits - 1 :]


@cache
def drawn(problems: int, column: int) -> np.ndarray:
    """How often each problem of a kind was drawn: (DRAWS, problems)."""
    rng = np.random.default_rng(column)
    return rng.multinomial(problems, np.full(problems, 1 / problems), DRAWS)


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """(kinds, problems) -> the mean over all, and its 95 % interval."""
    means = [drawn(len(v), i) @ v / len(v) for i, v in enumerate(values)]
    low, high = np.percentile(np.mean(means, axis=0), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


class Report:
    """data/ and what can be said about it. The public functions are the template's vocabulary."""

    def __init__(self, data: Path = HERE / "data"):
        self._rows = defaultdict(dict)  # arm -> seed -> row
        for row in read_jsonl(data / "runs.jsonl"):
            self._rows[row["arm"]][row["seed"]] = row
        self._samples = read_jsonl(data / "samples.jsonl")

    # -------------------------------------------------------------- arrays
    def _sum(self, arm: str, what: str, group: str, t: float = 0.6) -> np.ndarray:
        """(kinds, problems), a mean over seeds and responses."""
        found = []
        for row in self._rows[arm].values():
            (scores,) = (s for s in row["scores"] if s["temperature"] == t)
            found.append([np.array(scores[what][kind]) / scores["k"] for kind in GROUPS[group]])
        return np.mean(found, axis=0)

    def _pi(self, arm: str, kind: str) -> np.ndarray:
        """π of the trace tokens to which the base gives less than UNLIKELY."""
        (base,) = self._rows["base"].values()
        before = np.concatenate([*map(np.array, base["pi"][kind])])
        rows = self._rows[arm].values()
        now = np.mean([np.concatenate([*map(np.array, r["pi"][kind])]) for r in rows], axis=0)
        return now[before < UNLIKELY]

    # -------------------------------------------------------------- text
    def score(self, arm: str, group: str, t: float = 0.6) -> str:
        value, low, high = (number(x) for x in bootstrap(self._sum(arm, "right", group, t)))
        return f"{value} [{low}, {high}]"

    def gap(self, arm: str, other: str, group: str) -> str:
        """How much better `arm` is than `other`; undecided where the interval holds 0."""
        if not (arm in self._rows and other in self._rows):
            return "not run"
        found = bootstrap(self._sum(arm, "right", group) - self._sum(other, "right", group))
        value, low, high = (number(x, sign=True) for x in found)
        return f"{value} [{low}, {high}]" + (", undecided" if found[1] <= 0 <= found[2] else "")

    def steps(self) -> int:
        return max(row["steps"] for arm in self._rows if arm != "base" for row in self._of(arm))

    def seeds(self) -> str:
        count = {len(seeds) for arm, seeds in self._rows.items() if arm != "base"}
        return "one seed of each" if count == {1} else f"{min(count)} to {max(count)} seeds of each"

    def _of(self, arm: str) -> list[dict]:
        return list(self._rows[arm].values())

    def asked(self) -> int:
        return self._sum("base", "right", "2x2").size

    def scores_table(self) -> str:
        lines = [f"| arm | {' | '.join(WORDS[g] for g in GROUPS)} |", "|---" * 8 + "|"]
        for arm in self._rows:
            lines.append(f"| {name(arm)} | {' | '.join(self.score(arm, g) for g in GROUPS)} |")
        return "\n".join(lines)

    def gaps_table(self, *pairs: tuple[str, str]) -> str:
        head = "| first - second | trained kinds | new kinds | of these, 4 of 2 digits |"
        lines = [head, "|---" * 4 + "|"]
        for arm, other in pairs:
            cells = [self.gap(arm, other, group) for group in ("trained", "new", "4x2")]
            lines.append(f"| {name(arm)} - {name(other)} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def training_table(self) -> str:
        head = "| arm | reward, first 5 steps | last 5 | entropy, first 5 | last 5 | minutes |"
        lines = [head, "|---" * 6 + "|"]
        for arm in (arm for arm in self._rows if arm != "base"):
            steps = [(m, *ends) for m in ("reward", "entropy") for ends in ((0, 5), (-5,))]
            cells = [*(self.metric(arm, *which) for which in steps), self.minutes(arm)]
            lines.append(f"| {name(arm)} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def responses_table(self) -> str:
        lines = [
            "| arm | tokens, trained kinds | 3 of 3 digits | 4 of 2 digits | right that add up "
            "| π of unlikely trace tokens, trained kinds | new kinds |",
            "|---" * 7 + "|",
        ]
        for arm in self._rows:
            cells = [self.tokens(arm, group) for group in ("trained", "3x3", "4x2")]
            cells += [self.meant(arm), *(self.unlikely(arm, group) for group in ("trained", "new"))]
            lines.append(f"| {name(arm)} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def metric(self, arm: str, metric: str, start: int, end: int | None = None) -> str:
        """Its mean over some steps of training."""
        rows = [r["curves"].get(metric, [None])[start:end] for r in self._of(arm)]
        values = [x for row in rows for x in row if x is not None]
        return number(np.mean(values)) if values else "-"

    def tokens(self, arm: str, group: str) -> str:
        return f"{self._sum(arm, 'tokens', group).mean():.0f}"

    def unlikely(self, arm: str, group: str) -> str:
        return number(np.concatenate([self._pi(arm, kind) for kind in GROUPS[group]]).mean(), 3)

    def unlikely_count(self, group: str) -> int:
        return sum(self._pi("base", kind).size for kind in GROUPS[group])

    def meant(self, arm: str) -> str:
        """Of the right responses, how many add each number in its turn, and rightly."""
        right = sum(self._sum(arm, "right", group).sum() for group in ("trained", "new"))
        tricks = sum(self._sum(arm, "rewarded_trick", group).sum() for group in ("trained", "new"))
        k = self._of(arm)[0]["scores"][0]["k"]
        return f"{round((right - tricks) * k)} of {round(right * k)}"

    def minutes(self, arm: str) -> str:
        return f"{np.mean([row['seconds'] for row in self._of(arm)]) / 60:.0f}"

    def sample(self, arm: str, kind: str, n: int = 0, seed: int = 0) -> str:
        """A response to the n-th held-out problem of a kind."""
        same = [s for s in self._samples if (s["arm"], s["seed"]) == (arm, seed)]
        s = [s for s in same if s["source"] == kind][n]
        verdict = "right" if s["right"] else f"wrong, it is {s['answer']}"
        text = s["response"].replace("<|im_end|>", "")
        return f"{s['question']} `{text}` ({verdict})"

    # -------------------------------------------------------------- picture
    def _draw(self, file: Path) -> None:
        plt.rcParams.update({"axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False})
        figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
        titles = {
            "reward": "reward of rollouts (mean of the last 5 steps)",
            "length": "tokens of a rollout (mean of the last 5 steps)",
            "entropy": "entropy of rollouts, nats (mean of the last 5 steps)",
        }
        arms = [arm for arm in STYLES if arm in self._rows]
        for axis, (metric, title) in zip(axes.flat, titles.items()):
            for arm in arms:
                found = [smooth(row["curves"][metric], 5) for row in self._of(arm)]
                steps = range(1, len(found[0]) + 1)
                style = STYLES[arm] | dict(
                    markevery=4, markersize=4, label=name(arm).replace("`", "")
                )
                axis.plot(steps, np.mean(found, axis=0), **style)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 0].legend()
        axis, shown = axes[1, 1], list(self._rows)
        for shift, (group, marker) in enumerate((("trained", "o"), ("new", "s"))):
            pi = [np.concatenate([self._pi(arm, k) for k in GROUPS[group]]).mean() for arm in shown]
            count = self.unlikely_count(group)
            label = f"{group} kinds, {count} tokens"
            fill = "black" if group == "trained" else "white"
            y = np.arange(len(shown)) + 0.15 * shift
            axis.plot(pi, y, marker, color="black", markerfacecolor=fill, label=label)
        axis.set_yticks(range(len(shown)), [name(arm).replace("`", "") for arm in shown])
        axis.set_title("π of held-out traces' tokens that the base found unlikely")
        axis.set_xlim(-0.03, 1.03)
        axis.legend()
        for axis in axes.flat:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=110, metadata={"Software": None})
        plt.close(figure)


def render(template: str, report: Report) -> str:
    """With the value of each {{expression}}."""
    names = {k: getattr(report, k) for k in dir(report) if not k.startswith("_")}
    return re.sub(r"{{(.+?)}}", lambda found: str(eval(found[1], names)), template)


def write_all() -> None:
    report = Report()
    template = (HERE / "README.template.md").read_text()
    write(HERE / "README.md", render(template, report))
    report._draw(HERE / "curves.png")
