"""Processes: torchrun's ranks and their GPUs, numbers over all of them, how a program ends."""

import ctypes
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from machinery.files import InputError as InputError
from machinery.files import OwnInputError as OwnInputError
from machinery.printing import go_on, print_what_can_be

ending = ExitStack()  # closed when a program's main ends, however it does
DRIVER = Path("/proc/driver/nvidia/version")  # of the kernel's module, on Linux
EXPANDABLE = "expandable_segments:True"
PARENT = os.getppid()


def init_processes(device: str = "auto") -> None:
    """Join torchrun's process group, or make one of a single process; each on its GPU.

    device: auto, cuda or cpu. Raises InputError if there is, or has to be, a GPU that is no use.
    To be called before anything starts CUDA.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # then every torch.cuda.is_available() says no
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(hours=2)  # ranks wait for the one with the longest responses
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=lone_store(), rank=0, world_size=1)
    choose_device(device)


def die_with_parent() -> None:
    """A rank whose torchrun was killed would train on, beside the ranks of the next one. Linux."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != PARENT or is_orphan():
            os._exit(1)


def is_orphan() -> bool:
    """Did process 1 take this one over? In a container process 1 may be torchrun, a Python."""
    if os.getppid() != 1:
        return False
    try:
        return "python" not in os.path.basename(os.readlink("/proc/1/exe"))
    except OSError:  # it is another user's
        return True


def choose_device(asked: str) -> None:
    """Give this process its GPU; InputErrors as init_processes."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    complaint = OwnInputError if local == 0 else InputError  # one of a node's ranks says it
    if torch.cuda.is_available():
        if problem := ranks_problem(int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))):
            raise complaint(problem)
        return start_gpu(local)
    problem = "" if asked == "cpu" else gpu_problem()
    # A torch that was installed without CUDA is a choice, for small models: `model.find` knows.
    if problem and (asked == "cuda" or torch.version.cuda):
        raise complaint(f"--device {asked}: {problem}. Or --device cpu, for small models")
    if asked == "cuda":
        raise complaint("--device cuda: torch finds no GPU, and there is no driver of one")
    if problem:
        say(f"device      cpu: {problem}")


def start_gpu(index: int) -> None:
    # Runs that share a GPU with vLLM ran out of memory at the engine's second wake-up, with 15 to
    # 20 GiB reserved by torch and not allocated.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = EXPANDABLE
    use_expandable_segments(True)
    torch.cuda.set_device(index)


def use_expandable_segments(on: bool) -> None:
    """Allocate GPU memory from now on as the environment says, but off: never in such segments.

    The environment itself is read by torch once, which may be when it is imported.
    """
    names = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    settings = next((os.environ[name] for name in names if os.environ.get(name)), "")
    if EXPANDABLE in settings:  # all of them: a setting that is not given gets its default
        off = settings.replace(EXPANDABLE, "expandable_segments:False")
        torch._C._accelerator_setAllocatorSettings(settings if on else off)


def ranks_problem(ranks: int) -> str:
    """Why the ranks of this node cannot have a GPU each, and the fix; "" if they can."""
    count = torch.cuda.device_count()
    if ranks > count:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return (
            f"--nproc_per_node={ranks}: {ranks} processes and {count} GPUs that torch sees"
            + (f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden else "")
            + f". A process needs a GPU of its own: --nproc_per_node={count}, or more GPUs"
        )
    for i in range(ranks):
        major, minor = torch.cuda.get_device_capability(i)
        if major < 8:
            return (
                f"--device: GPU {i}, {torch.cuda.get_device_name(i)}, has compute capability "
                f"{major}.{minor}; bfloat16 and packed attention need 8.0 (A100, RTX 30) or more. "
                "CUDA_VISIBLE_DEVICES chooses other GPUs; --device cpu, for small models, none"
            )
    return ""


def gpu_problem() -> str:
    """Why torch cannot use the GPU that is there, and the fix; "" if it can, or there is none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or torch.cuda.is_available() or not (driver() or listed_gpus()):
        return ""
    if torch.version.cuda is None:
        return (
            f"there is a GPU, but torch {torch.__version__} was built without CUDA. On Linux `pip "
            "uninstall -y torch && pip install -r requirements.txt` gets the other one"
        )
    try:
        torch.cuda.init()
        words = "nothing"
    except RuntimeError as error:
        words = str(error).split("\n")[0]
    return (
        f"there is a GPU (driver {driver() or 'unknown'}), but torch {torch.__version__} cannot "
        f"use it: {words!r}. It is built for CUDA {torch.version.cuda}; CUDA 13 needs driver 580 "
        "or newer. A container needs --gpus all"
    )


def driver() -> str:
    """The version of the NVIDIA driver that is loaded, such as 580.95.05, or ""."""
    text = DRIVER.read_text("utf-8") if DRIVER.is_file() else ""
    found = re.search(r" (\d{3,}\.[\d.]+) ", text)
    return found[1] if found else ""


def listed_gpus() -> list[str]:
    """What `nvidia-smi -L` prints of each GPU, where there is such a program."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    try:
        asked = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    return [line for line in asked.stdout.splitlines() if line.startswith("GPU ")]


def lone_store() -> dist.Store:
    """Where a single process meets itself: without a port, and on Windows in a file."""
    if hasattr(dist, "HashStore"):
        return dist.HashStore()
    return dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def all_reduce(value: float, op: Any = dist.ReduceOp.SUM) -> float:
    """One number over all ranks: their sum, unless `op` says otherwise."""
    x = torch.tensor(float(value), dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x.item()


def gather(value: Any) -> list:
    """Every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def my_share(batch: list) -> dict[int, Any]:
    """Position -> item, of every world_size-th item of a batch."""
    return dict(list(enumerate(batch))[rank() :: world_size()])


def share(name: str, work: Callable[[list], list], items: list, at_once: int) -> list:
    """What `work` makes of each item, in their order. The ranks share the work, and get all of it.

    name: of a bar. at_once: items that a rank works on before the ranks meet, so that what is on
    its way between them is small. The InputError of one rank is raised on all of them.
    """
    done, ranks = [], world_size()
    with progress(name, len(items)) as bar:
        for i in range(0, len(items), at_once * ranks):
            block = items[i : i + at_once * ranks]
            mine: Any = block[rank() :: ranks]
            try:
                mine = work(mine) if mine else []
            except InputError as error:  # raised after the gather, where the others wait
                mine = InputError(str(error))
            for r, part in enumerate(gather(mine)):
                if isinstance(part, InputError):
                    raise part
                block[r::ranks] = part
            done += block
            bar.update(len(block))
    return done


def by_rank_0(work: Callable[[], None]) -> None:
    """Done by rank 0 alone, while the others wait; its InputError is raised on all of them."""
    complaint = ""
    if rank() == 0:
        try:
            work()
        except InputError as error:
            complaint = str(error)
    if complaint := gather(complaint)[0]:
        raise InputError(complaint)


def barrier() -> None:
    all_reduce(0)


def launch(main: Callable[[], None]) -> None:
    """Run a program's main and leave at once, whatever happened.

    At the usual exit vLLM and NCCL take leave of ranks that may be waiting elsewhere, for hours;
    torchrun ends those, but only when this process is gone. (And gloo aborts, now and then.) An
    InputError is a message, printed by rank 0, and no traceback.
    """
    print_what_can_be()

    def main_or_complaint() -> None:
        try:
            with ending:
                main()
        except InputError as error:
            program = os.path.basename(sys.argv[0])
            mine = rank() == 0 or isinstance(error, OwnInputError)
            sys.exit(f"{program}: {error}" if mine else 1)

    try:
        record(main_or_complaint)()  # torchrun then has the error in its summary
        barrier()  # a rank that is gone early would look like one that died
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    with suppress(SystemExit):  # nobody reads on
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def seed_of(*key: Any) -> int:
    """A seed as a function of what it is for, such as (seed, step, problem)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def say(*words: Any) -> None:
    """print, by rank 0 alone."""
    if rank() == 0:
        print(*words, flush=True)


def say_and_go_on(*words: Any) -> None:
    """say, by luffy.py: from here on it does not end where nobody reads what it prints."""
    go_on()
    say(*words)


def progress(name: str, total: int | None, items: Iterable | None = None) -> tqdm:
    """A bar for what takes longer than two seconds; silent on ranks other than 0."""
    return tqdm(items, total=total, desc=name, leave=False, delay=2, disable=rank() != 0)
