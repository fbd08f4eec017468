"""Random command lines, up to the first expensive work: taken, or refused with the flag's name."""

import random
import re
import shutil
import sys
from dataclasses import fields

import pytest
import torch.distributed as dist
from conftest import ROOT

import data
import eval
import luffy
import verify
from machinery import look, preflight, toy
from machinery.processes import InputError
from machinery.run_directory import Run
from verify import Verdict

VALUES = "-1 0 1 2 8 0.5 1e-300 1e300 nan inf -inf 1e9 none true False x toy toy/val luffy".split()
VALUES += ["", " ", "--", "-", "9" * 400, "9" * 5000, "x" * 300, "π", "\udcff", "a,b", ",", "0,1"]
VALUES += [
    "docs",
    "docs/data.md",
    "/",
    "/dev/null",
    "no/such",
    "{{",
    "a=b",
    "%s",
    "$x$",
    "[a]",
    "~",
]
VALUES += ["8x80", "0x80", "99999999x9", "auto", "cpu", "cuda", "six", "a.py:f", "http://x", "1,"]
PLAUSIBLE = "1 1 1 2 2 2 64 64 0.5 8x80 toy true auto own tiny mine.jsonl out/x.png".split()
KNOWN = {"luffy.py": [f.name for f in fields(luffy.Config)]}
KNOWN["eval.py"] = """model url paper template bench data_dir samples temperature limit
    max_prompt_tokens max_response_tokens device sampler seed out traces traces_per_problem
    max_trace_tokens concurrency""".split()
KNOWN["data.py"] = ["model", "template", "out", *look.LIMITS]
KNOWN["verify.py"] = ["timeout", "strict", "lenient"]
MAINS = {"luffy.py": luffy.main, "eval.py": eval.main, "data.py": data.main}
MAINS["verify.py"] = verify.main


class Taken(BaseException):
    """The doors are open: expensive work would begin."""


class NoGrader:
    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass

    def verdicts(self, jobs, lenient=None):
        return [Verdict(True, "") for _ in jobs]

    def unread(self, golds):
        return [False] * len(golds)


@pytest.fixture
def doors(monkeypatch, tmp_path, tiny_model):
    def taken(*_, **__):
        raise Taken

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "tiny").symlink_to(tiny_model)
    file = '{"problem": "b2,c5,-;e?", "answer": "535", "trace": "d=3;\\\\boxed{535}"}\n'
    (tmp_path / "mine.jsonl").write_text(file)
    for module in (data, verify):
        monkeypatch.setattr(module, "Grader", NoGrader)
    monkeypatch.setattr(toy, "base_model", lambda: tiny_model)
    monkeypatch.setattr(luffy, "train", lambda cfg, *_: Run(cfg) and taken())
    monkeypatch.setattr(preflight, "run", taken)
    monkeypatch.setattr(eval.responses, "take", taken)


def command(rng: random.Random) -> list[str]:
    program = rng.choice(["luffy.py"] * 4 + ["eval.py"] * 3 + ["data.py"] * 2 + ["verify.py"])
    line = [] if rng.random() < 0.05 else ["--model", "tiny"]
    if program == "luffy.py" and rng.random() < 0.2:
        line.append("--dry_run")
    if program == "eval.py":
        line += ["--bench", rng.choice(["mine.jsonl", "toy/val"])]
    if program == "data.py":
        line.append(rng.choice(["mine.jsonl"] if rng.random() < 0.7 else VALUES))
    if program == "verify.py":
        line = [rng.choice(["\\boxed{2}", *VALUES]), rng.choice(["2", *VALUES])]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        flag = "--" + rng.choice(KNOWN[program])
        if rng.random() < 0.05:
            flag = flag[: rng.randrange(len(flag))]  # no abbreviations
        odd = [*VALUES, str(rng.randrange(-9, 99)), f"{rng.gauss(0, 9):.3g}"]
        value = rng.choice(odd if rng.random() < 0.6 else PLAUSIBLE)
        kind = rng.random()
        line += [f"{flag}={value}"] if kind < 0.5 else [flag, value] if kind < 0.9 else [flag]
    return [program, *line]


def assert_taken_or_refused(line: list[str], capsys, monkeypatch) -> bool:
    program, *arguments = line
    monkeypatch.setattr(sys, "argv", line)
    try:
        MAINS[program]()
        return True
    except Taken:
        return True
    except InputError as error:
        said = str(error)
    except SystemExit as error:
        assert error.code in (0, 1, 2)
        said = str(error.code) + capsys.readouterr().err.split("error: ")[-1]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    texts = [text for a in arguments for text in re.split("[=,]", a) if text]
    assert "--" in said or "argument" in said or any(text in said for text in texts), said
    return False


def fuzz(seeds: range, capsys, monkeypatch) -> None:
    taken = 0
    for seed in seeds:
        line = command(random.Random(seed))
        try:
            taken += assert_taken_or_refused(line, capsys, monkeypatch)
        except BaseException as error:
            error.add_note(f"seed {seed}: {line!r:.2000}")
            raise
    assert 0.05 < taken / len(seeds) < 0.95  # else the lines are all alike


def test_command_lines(doors, capsys, monkeypatch):
    fuzz(range(100), capsys, monkeypatch)


@pytest.mark.slow
def test_a_thousand_command_lines(doors, capsys, monkeypatch):
    fuzz(range(1000), capsys, monkeypatch)
