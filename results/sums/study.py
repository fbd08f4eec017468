"""A real language model on sums, on one core: SmolLM2-135M-Instruct, RL with and without traces.

    python results/sums/study.py --model DIR    # what is not in data/ yet; killed, it goes on
    python results/sums/study.py --report       # only the text and the picture, from data/

DIR holds SmolLM2-135M-Instruct as from_pretrained loads it. Zero-shot it does not box an answer, so
the base is made of it first: 14 steps of SFT on sums of one-digit numbers. Each arm then trains
from the base on sums of three kinds, and is asked held-out sums of five: nobody trains on two. A
row of data/runs.jsonl is an arm and a seed, and is not run again. Weights stay in runs/sums.
"""

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sums_report  # noqa: E402
from data import Problem, encode, load_problems, to_evaluate  # noqa: E402
from hurry import hurry  # noqa: E402
from machinery.batches import Trajectory, pack  # noqa: E402
from machinery.files import append, read_jsonl, to_jsonl, write  # noqa: E402
from machinery.kinds import Tokenizer  # noqa: E402
from machinery.model import Policy, end_ids, load_config, load_model, load_tokenizer  # noqa: E402
from machinery.processes import init_processes, seed_of  # noqa: E402
from machinery.samplers import TorchSampler  # noqa: E402
from machinery.scores import respond  # noqa: E402
from sums_report import curves  # noqa: E402
from verify import Grader  # noqa: E402

KINDS = {"2x2": (2, 2), "2x3": (2, 3), "3x2": (3, 2), "3x3": (3, 3), "4x2": (4, 2)}  # n, digits
TRAINED = sums_report.TRAINED
COMMON = dict(eval_data="none", max_prompt_tokens=96, max_response_tokens=56, graders=1)
COMMON |= dict(token_budget=1024, checkpointing="false", updates_per_step=1, keep=1)
BASE = COMMON | dict(algo="sft", problems_per_step=32, steps=14, save_every=14, lr=3e-5, seed=0)
ARM = COMMON | dict(problems_per_step=8, save_every=10, sample_every=10)
RL, SFT = ARM | dict(lr=2e-5), ARM | dict(lr=3e-5)  # no learning rate was tuned
# arm -> (program, its flags, the arm that it starts from). The order is that of the runs.
ARMS = {
    "luffy": ("luffy", RL | dict(algo="luffy"), "base"),
    "on_policy": ("luffy", RL | dict(algo="on_policy"), "base"),
    "sft": ("luffy", SFT | dict(algo="sft"), "base"),  # on the traces that luffy sees, 8 a step
    "sft_then_on_policy": ("luffy", RL | dict(algo="on_policy"), "sft"),
    "mixed": ("luffy", RL | dict(algo="mixed"), "base"),
    "hpt": ("luffy", RL | dict(algo="hpt"), "base"),
    "opd": ("forks.opd", RL | dict(algo="opd"), "base"),  # its teacher is the sft arm
}
OTHER_PROBLEMS = 1000  # added to the seed of RL after SFT: else it gets SFT's, in the same order
ASKED, SAMPLES, TRACED = 64, 2, 16  # of a kind: problems, responses to each, traces to look at
SHOWN, TRICKS = 4, 12  # responses that are kept as text: of a kind; right ones that do not add up
CURVES = ("reward", *(f"reward/{kind}" for kind in TRAINED), "length", "entropy", "truncated")
CURVES += ("groups/none", "groups/all", "trace_prob", "trace_unlikely", "grad_norm", "clipped")
CURVES += ("skipped_updates", "sampler_kl", "teacher_kl")


# ------------------------------------------------------------------ sums
def example(numbers: tuple[int, ...], kind: str) -> dict:
    """A row of a data file: the question, the answer, and a trace that adds one number a step."""
    total, steps = numbers[0], []
    for x in numbers[1:]:
        steps.append(f"{total} + {x} = {total + x}.")
        total += x
    return {
        "prompt": [{"role": "user", "content": f"What is {' + '.join(map(str, numbers))}?"}],
        "answer": str(total),
        "trace": " ".join([*steps, f"The answer is \\boxed{{{total}}}."]),
        "data_source": kind,
    }


def make_data(base: int = 448, train: int = 600, test: int = ASKED) -> dict[str, list[dict]]:
    """split -> rows, no sum twice: one-digit sums for the base, then `train` and `test` a kind."""
    rng, seen = random.Random(0), set()

    def some(count: int, n: int, digits: int, kind: str) -> list[dict]:
        rows = []
        while len(rows) < count:
            low = 10 ** (digits - 1)
            numbers = tuple(rng.randint(low, 10 * low - 1) for _ in range(n))
            if numbers not in seen:
                seen.add(numbers)
                rows.append(example(numbers, kind))
        return rows

    splits = {
        "base": some(56, 2, 1, "2x1") + some(base - 56, 3, 1, "3x1"),
        "test": sum((some(test, *size, kind) for kind, size in KINDS.items()), []),
        "train": sum((some(train, *KINDS[kind], kind) for kind in TRAINED), []),
    }
    for name in ("base", "train"):
        rng.shuffle(splits[name])
    return splits


def adds_up(question: str, response: str) -> bool:
    """Is it what was meant: each number of the question added in its turn, and rightly?"""
    numbers = tuple(map(int, re.findall(r"\d+", question)))
    steps = r"(\d+) \+ (\d+) = (\d+)"
    return re.findall(steps, response) == re.findall(steps, example(numbers, "")["trace"])


# ------------------------------------------------------------------ an arm: train it, ask it
def train(program: str, flags: dict, out: Path) -> Path:
    """-> the last checkpoint. What is printed goes to the run's log."""
    last = out / f"checkpoint-{flags['steps']:06d}"
    if not last.exists():
        words = [f"--{name}={value}" for name, value in (flags | {"out": out}).items()]
        with open(f"{out}.log", "a") as log:
            command = [sys.executable, HERE / "hurry.py", program, *words]
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    return last


def evaluate(checkpoint: Path, file: Path, temperatures: tuple) -> tuple[dict, list[dict]]:
    """-> what is kept of responses to held-out problems, as sums for each problem, and of the
    tokens of their traces; and some responses as they are."""
    start = time.perf_counter()
    torch.set_float32_matmul_precision("highest")
    tokenizer, config = load_tokenizer(checkpoint), load_config(checkpoint)
    sampler = TorchSampler(checkpoint, config, end_ids(checkpoint, tokenizer))
    policy = Policy(load_model(checkpoint, config, False), 1.0)
    hurry()
    asked = load_problems(str(file))
    problems = to_evaluate(asked, tokenizer, max_prompt_tokens=96)
    how = dict(samples=SAMPLES, max_tokens=COMMON["max_response_tokens"])
    how["seeds"] = [seed_of("evaluation", 0, i) for i in range(len(problems))]
    scores, samples = [], []
    for t in temperatures:
        with Grader(1) as grader:
            everything = sampler, problems, range(len(problems)), grader, tokenizer
            rows = respond(*everything, temperature=t, **how)
        for row in rows:
            row["question"] = asked[row["problem"]].prompt[-1]["content"]
            row["right"] = int(row["reward"] == 1)
            row["meant"] = int(adds_up(row["question"], row["response"]))
            row["rewarded_trick"] = int(row["right"] > row["meant"])
        names = "right", "meant", "rewarded_trick", "tokens", "truncated"
        sums = {name: {kind: [] for kind in KINDS} for name in names}
        for i in range(0, len(rows), SAMPLES):
            for name in names:
                total = sum(int(row[name]) for row in rows[i : i + SAMPLES])
                sums[name][rows[i]["source"]].append(total)
        scores.append({"temperature": t, "k": SAMPLES} | sums)
        if t == temperatures[0]:
            first = [row for row in rows if row["sample"] == 0 and row["problem"] % ASKED < SHOWN]
            tricks = [row for row in rows if row["rewarded_trick"] and row not in first]
            kept = "question", "source", "response", "answer", "right", "meant"
            samples += [{name: row[name] for name in kept} for row in first + tricks[:TRICKS]]
    found = {"scores": scores} | trace_probabilities(policy, asked, tokenizer)
    return found | {"evaluation_seconds": round(time.perf_counter() - start)}, samples


@torch.no_grad()
def trace_probabilities(policy: Policy, asked: list[Problem], tokenizer: Tokenizer) -> dict:
    """pi: kind -> for each of its first traces, π of the tokens; go_on: of that token by which a
    trace of four numbers goes on after two steps."""
    some = [p for i, p in enumerate(asked) if i % ASKED < TRACED]
    kept, _ = encode(some, tokenizer, max_prompt_tokens=96, max_trace_tokens=96)
    rows = [Trajectory.of_trace(i, p, 1.0) for i, p in enumerate(kept)]
    for micro_batch in pack(rows, COMMON["token_budget"]):
        micro_batch.give(logp=policy(micro_batch)[0])
    found = {"pi": {kind: [] for kind in KINDS}, "go_on": []}
    for t in rows:
        pi = [float(f"{x:.3g}") for x in t.logp.exp().tolist()]
        found["pi"][t.problem.source].append(pi)
        if t.problem.source == "4x2":
            ends = [n for n, i in enumerate(t.response) if tokenizer.decode([i]) == "."]
            found["go_on"].append(pi[ends[1] + 1])
    return found


# ------------------------------------------------------------------ the order of things
def make_arm(model: str, runs: Path, arm: str, seed: int, steps: int) -> Path:
    """-> its last checkpoint; first those of the arms that it needs."""
    if arm == "base":  # the same for all seeds
        flags = BASE | {"model": model, "data": runs / "base.jsonl"}
        return train("luffy", flags, runs / "base-seed0")
    program, flags, start = ARMS[arm]
    flags = flags | {"model": make_arm(model, runs, start, seed, steps), "steps": steps}
    if arm == "opd":
        flags["teacher"] = make_arm(model, runs, "sft", seed, steps)
    flags["seed"] = seed + OTHER_PROBLEMS * (start == "sft")
    return train(program, flags | {"data": runs / "train.jsonl"}, runs / f"{arm}-seed{seed}")


def study(model: str, runs: Path, data: Path, jobs: list[tuple[str, int]], steps: int) -> None:
    """Add the rows of jobs, of an arm and a seed, that data/ does not have yet."""
    runs.mkdir(parents=True, exist_ok=True)
    for name, rows in make_data().items():
        write(runs / f"{name}.jsonl", to_jsonl(rows))
    bar = tqdm(jobs, unit="arm")
    for arm, seed in bar:
        bar.set_description(f"{arm}, seed {seed}")
        done = {(row["arm"], row["seed"]): row["steps"] for row in read_jsonl(data / "runs.jsonl")}
        of = BASE["steps"] if arm == "base" else steps
        if done.get((arm, seed), of) != of:
            sys.exit(f"data/ has {arm} of {done[arm, seed]} steps: name them, or remove its row")
        if (arm, seed) not in done:
            checkpoint = make_arm(model, runs, arm, seed, steps)
            temperatures = (0.6, 1.0) if arm == "base" else (0.6,)
            found, samples = evaluate(checkpoint, runs / "test.jsonl", temperatures)
            what = {"arm": arm, "seed": seed, "steps": of}
            append(data / "samples.jsonl", *(what | sample for sample in samples))
            append(data / "runs.jsonl", what | curves(checkpoint.parent, of, CURVES) | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="the directory of SmolLM2-135M-Instruct")
    parser.add_argument("--arms", default=",".join(ARMS), help="A,B of them [all]")
    parser.add_argument("--seeds", default="0", help="A,B [0]")
    parser.add_argument("--steps", type=int, default=20, help="of each arm [20]")
    parser.add_argument("--runs", type=Path, default=Path("runs/sums"), help="[runs/sums]")
    parser.add_argument("--report", action="store_true", help="only what is made from data/")
    args = parser.parse_args()
    arms = args.arms.split(",")
    if unknown := set(arms) - ARMS.keys():
        parser.error(f"--arms {args.arms}: no arm {unknown.pop()}; there are {', '.join(ARMS)}")
    if not args.report:
        if not args.model:
            parser.error("--model: needed, but for --report")
        torch.set_num_threads(1)
        init_processes("cpu")
        seeds = [int(seed) for seed in args.seeds.split(",")]
        jobs = [("base", 0), *((arm, seed) for seed in seeds for arm in ARMS if arm in arms)]
        study(args.model, args.runs.resolve(), HERE / "data", jobs, args.steps)
    sums_report.write_all()


if __name__ == "__main__":
    main()
