"""A real language model on a real hard set, on one GPU: SmolLM2-135M-Instruct on GSM8K.

    python results/gsm8k/study.py --model DIR --problems DIR    # killed, it goes on
    python results/gsm8k/study.py --report                      # only the text and the picture

--model holds SmolLM2-135M-Instruct as from_pretrained loads it, --problems gsm8k_train.jsonl and
gsm8k_test.jsonl as they are published: the human solutions are the traces. The model boxes nothing
by itself, so the base is made of it first, by SFT on problems that no arm sees. All arms run side
by side on one GPU. An arm's row in data/runs.jsonl is not run again. Weights stay in --runs.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from machinery.files import append, read_jsonl, write  # noqa: E402
from machinery.metrics import smooth  # noqa: E402
from machinery.responses import load_rows  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = HERE / "data"
OF_BASE = 512  # training problems that the base alone learns from
SIZES = dict(max_prompt_tokens=256, max_response_tokens=192, sampler="torch")
COMMON = SIZES | dict(eval_data="none", token_budget=16384, updates_per_step=1, graders=3, keep=1)
BASE = COMMON | dict(algo="sft", problems_per_step=32, steps=16, save_every=16, lr=3e-5)
RL = COMMON | dict(problems_per_step=64, lr=2e-5)  # no learning rate was tuned
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


class Study:
    """Arms as jobs of threads, each of which waits for the arm that it starts from."""

    def __init__(self, model: str, problems: Path, runs: Path, steps: int, limit: int):
        self.model, self.runs, self.limit = model, runs, limit
        self.test = problems / "gsm8k_test.jsonl"
        self.steps = {arm: flags.get("steps", steps) for arm, (flags, _) in ARMS.items()}
        self.checkpoints: dict[str, Future] = {}
        self.lock = threading.Lock()
        for directory in (runs, DATA):
            directory.mkdir(parents=True, exist_ok=True)
        lines = (problems / "gsm8k_train.jsonl").read_text("utf-8").splitlines(keepends=True)
        for name, some in {"base": lines[:OF_BASE], "train": lines[OF_BASE:]}.items():
            write(runs / f"{name}.jsonl", "".join(some))

    def run(self, name: str, *command: object) -> None:
        """A program of the project; what it prints goes to a log."""
        with open(self.runs / f"{name}.log", "a") as log:
            words = [sys.executable, *map(str, command)]
            subprocess.run(words, cwd=ROOT, check=True, stdout=log, stderr=log)

    def train(self, arm: str) -> Path:
        """-> its last checkpoint."""
        flags, start = ARMS[arm]
        flags = flags | {"steps": self.steps[arm], "out": self.runs / arm}
        flags["model"] = self.checkpoints[start].result() if start else self.model
        flags["data"] = self.runs / f"{'train' if start else 'base'}.jsonl"
        last = self.runs / arm / f"checkpoint-{self.steps[arm]:06d}"
        if not last.exists():
            self.run(arm, "luffy.py", *(f"--{name}={value}" for name, value in flags.items()))
        return last

    def evaluate(self, arm: str) -> None:
        """Greedily and 4 samples at T = 0.6, on the test problems -> data/."""
        out, start = self.runs / f"{arm}-eval", time.perf_counter()
        sizes = [f"--{name}={value}" for name, value in SIZES.items()] + [f"--limit={self.limit}"]
        what = "--model", self.checkpoints[arm].result(), "--bench", self.test, "--out", out
        self.run(f"{arm}-eval", "eval.py", *what, "--samples=4", "--temperature=0,0.6", *sizes)
        row = {"arm": arm, "steps": self.steps[arm]} | curves(self.runs / arm, self.steps[arm])
        for (_, temperature, _), rows in load_rows(out).items():
            right = Counter()
            for response in rows:
                right[response["problem"]] += response["reward"] == 1
            of = {name: sum(r[name] for r in rows) for name in ("tokens", "truncated", "lenient")}
            boxed = sum("\\boxed{" in r["response"] for r in rows)
            digits = "".join(str(right[p]) for p in sorted(right))  # the same order for all arms
            row[f"T={temperature:g}"] = of | dict(responses=len(rows), boxed=boxed, right=digits)
            if temperature == 0:
                kept = "problem", "response", "reward", "truncated"
                some = rows[:SHOWN] + [r for r in rows[SHOWN:] if r["reward"] == 1]
                shown = [{"arm": arm} | {n: r[n] for n in kept} for r in some]
        row["evaluation_seconds"] = round(time.perf_counter() - start)
        with self.lock:
            append(DATA / "samples.jsonl", *shown)
            append(DATA / "runs.jsonl", row)

    def do(self, arms: list[str]) -> None:
        with ThreadPoolExecutor(2 * len(ARMS)) as pool:
            for arm in ARMS:  # those of before are there
                self.checkpoints[arm] = pool.submit(self.train, arm)
            jobs = [pool.submit(self.evaluate, arm) for arm in arms]
            threading.Thread(target=self.show, args=(arms,), daemon=True).start()
        for job in jobs:
            job.result()

    def show(self, arms: list[str]) -> None:
        """A bar of all arms' steps, from what their runs have written."""
        with tqdm(total=sum(self.steps[arm] for arm in arms), unit="step") as bar:
            while True:
                files = [self.runs / arm / "metrics.jsonl" for arm in arms]
                bar.n = sum(len(read_jsonl(file)) for file in files if file.exists())
                bar.refresh()
                time.sleep(2)


def curves(out: Path, steps: int) -> dict:
    """Of a run's directory: metrics of each step, and seconds of its phases."""
    metrics, timing = (read_jsonl(out / f"{name}.jsonl")[:steps] for name in ("metrics", "timing"))
    kept = {n: [row.get(n) for row in metrics] for n in CURVES if any(n in r for r in metrics)}
    kept = {n: [x if x is None else float(f"{x:.4g}") for x in v] for n, v in kept.items()}
    phases = "sync", "sample", "score", "update"
    seconds = {name: round(sum(row[name] for row in timing), 1) for name in phases}
    return {"seconds": seconds, "curves": kept}


# ------------------------------------------------------------------ what came out
def number(value: float, digits: int = 3, sign: str = "") -> str:
    """0.5 -> .500"""
    return f"{value:{sign}.{digits}f}".replace("0.", ".", 1)


def table(rows: dict[str, dict]) -> str:
    """What the README has between its marks, from data/."""
    heads = "arm", "reward of rollouts, steps 1-8", "9-16", "right of 512, greedy", "T = 0.6, 2048"
    heads += "in a box, greedy", "entropy, first step", "last", "π of a step's traces, first", "last"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, row in rows.items():
        of, greedy, sampled = row["curves"], row.get("T=0"), row.get("T=0.6")
        reward = (
            [number(np.mean(of["reward"][i : i + 8])) for i in (0, 8)] if "reward" in of else []
        )
        right = [str(sum(map(int, x["right"]))) if x else "not done" for x in (greedy, sampled)]
        boxed = number(greedy["boxed"] / greedy["responses"], 2) if greedy else "not done"
        ends = [
            number(of[name][i], 2) if name in of else "-"
            for name in ("entropy", "trace_prob")
            for i in (0, -1)
        ]
        cells = [f"`{arm}`", *(reward or "--"), *right, boxed, *ends]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(rows: dict[str, dict]) -> str:
    """Of all pairs of arms, greedy: those whose 95 % interval over problems is without 0."""
    right = {a: np.array([*map(int, r["T=0"]["right"])]) for a, r in rows.items() if "T=0" in r}
    found, pairs = [], list(combinations(right, 2))
    for a, b in pairs:
        gap = right[b] - right[a]
        mean, error = gap.mean(), 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
        if abs(mean) > error:
            low, high = (number(x, sign="+") for x in (mean - error, mean + error))
            found.append(f"`{b}` - `{a}` {number(mean, sign='+')} [{low}, {high}]")
    return (
        f"Of {len(pairs)} differences, {len(found)} with an interval without 0: {'; '.join(found)}."
    )


def agreement(rows: dict[str, dict]) -> str:
    """Of the sampler's and the trainer's numerics, over all arms and steps."""
    kl = [x for row in rows.values() for x in row["curves"].get("sampler_kl", [])]
    low, high = (number(f(kl), 4) for f in (min, max))
    return f"KL between the sampler's policy and the trainer's, a token, by step: {low} to {high}."


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
        axis.set(title=title, xlabel="step", xticks=range(0, len(values) + 1, 4))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "curves.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def report() -> None:
    rows = {row["arm"]: row for row in read_jsonl(DATA / "runs.jsonl")}  # the last one of each
    text = (HERE / "README.md").read_text("utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    found = f"{table(rows)}\n\n{differences(rows)} {agreement(rows)}"
    write(HERE / "README.md", f"{before}{START}\n{found}\n{END}{after}")
    draw(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="the directory of SmolLM2-135M-Instruct")
    parser.add_argument("--problems", type=Path, help="the directory of GSM8K's two files")
    parser.add_argument("--steps", type=int, default=16, help="of each arm [16]")
    parser.add_argument("--limit", type=int, default=512, help="test problems [512]")
    parser.add_argument("--runs", type=Path, default=Path("runs/gsm8k"), help="[runs/gsm8k]")
    parser.add_argument("--report", action="store_true", help="only what is made from data/")
    args = parser.parse_args()
    if not args.report:
        if not (args.model and args.problems):
            parser.error("--model and --problems: needed, but for --report")
        done = {row["arm"] for row in read_jsonl(DATA / "runs.jsonl") if "T=0.6" in row}
        study = Study(args.model, args.problems, args.runs.resolve(), args.steps, args.limit)
        study.do([arm for arm in ARMS if arm not in done])
    report()


if __name__ == "__main__":
    main()
