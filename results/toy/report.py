"""Tables, the numbers in the text and the pictures of results/, all from the files in data/.

study.py calls `write_all`. In results/README.template.md `{{...}}` is a Python expression over
what is here and public in Report. Its parts become results/README.md, arms.md, and what stands
between `<!-- study -->` and `<!-- end -->` in the project's README. Data may be partial: what is
missing is "not run yet". No verdict is typed by hand: `verdict` reads them off intervals.

Differences of two arms are taken within each seed and problem. Over `both` kinds of base models a
seed counts once, with the mean of its two.
"""

import json
import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

from machinery.files import read_jsonl, write
from machinery.plots import draw_curves
from machinery.scores import pass_at_k

from intervals import ENOUGH, NOT_RUN, align, estimate, interval, number, stack  # isort: skip
from intervals import seeds_in_words, student, verdict  # isort: skip

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PART = "<!-- .* -->\n"  # begins a part of the template
KINDS = {"frequent": 0.5, "rare": 0.2}  # kinds of base models: GOALS
RATES = (3e-4, 1e-4, 1e-3, 3e-5)  # the toy's recipe has the first one
TUNED = "frequent"  # the kind on which settings are chosen, for both
SOURCES = ("easy", "medium", "hard", "ood")
MEAN = SOURCES[:3]  # what is trained on, and what settings are chosen by
# fmt: off
W = {"luffy": "γπ/(π+γ)²", "rl_plus": "4π√(1-π)/(3π_old+1)", "w_none": "π", "w_log": "1",
     "w_trsft": "min(1, π/γ)", "w_phi": "π(1-π)"}  # arm -> w of a trace token
RIVALS = ("hpt", "chord_phi", "chord_mu", "rl_plus", "srft", "prefix_rft", "trapo", "relift", "opd")
STAGED = ("sft_then_on_policy", "rl_2604")  # SFT, then RL
MAJOR = ("luffy", "mixed_shaped", "mixed", "on_policy", "grpo", "rl_sft", "sft", "sft_2604",
         *STAGED, *RIVALS, *list(W)[2:])  # five seeds; for the others three are planned
ARMS = ("base", "on_policy", "on_policy_noclip", "on_policy_shaped", "grpo", "mixed",
        "mixed_shaped", "luffy", "rl_sft", "sft", "sft_then_on_policy", "sft_2604", "rl_2604",
        *RIVALS[:3], "hpt_2", *RIVALS[3:5], "srft_plus", *RIVALS[5:], "uft", *list(W)[2:],
        "dft", "trsft", "sft_shaped", "dapo", "dapo_refill", "cispo", "gspo", "gmpo",
        "reinforce_pp", "orz", "prime", "exgrpo")
COMPARED = tuple(arm for arm in ARMS if arm in MAJOR and not arm.startswith("w_"))
SHORT = ("base", "on_policy", "grpo", "mixed", "mixed_shaped", "luffy", "rl_sft", "sft",
         "sft_2604", *STAGED)
EXPLORED = ("base", "on_policy", "sft", "luffy", "sft_then_on_policy")  # more temperatures
# arm -> its first stage, or teacher
FIRST = {"sft_then_on_policy": "sft", "rl_2604": "sft_2604", "opd": "sft"}
NAMES = {"base": "base model", "sft_then_on_policy": "sft, then on_policy",
         "rl_2604": "sft_2604, then rl_2604"}
STYLES = {  # apart in grey, too
    "base": dict(color="#999999", linestyle=":", marker="x"),
    "on_policy": dict(color="#0072b2", linestyle="--", marker="v"),
    "mixed": dict(color="#e69f00", linestyle="-.", marker="s"),
    "luffy": dict(color="black", linestyle="-", marker="o"),
    "sft": dict(color="#d55e00", linestyle=":", marker="X"),
    "sft_then_on_policy": dict(color="#777777", linestyle="--", marker="D"),
    "rl_2604": dict(color="#777777", linestyle=":", marker="^"),
    "hpt": dict(color="#56b4e9", linestyle="-", marker="v"),
    "srft": dict(color="#cc79a7", linestyle="-.", marker="P"),
}
# fmt: on
TOO_LONG = "longer at its first checkpoint"  # than SLACK allows
VERDICT = re.compile(f"undecided|reproduced|the opposite|yes|no, the reverse|{NOT_RUN}|{TOO_LONG}")
TIE = 2.25 / 1536  # on val: two responses more or less are no difference
SLACK = 1.1  # equal seconds: at most so many times LUFFY's


def chosen(rows: list[dict]) -> dict[str, dict]:
    """arm -> the best choice, by rows of scores.jsonl: TUNED, val, seed 0, not ood.

    What is within TIE of the best is a tie, which goes to the earliest row.
    """
    best, found = defaultdict(float), {}
    tried = [row for row in rows if (row["split"], row["seed"], row["kind"]) == ("val", 0, TUNED)]
    for row in tried:
        best[row["arm"]] = max(best[row["arm"]], val_score(row))
    for row in tried:
        if val_score(row) > best[row["arm"]] - TIE:
            found.setdefault(row["arm"], row["choice"])
    return found


def of(row: dict) -> tuple[str, str]:
    return row["kind"], row["arm"]


def val_score(row: dict) -> float:
    return float(np.mean([np.mean(row["right"][s]) / row["k"] for s in MEAN]))


def name(arm: str) -> str:
    return NAMES.get(arm, arm)


def code(arm: str) -> str:
    return name(arm) if arm == "base" else f"`{name(arm)}`"


def in_words(choice: dict) -> str:
    rate = f"{choice['lr']:.1e}".replace(".0e", "e").replace("e-0", "e-") if choice else "-"
    return ", ".join([rate, *(f"{k} {v:g}" for k, v in choice.items() if k != "lr")])


def table(head: str, lines: list[list[str]]) -> str:
    rows = [head.split(" | "), ["---"] * (head.count(" | ") + 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Report:
    """data/ in words. What is public is the template's vocabulary; `what`: see _values."""

    def __init__(
        self,
        data: Path = HERE / "data",
        choices: dict | None = None,
        seeds: Collection[int] = range(99),
    ):
        self._data = data
        runs, scores = (read_jsonl(data / f"{n}.jsonl") for n in ("runs", "scores"))
        runs, scores = ([row for row in rows if row["seed"] in seeds] for rows in (runs, scores))
        self._choice = chosen(scores) | (choices or {})
        for row in runs + scores:  # what val did not choose for
            self._choice.setdefault(row["arm"], row["choice"])
        self._runs, self._scores = defaultdict(dict), defaultdict(dict)  # ... -> seed -> row
        self._tried = defaultdict(list)  # arm -> (choice, its score on val)
        self._failed = Counter()
        self.claims, self.holding = 1, "none"  # in the template; of them with the correction
        self.changed = "no"  # verdicts, without the seed on which settings were chosen
        for row in runs:
            is_chosen = row["choice"] == self._choice[row["arm"]]
            if "failed" in row:
                self._failed[of(row)] += is_chosen
                if row["seed"] == 0 and row["kind"] == TUNED:
                    self._tried[row["arm"]].append((row["choice"], None))
            elif is_chosen:
                self._runs[of(row)][row["seed"]] = row
        for row in scores:
            if row["split"] == "val" and row["seed"] == 0 and row["kind"] == TUNED:
                self._tried[row["arm"]].append((row["choice"], val_score(row)))
            elif row["split"] == "test" and row["choice"] == self._choice[row["arm"]]:
                self._scores[*of(row), row["step"], row["temperature"]][row["seed"]] = row
        file = data / "teacher.json"
        self._teacher = json.loads(file.read_text()) if file.exists() else {}

    # -------------------------------------------------------------- quantities
    def _values(self, kind: str, arm: str, what: str) -> dict[int, np.ndarray]:
        """Seed -> a number for each problem, or one in all. Empty if it was not run.

        mean, easy, ...          share of right responses at the end; mean: of the sources in MEAN
        hard@100, mean@equal     at a checkpoint; at the last one within LUFFY's seconds
        hard T1.4, pass8 hard T1.4  at a temperature; pass@8, of T = 1 if none is named
        tokens hard              mean length of responses
        reward/medium@1-50       a curve's mean over these steps
        seconds, sampled, updated  what the run took, its first stage included
        X - Y                    one minus the other
        """
        if kind == "both":
            each = [self._values(k, arm, what) for k in KINDS]
            seeds = set.intersection(*map(set, each))
            return {seed: np.mean(align(*(some[seed] for some in each)), 0) for seed in seeds}
        if " - " in what:
            one, two = (self._values(kind, arm, part) for part in what.split(" - "))
            return {s: np.subtract(*align(one[s], two[s])) for s in one.keys() & two.keys()}
        if found := re.fullmatch(rf"({'|'.join(SOURCES)}|mean)(?:@(\w+))?(?: T([\d.]+))?", what):
            source, at, temperature = found.groups()
            step = self.equal_step(kind, arm) if at == "equal" else int(at) if at else None
            return self._rates(kind, arm, source, step, float(temperature or 0.6))
        if found := re.fullmatch(r"pass(\d+) (\w+)(?: T([\d.]+))?", what):
            return self._rates(kind, arm, found[2], None, float(found[3] or 1), int(found[1]))
        if found := re.fullmatch(r"tokens (\w+)", what):
            rows = self._scores[kind, arm, self._last(kind, arm), 0.6].items()
            names = MEAN if found[1] == "mean" else (found[1],)
            return {s: np.array([np.mean([row["length"][n] for n in names])]) for s, row in rows}
        if found := re.fullmatch(r"(.+)@(\d+)-(\d+)", what):
            points = {}
            for seed, row in self._runs[kind, arm].items():
                curve = np.array(row["curves"].get(found[1]) or [np.nan], float)
                ends = row["steps"] / len(curve) * np.arange(1, len(curve) + 1)
                inside = curve[(ends >= int(found[2])) & (ends <= int(found[3]))]
                if np.isfinite(inside).any():
                    points[seed] = np.array([np.nanmean(inside)])
            return points
        return self._spent(kind, arm, what)

    def _last(self, kind: str, arm: str) -> int:
        """The step of the checkpoint that counts."""
        return next((row["steps"] for row in self._runs[kind, arm].values()), 0)

    def _rates(self, kind, arm, source, step, temperature, k=1) -> dict[int, np.ndarray]:
        """pass@k of each problem; k = 1: the share of right responses"""
        step = self._last(kind, arm) if step is None else step
        found = {}
        for seed, row in self._scores[kind, arm, step, temperature].items():
            if k <= row["k"]:
                rate = np.array([pass_at_k(row["k"], c, k) for c in range(row["k"] + 1)])
                names = MEAN if source == "mean" else (source,)
                found[seed] = np.mean([rate[row["right"][n]] for n in names], 0)
        return found

    def _spent(self, kind, arm, what, step=None) -> dict[int, np.ndarray]:
        """Seconds, or million tokens, up to a checkpoint; with those of the first stage."""
        step, unit = str(step or self._last(kind, arm)), 1 if what == "seconds" else 1e6
        own = {s: row[what].get(step) for s, row in self._runs[kind, arm].items()}
        own = {s: np.array([value / unit]) for s, value in own.items() if value is not None}
        if arm in FIRST:
            before = self._spent(kind, FIRST[arm], what)
            own = {s: own[s] + before[s] for s in own.keys() & before.keys()}
        return own

    def _gaps(self, kind: str, arm: str, other: str, what: str) -> np.ndarray | None:
        """arm minus other, (seeds, problems), of the seeds that both have"""
        one, two = (self._values(kind, a, what) for a in (arm, other))
        return stack({s: np.subtract(*align(one[s], two[s])) for s in one.keys() & two.keys()})

    def _checkpoints(self, kind: str, arm: str) -> dict[int, np.ndarray]:
        """Step -> seconds until then, of each seed."""
        steps = sorted({step for *key, step, _ in self._scores if key == [kind, arm] and step > 0})
        took = {step: stack(self._spent(kind, arm, "seconds", step)) for step in steps}
        return {step: seconds for step, seconds in took.items() if seconds is not None}

    def equal_step(self, kind: str, arm: str) -> int:
        """The last checkpoint that took at most SLACK times LUFFY's seconds; -1: none did."""
        limit = SLACK * np.mean(list(self._spent(kind, "luffy", "seconds").values()) or np.nan)
        took = self._checkpoints(kind, arm).items()
        return max((step for step, seconds in took if seconds.mean() <= limit), default=-1)

    # -------------------------------------------------------------- text
    def score(self, kind: str, arm: str, what: str = "mean", digits: int = 2) -> str:
        bounds = (0, 1) if is_share(what) else (0,)
        return interval(stack(self._values(kind, arm, what)), digits, bounds=bounds)

    def gap(self, kind, arm, other, what="mean", digits=2) -> str:
        """How much more `arm` has than `other`; other "": `what` is a difference itself."""
        gaps = self._gaps(kind, arm, other, what) if other else stack(self._values(kind, arm, what))
        if gaps is None:
            kinds = KINDS if kind == "both" else (kind,)
            run = all(self._runs[k, a] for k in kinds for a in (arm, "luffy"))
            long = any(self.equal_step(k, arm) < 0 for k in kinds)
            return TOO_LONG if "@equal" in what and run and long else NOT_RUN
        few = f" ({seeds_in_words(len(gaps))})" if ENOUGH <= len(gaps) < self.seeds() else ""
        ends = what.count(" - ") + 1
        return interval(gaps, digits, True, (-ends, ends) if is_share(what) else ()) + few

    def claim(self, kind, arm, other, what="mean", margin=0.0, digits=2) -> str:
        """Two cells: how much more `arm` has, and whether the claim holds that it has more."""
        gaps, text = self._gaps(kind, arm, other, what), self.gap(kind, arm, other, what, digits)
        late = "undecided" if text == TOO_LONG else ""
        return f"{text} | {late or verdict(gaps, margin, self.claims)}"

    def ask(self, kind, arm, other, what="mean", digits=2) -> str:
        """The same as an answer."""
        gaps, text = self._gaps(kind, arm, other, what), self.gap(kind, arm, other, what, digits)
        found = verdict(gaps, 0, self.claims, ("yes", "no, the reverse"))
        return text if gaps is None else f"{found}, {text}"

    def best(self, kind: str, *arms: str, what: str = "mean") -> str:
        """The arm that is above each other one together, if there is one; else who is not it."""
        found = {a: self._values(kind, a, what) for a in arms or MAJOR}
        found = {a: values for a, values in found.items() if len(values) >= ENOUGH}
        seeds = set.intersection(*map(set, found.values())) if found else set()
        if len(found) < 2 or len(seeds) < ENOUGH:
            return NOT_RUN
        means = {a: np.mean([values[s] for s in seeds]) for a, values in found.items()}
        top = max(means, key=lambda arm: means[arm])
        m = len(means) - 1
        gaps = {arm: self._gaps(kind, top, arm, what) for arm in means if arm != top}
        below = [arm for arm, x in gaps.items() if x is not None and estimate(x, m=m)[1] > 0]
        text = f"{code(top)} has the highest mean of {m + 1}, {number(means[top])}"
        if len(below) == m:
            return f"{text}, above each of the {m} others"
        listed = ", ".join(map(code, sorted(below, key=lambda arm: -means[arm])))
        told = f"; shown to be below it, corrected for {m} comparisons: {listed or 'none'}"
        return f"{text}{told}; not told apart from it: the other {m - len(below)}"

    def stuck(self, *arms: str) -> str:
        """How many runs end below a twentieth on hard problems."""
        ends = [
            [v.mean() for k in KINDS for v in self._values(k, a, "hard").values()] for a in arms
        ]
        stuck = [f"{sum(end < 0.05 for end in some)} of {len(some)}" for some in ends]
        return ", ".join(f"{code(a)} {n if e else NOT_RUN}" for a, n, e in zip(arms, stuck, ends))

    def choice(self, arm: str) -> str:
        return in_words(self._choice[arm]) if arm in self._choice else NOT_RUN

    def rate(self, arm: str) -> str:
        return in_words({"lr": self._choice[arm]["lr"]}) if arm in self._choice else NOT_RUN

    def edges(self) -> str:
        """Arms whose choice is the lowest or highest of what was tried, and of what."""
        found = []
        for arm in ARMS[1:]:
            tried = [choice for choice, _ in self._tried[arm]]
            for key, value in self._choice.get(arm, {}).items():
                values = {choice[key] for choice in tried if key in choice}
                if len(values) > 1 and value in (min(values), max(values)):
                    found.append(f"{code(arm)} ({key} {value:g})".replace("e-0", "e-"))
        chose = sum(len(self._tried[arm]) > 1 for arm in ARMS)
        return f"Of {chose} arms these chose an end of their grid: {', '.join(found) or 'none'}."

    def seeds(self) -> int:
        """As many as each arm of README's table has; where there are fewer, it is said."""
        return min(len(self._values(kind, arm, "mean")) for kind in KINDS for arm in SHORT)

    def longer(self, m: int) -> str:
        """How many times: an interval that holds with m - 1 others, for these seeds."""
        n = max(self.seeds(), 2)
        return number(student(n, 1 - 0.05 / m) / student(n, 0.95), 1)

    def spread(self, arm: str, what: str = "mean") -> str:
        """The standard deviation of its seeds."""
        found = stack(self._values("both", arm, what))
        return NOT_RUN if found is None or len(found) < 2 else number(found.mean(1).std(ddof=1))

    def one_seed(self, rate: float = 0) -> "Report":
        """Seed 0 alone; with a rate: what arms have at it, and nothing else of their own."""
        choices = {arm: {"lr": rate} for arm in ARMS[1:] if rate}
        return Report(self._data, choices, {0})

    def other_seeds(self) -> "Report":
        """Without the seed on which settings were chosen."""
        other = Report(self._data, self._choice, range(1, 99))
        other.claims = self.claims
        return other

    def not_run(self) -> str:
        """Arms that have no numbers, in a sentence."""
        lack = [code(a) for a in ARMS if not all(self._values(kind, a, "mean") for kind in KINDS)]
        return f"**Not run yet, on one or both kinds:** {', '.join(lack)}." if lack else ""

    def teacher(self, what: str = "tokens") -> str:
        return f"{self._teacher[what]:.0f}" if what in self._teacher else NOT_RUN

    # -------------------------------------------------------------- tables
    def arms_table(self, *kinds: str) -> str:
        """In a cell, a line for each kind."""
        head = "arm | chosen | easy | medium | hard | mean | ood | tokens | seconds | seeds"
        lines = []
        for arm in self._begun():
            rows = [self._arm_cells(kind, arm) for kind in kinds]
            lines.append([code(arm), *("<br>".join(cells) for cells in zip(*rows))])
        return table(head, lines)

    def _begun(self) -> list[str]:
        return [a for a in ARMS if any(self._values(kind, a, "mean") for kind in KINDS)]

    def _arm_cells(self, kind: str, arm: str) -> list[str]:
        seeds, failed = len(self._values(kind, arm, "mean")), self._failed[kind, arm]
        count = f"{seeds}, {failed} failed" if failed else str(seeds)
        if not seeds:
            return [NOT_RUN, *["-"] * 7, count]
        means = [self._mean(kind, arm, what) for what in ("tokens mean", "seconds")]
        return [in_words(self._choice[arm]), *self._five(kind, arm), *means, count]

    def _five(self, kind: str, arm: str) -> list[str]:
        return [self.score(kind, arm, what) for what in (*MEAN, "mean", "ood")]

    def _mean(self, kind: str, arm: str, what: str, digits: int = 0) -> str:
        values = stack(self._values(kind, arm, what))
        return "-" if values is None else number(values.mean(), digits)

    def _minus_luffy(self, arm: str, what: str = "mean") -> list[str]:
        kinds = (*KINDS, "both")
        return ["-"] * 3 if arm == "luffy" else [self.gap(k, arm, "luffy", what) for k in kinds]

    def short_table(self) -> str:
        lines = [[code(a), *self._five("both", a), self._mean("both", a, "seconds")] for a in SHORT]
        return table("arm | easy | medium | hard | mean | ood | seconds", lines)

    def w_table(self) -> str:
        head = "arm | w | easy | medium | hard | mean | ood | mean, minus luffy's"
        lines = [
            [code(a), w, *self._five("both", a), self._minus_luffy(a)[2]] for a, w in W.items()
        ]
        return table(head, lines)

    def rates_table(self, *arms: str) -> str:
        """Arms at the same learning rates: val, seed 0 of TUNED."""
        rates = sorted(RATES)
        lines = [[code(a), *(self._on_val(a, {"lr": rate}) for rate in rates)] for a in arms]
        return table(" | ".join(["arm", *(in_words({"lr": rate}) for rate in rates)]), lines)

    def _on_val(self, arm: str, choice: dict) -> str:
        values = (value for tried, value in self._tried[arm] if tried == choice)
        return next(("failed" if v is None else number(v, 3) for v in values), NOT_RUN)

    def steps_table(self) -> str:
        """Equal steps: each arm at its end, minus luffy."""
        head = "arm | million sampled | in updates | minus luffy, `frequent` | `rare` | both"
        lines = []
        for arm in COMPARED:
            spent = [self._mean("both", arm, what, 2) for what in ("sampled", "updated")]
            lines.append([code(arm), *spent, *self._minus_luffy(arm)])
        return table(head, lines)

    def seconds_table(self) -> str:
        """Equal seconds: arms that LUFFY's seconds cut short, minus luffy."""
        head = "arm | seconds in all, by kind | at step | minus luffy, `frequent` | `rare` | both"
        lines = []
        for arm in COMPARED:
            took = ", ".join(self._mean(kind, arm, "seconds") for kind in KINDS)
            steps = [self.equal_step(kind, arm) for kind in KINDS]
            if "-" in took or steps == [self._last(kind, arm) for kind in KINDS]:
                continue  # not run, or as in steps_table
            at = ", ".join(str(step) if step > 0 else "-" for step in steps)
            lines.append([code(arm), took, at, *self._minus_luffy(arm, "mean@equal")])
        return table(head, lines) if lines else "No arm was cut short."

    def choices_table(self) -> str:
        """What was tried for each arm on val, seed 0, the chosen in bold; its fields of Config."""
        head = "arm | fields that differ from luffy's | tried"
        lines = []
        for arm in filter(self._tried.get, ARMS):
            differs, tried = {}, []
            for choice, _ in self._tried[arm]:
                text = f"{in_words(choice)}: {self._on_val(arm, choice)}"
                tried.append(f"**{text}**" if choice == self._choice[arm] else text)
            for row in (row for kind in KINDS for row in self._runs[kind, arm].values()):
                differs |= {k: v for k, v in row["differs"].items() if k not in row["choice"]}
            fields = ", ".join(f"`{k}` {v}" for k, v in differs.items()) or "-"
            lines.append([code(arm), fields, "<br>".join(tried)])
        return table(head, lines)

    # -------------------------------------------------------------- pictures
    def _draw_all(self, directory: Path) -> None:
        for letter in "abcde":
            figure = getattr(self, f"_draw_{letter}")()
            figure.savefig(directory / f"{letter}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)

    def _draw_a(self):
        """Dynamics: the mean over seeds, and each seed as a thin line."""
        titles = {f"reward/{source}": f"reward, {source}" for source in MEAN}
        titles |= {"entropy": "entropy (nats), all", "length": "tokens of a response, all"}
        figure, axes = panels(2, 5, (14, 5.4), sharex=True, sharey="col")
        for row, kind in zip(axes, KINDS):
            row[0].set_ylabel(f"{kind} bases")
            for axis, (metric, title) in zip(row, titles.items()):
                for arm in ("on_policy", "mixed", "luffy"):
                    rows = [r for r in self._runs[kind, arm].values() if r["curves"].get(metric)]
                    found = np.array([row["curves"][metric] for row in rows] or [[None]], float)
                    each = (rows[0]["steps"] if rows else 0) / found.shape[1]
                    steps = each * np.arange(1, found.shape[1] + 1)
                    style = {**STYLES[arm], "label": name(arm), "markersize": 4, "markevery": 8}
                    axis.plot(steps, found.mean(0), **style)
                    axis.plot(steps, found.T, alpha=0.35, linewidth=0.7, color=style["color"])
                axis.set_title(title)
                axis.set_xlabel("step")
                if metric.startswith("reward"):
                    axis.set_ylim(-0.03, 1.03)
        return with_legend(figure, axes[0, 0])

    def _draw_b(self):
        """Which w(π)."""
        figure, axes = panels(1, 4, (13, 3), sharey=True)
        for axis, source in zip(axes[0], SOURCES):
            for kind, shift, fill in zip(KINDS, (0.17, -0.17), ("black", "white")):
                for y, arm in enumerate(reversed(W)):
                    dot(axis, stack(self._values(kind, arm, source)), y + shift, fill)
                axis.plot([], [], "o", color="black", mfc=fill, label=f"{kind} bases")
            axis.set_title(f"{source}, share right")
            axis.set_xlim(-0.03, 1.03)
            axis.set_yticks(range(len(W)), [f"{arm}: {w}" for arm, w in reversed(W.items())])
        return with_legend(figure, axes[0, 0])

    def _draw_c(self):
        """All arms, the best on top; grey: intervals that hold together."""
        figure, axes = panels(1, 2, (12, 8), sharey=True)
        found = {arm: [stack(self._values(k, arm, "mean")) for k in KINDS] for arm in ARMS}
        means = {a: [x.mean() for x in both if x is not None] for a, both in found.items()}
        order = sorted(filter(means.get, ARMS), key=lambda arm: np.mean(means[arm]))
        for column, (axis, kind) in enumerate(zip(axes[0], KINDS)):
            for y, arm in enumerate(order):
                if (values := found[arm][column]) is not None:
                    axis.plot(whiskers(values, len(order))[1:], [y, y], "-", color="#bbbbbb")
                    dot(axis, values, y, "black" if arm == "luffy" else "white")
            axis.set_yticks(range(len(order)), [name(arm) for arm in order])
            axis.set_title(f"{kind} bases: share right, mean of easy, medium and hard")
            axis.set_xlim(-0.03, 1.03)
        return figure

    def _draw_d(self):
        """Score against seconds."""
        figure, axes = panels(1, 2, (11, 4.4), sharey=True)
        for axis, kind in zip(axes[0], KINDS):
            for arm in list(STYLES)[1:]:
                took = self._checkpoints(kind, arm).items()
                at = [
                    (t.mean(), stack(self._values(kind, arm, f"mean@{step}"))) for step, t in took
                ]
                bars(axis, at, arm)
            axis.set_title(f"{kind} bases: share right, mean of easy, medium and hard")
            axis.set_xlabel("seconds of one core (first stages included)")
        return with_legend(figure, axes[0, 0])

    def _draw_e(self):
        """pass@k and temperature."""
        whats = {"pass@k at T = 1, mean": {k: f"pass{k} mean" for k in (1, 2, 4, 8, 16)}}
        for source in MEAN:
            at = {t: f"{source} T{t}" for t in (0.2, 0.6, 1.0, 1.4)}
            whats[f"share right, {source}, by temperature"] = at
        figure, axes = panels(2, 4, (13, 5.6), sharey=True)
        for row, kind in zip(axes, KINDS):
            row[0].set_ylabel(f"{kind} bases")
            row[0].set_xscale("log", base=2)
            row[0].xaxis.set_major_formatter("{x:g}")
            for axis, (title, at) in zip(row, whats.items()):
                for arm in EXPLORED:
                    found = [self._values(kind, arm, what) for what in at.values()]
                    seeds = sorted(set.intersection(*map(set, found)))
                    same = [align(*(some[seed] for some in found)) for seed in seeds]
                    bars(axis, [(x, np.array(some)) for x, some in zip(at, zip(*same))], arm)
                axis.set_title(title)
                axis.set_xlabel("k" if axis is row[0] else "temperature")
        return with_legend(figure, axes[0, 0])


def is_share(what: str) -> bool:
    return bool(re.match("|".join((*SOURCES, "mean|pass|reward|trace")), what))


def panels(rows: int, columns: int, size: tuple, **options):
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "axes.labelsize": 9})
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def with_legend(figure, axis):
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=9, frameon=False)
    return figure


def whiskers(values: np.ndarray, m: int = 1) -> tuple[float, float, float]:
    """A share and the ends of its interval, which fewer than ENOUGH seeds do not have."""
    found = estimate(values, 0, 1, m)
    return found if len(values) >= ENOUGH else (found[0], math.nan, math.nan)


def bars(axis, found: list[tuple], arm: str) -> None:
    """found: x and (seeds, problems)"""
    points = [(x, *whiskers(values)) for x, values in found if values is not None and len(values)]
    x, value, low, high = np.array(points or [[np.nan] * 4]).T
    style = {**STYLES[arm], "label": name(arm), "markersize": 4, "capsize": 2}
    axis.errorbar(x, value, np.nan_to_num([value - low, high - value]), **style)
    axis.set_ylim(-0.03, 1.03)


def dot(axis, values: np.ndarray | None, y: float, fill: str) -> None:
    """A mean with its interval, and small strokes for seeds."""
    if values is not None:
        value, low, high = whiskers(values)
        axis.plot(values.mean(1), [y] * len(values), "|", color="#888888", markersize=6)
        how = dict(xerr=np.nan_to_num([[value - low], [high - value]]), capsize=2, linewidth=1)
        axis.errorbar(value, y, color="black", marker="o", markersize=5, mfc=fill, **how)


def render(template: str, report: Report) -> str:
    """With the value of each {{expression}}."""
    names = globals() | {k: getattr(report, k) for k in dir(report) if not k.startswith("_")}
    return re.sub(r"{{(.+?)}}", lambda found: str(eval(found[1], names)), template)


def wrapped(text: str) -> str:
    """Its paragraphs and lists, not its tables."""
    how = dict(width=118, break_long_words=False, break_on_hyphens=False)

    def fill(block: str) -> str:
        if block[0] == "|":
            return block
        items = re.split(r"\n(?=- )", block)
        return "\n".join(
            textwrap.fill(x, subsequent_indent="  " * (x[0] == "-"), **how) for x in items
        )

    text = re.sub(r"( \[[-+.\d]+,) (?=[-+.\d]+\])", "\\1\0", text)  # an interval stays in one line
    return "\n\n".join(map(fill, text.strip().split("\n\n"))).replace("\0", " ") + "\n"


def texts(report: Report) -> dict[Path, str]:
    """What the documents should say."""
    template = (ROOT / "results/README.template.md").read_text("utf-8")
    decided = re.findall(r"{{(?:claim|ask)\(.+?}}", re.split(PART, template)[0])
    report.claims = len(decided)
    report.holding = sum("**" in render(one, report) for one in decided) or "none"
    with_it, without = ([render(one, r) for one in decided] for r in (report, report.other_seeds()))
    changed = sum(VERDICT.search(a)[0] != VERDICT.search(b)[0] for a, b in zip(with_it, without))
    report.changed = f"{changed} of {len(decided)}" if changed else "no"
    results, arms, section = (render(part, report) for part in re.split(PART, template))
    before, _, after = re.split(
        "<!-- study -->\n|<!-- end -->", (ROOT / "README.md").read_text("utf-8")
    )
    return {
        ROOT / "results/README.md": wrapped(results),
        HERE / "arms.md": wrapped(arms),
        ROOT / "README.md": f"{before}<!-- study -->\n{wrapped(section)}<!-- end -->{after}",
    }


def has_enough(data: Path = HERE / "data") -> bool:
    """Has each arm of README's table ENOUGH seeds? Then documents are made of what there is."""
    runs, scores = (read_jsonl(data / f"{name}.jsonl") for name in ("runs", "scores"))
    choice = chosen(scores)
    test = [row for row in scores if row["split"] == "test" and row["every"] == 1]  # of ends
    ends = [*test, *(row for row in runs if "failed" in row)]
    done = {(*of(row), row["seed"]) for row in ends if row["choice"] == choice.get(row["arm"], {})}
    return set(product(KINDS, SHORT, range(ENOUGH))) <= done


def write_all() -> None:
    report = Report()
    for file, text in texts(report).items():
        write(file, text)
        print(f"written     {file.relative_to(ROOT)}")
    report._draw_all(HERE)
    draw_curves(HERE)  # of the metrics.jsonl beside it
