"""The run directory: its log, checkpoints and resumption. Rank 0 writes all but optimizer shards.

config.json            what was asked for, and hashes of the problems; the same command with the
                       same --out resumes
metrics.jsonl          one object a step; on a CPU the same bits if the run was interrupted,
                       and went on with as many processes
timing.jsonl           one object a step: seconds and tokens per second of each phase
evals.jsonl            one object for each evaluation
samples/               groups of trajectories with what was computed of their tokens
watched.jsonl          the same values for a fixed set of traces, every few steps
checkpoint-STEP/       a model that from_pretrained loads, and the optimizer's shards; the last
                       two keep these
curves.png             drawn after the first step, evaluations, checkpoints, and at the end
report.html            made whenever curves.png is: a page to look into all of this
tracked_as.txt         the run's name in another program: --track
printed.txt            what was printed when stdout or stderr had gone, as with a terminal
.lock                  held by the process that writes here
"""

import hashlib
import json
import os
import shutil
import signal
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from machinery import checkpoints, track
from machinery.batches import Trajectory
from machinery.files import append, lock, read_json, read_jsonl, sync, to_jsonl, write, writing
from machinery.flags import Config
from machinery.kinds import PreTrainedModel, Tokenizer
from machinery.metrics import evaluation_metrics, one_line
from machinery.printing import Output, go_on
from machinery.reward import version
from machinery.processes import InputError, all_reduce, barrier, by_rank_0, rank, say
from machinery.scores import draw

# A finished or interrupted run may go on with these changed: they do not change the objective,
# but for `steps` where a schedule may use it.
MAY_CHANGE = {"out", "steps", "save_every", "eval_every", "sample_every", "sample_groups", "note"}
MAY_CHANGE |= {"graders", "token_budget", "sampler", "tensor_parallel", "cache_gib", "keep"}
MAY_CHANGE |= {"checkpointing", "track", "dry_run", "preflight", "device", "offload_optimizer"}
# Fields of a Trajectory that report.html shows: of the whole, of each token.
VERDICTS = "right", "reward", "advantage", "learns", "inv_z"
TOKENS = "logp", "logp_behavior", "factor", "slope"
LOGS = "metrics.jsonl", "timing.jsonl", "evals.jsonl", "watched.jsonl"
HASHES = "data_sha256", "eval_data_sha256", "reward_sha256"
Problem = Any  # data.Problem: the machinery imports none of the files on top

Kept = TypeVar("Kept")


class Due(NamedTuple):
    """What is to be done after a step: the same on every rank."""

    show: bool  # keep groups and watched traces for report.html
    evaluate: bool
    save: bool


class Run:
    """The run directory of a config, opened: `checkpoint` says where to go on."""

    def __init__(self, cfg: Config):
        self.cfg, self.out = cfg, Path(cfg.out)
        self.seconds: dict[str, float] = defaultdict(float)
        self.kept: dict[str, Any] = {}  # what checkpoints hold besides the model
        self.track: track.Log = lambda metrics, step: None
        self.asked_to_stop = 0.0  # when
        self.stopped = False  # agreed upon by all ranks
        self.was_due = Due(show=False, evaluate=False, save=False)  # after the step before
        by_rank_0(self.take)
        if all_reduce(not (self.out / "config.json").exists()):
            raise InputError(
                f"--out {self.out}: not all ranks see what rank 0 writes there; name a directory "
                "on a file system that all nodes share"
            )
        if Output.instead:
            go_on(self.out / "printed.txt")
        self.checkpoint = checkpoints.to_resume(self.out)
        self.first_step = checkpoints.step_of(self.checkpoint) if self.checkpoint else 0
        if not self.checkpoint:
            by_rank_0(self.cut_logs)

    def check(self) -> None:
        """Refuse the directory of another run, and one below a file."""
        if file := next((p for p in self.out.absolute().parents if p.is_file()), None):
            raise InputError(f"--out {self.out}: {file} is a file; name another directory")
        if not self.out.exists():
            return
        config = self.out / "config.json"
        old = read_json(config) if config.is_file() else {}
        if "algo" not in old:  # a model's directory has a config.json, too
            # of a start that died at once, or of a preflight
            own = {".lock", ".config.json.tmp", f".preflight-{self.out.name}"}
            if not self.out.is_dir() or {p.name for p in self.out.iterdir()} - own:
                raise InputError(
                    f"--out {self.out} exists and is not a run of this program; name another "
                    "directory"
                )
            return
        new = asdict(self.cfg)
        # of a version with fewer fields; none had a scale; a fork's are not luffy.py's
        old = {f.name: f.default for f in fields(type(self.cfg).__mro__[-2])} | {"scale": 1.0} | old
        uses_steps = new["schedule"] != "constant" or new["prefix"] != "none"
        may_change = MAY_CHANGE - ({"steps"} if uses_steps else set())
        if checkpoints.checkpoints(self.out):  # then `begin` compares the hashes
            may_change |= {name.removesuffix("_sha256") for name in HASHES[:2] if name in old}
        differ = [
            f"{name} was {old.get(name, 'no flag')!r}, now {new[name]!r}"
            for name in new
            if name not in may_change and (name not in old or old[name] != new[name])
        ]
        gone = old.keys() - new.keys() - set(HASHES)
        differ += [f"{n} was {old[n]!r}, now there is no such flag" for n in sorted(gone)]
        rows = read_jsonl(self.out / "metrics.jsonl", step=int)  # none: there is nothing to lose
        if rows and rows[-1]["step"] > old["save_every"] and not checkpoints.checkpoints(self.out):
            raise InputError(
                f"--out {self.out}: its metrics.jsonl goes to step {rows[-1]['step']}, and there "
                "is no checkpoint to go on from. Put it back, or name another --out"
            )
        if differ and rows:
            raise InputError(
                f"--out {self.out} holds a run with another configuration: {'; '.join(differ)}. "
                "Name another --out, or use the old values"
            )

    def take(self) -> None:
        """Make the directory this run's, by rank 0, before anything else is written there."""
        with writing(self.out):
            self.check()
        lock(self.out)
        self.check()  # another run may just have ended there
        checkpoints.remove_half_written(self.out)
        config = self.out / "config.json"
        old = read_json(config) if config.exists() else {}
        self.write_config({name: old[name] for name in HASHES if name in old})
        with writing(self.out / "samples"):
            (self.out / "samples").mkdir(exist_ok=True)

    def write_config(self, hashes: dict[str, str]) -> None:
        write(self.out / "config.json", json.dumps(asdict(self.cfg) | hashes, indent=1))

    def begin(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        problems: list[Problem],
        held_out: list[Problem],
        optimizer: Any,
    ) -> None:
        """Before the first step: restore, try to save, and only then drop what a killed run logged
        after its last checkpoint. Raises InputError if it cannot go on, or could not save."""
        self.keep("optimizer", optimizer)
        if self.first_step < self.cfg.steps:
            self.try_to_save(model, tokenizer, problems)
        by_rank_0(lambda: self.compare_problems(problems, held_out))
        if self.checkpoint:
            by_rank_0(self.cut_logs)
            say(f"resuming {self.out} after step {self.first_step}")
        if rank() == 0:
            self.track = track.start(self.cfg.track, self.out, asdict(self.cfg))
        barrier()

    def compare_problems(self, *found: list[Problem]) -> None:
        """With those that the run began with, by their hashes in config.json."""
        known, hashes = read_json(self.out / "config.json"), dict(zip(HASHES, map(digest, found)))
        for name, now in hashes.items():
            if self.checkpoint and known.get(name, now) != now:
                flag = name.removesuffix("_sha256")
                raise InputError(
                    f"--{flag} {getattr(self.cfg, flag)}: its problems, traces or their rewards "
                    f"are not those that the run in {self.out} began with. Put the old ones back, "
                    "or name another --out"
                )
        hashes["reward_sha256"] = version(self.cfg.reward)
        if self.checkpoint and known.get("reward_sha256", "") not in ("", hashes["reward_sha256"]):
            say(f"reward      {self.cfg.reward}: its file has changed, and counts from here on")
        self.write_config(hashes)

    def cut_logs(self) -> None:
        """To what was logged up to the checkpoint. All are read before one is written."""
        rows: dict[str, list[dict]] = {name: [] for name in LOGS}
        if self.checkpoint:
            rows = {name: read_jsonl(self.out / name, step=int) for name in LOGS}
        steps = [row["step"] for row in rows["metrics.jsonl"] if row["step"] <= self.first_step]
        if steps != [*range(1, self.first_step + 1)]:
            raise InputError(
                f"{self.out / 'metrics.jsonl'} does not have each step up to the checkpoint's, "
                f"{self.first_step}, once: something else wrote there. Put the old one back, or "
                "name another --out, and with --model the checkpoint"
            )
        for name, found in rows.items():
            kept = [row for row in found if row["step"] <= self.first_step]
            write(self.out / name, to_jsonl(kept))
        for file in (self.out / "samples").glob(f"step-{6 * '[0-9]'}.jsonl"):
            if int(file.stem.split("-")[1]) > self.first_step:
                file.unlink()

    # -------------------------------------------------------------- the steps
    def steps(self) -> Iterator[int]:
        """From the last checkpoint to --steps. Ctrl-C, SIGTERM or SIGHUP ends it after the step."""
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)  # the terminal has gone; with nohup that is nothing
        handlers = [signal.signal(number, self.ask_to_stop) for number in signals]
        try:
            for step in range(self.first_step, self.cfg.steps):
                yield step
                if self.stopped:
                    break
                if rank() == 0:
                    self.draw(step + 1)
        finally:
            for number, handler in zip(signals, handlers):
                signal.signal(number, handler)

    def draw(self, step: int) -> None:
        """Something to look at while the run goes on; `report` draws the last, and all of few."""
        due, first, steps = self.was_due, step == self.first_step + 1, self.cfg.steps
        if (first or due.save or due.evaluate) and self.cfg.sample_every < steps != step:
            try:
                draw(self.out)
                if first:
                    print(f"look inside {self.out / 'report.html'}, made anew at each checkpoint")
            except Exception as error:  # it ends no run
                print(f"no report.html yet: {type(error).__name__}: {error}"[:300])

    def ask_to_stop(self, number: int, _frame: Any) -> None:
        """A second Ctrl-C stops at once, but torchrun's echo of the first one does not."""
        if number == signal.SIGINT and 0 < self.asked_to_stop < time.monotonic() - 2:
            raise KeyboardInterrupt
        if not self.asked_to_stop and rank() == 0:
            words = "stopping after this step, with a checkpoint (Ctrl-C again: at once, without)"
            with suppress(OSError):  # SIGHUP: the terminal has gone
                os.write(2, f"\n{words}\n".encode())  # print may be what was interrupted
        self.asked_to_stop = self.asked_to_stop or time.monotonic()

    def due(self, step: int) -> Due:
        """After `step` steps. It all-reduces, so that all ranks stop together."""
        cfg, last = self.cfg, step == self.cfg.steps
        self.stopped = all_reduce(self.asked_to_stop, dist.ReduceOp.MAX) > 0
        self.was_due = Due(
            show=last or self.stopped or step <= 1 or step % cfg.sample_every == 0,
            evaluate=last or step == 0 or cfg.eval_every > 0 and step % cfg.eval_every == 0,
            save=last or self.stopped or step % cfg.save_every == 0,
        )
        return self.was_due

    # -------------------------------------------------------------- the log
    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def log_step(
        self,
        step: int,
        metrics: dict[str, float],
        trajectories: list[Trajectory],
        tokenizer: Tokenizer,
        show: bool,
    ) -> None:
        """When `step` steps are done. show: keep groups for report.html, too."""
        sampled = sum(len(t.response) - t.trace_tokens for t in trajectories)
        trained = sum(len(t.problem.prompt_ids) + len(t.response) for t in trajectories)
        tokens = {"sample": all_reduce(sampled), "update": all_reduce(trained)}
        speed = {
            f"tokens_per_second/{phase}": count / max(self.seconds[phase], 1e-9)
            for phase, count in tokens.items()
        }
        row = {"step": step} | {name: metrics[name] for name in sorted(metrics)}
        if rank() == 0:
            append(self.out / "metrics.jsonl", row)
            append(self.out / "timing.jsonl", {"step": step} | self.seconds | speed)
            self.track(metrics, step)
            print(one_line(row, self.seconds), flush=True)
            if show:
                self.log_samples(step, trajectories, tokenizer)
        self.seconds.clear()

    def log_samples(self, step: int, trajectories: list[Trajectory], tokenizer: Tokenizer) -> None:
        """This rank's groups, spread over the updates of the step."""
        positions = sorted({t.position for t in trajectories})
        n = min(self.cfg.sample_groups, len(positions))
        kept = [positions[i * len(positions) // n] for i in range(n)]
        shown = [t for t in trajectories if t.position in kept]
        rows = [described(t, tokenizer) | recorded(t, *VERDICTS, *TOKENS) for t in shown]
        write(self.out / "samples" / f"step-{step:06d}.jsonl", to_jsonl(rows))

    def log_watched(self, step: int, traces: list[Trajectory], tokenizer: Tokenizer) -> None:
        """What was recorded of the same traces, after so many steps; their text the first time."""
        if rank() == 0 and traces:
            file = self.out / "watched.jsonl"
            rows = [recorded(t, *TOKENS) for t in traces]
            if not file.stat().st_size:
                rows = [described(t, tokenizer) | row for t, row in zip(traces, rows)]
            append(file, {"step": step, "traces": rows})

    def log_evaluation(self, step: int, scores: dict[str, dict]) -> None:
        if rank() == 0 and scores:
            append(self.out / "evals.jsonl", {"step": step, "scores": scores})
            self.track(evaluation_metrics(scores), step)

    # -------------------------------------------------------------- checkpoints
    def save(self, step: int, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        """A complete checkpoint or none: written under another name, then renamed."""
        final = self.out / f"checkpoint-{step:06d}"
        half_written = self.out / f".{final.name}.tmp"

        def begin() -> None:
            for file in checkpoints.spare(self.out):  # the newest one, which stays, is complete
                file.unlink()
            checkpoints.save_model(half_written, model, tokenizer)
            for log in LOGS:  # a checkpoint without its log would be resumed
                sync(self.out / log)

        by_rank_0(begin)
        for name, kept in self.kept.items():
            checkpoints.save_state(half_written / f"{name}-{rank()}.pt", kept.state_dict())
        barrier()
        checkpoints.complete(half_written, final)
        if rank() == 0 and self.cfg.keep:
            for old in checkpoints.checkpoints(self.out)[: -self.cfg.keep]:
                checkpoints.remove(old)
        barrier()

    def try_to_save(
        self, model: PreTrainedModel, tokenizer: Tokenizer, problems: list[Problem]
    ) -> None:
        """Is there room for a checkpoint, can it be written, will it load? Else InputErrors."""
        states = {name: kept.state_dict() for name, kept in self.kept.items()}
        weights, state = checkpoints.sizes(model, list(states.values()))
        scratch = self.out / ".try.tmp"
        text = tokenizer.decode(problems[0].prompt_ids) if problems else "1 + 1"

        def try_model() -> None:
            old = sum(file.stat().st_size for file in checkpoints.spare(self.out))
            free, needed = shutil.disk_usage(self.out).free, weights + state - old
            if free < needed:
                raise InputError(
                    f"--out {self.out}: a checkpoint needs {needed / 2**30:.1f} GiB, and "
                    f"{free / 2**30:.1f} are free on that disk. Make room, or name another --out"
                )
            checkpoints.try_model(scratch, model, tokenizer, text)
            scratch.mkdir()

        by_rank_0(try_model)
        for name, kept in states.items():
            checkpoints.try_state(scratch / f"{name}-{rank()}.pt", kept)
        barrier()
        if rank() == 0:
            shutil.rmtree(scratch)

    def keep(self, name: str, kept: Kept) -> Kept:
        """Save this with each checkpoint, and take it from the one that the run goes on from.

        kept: state_dict() -> this rank's share, a dict; load_state_dict(the shares of all ranks, in
        one dict), which raises KeyError if they are not all there.
        """
        self.kept[name] = kept
        if self.checkpoint:
            state = {}
            for shard in self.checkpoint.glob(f"{name}-[0-9]*.pt"):
                state |= checkpoints.load_state(shard)
            try:
                kept.load_state_dict(state)
            except KeyError as error:
                raise InputError(
                    f"{self.checkpoint}: its {name} has no state for {error}; only the newest two "
                    "checkpoints keep it. Start a new run with --model from this one"
                ) from None
        return kept


def digest(problems: list[Problem]) -> str:
    """Of what problems are to a run: their tokens, golds and rewards, in their order."""
    found = hashlib.sha256()
    for problem in problems:
        for p in (problem, *problem.others):
            ids = p.prompt_ids, p.trace_ids
            facts = *map(len, ids), p.answer, p.source, p.trace_right, p.trace_reward, p.k
            found.update(repr((*facts, list(p.trace_logps))).encode("utf-8", "surrogatepass"))
            for tokens in ids:
                found.update(array("i", tokens))
    return found.hexdigest()


# ------------------------------------------------------------------ rows to look at
def described(t: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a trajectory is."""
    return {
        "position": t.position,
        "source": t.problem.source,
        "off_policy": t.off_policy,
        "prefix": t.prefix,
        "prompt": tokenizer.decode(t.problem.prompt_ids),
        "answer": t.problem.answer,
        "response": tokenizer.decode(t.response),
        "tokens": token_texts(t.response, tokenizer),
    }


def recorded(t: Trajectory, *names: str) -> dict[str, Any]:
    """What was computed of it: fields as they are, tensors to five digits.

    Digits, not decimals: log π of a sure token is π - 1, which must not become 0.
    """
    row = {name: getattr(t, name) for name in names}
    for name, value in row.items():
        if isinstance(value, Tensor):
            row[name] = [float(f"{x:.5g}") for x in value.tolist()]
    return row


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
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
