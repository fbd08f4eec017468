"""The machinery of a run: processes, metrics; its directory, log and resumption.

A run directory holds
    config.json            what was asked for; the same command with the same --out resumes
    metrics.jsonl          one object a step; on a CPU the same bits if the run was interrupted
    timing.jsonl           one object a step: seconds and tokens per second of each phase; "sync",
                           new weights for the sampler, is part of "sample" with vLLM
    evals.jsonl            one object for each evaluation
    samples/               groups of trajectories with their tokens' log-probs, every few steps
    watched.jsonl          log-probs of the first groups' traces, always the same, every few steps
    checkpoint-STEP/       a model that from_pretrained loads, and the optimizer's shards
    curves.png             drawn at the end and on Ctrl-C
    report.html            made at the end and on Ctrl-C: a page to look into all of this
Rank 0 writes all of it, but for the optimizer's shards.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

# A finished or interrupted run may go on with these changed: they do not change the mathematics.
MAY_CHANGE = {"out", "steps", "save_every", "eval_every", "sample_every", "sample_groups",
              "graders", "token_budget", "sampler", "tensor_parallel", "cache_gib",
              "checkpointing"}


class InputError(ValueError):
    """The user's input cannot be used. The message names the flag, file or row, and the fix."""


# ------------------------------------------------------------------ processes
def init_processes() -> None:
    """Join torchrun's process group, or make one of a single process."""
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    timeout = timedelta(hours=2)  # ranks wait for the one with the longest responses
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def all_reduce(value: float, op=dist.ReduceOp.SUM) -> float:
    """One number over all ranks."""
    x = torch.tensor(float(value), dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x.item()


def gather(value) -> list:
    """Every rank's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    all_reduce(0)


def launch(main) -> None:
    """Run a program's main and leave at once, whatever happened.

    At the usual exit vLLM and NCCL take leave of ranks that may be waiting elsewhere, for hours;
    torchrun ends those, but only when this process is gone. (And gloo aborts, now and then.)
    """
    try:
        record(main)()  # torchrun then has the error in its summary
        barrier()  # a rank that is gone early would look like one that died
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def seed_of(*key) -> int:
    """A seed as a function of what it is for, such as (seed, step, problem)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def say(*words) -> None:
    """print, by rank 0 alone."""
    if rank() == 0:
        print(*words, flush=True)


def progress(name: str, total: int) -> tqdm:
    """A bar for what takes longer than two seconds; silent on ranks other than 0."""
    return tqdm(total=total, desc=name, leave=False, delay=2, disable=rank() != 0)


# ------------------------------------------------------------------ metrics
class Means:
    """Averages and maxima of quantities that come in parts, from micro-batches and from ranks."""

    def __init__(self):
        self.parts = defaultdict(lambda: (0.0, 0))  # name -> (sum, count)
        self.peaks = {}  # name -> maximum

    def add(self, name: str, values: torch.Tensor | list) -> None:
        values = torch.as_tensor(values, dtype=torch.float64)
        total, count = self.parts[name]
        self.parts[name] = total + values.sum().item(), count + values.numel()

    def peak(self, name: str, values: torch.Tensor) -> None:
        if values.numel():
            self.peaks[name] = max(values.max().item(), self.peaks.get(name, -math.inf))

    def reduce(self) -> dict[str, float]:
        """name -> mean (or maximum) over all ranks, for every name with a value."""
        all_ranks = Means()
        for parts, peaks in gather((dict(self.parts), self.peaks)):
            for name, (total, count) in parts.items():
                sum_so_far, count_so_far = all_ranks.parts[name]
                all_ranks.parts[name] = sum_so_far + total, count_so_far + count
            for name, value in peaks.items():
                all_ranks.peak(name, torch.tensor(value, dtype=torch.float64))
        return all_ranks.peaks | {name: total / count for name, (total, count)
                                  in all_ranks.parts.items() if count}


def trajectory_metrics(trajectories: list, rewards: Tensor, eos: int) -> dict[str, float]:
    """Means over all ranks' trajectories, rollouts and traces apart; rewards (P, rollouts)."""
    means = Means()
    for t in trajectories:
        kind = "trace_" if t.off_policy else ""
        means.add(f"{kind}reward", [t.reward])
        means.add(f"{kind}length", [len(t.response)])
        if not t.off_policy:
            means.add(f"reward/{t.problem.source}", [t.reward])
            means.add("truncated", [t.response[-1] != eos])
    if rewards.numel():
        solved = rewards.mean(dim=1)
        means.add("groups/none", solved == 0)
        means.add("groups/mixed", (solved > 0) & (solved < 1))
        means.add("groups/all", solved == 1)
    return means.reduce()


def add_token_metrics(means: Means, batch, logp: Tensor, old: Tensor, entropy: Tensor,
                      shaped: Tensor) -> None:
    """From one micro-batch, all (N,): each metric over rollout tokens or over trace tokens only."""
    on, off = ~batch.off_policy, batch.off_policy
    log_ratio = (old - batch.logp_sampler)[on]  # the sampler's numerics against the trainer's
    means.add("entropy", entropy[on])
    means.add("ratio", (logp - old)[on].exp())
    means.add("ratio_far", ((logp - old)[on].abs() > 0.2).float())
    # k3 of http://joschu.net/blog/kl-approx.html: unbiased for KL(sampler || trainer)
    means.add("sampler_kl", log_ratio.exp() - 1 - log_ratio)
    means.peak("sampler_ratio_max", log_ratio.exp())  # --tis_cap cuts it
    means.add("trace_prob", logp[off].exp())
    means.add("trace_unlikely", logp[off] < math.log(0.1))  # those that shaping is for
    means.add("trace_weight", shaped[off])


def as_rows(trajectories: list, tokenizer) -> list[dict]:
    """A row a trajectory, to look at; log-probs as of the update."""
    return [{"position": t.position, "source": t.problem.source, "off_policy": t.off_policy,
             "prompt": tokenizer.decode(t.problem.prompt_ids), "answer": t.problem.answer,
             "response": tokenizer.decode(t.response), "reward": t.reward,
             "advantage": t.advantage, "tokens": token_texts(t.response, tokenizer),
             "logp": rounded(t.logp), "logp_old": rounded(t.logp_old)} for t in trajectories]


def token_texts(ids: list[int], tokenizer) -> list[str]:
    """The text of each token. A character whose bytes several tokens share is the last one's."""
    texts = tokenizer.batch_decode([[i] for i in ids])
    for end, text in enumerate(texts, start=1):
        if "\ufffd" in text:  # a character has four bytes at most
            for start in range(end - 2, max(end - 5, -1), -1):
                whole = tokenizer.decode(ids[start:end])
                if "\ufffd" not in whole:
                    texts[start:end] = [""] * (end - 1 - start) + [whole]
                    break
    return texts


def rounded(logps: Tensor | None) -> list[float] | None:
    """To five digits, not decimals: log π of a sure token is π - 1, which must not become 0."""
    return None if logps is None else [float(f"{x:.5g}") for x in logps.tolist()]


# ------------------------------------------------------------------ the run directory
class Run:
    """The run directory of a config, opened: `checkpoint` says where to go on."""

    def __init__(self, cfg):
        self.cfg, self.out = cfg, Path(cfg.out)
        self.seconds = defaultdict(float)
        self.check()
        done = checkpoints(self.out)
        self.checkpoint = done[-1] if done else None
        self.first_step = int(done[-1].name.split("-")[1]) if done else 0
        self.asked_to_stop = 0.0  # when
        self.stopped = False  # agreed upon by all ranks
        barrier()
        if rank() == 0:
            self.prepare()
        barrier()
        if all_reduce(not (self.out / "config.json").exists()):
            raise InputError(f"--out {self.out}: not all ranks see what rank 0 writes there; name "
                             "a directory on a file system that all nodes share")

    def check(self) -> None:
        """Refuse the directory of another run."""
        if not self.out.exists():
            return
        config = self.out / "config.json"
        old = json.loads(config.read_text()) if config.is_file() else {}
        if "algo" not in old:  # a model's directory has a config.json, too
            if not self.out.is_dir() or any(self.out.iterdir()):
                raise InputError(f"--out {self.out} exists and is not a run of this program; "
                                 "name another directory")
            return
        new = asdict(self.cfg)
        differ = [f"{k} was {old.get(k)!r}, now {new[k]!r}" for k in new
                  if k not in MAY_CHANGE and old.get(k) != new[k]]
        if differ and read_jsonl(self.out / "metrics.jsonl"):  # else there is nothing to lose
            raise InputError(f"--out {self.out} holds a run with another configuration: "
                             f"{'; '.join(differ)}. Name another --out, or use the old values")

    def prepare(self) -> None:
        """Make the directory; drop what a killed run logged after its last checkpoint."""
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        write(self.out / "config.json", json.dumps(asdict(self.cfg), indent=1))
        for name in ("metrics", "timing", "evals", "watched"):
            rows = [row for row in read_jsonl(self.out / f"{name}.jsonl")
                    if row["step"] <= self.first_step and self.checkpoint]
            write(self.out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for file in (self.out / "samples").glob("step-*.jsonl"):
            if int(file.stem.split("-")[1]) > self.first_step:
                file.unlink()
        if self.checkpoint:
            say(f"resuming {self.out} after step {self.first_step}")

    # -------------------------------------------------------------- the steps
    def steps(self) -> Iterator[int]:
        """From the last checkpoint to --steps. Ctrl-C or SIGTERM ends it after the step."""
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(number, self.ask_to_stop) for number in signals]
        try:
            for step in range(self.first_step, self.cfg.steps):
                yield step
                if self.stopped:
                    break
        finally:
            for number, handler in zip(signals, handlers):
                signal.signal(number, handler)

    def ask_to_stop(self, number: int, _frame) -> None:
        """A second Ctrl-C stops at once, but torchrun's echo of the first one does not."""
        if number == signal.SIGINT and 0 < self.asked_to_stop < time.monotonic() - 2:
            raise KeyboardInterrupt
        if not self.asked_to_stop and rank() == 0:  # os.write: print may be what was interrupted
            os.write(2, b"\nstopping after this step, with a checkpoint (again: now, without)\n")
        self.asked_to_stop = self.asked_to_stop or time.monotonic()

    def due(self, step: int) -> tuple[bool, bool]:
        """After a step: evaluate? save? The same answers on every rank."""
        self.stopped = all_reduce(self.asked_to_stop, dist.ReduceOp.MAX) > 0
        every, done = self.cfg.eval_every, step + 1 == self.cfg.steps
        return (done or every > 0 and (step + 1) % every == 0,
                done or self.stopped or (step + 1) % self.cfg.save_every == 0)

    # -------------------------------------------------------------- the log
    @contextmanager
    def clock(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def log_step(self, step: int, metrics: dict, trajectories: list, tokenizer) -> None:
        """step: how many are done."""
        sampled = sum(len(t.response) for t in trajectories if not t.off_policy)
        trained = sum(len(t.problem.prompt_ids) + len(t.response) for t in trajectories)
        tokens = {"sample": all_reduce(sampled), "update": all_reduce(trained)}
        row = {"step": step} | {k: metrics[k] for k in sorted(metrics)}
        if rank() == 0:
            append(self.out / "metrics.jsonl", row)
            append(self.out / "timing.jsonl", {"step": step} | dict(self.seconds) | {
                f"tokens_per_second/{phase}": count / max(self.seconds[phase], 1e-9)
                for phase, count in tokens.items()})
            if self.shown(step):
                positions = sorted({t.position for t in trajectories})
                n = min(self.cfg.sample_groups, len(positions))  # of the later updates, too
                kept = [positions[i * len(positions) // n] for i in range(n)]
                rows = as_rows([t for t in trajectories if t.position in kept], tokenizer)
                write(self.out / "samples" / f"step-{step:06d}.jsonl",
                      "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(one_line(row, self.seconds), flush=True)
        self.seconds.clear()

    def shown(self, step: int) -> bool:
        """Is this one of the steps whose groups are kept?"""
        return (step in (1, self.cfg.steps) or self.stopped
                or step % self.cfg.sample_every == 0)

    def log_watched(self, step: int, traces: list, tokenizer) -> None:
        """log-probs of the same traces, after so many steps; what they are, in the first row."""
        if rank() == 0 and traces:
            file = self.out / "watched.jsonl"
            rows = [{"position": t.position, "logp": rounded(t.logp_old)} for t in traces]
            if not file.stat().st_size:
                rows = [row | {"source": t.problem.source, "answer": t.problem.answer,
                               "prompt": tokenizer.decode(t.problem.prompt_ids),
                               "tokens": token_texts(t.response, tokenizer)}
                        for row, t in zip(rows, traces)]
            append(file, {"step": step, "traces": rows})

    def log_evaluation(self, step: int, scores: dict[str, dict]) -> None:
        if rank() == 0 and scores:
            append(self.out / "evals.jsonl", {"step": step, "scores": scores})

    # -------------------------------------------------------------- checkpoints
    def save(self, step: int, model, tokenizer, optimizer) -> None:
        """A complete checkpoint or none: written under another name, then renamed."""
        final = self.out / f"checkpoint-{step:06d}"
        half_written = self.out / f".{final.name}.tmp"
        if rank() == 0:
            shutil.rmtree(half_written, ignore_errors=True)
            model.save_pretrained(half_written)
            tokenizer.save_pretrained(half_written)
        barrier()
        torch.save(optimizer.state_dict(), half_written / f"optimizer-{rank()}.pt")
        barrier()
        if rank() == 0:
            half_written.rename(final)
            for old in self.out.glob("checkpoint-[0-9]*/optimizer-*.pt"):  # only the newest resumes
                if old.parent != final:
                    old.unlink()
        barrier()

    def restore(self, optimizer) -> None:
        """The optimizer's state from the checkpoint, whatever number of ranks wrote it."""
        if self.checkpoint:
            state = {}
            for shard in self.checkpoint.glob("optimizer-*.pt"):
                state |= torch.load(shard, map_location="cpu", mmap=True)
            try:
                optimizer.load_state_dict(state)
            except KeyError as error:
                raise InputError(
                    f"{self.checkpoint}: no optimizer state for parameter {error}; only the newest "
                    "checkpoint keeps it. Start a new run with --model from this one") from None


def checkpoints(run: Path) -> list[Path]:
    """Complete ones, the newest last: a half-written one has another name."""
    return sorted(run.glob("checkpoint-[0-9]*"))


def one_line(row: dict, seconds: dict) -> str:
    """A step for a person: what the rows of metrics.jsonl hold, abbreviated."""
    def number(name: str, form: str = ".2f") -> str:
        text = format(row[name], form) if name in row else "-"
        return text[1:] if text.startswith("0.") else text

    sources = " ".join(f"{k[7:]} {number(k)}" for k in row if k.startswith("reward/"))
    groups = "/".join(number(f"groups/{kind}") for kind in ("none", "mixed", "all"))
    return " | ".join((
        f"step {row['step']}",
        f"reward {number('reward')} ({sources}, trace {number('trace_reward')})",
        f"groups 0/mix/1 {groups}", f"len {number('length', '.0f')}",
        f"trunc {number('truncated', '.0%')}", f"H {number('entropy')}",
        f"π(trace) {number('trace_prob')}", f"gnorm {number('grad_norm', '.3f')}",
        " ".join(f"{phase} {spent:.1f}s" for phase, spent in seconds.items())))


def read_jsonl(path: Path) -> list[dict]:
    """The complete rows of a file; a killed run may have left half a row at its end."""
    rows = []
    for line in path.read_text().split("\n") if path.exists() else []:  # U+2028 is text
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(path: Path, text: str) -> None:
    """The whole file or the old one."""
    half_written = path.with_name(f".{path.name}.tmp")
    half_written.write_text(text)
    half_written.rename(path)
