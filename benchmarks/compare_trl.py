"""A full step of ours against TRL's GRPOTrainer: sample, score, update; in time and memory.

    python benchmarks/compare_trl.py [--model DIR]    # CPU; prints the tables of its README

Both train the same model on the same prompts x 8 samples, which stop at EOS or at the limit, on the
Dr. GRPO loss without clipping, AdamW, float32, one thread, without vLLM and without gradient
checkpointing: the tiny shape of tiny.py and, with --model (such as SmolLM2-135M-Instruct), its real
one. The programs take turns, each time in a new process of one step to warm up and a few to
measure. Memory is the most that a process adds to what it holds when everything is imported. The
virtual environment `.venv-trl` is made beside this file at the first call, from ours and TRL.
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
CHECKPOINTING = -1  # in place of TRL's batch: ours, which computes activations again, as by default
STATE = 16  # bytes a parameter: weight, gradient and two moments, in float32


def make_environment() -> Path:
    """-> its python."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        print(f"making {ENVIRONMENT}", file=sys.stderr)
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        packages = ["-r", HERE.parent / "requirements-cpu.txt", TRL]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


# ------------------------------------------------------------------ one program
def ours(model: str, shape: str, steps: int, **changes) -> list[dict]:
    import tiny

    tiny.luffy.init_processes()
    program = tiny.Ours(model, shape, **changes)
    rows = []
    for number in range(steps):
        row = program.step(number)
        row["prompt"] = statistics.mean(len(p.prompt_ids) for p in program.problems)
        del row["trajectories"]
        rows.append(row)
    return rows


def trl(model: str, shape: str, steps: int, batch: int) -> list[dict]:
    import datasets
    import tiny
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    size, rows = tiny.SHAPES[shape], []
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate_single_turn(*args, **kwargs)
            row = {"sample": time.perf_counter() - start, "tokens": sum(map(len, out[0]))}
            rows.append(row | {"prompt": statistics.mean(map(len, args[0]))})
            return out

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *args, **kwargs):
            rows[-1]["step"] = time.perf_counter() - self.start[0]
            rows[-1]["cpu"] = time.process_time() - self.start[1]

    def rewards(completions, **_):
        return [tiny.reward(text) for text in completions]

    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=rewards,
            callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_dict(
                {"prompt": size.texts(size.problems, tokenizer) * steps}
            ),
            args=GRPOConfig(
                output_dir=directory,
                max_steps=steps,
                num_generations=8,
                shuffle_dataset=False,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=size.problems * 8 // batch,
                max_completion_length=size.max_tokens,
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


def measure(model: str, shape: str, steps: int, budget: int, batch: int) -> None:
    """Print the medians of one process: ours, or TRL's with batches of this size."""
    import tiny

    if batch > 0:
        importlib.import_module("trl.trainer.grpo_trainer")  # imported, not memory of the step
    with tiny.PeakMemory() as peak:
        if batch > 0:
            rows = trl(model, shape, steps + 1, batch)[1:]
        else:
            how = dict(token_budget=budget, checkpointing=batch == CHECKPOINTING)
            rows = ours(model, shape, steps + 1, **how)[1:]
    out = {
        phase: statistics.median(row[phase] / row["tokens"] for row in rows)
        for phase in ("sample", "step", "cpu")
    }  # seconds a token
    samples = 8 * tiny.SHAPES[shape].problems
    out["mean_tokens"] = statistics.mean(row["tokens"] for row in rows) / samples
    out["prompt"] = rows[0]["prompt"]
    print("\n" + json.dumps(out | {"bytes": peak.bytes}), flush=True)
    os._exit(0)


# ------------------------------------------------------------------ all of them
def compare(model: str, shape: str, args: argparse.Namespace) -> None:
    """Print a table."""
    import tiny
    from machinery.model import load_config, parameter_sizes
    from tqdm import tqdm

    size = tiny.SHAPES[shape]
    programs = {"ours": 0, "ours, checkpointing": CHECKPOINTING}
    programs |= {f"TRL, batches of {batch}": batch for batch in args.batches}
    rounds = [{name: {} for name in programs} for _ in range(args.rounds)]
    with tqdm(total=args.rounds * len(programs), desc=shape) as bar:
        for turn in rounds:
            for name, batch in programs.items():
                job = "--one", model, shape, batch, "--steps", args.steps, "--budget", args.budget
                turn[name] = tiny.in_process(__file__, *job)
                bar.update()
    state = STATE * sum(parameter_sizes(load_config(model)))
    print(
        f"\n{shape} shape: {size.problems} prompts x 8 samples of up to {size.max_tokens} tokens, "
        f"{state / STATE / 1e6:,.1f} million parameters; {tiny.machine()}, {TRL}; {args.rounds} "
        f"rounds of {args.steps} steps, median (lowest to highest); tokens are sampled ones\n"
    )
    tiny.show_head(
        *("", "tokens/s", "while sampling", "seconds a step", "tokens/s, ours / it"),
        *("the same by CPU time", "peak memory, MiB", "memory, ours / it", "of it state"),
    )
    for name in programs:
        mine = [turn[name] for turn in rounds]
        seconds = statistics.median(r["step"] * r["mean_tokens"] * size.problems * 8 for r in mine)
        ratios = [
            tiny.spread([turn[name]["step"] / turn["ours"]["step"] for turn in rounds]),
            tiny.spread([turn[name]["cpu"] / turn["ours"]["cpu"] for turn in rounds]),
            tiny.spread([turn["ours"]["bytes"] / turn[name]["bytes"] for turn in rounds]),
        ]
        speed, memory, ratio = (
            [tiny.spread([1 / row[phase] for row in mine], ",.0f") for phase in ("step", "sample")],
            tiny.spread([row["bytes"] / 2**20 for row in mine], ",.0f"),
            ratios if name != "ours" else [""] * 3,
        )
        share = tiny.spread([state / row["bytes"] for row in mine])
        tiny.show(name, *speed, f"{seconds:.1f}", *ratio[:2], memory, ratio[2], share)
    print(
        "\nmean tokens of a prompt and of a sample: "
        + ", ".join(
            f"{name} {statistics.mean(turn[name]['prompt'] for turn in rounds):.0f} and "
            f"{statistics.mean(turn[name]['mean_tokens'] for turn in rounds):.0f}"
            for name in programs
        )
    )


def main() -> None:
    print_what_can_be()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a directory; adds the real shape")
    parser.add_argument("--shapes", nargs="+", choices=("tiny", "real"), help="not all of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured in a process")
    parser.add_argument("--budget", type=int, default=512, help="tokens of a micro-batch of ours")
    # Of 8, 16, 32 and 128, at the tiny shape, TRL's default is the fastest and the leanest here.
    parser.add_argument("--batches", type=int, nargs="+", default=[8], help="TRL's, trajectories")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = args.shapes or ["tiny"] + ["real"] * bool(args.model)
    if "real" in shapes and not args.model:
        parser.error("the real shape needs --model DIR")
    if args.one:
        return measure(*args.one[:2], args.steps, args.budget, int(args.one[2]))
    python = make_environment()
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        os.execv(python, [python, __file__, *sys.argv[1:]])
    import tiny

    with tempfile.TemporaryDirectory() as directory:
        for shape in shapes:
            compare(tiny.save(directory) if shape == "tiny" else args.model, shape, args)


if __name__ == "__main__":
    main()
