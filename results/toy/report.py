"""Tables, the numbers in the text and the pictures of results/, all from the files in data/.

study.py calls `write_all`. In results/README.template.md `{{...}}` is a Python expression over the
public functions of Report; results/README.md is what comes out, and so are the tables between
`<!-- study -->` and `<!-- end -->` in the project's README.

Intervals are 95 % intervals of a bootstrap that draws seeds and problems anew, of what has no
problems (lengths, entropies) seeds alone. They are paired: a difference of two arms is taken within
each seed and problem.
"""

import json
import math
import re
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np

from machinery.files import read_jsonl, write
from machinery.plots import draw_curves
from machinery.scores import pass_at_k

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = {"frequent": 0.5, "rare": 0.2}  # kinds of base models: GOALS
SOURCES = ("easy", "hard", "ood")
ARMS = (
    "base",
    "on_policy",
    "on_policy_noclip",
    "grpo",
    "mixed",
    "mixed_shaped",
    "luffy",
    "rl_sft",
    "sft",
    "sft_then_on_policy",
)
NAMES = {"base": "base model", "sft_then_on_policy": "sft, then on_policy"}
GAMMAS = {
    0.05: "luffy, γ 0.05",
    0.1: "luffy",
    0.2: "luffy, γ 0.2",
    0.3: "luffy, γ 0.3",
    0.5: "luffy, γ 0.5",
}
DRAWS = 4000
MAJOR = ("luffy","on_policy","sft","sft_then_on_policy")
def chosen(rows):
    best={}
    for r in rows:
        if r["split"]=="val":
            v=sum(sum(r["right"][s])/len(r["right"][s])/r["k"] for s in ("easy","medium","hard"))/3
            key=(r["kind"],r["arm"])
            if key not in best or v>best[key][0]+1.5/1024: best[key]=(v,r["choice"])
    return {k:c for k,(v,c) in best.items()}

STUDENT = {
    2: 12.71,
    3: 4.30,
    4: 3.18,
    5: 2.78,
    6: 2.57,
    7: 2.45,
    8: 2.36,
    9: 2.31,
    10: 2.26,
}  # t of 97.5 % for so many seeds
STYLES = {  # apart in grey, too: by dashes, by marker and by lightness
    "base": dict(color="#999999", linestyle=":", marker="x"),
    "on_policy": dict(color="#0072b2", linestyle="--", marker="v"),
    "on_policy_noclip": dict(color="#56b4e9", linestyle=":", marker="^"),
    "grpo": dict(color="#999999", linestyle="-.", marker="x"),
    "mixed": dict(color="#e69f00", linestyle="--", marker="s"),
    "mixed_shaped": dict(color="#777777", linestyle="-.", marker="D"),
    "luffy": dict(color="black", linestyle="-", marker="o"),
    "sft": dict(color="#e69f00", linestyle="-.", marker="s"),
    "sft_then_on_policy": dict(color="#777777", linestyle="--", marker="D"),
}


def name(arm: str) -> str:
    return NAMES.get(arm, arm)


@cache
def drawn(shape: tuple[int, int]) -> list[np.ndarray]:
    """How often each seed and each problem was drawn: (DRAWS, seeds), (DRAWS, problems)."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in shape]


def bootstrap(values: np.ndarray, low: float = -np.inf, high: float = np.inf) -> tuple:
    """(seeds, problems) -> the mean and its 95 % interval, within [low, high].

    A handful of seeds vary less among themselves than they should, and their quantiles are not
    normal: so each seed's distance from the mean is widened by sqrt(n / (n - 1)) and by Student's t
    over 1.96, which is 1.58 for five.
    """
    mean = values.mean()
    n = len(values)
    factor = STUDENT.get(n, 1.96) / 1.96 * math.sqrt(n / max(n - 1, 1))
    wider = values + (factor - 1) * (values.mean(1, keepdims=True) - mean)
    seeds, problems = drawn(values.shape)
    means = np.einsum("dp,dp->d", seeds @ wider, problems) / values.size
    ends = np.percentile(means, (2.5, 97.5))
    return float(mean), float(np.clip(ends[0], low, mean)), float(np.clip(ends[1], mean, high))


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """0.5 -> .50"""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text) if float(text) else text.strip("+-")[-digits - 1 :]


def with_interval(
    values: np.ndarray, digits: int = 2, sign: bool = False, bounds: tuple = ()
) -> str:
    value, low, high = (number(x, digits, sign) for x in bootstrap(values, *bounds))
    return f"{value} [{low}, {high}]"


def spread(values: np.ndarray, digits: int) -> str:
    """Mean and range."""
    low, value, high = (number(x, digits) for x in (values.min(), values.mean(), values.max()))
    return value + (f" ({low} to {high})" if low != high else "")


class Report:
    """data/ and what can be said about it. The public functions are the templates' vocabulary."""

    def __init__(self, data: Path = HERE / "data"):
        self._final, self._val = {}, defaultdict(dict)  # (kind, arm) -> seed -> the run's row
        self._scores, self._traces = defaultdict(dict), defaultdict(dict)
        for row in read_jsonl(data / "runs.jsonl"):
            if row["final"]:
                self._final.setdefault((row["kind"], row["arm"]), {})[row["seed"]] = row

        def is_final(row: dict) -> bool:
            run = self._final.get((row["kind"], row["arm"]), {}).get(row["seed"], {"choice": {}})
            return row["choice"] == run["choice"]

        for row in filter(is_final, read_jsonl(data / "traces.jsonl")):
            self._traces[row["kind"], row["arm"]][row["seed"]] = row
        for row in read_jsonl(data / "scores.jsonl"):
            if row["split"] == "val":
                self._val[row["kind"], row["arm"]][str(row["choice"]), row["step"]] = row
            elif is_final(row):
                how = row["step"], row["temperature"], row["k"]
                self._scores[row["kind"], row["arm"], *how][row["seed"]] = row
        self._teacher = json.loads((data / "teacher.json").read_text())

    def choices(self) -> dict[tuple[str, str], dict]:
        """What val chose, as study.py takes it."""
        found = {key: next(iter(runs.values())) for key, runs in self._final.items()}
        return {
            (kind, arm): row["choice"] | ({"steps": row["final"]} if arm == "sft" else {})
            for (kind, arm), row in found.items()
        }

    # -------------------------------------------------------------- arrays
    def _step(self, kind: str, arm: str) -> int:
        """Of the checkpoint that counts."""
        return 0 if arm == "base" else next(iter(self._final[kind, arm].values()))["final"]

    def _rows(
        self, kind: str, arm: str, step: int | None = None, temperature: float = 0.6, k: int = 8
    ) -> list[dict]:
        step = self._step(kind, arm) if step is None else step
        rows = self._scores[kind, arm, step, temperature, k]
        return [rows[seed] for seed in sorted(rows)]

    def _right(self, kind: str, arm: str, source: str = "all", **how) -> np.ndarray:
        """(seeds, problems): share of right responses.

        source all: the mean of the three; kind both: the seeds of both.
        """
        if kind == "both":
            return np.concatenate([self._right(k, arm, source, **how) for k in KINDS])
        if source == "all":
            return np.mean([self._right(kind, arm, s, **how) for s in SOURCES], axis=0)
        rows = self._rows(kind, arm, **how)
        return np.array([row["right"][source] for row in rows]) / how.get("k", 8)

    def _length(self, kind: str, arm: str, source: str) -> np.ndarray:
        return np.array([[row["length"][source]] for row in self._rows(kind, arm)])

    def _curve(self, kind: str, arm: str, metric: str) -> np.ndarray:
        """(seeds, points), a point for every WINDOW steps; NaN where nothing was measured"""
        runs = self._final[kind, arm]
        return np.array([runs[seed]["curves"][metric] for seed in sorted(runs)], float)

    def _at_forks(self, kind: str, arm: str, step: str, what: str) -> np.ndarray:
        rows = self._traces[kind, arm]
        return np.array([[rows[seed][step][what]] for seed in sorted(rows)])

    def _spent(self, kind: str, arm: str, what: str, step: int | None = None) -> np.ndarray:
        """(seeds,): seconds, or million tokens sampled or in updates, up to a checkpoint.

        With what the SFT took, where RL began with its checkpoint.
        """
        runs = self._final[kind, arm]
        step = step or self._step(kind, arm)
        spent = np.array([runs[seed][what][str(step)] for seed in sorted(runs)])
        spent = spent if what == "seconds" else spent / 1e6
        return spent + (self._spent(kind, "sft", what) if arm == "sft_then_on_policy" else 0)

    @staticmethod
    def _value(row: dict) -> float:
        """What choices are made by: the mean over easy and hard."""
        return np.mean([np.mean(row["right"][s]) / row["k"] for s in ("easy", "hard")])

    def _at_temperature(self, kind: str, arm: str, temperature: float, source: str) -> np.ndarray:
        """(seeds, problems), every fourth of the split"""
        if temperature == 0.6:
            return self._right(kind, arm, source)[:, ::4]
        return self._right(
            kind, arm, source, temperature=temperature, k=32 if temperature == 1 else 8
        )

    def _pass_at(self, kind: str, arm: str, k: int, source: str = "all") -> np.ndarray:
        """(seeds, problems): unbiased pass@k from 32 responses at temperature 1"""
        if source == "all":
            return np.mean([self._pass_at(kind, arm, k, s) for s in SOURCES], axis=0)
        right = np.rint(32 * self._right(kind, arm, source, temperature=1.0, k=32)).astype(int)
        return np.array([pass_at_k(32, c, k) for c in range(33)])[right]

    def _along_the_way(self, kind: str, arm: str) -> dict[int, tuple[float, np.ndarray]]:
        """step -> (seconds, rates) at each checkpoint"""
        steps = sorted({step for k, a, step, *_ in self._scores if (k, a) == (kind, arm)})
        return {
            step: (
                self._spent(kind, arm, "seconds", step).mean(),
                self._right(kind, arm, step=step),
            )
            for step in steps
        }

    def _equal_compute(self, kind: str) -> tuple[int, np.ndarray]:
        """The last checkpoint of SFT + RL that took no more than LUFFY, and its rates."""
        limit = self._spent(kind, "luffy", "seconds").mean()
        found = self._along_the_way(kind, "sft_then_on_policy")
        step = max(step for step, (seconds, _) in found.items() if seconds <= limit)
        return step, found[step][1]

    # -------------------------------------------------------------- text
    def score(self, kind: str, arm: str, source: str = "all") -> str:
        return with_interval(self._right(kind, arm, source), bounds=(0, 1))

    def gap(
        self, kind: str, arm: str, other: str, source: str = "all", temperature: float = 0.6
    ) -> str:
        """How much better `arm` is than `other`."""
        found = (
            self._right
            if temperature == 0.6
            else partial(self._at_temperature, temperature=temperature)
        )
        gaps = found(kind, arm, source=source) - found(kind, other, source=source)
        return with_interval(gaps, sign=True, bounds=(-1, 1))

    def loss(self, kind: str, arm: str) -> str:
        """On hard problems, from T = 0.2 to 1.4."""
        cold, hot = (self._at_temperature(kind, arm, t, "hard") for t in (0.2, 1.4))
        return with_interval(hot - cold, sign=True, bounds=(-1, 1))

    def val(self, kind: str, arm: str, **choice) -> str:
        """The score by which choices were made, of one choice."""
        [row] = [row for row in self._val[kind, arm].values() if row["choice"] == choice]
        return number(self._value(row), 3)

    def tried(self, kind: str, arm: str) -> str:
        return str(len(self._val[kind, arm]))

    def reward_max(self, kind: str, *arms: str) -> str:
        """The highest reward on hard problems, of any seed, at any point of the curves."""
        return number(max(np.nanmax(self._curve(kind, arm, "reward/hard")) for arm in arms), 3)

    def val_max(self, source: str, *arms: str) -> str:
        """The best avg@8 on val, over all kinds of bases, choices and these arms."""
        rows = [row for (_, arm), rows in self._val.items() if arm in arms for row in rows.values()]
        return number(max(np.mean(row["right"][source]) / row["k"] for row in rows), 3)

    def stuck(self, kind: str, arm: str) -> str:
        """How many seeds solve less than a twentieth of the hard problems in the end."""
        solved = self._right(kind, arm, "hard").mean(1)
        return f"{(solved < 0.05).sum()} of {len(solved)}"

    def at(self, kind: str, arm: str, metric: str, step: int, digits: int = 3) -> str:
        """A curve's point that ends with this step."""
        curve = self._curve(kind, arm, metric)
        point = step * curve.shape[1] // self._step(kind, arm) - 1
        return with_interval(curve[:, [point]], digits, bounds=(0,))

    def forks(self, kind: str, arm: str, step: str | int, what: str, digits: int = 2) -> str:
        bounds = () if what == "solution" else (0, 1)
        return with_interval(self._at_forks(kind, arm, str(step), what), digits, bounds=bounds)

    def pass_at(self, kind: str, arm: str, k: int, source: str = "all") -> str:
        return with_interval(self._pass_at(kind, arm, k, source), bounds=(0, 1))

    def at_temperature(self, kind: str, arm: str, temperature: float, source: str) -> str:
        return with_interval(self._at_temperature(kind, arm, temperature, source), bounds=(0, 1))

    def length(self, kind: str, arm: str, source: str = "hard") -> str:
        return with_interval(self._length(kind, arm, source), 0)

    def teacher(self, what: str = "tokens") -> str:
        return f"{self._teacher[what]:.0f}"

    def seconds(self, kind: str, arm: str, step: int | None = None) -> str:
        return spread(self._spent(kind, arm, "seconds", step), 0)

    def times(self, arm: str, other: str) -> str:
        """How many times the seconds, over both kinds."""
        total = [sum(self._spent(kind, a, "seconds").sum() for kind in KINDS) for a in (arm, other)]
        return f"{total[0] / total[1]:.1f}"

    def equal_step(self, kind: str) -> int:
        return self._equal_compute(kind)[0]

    def equal_compute(self, kind: str) -> str:
        """LUFFY minus SFT + RL, where that had no more compute."""
        kinds = KINDS if kind == "both" else (kind,)
        return with_interval(
            np.concatenate([self._right(k, "luffy") - self._equal_compute(k)[1] for k in kinds]),
            sign=True,
            bounds=(-1, 1),
        )

    def arms_table(self, kind: str) -> str:
        lines = ["| arm | learning rate | easy | hard | ood | tokens on hard |", "|---" * 6 + "|"]
        for arm in ARMS:
            cells = [self.score(kind, arm, source) for source in SOURCES]
            lines.append(
                f"| {self._code(arm)} | {self._choice(kind, arm)} | {' | '.join(cells)} | "
                f"{with_interval(self._length(kind, arm, 'hard'), 0)} |"
            )
        return "\n".join(lines)

    def gaps_table(self, kind: str) -> str:
        lines = ["| luffy minus | easy | hard | ood | all |", "|---" * 5 + "|"]
        return "\n".join(
            lines
            + [
                f"| {self._code(arm)} | "
                + " | ".join(self.gap(kind, "luffy", arm, s) for s in (*SOURCES, "all"))
                + " |"
                for arm in ARMS
                if arm != "luffy"
            ]
        )

    def budget_table(self, kind: str) -> str:
        """Mean over seeds, and the range."""
        lines = [
            "| arm | steps | response tokens sampled, million | in updates, million | "
            "seconds on one core |",
            "|---" * 5 + "|",
        ]
        for arm in ARMS[1:]:
            before = f"{self._step(kind, 'sft')} + " if arm == "sft_then_on_policy" else ""
            cells = [
                spread(self._spent(kind, arm, what), digits)
                for what, digits in (("sampled", 2), ("updated", 2), ("seconds", 0))
            ]
            lines.append(
                f"| {self._code(arm)} | {before}{self._step(kind, arm)} | {' | '.join(cells)} |"
            )
        return "\n".join(lines)

    def choices_table(self) -> str:
        """What was tried for each arm on val, seed 0; the best in bold."""
        lines = [
            "| arm | " + " | ".join(f"{kind} bases" for kind in KINDS) + " |",
            "|---" * (1 + len(KINDS)) + "|",
        ]
        for arm in ARMS[1:]:
            cells = []
            for kind in KINDS:
                final = next(iter(self._final[kind, arm].values()))
                tried = []
                rows = sorted(
                    self._val[kind, arm].values(),
                    key=lambda row: (
                        row["choice"]["lr"],
                        row["choice"].get("sft_coef", 0.1),
                        row["step"],
                    ),
                )
                for row in rows:
                    words = self._in_words(arm, row["choice"], row["step"])
                    text = f"{words}: {number(self._value(row), 3)}"
                    best = (row["choice"], row["step"]) == (final["choice"], final["final"])
                    tried.append(f"**{text}**" if best else text)
                cells.append("<br>".join(tried))
            lines.append(f"| {self._code(arm)} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def switches_table(self) -> str:
        """The fields in which the runs of an arm differ from luffy's; study.py has checked them."""
        lines = ["| arm | fields of its config that differ from luffy's |", "|---|---|"]
        for arm in ARMS[1:]:
            differ = {}
            for kind in KINDS:
                for row in self._final[kind, arm].values():
                    for field, value in row["differs"].items():
                        if field == "lr":  # the tables of scores have it
                            continue
                        differ.setdefault(field, []).append(value)
            text = ", ".join(
                f"`{field}` " + " or ".join(map(str, dict.fromkeys(values)))
                for field, values in differ.items()
            )
            lines.append(f"| {self._code(arm)} | {text or '-'} |")
        return "\n".join(lines)

    def gammas_table(self, kind: str) -> str:
        lines = ["| γ | easy | hard | ood | all | hard minus γ 0.1's |", "|---" * 6 + "|"]
        for gamma, arm in GAMMAS.items():
            cells = [self.score(kind, arm, source) for source in (*SOURCES, "all")]
            gap = self.gap(kind, arm, "luffy", "hard") if arm != "luffy" else "-"
            lines.append(f"| {gamma} | {' | '.join(cells)} | {gap} |")
        return "\n".join(lines)

    def bases_table(self) -> str:
        """How unlikely the decisive tokens are under the base models, on hard training problems."""
        lines = [
            "| bases | GOALS | π of a third step | π of the box after the last step | "
            "log-prob of a whole solution | trace tokens with π < 0.1 |",
            "|---" * 6 + "|",
        ]
        for kind, goals in KINDS.items():
            go_on = self._at_forks(kind, "luffy", "0", "go_on")
            rows = self._traces[kind, "luffy"]
            share = np.array([[rows[seed]["share_unlikely"]] for seed in sorted(rows)])
            lines.append(
                f"| {kind} | {goals} | {go_on.min():.0e} to {go_on.max():.0e} | "
                f"{self.forks(kind, 'luffy', 0, 'stop')} | "
                f"{self.forks(kind, 'luffy', 0, 'solution', 0)} | "
                f"{with_interval(share, bounds=(0, 1))} |"
            )
        return "\n".join(lines)

    def _code(self, arm: str) -> str:
        return name(arm) if arm == "base" else f"`{name(arm)}`"

    def _choice(self, kind: str, arm: str) -> str:
        if arm == "base":
            return "-"
        row = next(iter(self._final[kind, arm].values()))
        return self._in_words(arm, row["choice"], row["final"])

    def _in_words(self, arm: str, choice: dict, step: int) -> str:
        steps = f", {step} steps" if arm == "sft" else ""
        coef = f", coefficient {choice.get('sft_coef', 0.1):g}" if arm == "rl_sft" else ""
        return f"{choice['lr']:.0e}".replace("e-0", "e-") + steps + coef

    # -------------------------------------------------------------- pictures
    def _draw_all(self, directory: Path) -> None:
        for letter, draw in (
            ("a", self._draw_a),
            ("b", self._draw_b),
            ("c", self._draw_c),
            ("d", self._draw_d),
            ("e", self._draw_e),
            ("f", self._draw_f),
            ("g", self._draw_g),
            ("h", self._draw_h),
        ):
            figure = draw()
            figure.savefig(directory / f"{letter}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)

    def _draw_a(self):
        figure, axes = panels(1, 2, (9, 3.2))
        for axis, kind in zip(axes[0], KINDS):
            self._curves(
                axis, kind, ("luffy", "on_policy", "on_policy_noclip", "grpo"), "reward/hard"
            )
            axis.set_title(f"reward on hard problems, {kind} bases")
            axis.set_ylim(-0.03, 1.03)
        axes[0, 0].legend(loc="center right")
        return figure

    def _draw_b(self):
        figure, axes = panels(2, 4, (13, 5.6))
        arms = ("luffy", "mixed_shaped", "mixed")
        for row, kind in zip(axes, KINDS):
            self._curves(row[0], kind, arms, "reward/hard")
            self._curves(row[1], kind, arms, "entropy")
            self._curves(row[3], kind, arms, "trace_unlikely")
            for arm in arms:
                steps = sorted(int(s) for s in self._traces[kind, arm][0] if s.isdigit())
                points = np.array(
                    [bootstrap(self._at_forks(kind, arm, str(s), "unlikely"), 0, 1) for s in steps]
                )
                row[2].errorbar(
                    steps,
                    points[:, 0],
                    abs(points[:, 1:].T - points[:, 0]),
                    capsize=2,
                    markersize=4,
                    label=arm,
                    **STYLES[arm],
                )
            row[0].set_ylabel(f"{kind} bases")
            row[0].set_ylim(-0.03, 1.03)
            row[1].set_ylim(0, 0.07)
            row[2].set_ylim(-0.03, 1.03)
            row[3].set_ylim(0, 0.09)
            row[2].set_xlabel("step")
        for axis, title in zip(
            axes[0],
            (
                "reward on hard problems",
                "entropy of rollouts (nats)",
                "π of the trace tokens\nthat began below 0.1",
                "share of all trace tokens\nwith π < 0.1",
            ),
        ):
            axis.set_title(title)
        axes[0, 0].legend(loc="lower right")
        return figure

    def _draw_c(self):
        figure, axes = panels(1, 3, (11, 2.6), sharey=True)
        self._dots(axes[0], ("on_policy", "on_policy_noclip", "mixed_shaped", "luffy"))
        return figure

    def _draw_d(self):
        figure, axes = panels(1, 3, (11, 4.6), sharey=True)
        self._dots(axes[0], ARMS)
        return figure

    def _draw_e(self):
        figure, axes = panels(2, 3, (11, 5.6))
        arms = ("base", "on_policy", "sft", "luffy", "sft_then_on_policy")
        for row, kind in zip(axes, KINDS):
            for arm in arms:
                style = {**STYLES[arm], "markersize": 4, "label": name(arm)}
                at_k = [self._pass_at(kind, arm, k).mean() for k in range(1, 33)]
                row[0].plot(range(1, len(at_k) + 1), at_k, markevery=[0, 1, 3, 7, 15, 31], **style)
                for axis, source in ((row[1], "easy"), (row[2], "hard")):
                    points = [
                        bootstrap(self._at_temperature(kind, arm, t, source), 0, 1)
                        for t in (0.2, 0.6, 1.0, 1.4)
                    ]
                    value, low, high = np.array(points).T
                    axis.errorbar(
                        (0.2, 0.6, 1.0, 1.4), value, (value - low, high - value), capsize=2, **style
                    )
            row[0].set_xscale("log", base=2)
            row[0].xaxis.set_major_formatter("{x:g}")
            row[0].set_ylabel(f"{kind} bases")
            for axis in row:
                axis.set_ylim(-0.03, 1.03)
        for axis, title in zip(
            axes[0], ("pass@k at T = 1, all problems", "share right, easy", "share right, hard")
        ):
            axis.set_title(title)
        for axis, label in zip(axes[1], ("k", "temperature", "temperature")):
            axis.set_xlabel(label)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return figure

    def _draw_f(self):
        figure, axes = panels(1, 2, (9, 3.6), sharey=True)
        arms = ARMS[::-1]
        for axis, kind in zip(axes[0], KINDS):
            for y, arm in enumerate(arms):
                lengths = self._length(kind, arm, "hard")
                self._dot(axis, lengths, y, "o", True)
            for x, style, label in (
                (self._teacher["tokens"], "-", "teacher"),
                (self._teacher["plain"], ":", "without detours"),
            ):
                axis.axvline(x, color="black", linestyle=style, linewidth=1, label=label)
            axis.set_yticks(range(len(arms)), [name(arm) for arm in arms])
            axis.set_title(f"tokens on hard problems, {kind} bases")
        axes[0, 0].legend(loc="lower left")
        return figure

    def _draw_g(self):
        figure, axes = panels(1, 3, (11, 2.8), sharey=True)
        self._dots(axes[0], tuple(GAMMAS.values()), [f"γ {gamma}" for gamma in GAMMAS], ("rare",))
        return figure

    def _draw_h(self):
        figure, axes = panels(1, 2, (9, 3.4), sharey=True)
        for axis, kind in zip(axes[0], KINDS):
            for arm in ("luffy", "sft_then_on_policy"):
                x, value, low, high = np.array(
                    [
                        (seconds, *bootstrap(rates, 0, 1))
                        for seconds, rates in self._along_the_way(kind, arm).values()
                    ]
                ).T
                axis.errorbar(
                    x,
                    value,
                    (value - low, high - value),
                    capsize=2,
                    markersize=4,
                    label=name(arm),
                    **STYLES[arm],
                )
            axis.set_title(f"mean score on test, {kind} bases")
            axis.set_xlabel("seconds on one core (SFT's included)")
            axis.set_ylim(-0.03, 1.03)
        axes[0, 0].legend(loc="lower right")
        return figure

    def _curves(self, axis, kind: str, arms: tuple, metric: str) -> None:
        """Mean over seeds, and each seed as a thin line."""
        for arm in arms:
            found = self._curve(kind, arm, metric)
            width = self._step(kind, arm) // found.shape[1]
            steps = width * np.arange(1, found.shape[1] + 1)
            axis.plot(
                steps, found.mean(0), markevery=8, markersize=4, label=name(arm), **STYLES[arm]
            )
            axis.plot(steps, found.T, alpha=0.35, linewidth=0.7, color=STYLES[arm]["color"])
        axis.set_xlabel("step")

    def _dots(self, axes, arms: tuple, labels: list | None = None, kinds=tuple(KINDS)) -> None:
        """Easy, hard, ood: a dot and its interval for each arm and kind, small ones for seeds."""
        marks = {"frequent": ("o", True, 0.17), "rare": ("s", False, -0.17)}
        for axis, source in zip(axes, SOURCES):
            for y, arm in enumerate(arms[::-1]):
                for kind in kinds:
                    marker, filled, shift = marks[kind]
                    self._dot(
                        axis,
                        self._right(kind, arm, source),
                        y + shift * (len(kinds) > 1),
                        marker,
                        filled,
                    )
            axis.set_title(f"{source}, share right")
            axis.set_xlim(-0.03, 1.03)
            axis.set_yticks(range(len(arms)), (labels or [name(arm) for arm in arms])[::-1])
        for kind in kinds:
            marker, filled, _ = marks[kind]
            axes[0].plot(
                [],
                [],
                marker=marker,
                color="black",
                linestyle="",
                label=f"{kind} bases",
                markerfacecolor="black" if filled else "white",
            )
        axes[0].figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)

    @staticmethod
    def _dot(axis, values: np.ndarray, y: float, marker: str, filled: bool) -> None:
        value, low, high = bootstrap(values, 0, 1 if values.max() <= 1 else np.inf)
        axis.plot(values.mean(1), [y] * len(values), "|", color="#888888", markersize=6)
        axis.errorbar(
            value,
            y,
            xerr=[[value - low], [high - value]],
            color="black",
            capsize=2,
            marker=marker,
            markersize=5,
            linewidth=1,
            markerfacecolor="black" if filled else "white",
        )


def panels(rows: int, columns: int, size: tuple, **options):
    plt.rcParams.update(
        {
            "axes.titlesize": 9,
            "axes.labelsize": 9,
            "legend.fontsize": 8,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.frameon": False,
        }
    )
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def render(template: str, report: Report) -> str:
    """With the value of each {{expression}}."""
    names = {k: getattr(report, k) for k in dir(report) if not k.startswith("_")}
    return re.sub(r"{{(.+?)}}", lambda found: str(eval(found[1], names)), template)


def texts(report: Report) -> dict[Path, str]:
    """What the two documents should say."""
    template = (ROOT / "results/README.template.md").read_text()
    readme = (ROOT / "README.md").read_text()
    before, table = readme.split("<!-- study -->\n")
    table, after = table.split("<!-- end -->")
    table = f"\n{report.arms_table('frequent')}\n"
    return {
        ROOT / "results/README.md": render(template, report),
        ROOT / "README.md": f"{before}<!-- study -->\n{table}<!-- end -->{after}",
    }


def write_all() -> None:
    report = Report()
    for file, text in texts(report).items():
        write(file, text)
    report._draw_all(HERE)
    draw_curves(HERE)  # of the metrics.jsonl beside it
