"""How a step's cost grows: with processes, group size, length, vocabulary; and what none asked for.

    python benchmarks/scaling.py        # CPU, twenty minutes; prints the tables of its README

The step is that of benchmarks/compare_trl.py, 16 prompts x 8 samples of up to 128 tokens of a tiny
Qwen2, float32, one thread a process; each table changes one number. Processes: the same step by one
and by two, in turns. Overhead: of the toy's real run, what a step takes beyond its phases sample,
score, update and sync; evaluation and checkpoints are not in it.
"""

import argparse
import json
import statistics
import tempfile
import time

from tiny import VOCABULARY, Ours, in_process, luffy, machine, save, spread
from tqdm import tqdm

GROWTH = {  # what grows -> its values; elsewhere 8, 128 and 512
    "samples of a prompt": ("rollouts", (4, 8, 16)),
    "longest response": ("max_response_tokens", (64, 128, 256)),
    "vocabulary": ("vocabulary", (512, 4096, 32768)),
}


def measure(changes: dict, steps: int) -> dict:
    """Medians of this many steps after one to warm up, in this process or these processes."""
    luffy.init_processes()
    program = Ours(**changes)
    rows = [program.step(number) for number in range(steps + 1)][1:]
    return {
        key: statistics.median(row[key] for row in rows)
        for key in ("sample", "score", "update", "step", "tokens")
    }


def overhead(steps: int) -> dict:
    """Of a run of luffy.py on the toy: seconds between the ends of steps, and in the phases."""
    ends, phases = [], []

    class Clocked(luffy.Run):
        def log_step(self, *args):
            phases.append(sum(self.seconds.values()))
            super().log_step(*args)
            ends.append(time.perf_counter())

    luffy.Run = Clocked
    with tempfile.TemporaryDirectory() as directory:
        cfg = luffy.parse_args(
            [
                "--steps",
                str(steps),
                "--save_every",
                "100000",
                "--eval_data",
                "",
                "--out",
                f"{directory}/run",
            ]
        )
        luffy.init_processes()
        luffy.train(cfg, luffy.find(cfg.model))
    walls = [b - a for a, b in zip(ends, ends[1:])]
    return {
        "step": statistics.median(walls),
        "overhead": statistics.median(1 - p / w for p, w in zip(phases[1:], walls)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured in a process")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        changes = json.loads(args.one)
        out = measure(changes, args.steps) if changes else overhead(50)
        if luffy.rank() == 0:
            print("\n" + json.dumps(out))
        return

    def run(ranks: int = 1, vocabulary: int = VOCABULARY, **changes) -> dict:
        with tempfile.TemporaryDirectory() as directory:
            changes["model"] = save(directory, vocabulary=vocabulary)
            return in_process(
                __file__, "--one", json.dumps(changes), "--steps", args.steps, ranks=ranks
            )

    print(f"{machine()}; {args.rounds} pairs of {args.steps} steps, median (lowest to highest)\n")
    print("| prompts | | 1 process, s | 2 processes, s | speed-up |\n|---|---|---|---|---|")
    for prompts in (16, 32):
        pairs = [
            (run(problems_per_step=prompts), run(problems_per_step=prompts, ranks=2))
            for _ in tqdm(range(args.rounds), "processes")
        ]
        for phase in ("sample", "update", "step"):
            one, two = ([row[phase] for row in rows] for rows in zip(*pairs))
            print(
                f"| {prompts} | {phase} | {spread(one)} | {spread(two)} "
                f"| {spread([a / b for a, b in zip(one, two)])} |",
                flush=True,
            )

    print(
        f"\nMedians of {args.steps} steps of one process\n\n| | | mean tokens | sample, s | "
        "update, s | step, s | sampled tokens/s |\n|---|---|---|---|---|---|---|"
    )
    for what, (field, values) in GROWTH.items():
        for value in tqdm(values, what):
            row = run(**{field: value})
            mean = row["tokens"] / 16 / (value if field == "rollouts" else 8)
            print(
                f"| {what} | {value:,} | {mean:.0f} | {row['sample']:.2f} | {row['update']:.2f} "
                f"| {row['step']:.2f} | {row['tokens'] / row['step']:,.0f} |",
                flush=True,
            )

    rows = [in_process(__file__, "--one", "{}") for _ in tqdm(range(args.rounds), "overhead")]
    print(
        f"\nOverhead of the toy's run, of a step of {spread([r['step'] for r in rows])} s: "
        f"{spread([100 * r['overhead'] for r in rows])} %"
    )


if __name__ == "__main__":
    luffy.launch(main)
