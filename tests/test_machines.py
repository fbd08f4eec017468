"""Terminals and machines: where nobody reads on a tool ends, and a run goes on and saves."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import pytest
from conftest import ROOT, command

import luffy
from machinery import samplers
from machinery.files import read_jsonl
from machinery.run_directory import Run

TOOLS = [("verify.py", r"\boxed{1}", "1"), ("docs/annotate.py",)]
SLOW_TOOLS = [
    ("verify.py", "--help"),
    ("luffy.py", "--dry_run"),
    ("data.py", "toy", "--out", "{tmp}/a.png"),
    ("eval.py", "compare", "--help"),
    ("eval.py", "--help"),
    ("benchmarks/grading.py", "--help"),
    ("benchmarks/update.py", "--help"),
]
SMALL = "--problems_per_step 2 --eval_data none --steps".split()
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


def end_of(*args, stdout, stderr=subprocess.PIPE, **env) -> tuple[int, str]:
    how = dict(cwd=ROOT, text=True, timeout=280, env=os.environ | env)
    result = subprocess.run(command(*args), stdout=stdout, stderr=stderr, **how)
    return result.returncode, result.stderr or ""


def closed() -> int:
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    "tool", TOOLS + [pytest.param(tool, marks=pytest.mark.slow) for tool in SLOW_TOOLS]
)
def test_a_tool_that_nobody_reads_ends_in_silence(tool, buffered, tmp_path):
    args = [arg.format(tmp=tmp_path) if "{tmp}" in arg else arg for arg in tool]
    status, said = end_of(*args, stdout=closed(), PYTHONUNBUFFERED=buffered)
    assert status == 128 + signal.SIGPIPE and not said, said


@FULL
def test_a_tool_on_a_full_disk_says_so_in_a_line():
    with open("/dev/full", "w") as full:
        status, said = end_of("verify.py", r"\boxed{1}", "1", stdout=full)
    assert status == 1 and said == "verify.py: stdout: [Errno 28] No space left on device\n"


@FULL
@pytest.mark.parametrize("both", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_goes_on_and_says_so_in_a_file(tiny_model, tmp_path, both):
    out = tmp_path / "run"
    with open("/dev/full", "w") as full:
        args = "luffy.py", "--model", tiny_model, "--out", out, *SMALL, 1
        where = dict(stdout=full, stderr=full) if both else dict(stdout=closed())
        status, said = end_of(*args, **where)
    assert status == 0 and "Error" not in said, said
    assert (out / "checkpoint-000001").is_dir() and (out / "report.html").exists()
    printed = (out / "printed.txt").read_text("utf-8")
    words = "No space left" if both else "Broken pipe"
    # once a stream; on stderr there is a bar if the machine is slow
    assert printed.count("The run goes on") in (1, 1 + both) and words in printed, printed
    assert "step 1 | reward" in printed and "\r" not in printed


ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict")


def test_an_ascii_terminal_gets_question_marks(tmp_path):
    with (tmp_path / "said").open("w") as file:
        args = "verify.py", r"\boxed{\text{π}}", r"\pi"
        status, said = end_of(*args, stdout=file, PYTHONIOENCODING="ascii:strict")
    text = (tmp_path / "said").read_text("ascii")
    assert status == 0 and "?" in text and "verdict" in text, text + said


@pytest.mark.slow  # its quicker relative: a tool
def test_a_run_on_an_ascii_terminal(tiny_model, tmp_path):
    args = "luffy.py", "--model", tiny_model, *SMALL, 1, "--out", tmp_path / "run"
    with (tmp_path / "said").open("w") as file:
        status, said = end_of(*args, stdout=file, **ASCII)
    text = (tmp_path / "said").read_text("ascii")
    assert status == 0 and "?(trace)" in text, text + said
    for name in ("metrics.jsonl", "watched.jsonl", "samples/step-000001.jsonl"):
        assert read_jsonl(tmp_path / "run" / name)


# ------------------------------------------------------------------ signals
@pytest.fixture
def ended(tmp_path, monkeypatch):
    """-> the step after which a run of three ends, where each brings this signal."""

    def ended(number: int) -> int:
        run = Run(replace(luffy.parse_args([]), out=str(tmp_path / "run"), steps=3))
        for step in run.steps():
            os.kill(os.getpid(), number)
            saves = run.due(step + 1).save
        assert saves and run.stopped == (step < 2)
        return step + 1

    return ended


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_a_run_whose_terminal_has_gone_saves_but_with_nohup_it_goes_on(ended, monkeypatch):
    write = os.write

    def gone(number, text):
        if number == 2:
            raise OSError("Input/output error")
        return write(number, text)

    monkeypatch.setattr(os, "write", gone)
    assert ended(signal.SIGHUP) == ended(signal.SIGTERM) == 1
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended(signal.SIGHUP) == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_sighup_as_on_windows(ended, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    assert ended(signal.SIGTERM) == 1 and signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_is_a_line_and_no_traceback():
    program = "import signal\nfrom machinery.processes import launch\n"
    program += "launch(lambda: signal.raise_signal(signal.SIGINT))"
    status, said = end_of("-c", program, stdout=subprocess.PIPE)
    assert (status, said) == (128 + signal.SIGINT, "-c: interrupted\n")


# ------------------------------------------------------------------ workers, pictures
def test_a_reward_that_prints_is_none_of_the_terminals(tmp_path):
    """Where the trainer's own stderr has gone, a worker's print is no error of the function."""
    (tmp_path / "its.py").write_text("def f(response, answer):\n    print('x')\n    return 2\n")
    grade = (
        "import sys; sys.path.insert(0, '.')\nfrom verify import Grader\n"
        f"with Grader(1, reward={str(tmp_path / 'its.py') + ':f'!r}) as g:\n"
        "    print(g.right_and_reward([('a', '2')]))\n"
    )
    with (tmp_path / "said").open("w") as file:
        status, _ = end_of("-c", grade, stdout=file, stderr=closed())
    assert status == 0 and (tmp_path / "said").read_text() == "[(0.0, 2.0)]\n"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_what_a_living_process_has_mapped_stays(tmp_path):
    for directory in (Path("/dev/shm"), tmp_path):
        file = directory / f"-tp:test-{os.getpid()}"
        file.write_bytes(bytes(4096))
        try:
            assert not samplers.is_mapped(file)
            with file.open("r+b") as opened, mmap(opened.fileno(), 0):
                assert samplers.is_mapped(file)
        finally:
            file.unlink()


def test_labels_may_have_dollars_and_names_brackets(tmp_path):
    """matplotlib takes what stands between two dollars for mathematics, and may fail to read it."""
    from machinery.plots import draw_curves

    out = tmp_path / r"run[1] $\frac$"
    out.mkdir()
    source = r"reward/$\frac$ $x_"
    row = {"step": 1, source: 0.5, "groups/none": 1.0}
    (out / "metrics.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    config = {"algo": "luffy", "model": r"a/$\frac{$", "seed": 0}
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    draw_curves(out)
    assert (out / "curves.png").stat().st_size


def test_a_run_of_one_step_is_seen_in_its_curves(tmp_path):
    """A line of one point shows nothing, and the first picture has one step."""
    from machinery.plots import draw_curves

    (tmp_path / "config.json").write_text('{"algo": "luffy", "model": "toy", "seed": 0}')
    pictures = set()
    for share in 0.2, 0.8:
        row = {"step": 1, "groups/none": share}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        draw_curves(tmp_path)
        pictures.add((tmp_path / "curves.png").read_bytes())
    assert len(pictures) == 2
