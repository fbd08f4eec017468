"""The text and the picture of results/sums, from the files in data/: see study.py.

In README.template.md `{{...}}` is a Python expression over the public functions of Report, and
README.md is what comes out. Intervals are 95 % intervals of a bootstrap over problems, of a mean
over seeds, and paired where arms are compared. They do not say how far another seed would be.
"""

import re
from collections.abc import Collection
from pathlib import Path

import matplotlib
import numpy as np

from machinery.files import read_jsonl, write
from machinery.metrics import UNLIKELY, smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
TRAINED, NEW = ("2x2", "2x3", "3x2"), ("3x3", "4x2")
KINDS = TRAINED + NEW
GROUPS = {"trained": TRAINED, "new": NEW} | {kind: (kind,) for kind in KINDS}
WORDS = {"2x2": "2 numbers of 2 digits", "2x3": "2 of 3 digits", "3x2": "3 of 2 digits"}
WORDS |= {"trained": "trained kinds", "3x3": "3 of 3 digits", "4x2": "4 of 2 digits"}
WORDS |= {"new": "new kinds"}
DRAWS = 4000
STYLES = {"luffy": "black o -", "on_policy": "#0072b2 v --", "sft_then_on_policy": "#777777 D --"}
STYLES |= {"mixed": "#e69f00 s --", "hpt": "#009e73 ^ -.", "opd": "#cc79a7 x :"}


def name(arm: str) -> str:
    return {"base": "base", "sft_then_on_policy": "`sft`, then `on_policy`"}.get(arm, f"`{arm}`")


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """0.5 -> .50"""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text) if float(text) else text.strip("+-")[-digits - 1 :]


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """(kinds, problems) -> the mean over all, and its 95 % interval: problems are drawn anew."""
    kinds, n = values.shape
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), (DRAWS, kinds))
    low, high = np.percentile((times * values).sum((1, 2)) / values.size, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def table(head: str, rows: dict[str, list[str]]) -> str:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join(
        lines + [f"| {first} | {' | '.join(cells)} |" for first, cells in rows.items()]
    )


def curves(out: Path, steps: int, names: Collection[str]) -> dict:
    """Of a run's directory: these metrics of each step, and seconds."""
    metrics, timing = (read_jsonl(out / f"{name}.jsonl")[:steps] for name in ("metrics", "timing"))
    kept = {n: [row.get(n) for row in metrics] for n in names if any(n in r for r in metrics)}
    kept = {n: [x if x is None else float(f"{x:.4g}") for x in v] for n, v in kept.items()}
    seconds = sum(row[phase] for row in timing for phase in ("sync", "sample", "score", "update"))
    return {"seconds": round(seconds), "curves": kept}


class Report:
    """data/ and what can be said about it. The public functions are the template's vocabulary."""

    def __init__(self, data: Path = HERE / "data"):
        self._rows = {}  # arm -> seed -> row
        for row in read_jsonl(data / "runs.jsonl"):
            self._rows.setdefault(row["arm"], {})[row["seed"]] = row
        self._arms = [arm for arm in self._rows if arm != "base"]

    def _of(self, arm: str, seeds: Collection[int] = ()) -> list[dict]:
        return [row for seed, row in self._rows[arm].items() if seed in seeds or not seeds]

    def _sum(self, what: str, arm: str, group: str, seeds: Collection[int] = ()) -> np.ndarray:
        """(kinds, problems) at T = 0.6, a mean over responses and over seeds, or some of them."""
        scores = [row["scores"][0] for row in self._of(arm, seeds)]
        found = [[np.array(s[what][kind]) / s["k"] for kind in GROUPS[group]] for s in scores]
        return np.mean(found, axis=0)

    def _pi(self, arm: str, group: str) -> np.ndarray:
        """π of the trace tokens to which the base gives less than UNLIKELY."""

        def flat(row: dict) -> np.ndarray:
            return np.concatenate([pi for kind in GROUPS[group] for pi in row["pi"][kind]])

        now = np.mean([*map(flat, self._of(arm))], axis=0)
        return now[flat(*self._of("base")) < UNLIKELY]

    # -------------------------------------------------------------- numbers in the text
    def score(self, arm: str, group: str) -> str:
        found = bootstrap(self._sum("right", arm, group))
        return "{} [{}, {}]".format(*map(number, found))

    def by_seed(self, group: str) -> str:
        """Of arms with several seeds, the score of each by itself."""
        found = []
        for arm in (arm for arm in self._arms if len(self._rows[arm]) > 1):
            scores = (number(self._sum("right", arm, group, [s]).mean()) for s in self._rows[arm])
            found.append(f"{name(arm)} {' and '.join(scores)}")
        return "; ".join(found) or "none has two"

    def seeds_move(self, group: str) -> str:
        """How far two seeds of an arm are apart, and of the difference of two arms."""
        two = [arm for arm in self._arms if len(self._rows[arm]) == 2]
        means = [[self._sum("right", a, group, [s]).mean() for s in self._rows[a]] for a in two]
        moves = [one - other for one, other in means]
        ends = [f(map(abs, moves)) for f in (min, max)] + [max(moves) - min(moves)]
        return "an arm by {} to {}, a difference by up to {}".format(*map(number, ends))

    def gap(self, arm: str, other: str, group: str) -> str:
        """`arm` minus `other`, over the seeds that both have; undecided if the interval holds 0."""
        if {arm, other} - self._rows.keys():
            return "not run"
        seeds = sorted(self._rows[arm].keys() & self._rows[other].keys())
        one, two = (self._sum("right", a, group, seeds) for a in (arm, other))
        found = bootstrap(one - two)
        text = "{} [{}, {}]".format(*(number(x, sign=True) for x in found))
        if len(seeds) == 1:
            text += ", one seed"
        else:
            pairs = [
                [self._sum("right", a, group, [s]).mean() for a in (arm, other)] for s in seeds
            ]
            text += f" (seeds {', '.join(number(one - two, sign=True) for one, two in pairs)})"
        return text + (", undecided" if found[1] <= 0 <= found[2] else "")

    def metric(self, arm: str, metric: str, start: int, end: int | None = None) -> str:
        """Its mean over some steps of the first seed's training."""
        curves = self._of(arm)[0]["curves"]
        return number(np.mean(curves[metric][start:end])) if metric in curves else "-"

    def tokens(self, arm: str, group: str) -> str:
        return f"{self._sum('tokens', arm, group).mean():.1f}"

    def go_on(self, arm: str, *seeds: int) -> str:
        """π of the token by which traces of four numbers go on after two steps."""
        return number(np.mean([row["go_on"] for row in self._of(arm, seeds)]))

    def meant(self, arm: str, *kinds: str) -> str:
        """Of the right responses (all kinds), how many add each number in its turn, and rightly."""
        right, tricks = (
            sum(sum(row["scores"][0][what][k]) for row in self._of(arm) for k in kinds or KINDS)
            for what in ("right", "rewarded_trick")
        )
        return f"{right - tricks} of {right}"

    def minutes(self, arm: str, *seeds: int) -> str:
        return number(np.mean([row["seconds"] for row in self._of(arm, seeds)]) / 60, 1)

    # -------------------------------------------------------------- tables
    def scores_table(self) -> str:
        rows = {
            f"{name(arm)}, {len(self._rows[arm])}": [self.score(arm, g) for g in WORDS]
            for arm in self._rows
        }
        return table("arm, seeds | " + " | ".join(WORDS.values()), rows)

    def gaps_table(self, *pairs: tuple[str, str]) -> str:
        rows = {}
        for a, b in pairs:
            rows[f"{name(a)} - {name(b)}"] = [self.gap(a, b, g) for g in ("trained", "new", "4x2")]
        return table("first - second | trained kinds | new kinds | of these, 4 of 2 digits", rows)

    def arms_table(self) -> str:
        """What went on in training, and what became of responses and of unlikely tokens."""
        rows = {}
        for arm in self._rows:
            cells = [f"{self.metric(arm, m, 0, 5)} to {self.metric(arm, m, -5)}"
                     for m in ("reward", "entropy")]  # fmt: skip
            cells += [self.minutes(arm), self.tokens(arm, "4x2"), self.go_on(arm)]
            cells += [number(self._pi(arm, group).mean()) for group in ("trained", "new")]
            rows[name(arm)] = ["-" if x == "- to -" else x for x in cells] + [self.meant(arm)]
        head = "arm | reward | entropy | minutes | tokens, 4 of 2 digits | π of going on | "
        return table(head + "π of unlikely tokens, trained | new | right ones that add up", rows)

    # -------------------------------------------------------------- picture
    def _draw(self, file: Path) -> None:
        plt.rcParams.update({"axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False})
        figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
        for axis, metric in zip(axes, ("reward", "length", "entropy")):
            for arm in (arm for arm in STYLES if arm in self._rows):
                values = smooth(self._of(arm)[0]["curves"][metric], 5)
                color, marker, line = STYLES[arm].split()
                style = dict(color=color, marker=marker, linestyle=line, markevery=4, markersize=4)
                style["label"] = name(arm).replace("`", "")
                axis.plot(range(1, len(values) + 1), values, **style)
            axis.set_title(f"{metric} of rollouts, seed 0 (mean of the last 5 steps)")
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
        for group, marker in (("trained", "o"), ("new", "x")):
            pi = [self._pi(arm, group).mean() for arm in self._rows]
            axes[3].plot(pi, range(len(pi)), "k" + marker, label=f"{group} kinds")
        axes[3].set_yticks(range(len(pi)), [name(arm).replace("`", "") for arm in self._rows])
        axes[3].set_title("π of trace tokens that the base found unlikely")
        axes[3].set_xlim(-0.03, 1.03)
        axes[3].legend()
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        figure.savefig(file, dpi=110, metadata={"Software": None})
        plt.close(figure)


def render(template: str, report: Report) -> str:
    """With the value of each {{expression}}."""
    names = {k: getattr(report, k) for k in dir(report) if not k.startswith("_")}
    return re.sub(r"{{(.+?)}}", lambda found: str(eval(found[1], names)), template)


def write_all() -> None:
    report = Report()
    template = (HERE / "README.template.md").read_text("utf-8")
    write(HERE / "README.md", render(template, report))
    report._draw(HERE / "curves.png")
