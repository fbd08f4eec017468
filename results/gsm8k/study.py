"""A real language model on a real hard set, on one GPU: SmolLM2-135M-Instruct on GSM8K.

    python results/gsm8k/study.py --model DIR --train FILE --test FILE
    python results/gsm8k/study.py --report    # only the table and the picture, from data/

--model holds SmolLM2-135M-Instruct as from_pretrained loads it. The files are train.jsonl and
test.jsonl of openai/grade-school-math: the human solutions are the traces. The model boxes nothing
by itself, so the base is made of it first, by SFT on problems that no arm sees. All arms run side
by side on one GPU. Killed and started again it goes on, from checkpoints in --runs; an arm that has
its row in data/runs.jsonl is not run again.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(HERE.parent / "sums"))  # last: it has a study.py, too

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from machinery.arguments import ranged  # noqa: E402
from machinery.files import read_jsonl, to_jsonl, write  # noqa: E402
from machinery.metrics import smooth  # noqa: E402
from machinery.responses import load_rows  # noqa: E402
from sums_report import bootstrap, curves, number, table  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = HERE / "data"
OF_BASE = 512  # training problems that the base alone learns from
SIZES = dict(max_prompt_tokens=256, max_response_tokens=192, sampler="torch")
COMMON = SIZES | dict(eval_data="none", token_budget=16384, updates_per_step=1, graders=3, keep=1)
BASE = COMMON | dict(algo="sft", problems_per_step=32, steps=16, save_every=16, lr=3e-5)
RL = COMMON | dict(problems_per_step=64, save_every=4, lr=2e-5)  # no learning rate was tuned
ARMS = {  # arm -> its flags, the arm that it starts from
    "base": (BASE, ""),
    "on_policy": (RL | dict(algo="on_policy"), "base"),
    "luffy": (RL | dict(algo="luffy"), "base"),
    "mixed": (RL | dict(algo="mixed"), "base"),
    "sft": (RL | dict(algo="sft", lr=3e-5), "base"),  # on the traces that luffy sees
    "sft_then_on_policy": (RL | dict(algo="on_policy", seed=1000), "sft"),  # other problems first
}
CURVES = ("reward", "length", "entropy", "truncated", "groups/none", "groups/all", "trace_prob")
CURVES += ("trace_unlikely", "grad_norm", "clipped", "skipped_updates", "sampler_kl")
START, END = "<!-- data -->", "<!-- end -->"
SHOWN = 12  # greedy responses that are kept as text, beside all right ones
SAMPLES = 4  # of a problem, at T = 0.6


class Study:
    """Arms as jobs of threads, each of which waits for the arm that it starts from."""

    def __init__(self, model: Path, test: Path, runs: Path, steps: int, limit: int):
        self.model, self.test, self.runs, self.limit = model, test, runs, limit
        self.steps = {arm: flags.get("steps", steps) for arm, (flags, _) in ARMS.items()}
        self.checkpoints: dict[str, Future] = {}
        self.lock, self.evaluated = threading.Lock(), 0

    def last(self, arm: str) -> Path:
        return self.runs / arm / f"checkpoint-{self.steps[arm]:06d}"

    def run(self, name: str, *command: object) -> None:
        """A program of the project; what it prints goes to a log."""
        log = self.runs / f"{name}.log"
        with log.open("a") as file:
            words = [sys.executable, *map(str, command)]
            code = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file).returncode
        if code:
            raise RuntimeError(f"{name} ended with code {code}; see the end of {log}")

    def train(self, arm: str) -> Path:
        """-> its last checkpoint."""
        flags, start = ARMS[arm]
        flags = flags | {"steps": self.steps[arm], "out": self.runs / arm}
        flags["model"] = self.checkpoints[start].result() if start else self.model
        flags["data"] = self.runs / f"{'train' if start else 'base'}.jsonl"
        if not self.last(arm).exists():
            self.run(arm, "luffy.py", *(f"--{name}={value}" for name, value in flags.items()))
        if not self.last(arm).exists():
            raise RuntimeError(f"{arm} was stopped; the same command goes on")
        return self.last(arm)

    def evaluate(self, arm: str) -> None:
        """Greedily and 4 samples at T = 0.6, on the test problems -> data/."""
        out, start = self.runs / f"{arm}-eval", time.perf_counter()
        sizes = [f"--{name}={value}" for name, value in SIZES.items()] + [f"--limit={self.limit}"]
        what = "--model", self.checkpoints[arm].result(), "--bench", self.test, "--out", out
        how = f"--samples={SAMPLES}", "--temperature=0,0.6"
        self.run(f"{arm}-eval", "eval.py", *what, *how, *sizes)
        row = {"arm": arm, "steps": self.steps[arm]} | curves(
            self.runs / arm, self.steps[arm], CURVES
        )
        for (_, temperature, _), rows in load_rows(out).items():
            row[f"T={temperature:g}"] = summary(rows)
            if temperature == 0:
                kept = "problem", "response", "reward", "truncated"
                some = rows[:SHOWN] + [r for r in rows[SHOWN:] if r["reward"] == 1]
                shown = [{"arm": arm} | {n: r[n] for n in kept} for r in some]
        row["evaluation_seconds"] = round(time.perf_counter() - start)
        with self.lock:
            for file, new in ((DATA / "samples.jsonl", shown), (DATA / "runs.jsonl", [row])):
                others = [r for r in read_jsonl(file) if r["arm"] != arm]
                write(file, to_jsonl(others + new))
            self.evaluated += 1

    def do(self, arms: list[str]) -> None:
        """Train and evaluate these. Raises RuntimeError after the last one if one failed."""
        starts, problems = starts_of(arms), []
        with ThreadPoolExecutor(2 * len(ARMS)) as pool, self.bar(arms):
            for arm in ARMS:
                if arm in arms or arm in starts:
                    self.checkpoints[arm] = pool.submit(self.train, arm)
            for job in as_completed([pool.submit(self.evaluate, arm) for arm in arms]):
                if error := job.exception():
                    problems.append(str(error))
                    tqdm.write(str(error), file=sys.stderr)
        if problems:
            raise RuntimeError("; ".join(dict.fromkeys(problems)))

    @contextmanager
    def bar(self, arms: list[str]) -> Iterator[None]:
        """Of these arms' steps, from what their runs have written."""
        done = threading.Event()

        def show() -> None:
            files = [self.runs / arm / "metrics.jsonl" for arm in arms]
            with tqdm(total=sum(self.steps[arm] for arm in arms), unit="step") as bar:
                while not done.wait(2):
                    bar.n = sum(len(read_jsonl(file)) for file in files)
                    bar.set_postfix(evaluated=f"{self.evaluated}/{len(arms)}")

        thread = threading.Thread(target=show)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def starts_of(arms: list[str]) -> set[str]:
    """Arms that these start from, and that are not among them."""
    return {ARMS[arm][1] for arm in arms} - {*arms, ""}


def summary(rows: list[dict]) -> dict:
    """Of responses. right: a digit for each problem, in an order that is the same for all arms."""
    right = Counter()
    for row in rows:
        right[row["problem"]] += row["reward"] == 1
    found = {name: sum(row[name] for row in rows) for name in ("tokens", "truncated", "lenient")}
    found |= dict(responses=len(rows), boxed=sum("\\boxed{" in row["response"] for row in rows))
    return found | {"right": "".join(str(right[p]) for p in sorted(right))}


# ------------------------------------------------------------------ what came out
def arms_table(rows: dict[str, dict]) -> str:
    head = "arm | reward of rollouts, first half | second | right, greedy | at T = 0.6 | in a box, "
    head += "greedy | entropy, first step | last | π of a step's traces, first | last"
    lines = {}
    for arm, row in rows.items():
        of, greedy, sampled = row["curves"], row.get("T=0"), row.get("T=0.6")
        halves = np.array_split(of["reward"], 2) if "reward" in of else []
        cells = [number(np.mean(half), 3) for half in halves] or ["-", "-"]
        for x in (greedy, sampled):
            right = sum(map(int, x["right"])) if x else 0
            cells.append(f"{right} of {x['responses']:,}" if x else "not done")
        cells += [number(greedy["boxed"] / greedy["responses"]) if greedy else "not done"]
        for name in ("entropy", "trace_prob"):
            cells += [number(of[name][i]) if name in of else "-" for i in (0, -1)]
        lines[f"`{arm}`"] = cells
    return table(head, lines)


def differences(rows: dict[str, dict]) -> str:
    """Of all pairs of arms, greedy: those whose 95 % interval over problems is without 0."""
    right = {a: np.array([*map(int, r["T=0"]["right"])]) for a, r in rows.items() if "T=0" in r}
    found, pairs = [], list(combinations(right, 2))
    for a, b in pairs:
        mean, low, high = bootstrap((right[b] - right[a])[None])
        if low > 0 or high < 0:
            mean, low, high = (number(x, 3, sign=True) for x in (mean, low, high))
            found.append(f"`{b}` - `{a}` {mean} [{low}, {high}]")
    named = "; ".join(found) or "none"
    return f"Differences with an interval without 0, {len(found)} of {len(pairs)}: {named}."


def agreement(rows: dict[str, dict]) -> str:
    """Of the sampler's and the trainer's numerics, over all arms and steps."""
    kl = [x for row in rows.values() for x in row["curves"].get("sampler_kl", [])]
    ends = " to ".join(number(f(kl), 4) for f in (min, max)) if kl else "none"
    return f"KL between the sampler's policy and the trainer's, a token, by step: {ends}."


def draw(rows: dict[str, dict]) -> None:
    names = {"reward": "reward of rollouts (mean of the last 4 steps)", "entropy": "entropy"}
    names |= {"truncated": "rollouts without an end", "trace_prob": "π of trace tokens (mean of 4)"}
    figure, axes = plt.subplots(1, len(names), figsize=(15, 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, names.items()):
        for i, (arm, row) in enumerate(rows.items()):
            if arm != "base" and name in row["curves"]:
                values = row["curves"][name]
                values = values if name in ("entropy", "truncated") else smooth(values, 4)
                axis.plot(range(1, len(values) + 1), values, f"C{i}", marker="os^vDx"[i], label=arm)
        axis.set(title=title, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "curves.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def report() -> None:
    """README.md between its marks, and curves.png."""
    found = {row["arm"]: row for row in read_jsonl(DATA / "runs.jsonl")}
    rows = {arm: found[arm] for arm in ARMS if arm in found}
    before, rest = (HERE / "README.md").read_text("utf-8").split(START)
    after = rest.split(END)[1]
    made = f"{arms_table(rows)}\n\n{differences(rows)} {agreement(rows)}"
    write(HERE / "README.md", f"{before}{START}\n{made}\n{END}{after}")
    draw(rows)


# ------------------------------------------------------------------ the command line
def check(study: Study, arms: list[str]) -> None:
    """Ends the program where rows of data/ and this command do not belong together."""
    for row in read_jsonl(DATA / "runs.jsonl"):
        limit = row.get("T=0", {}).get("responses", study.limit)
        if (row["steps"], limit) != (study.steps[row["arm"]], study.limit):
            sys.exit(f"data/ has {row['arm']} of {row['steps']} steps and {limit} test problems: "
                     "give --steps and --limit as they were, or remove data/")  # fmt: skip
    for start in starts_of(arms):
        if not study.last(start).exists():
            sys.exit(f"data/ has {start}, but {study.runs} has no weights of it, which "
                     "other arms start from: name the right --runs, or remove data/")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="the directory of SmolLM2-135M-Instruct")
    parser.add_argument("--train", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--test", type=Path, help="GSM8K's test.jsonl")
    parser.add_argument("--steps", type=ranged(int, 1), default=16, help="of each arm [16]")
    parser.add_argument("--limit", type=ranged(int, 1), default=512, help="test problems [512]")
    parser.add_argument("--runs", type=Path, default=Path("runs/gsm8k-study"), help="for weights")
    parser.add_argument("--report", action="store_true", help="only what is made from data/")
    args = parser.parse_args()
    if args.report:
        return report()
    for name in ("model", "train", "test"):
        where = getattr(args, name)
        if where is None:
            parser.error(f"--{name}: needed, but for --report")
        if not (where / "config.json" if name == "model" else where).is_file():
            parser.error(f"--{name} {where}: no {'model' if name == 'model' else 'file'} is there")
    done = {row["arm"] for row in read_jsonl(DATA / "runs.jsonl") if "T=0.6" in row}
    arms = [arm for arm in ARMS if arm not in done]
    paths = (path.resolve() for path in (args.model, args.test, args.runs))
    study = Study(*paths, args.steps, args.limit)
    check(study, arms)
    for directory in (study.runs, DATA):
        directory.mkdir(parents=True, exist_ok=True)
    lines = args.train.read_text("utf-8").splitlines(keepends=True)
    for name, some in {"base": lines[:OF_BASE], "train": lines[OF_BASE:]}.items():
        write(study.runs / f"{name}.jsonl", "".join(some))
    try:
        if arms:
            study.do(arms)
    except RuntimeError as error:
        sys.exit(str(error))
    finally:
        report()


if __name__ == "__main__":
    main()
