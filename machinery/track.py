"""--track: metrics and evaluations in wandb, trackio or tensorboard, too.

A tracked run belongs to a run directory, which holds its name. When the run directory is opened,
the tracked run gets all that its log holds, so that it is the same one, and has no step twice,
after a kill and where tracking begins late.
"""

import os
import secrets
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machinery.files import read_jsonl, write
from machinery.metrics import evaluation_metrics
from machinery.processes import InputError, ending

PROJECT = "luffy"
Log = Callable[[dict[str, float], int], None]  # of metrics and their step
Finish = Callable[[bool], None]  # of: did the run fail?


def tensorboard(out: Path, name: str, config: dict) -> tuple[Log, Finish]:
    """Event files in the run directory. The last one hides the others."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out, purge_step=0)

    def log(metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, lambda failed: writer.close()


def trackio(out: Path, name: str, config: dict) -> tuple[Log, Finish]:
    """A run of trackio's local database, emptied if it is there: it would keep steps twice."""
    import trackio

    with suppress(ValueError):  # no such project yet
        for run in trackio.Api().runs(PROJECT):
            if run.name == name:
                run.delete()
    run = trackio.init(PROJECT, name, config=config)
    return run.log, lambda failed: run.finish()


def wandb(out: Path, name: str, config: dict) -> tuple[Log, Finish]:
    """A run of wandb that goes on. It never takes a step twice: the first values stay."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    how: Any = dict(project=project, id=name, name=name, dir=out, config=config, resume="allow")
    try:
        run = wandb.init(**how)
    except wandb.Error as error:  # no account, no network
        raise InputError(f"--track wandb: {error} Or set WANDB_MODE=offline") from None

    def log(metrics: dict[str, float], step: int) -> None:
        if step >= run.starting_step:
            run.log(metrics, step=step)

    def finish(failed: bool) -> None:
        run.finish(exit_code=int(failed))
        wandb.teardown()  # waits until its process has written everything

    return log, finish


TRACKERS = {"wandb": wandb, "trackio": trackio, "tensorboard": tensorboard}


def check(tracker: str) -> None:
    """Raise InputError if it is not installed."""
    spec = find_spec(tracker) if tracker else None
    if tracker and not (spec and spec.origin):  # none: a mere directory of that name
        raise InputError(f"--track {tracker}: not installed; pip install {tracker}")


def start(tracker: str, out: Path, config: dict[str, Any]) -> Log:
    """What logs metrics of a step; the tracked run ends when the program's main does."""
    if not tracker:
        return lambda metrics, step: None
    kept = out / "tracked_as.txt"
    if not kept.exists():
        write(kept, f"{out.resolve().name}-{secrets.token_hex(4)}")
    log, finish = TRACKERS[tracker](out, kept.read_text("utf-8"), config)
    ending.push(lambda error, *_: finish(error is not None))
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for row in read_jsonl(out / "metrics.jsonl"):
        rows[row.pop("step")] |= row
    for row in read_jsonl(out / "evals.jsonl"):
        rows[row["step"]] |= evaluation_metrics(row["scores"])
    for step in sorted(rows):
        log(rows[step], step)
    return log
