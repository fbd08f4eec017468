"""What tests share: a tiny untrained model of the toy, and the program as a user starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real data, where there is some
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(ROOT))

from luffy import ALGORITHMS  # noqa: E402
from machinery.rivals import ROWS  # noqa: E402
from verify import Grader  # noqa: E402

ALL_ROWS = tuple(ALGORITHMS)  # a fork adds its own when a test imports it


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that the last process to finish is not alone for long."""
    longest = "test_resume", "test_page", "test_algorithms", "test_grader", "test_preflight"
    items.sort(key=lambda item: not item.path.stem.startswith(longest))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random model of the toy's shape and its tokenizer: the program takes it for a toy."""
    from machinery import toy

    directory = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = toy.make_tokenizer()
    toy.make_model(tokenizer, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def rows(*quick: str) -> list:
    """Parameters: the paper's rows and the named ones of others; the rest is slow."""
    slow = set(ROWS) - set(quick)
    return [pytest.param(a, marks=[pytest.mark.slow] * (a in slow)) for a in ALL_ROWS]


class Judge(Grader):
    """Grades by a function of the jobs, in this process."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge

    def judged(self, jobs, lenient=None):
        return self.judge(jobs)

    __call__ = judged


def command(*args, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    return [*launcher, *map(str, args)]


@cache
def forks() -> subprocess.Popen:
    """The process that forks programs, one for all tests of this one."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "tests/preloaded.py"], cwd=ROOT, text=True, **pipes)


class Forked:
    """FILE.py ARGS or -m MODULE ARGS, as `python` would run it; one at a time."""

    def __init__(self, *args, ranks: int = 1):
        """ranks: as on nodes with one process each, without torchrun."""
        self.args, self.directory, envs = list(map(str, args)), tempfile.TemporaryDirectory(), [{}]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                alike = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
            alike |= dict(WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            envs = [alike | dict(RANK=str(rank)) for rank in range(ranks)]
        where = Path(self.directory.name)
        self.files = [[where / f"{x}{rank}" for rank in range(ranks)] for x in ("out", "err")]
        jobs = [
            [self.args, os.environ | env, str(out), str(err)]
            for env, out, err in zip(envs, *self.files)
        ]
        print(json.dumps(jobs), file=forks().stdin, flush=True)
        self.pids = json.loads(forks().stdout.readline())

    def text(self, error: bool = False) -> str:
        return "".join(f.read_text("utf-8") for f in self.files[error] if f.exists())

    def wait_for(self, printed: str) -> None:
        while printed not in self.text():
            alive = all(Path(f"/proc/{pid}").exists() for pid in self.pids)
            assert alive, (self.wait(), self.text(error=True))
            time.sleep(0.05)

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        """-> the status of the first rank that failed, or 0."""
        return next(filter(None, json.loads(forks().stdout.readline())), 0)


def run(*args, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """python (or torchrun) ARGS in the project's directory."""
    if ranks == 1 and args[0] not in ("-X", "-c") and not find_spec("vllm"):  # it has processes
        return forked(*args, check=check)
    result = subprocess.run(
        command(*args, ranks=ranks), cwd=ROOT, text=True, capture_output=True, timeout=280
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def forked(*args, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """As run, but ranks have no torchrun."""
    program = Forked(*args, ranks=ranks)
    status, out, err = program.wait(), program.text(), program.text(error=True)
    assert not (check and status), out + err
    return subprocess.CompletedProcess(program.args, status, out, err)


def few(directory: Path, problems: int = 1) -> tuple[str, Path]:
    """A flag: problems to evaluate on."""
    file = directory / "few.jsonl"
    rows = [
        {
            "data_source": "hard",
            "prompt": [{"role": "user", "content": f"b{n},c5,-;e?"}],
            "reward_model": {"ground_truth": "5"},
        }
        for n in range(problems)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "--eval_data", file
