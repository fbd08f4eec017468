"""A full step of ours against TRL's GRPOTrainer: sample, score, update; in time and memory.

    python benchmarks/compare_trl.py        # CPU, 15 minutes; prints a table of its README

Both train the same tiny Qwen2 on the same 16 prompts x 8 samples of up to 128 tokens, which stop at
random, on the Dr. GRPO loss, float32, one thread, without vLLM and without gradient checkpointing.
The programs take turns, each time in a new process of one step to warm up and a few to measure.
Memory is the most that a process adds to what it holds when everything is imported. The virtual
environment `.venv-trl` is made beside this file at the first call, from ours and TRL.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(os.path.abspath(__file__)).parent
sys.path.insert(0, str(HERE.parent))

from machinery.printing import print_what_can_be  # noqa: E402

ENVIRONMENT = HERE / ".venv-trl"
TRL = "trl==1.16.0"
# per_device_train_batch_size: TRL's default, and the largest there is, its only one without
# gradient accumulation. Of 8, 16, 32 and 128 the default is the fastest and the leanest here.
PROGRAMS = {"ours": None, "TRL, batches of 8": 8, "TRL, batches of 128": 128}


def make_environment() -> Path:
    """-> its python."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        print(f"making {ENVIRONMENT}", file=sys.stderr)
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        subprocess.run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "-r",
                HERE.parent / "requirements-cpu.txt",
                TRL,
            ],
            check=True,
        )
        (ENVIRONMENT / "complete").touch()
    return python


# ------------------------------------------------------------------ one program
def ours(model: str, steps: int) -> list[dict]:
    import tiny

    tiny.luffy.init_processes()
    program = tiny.Ours(model)
    rows = []
    for number in range(steps):
        row = program.step(number)
        del row["trajectories"]
        rows.append(row)
    return rows


def trl(model: str, steps: int, batch: int) -> list[dict]:
    import datasets
    import tiny
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = []

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate_single_turn(*args, **kwargs)
            rows.append({"sample": time.perf_counter() - start, "tokens": sum(map(len, out[0]))})
            return out

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            rows[-1]["step"] = time.perf_counter() - self.start

    def rewards(completions, **_):
        return [tiny.reward(text) for text in completions]

    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            reward_funcs=rewards,
            callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_dict({"prompt": tiny.prompts() * steps}),
            args=GRPOConfig(
                output_dir=directory,
                max_steps=steps,
                num_generations=8,
                shuffle_dataset=False,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=128 // batch,
                max_completion_length=tiny.MAX_TOKENS,
                loss_type="dr_grpo",
                scale_rewards="none",
                beta=0.0,
                learning_rate=1e-6,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                fp16=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return rows


def measure(name: str, model: str, steps: int) -> None:
    """Print the medians of one process of this program."""
    import tiny

    if PROGRAMS[name]:
        importlib.import_module("trl.trainer.grpo_trainer")  # imported, not memory of the step
    with tiny.PeakMemory() as peak:
        rows = ours(model, steps + 1) if name == "ours" else trl(model, steps + 1, PROGRAMS[name])
    phases = {
        phase: statistics.median(row[phase] / row["tokens"] for row in rows[1:])
        for phase in ("sample", "step")
    }  # seconds a token
    tokens = statistics.mean(row["tokens"] for row in rows[1:]) / 128
    print("\n" + json.dumps(phases | {"bytes": peak.bytes, "mean_tokens": tokens}), flush=True)
    os._exit(0)


# ------------------------------------------------------------------ all of them
def main() -> None:
    print_what_can_be()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured in a process")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(*args.one, args.steps)
    python = make_environment()
    if Path(sys.prefix) != ENVIRONMENT:
        os.execv(python, [python, __file__, *sys.argv[1:]])
    import tiny
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as model:
        tiny.save(model)
        rounds = []
        for _ in tqdm(range(args.rounds)):
            rounds.append(
                {
                    name: tiny.in_process(__file__, "--one", name, model, "--steps", args.steps)
                    for name in PROGRAMS
                }
            )
    print(
        f"{tiny.machine()}, {TRL}; {args.rounds} rounds of {args.steps} steps, median (lowest "
        "to highest); tokens are sampled ones\n"
    )
    print(
        "| | tokens/s | while sampling | seconds a step | peak memory, MiB "
        "| tokens/s, ours / it | memory, ours / it |\n|---|---|---|---|---|---|---|"
    )
    for name in PROGRAMS:
        mine = [r[name] for r in rounds]
        speed = [
            f"{tiny.spread([1 / row[phase] for row in mine], ',.0f')}"
            for phase in ("step", "sample")
        ]
        seconds = statistics.median(row["step"] * row["mean_tokens"] * 128 for row in mine)
        ratios = [
            tiny.spread([r[name]["step"] / r["ours"]["step"] for r in rounds]),
            tiny.spread([r["ours"]["bytes"] / r[name]["bytes"] for r in rounds]),
        ]
        print(
            "|",
            " | ".join(
                [
                    name,
                    *speed,
                    f"{seconds:.1f}",
                    tiny.spread([row["bytes"] / 2**20 for row in mine], ".0f"),
                    *(ratios if name != "ours" else ["", ""]),
                ]
            ),
            "|",
        )
    lengths = {name: statistics.mean(r[name]["mean_tokens"] for r in rounds) for name in PROGRAMS}
    print(
        "\nmean tokens of a sample: "
        + ", ".join(f"{name} {length:.0f}" for name, length in lengths.items())
    )


if __name__ == "__main__":
    main()
