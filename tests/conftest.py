"""What tests share: a tiny untrained model of the toy, and the program as a user starts it."""

import os
import subprocess
import sys
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
    longest = "test_toy", "test_distributed", "test_resume", "test_rivals"
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


def run(*args, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """python (or torchrun) ARGS in the project's directory."""
    result = subprocess.run(
        command(*args, ranks=ranks), cwd=ROOT, text=True, capture_output=True, timeout=280
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result
