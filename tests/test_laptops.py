"""macOS and Windows, simulated: nothing of this has run there. Calls that they lack are taken away.

A sitecustomize.py on PYTHONPATH does it, in the trainer and in its workers alike.
"""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from machinery.files import read_jsonl

MACOS = """
import resource
def setrlimit(*_):
    raise ValueError("current limit exceeds maximum limit")
resource.setrlimit = setrlimit
"""
WINDOWS = """
import multiprocessing.connection, os, signal, sys
sys.modules |= {"resource": None, "fcntl": None, "pwd": None}
for name in ("alarm", "setitimer", "SIGALRM", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
for name in ("fork", "killpg", "setsid", "mkfifo"):
    delattr(os, name)
def wait(*_):
    raise OSError("pipes cannot be waited for")
multiprocessing.connection.wait = wait
rename, unlink = os.rename, os.unlink
def refuse(path):  # what is open, or mapped into memory, stays where it is
    held = open("/proc/self/maps").read().split()
    held += [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    path = os.path.realpath(path)
    if "checkpoint-" in path and any(n == path or n.startswith(path + os.sep) for n in held):
        raise PermissionError(f"in use: {path}")
def rename_unless_there(source, target, **how):
    refuse(source)
    if os.path.exists(target):
        raise FileExistsError(target)
    rename(source, target, **how)
def unlink_unless_used(path, **how):
    refuse(path)
    unlink(path, **how)
os.rename, os.unlink = rename_unless_there, unlink_unless_used
"""
# A pipe and a file of Windows have the characters of cp1252 only, this locale even fewer.
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

GRADE = r"""
from verify import Grader
if __name__ == "__main__":
    with Grader(workers=2, timeout=2.0) as grader:
        hang = r"\boxed{\binom{10^9}{5*10^8}}", r"\binom{n}{2}"
        jobs = [hang, (r"\boxed{x+1}", "1+x")]
        print(*grader(jobs), *grader(jobs[1:]), dict(grader.failures))
"""
TRAIN_AND_RESUME = """
import sys
import torch.distributed as dist
del dist.HashStore
import luffy
from machinery.processes import launch

def twice():
    luffy.main()
    dist.destroy_process_group()
    sys.argv += ["--steps", "3", "--save_every", "1"]
    luffy.main()

launch(twice)
"""


def without(calls: str, directory, program: str, *args, **env) -> tuple[str, str]:
    (directory / "sitecustomize.py").write_text(calls, "utf-8")
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        cwd=ROOT,
        env=os.environ | NO_UTF8 | {"PYTHONPATH": str(directory)} | env,
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, result.stderr


@pytest.mark.parametrize("calls, rank", [(MACOS, "0"), (MACOS, "1"), (WINDOWS, "0")])
def test_simulated_graders_start_and_kill_and_say_once_that_memory_has_no_limit(
    tmp_path, calls, rank
):
    out, err = without(calls, tmp_path, GRADE, RANK=rank)
    assert out == "0.0 1.0 1.0 {'timeout': 1}\n"
    assert err.count("memory is not limited") == (rank == "0"), err


@pytest.mark.slow
def test_simulated_windows_trains_the_toy_and_resumes(tiny_model, tmp_path):
    """The second half meets files that are there, and deletes the optimizer that it has loaded."""
    sizes = "--problems_per_step 2 --eval_data none --steps 1 --model".split()
    args = *sizes, tiny_model, "--out", tmp_path / "run"
    out, err = without(WINDOWS, tmp_path, TRAIN_AND_RESUME, *args)
    # Said by the first worker, if there is one: numbers need no parser.
    assert "resuming" in out and "?(trace)" in out and err.count("memory is not limited") <= 1
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "run" / "report.html").exists()
    optimizers = (tmp_path / "run").glob("checkpoint-*/optimizer-0.pt")
    kept = sorted(file.parent.name for file in optimizers)
    assert kept == ["checkpoint-000002", "checkpoint-000003"]


def test_text_has_an_encoding():
    """Where none is named it is the system's, which on Windows is not UTF-8."""
    files = [f for part in ("", "machinery", "forks") for f in (ROOT / part).glob("*.py")]
    for file in files:
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            name = isinstance(call, ast.Call) and getattr(call.func, "attr", None)
            if name in ("read_text", "write_text", "open") and isinstance(
                call.func.value, ast.expr
            ):
                named = any(k.arg == "encoding" for k in call.keywords)
                named |= len(call.args) > (name == "write_text")
                is_os = name == "open" and getattr(call.func.value, "id", "") == "os"
                assert named or is_os, f"{file}, line {call.lineno}"
