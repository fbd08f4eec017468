"""--reward FILE.py:function: what it gives, and what is said of one that is broken."""

import json
import sys

import pytest
import torch.distributed as dist
from conftest import run

import luffy
from data import load_training_set
from machinery import toy
from machinery.files import read_jsonl
from machinery.processes import InputError
from verify import Grader

LENGTH = "from verify import grade\ndef f(response, answer):\n    return "
RIGHT, WRONG = (r"\boxed{2}", "2"), (r"\boxed{3}", "2")


def rewarding(directory, text: str) -> str:
    (directory / "its.py").write_text(text, "utf-8")
    return f"{directory / 'its.py'}:f"


@pytest.fixture
def train(monkeypatch, tiny_model):
    """luffy.py in this process, on an untrained model: its rollouts are wrong."""

    def train(out, *args) -> list[dict]:
        sizes = f"--model {tiny_model} --out {out} --problems_per_step 2 --eval_data none"
        monkeypatch.setattr(sys, "argv", ["luffy.py", *sizes.split(), *map(str, args)])
        try:
            luffy.main()
        finally:
            dist.destroy_process_group()
        return read_jsonl(out / "metrics.jsonl")

    return train


def test_a_run_learns_from_the_function_and_right_stays_the_verifiers_word(train, tmp_path):
    name = rewarding(tmp_path, LENGTH + "grade(response, answer) + len(response) / 1000")
    (step,) = train(tmp_path / "run", "--steps", 1, "--reward", name)
    assert step["right"] == 0 and step["groups/none"] == 1 and step["reward"] > 0
    for row in read_jsonl(tmp_path / "run" / "samples" / "step-000001.jsonl"):
        assert row["right"] == row["off_policy"]
        assert row["reward"] == row["right"] + len(row["response"]) / 1000
        assert row["advantage"]
    with pytest.raises(InputError, match="reward was"):
        train(tmp_path / "run", "--steps", 2)


def test_traces_are_rewarded_anew_when_the_function_changes(tmp_path):
    trace = [{"role": "assistant", "content": r"\boxed{5}"}]
    row = {"prompt": [{"role": "user", "content": "b2"}], "target": trace}
    row |= {"reward_model": {"ground_truth": "5"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), "utf-8")

    def load(text: str) -> tuple:
        with Grader(1, reward=rewarding(tmp_path, LENGTH + text)) as grader:
            cfg, file = luffy.Config(data=str(tmp_path / "a.jsonl")), tmp_path / "rewards.json"
            (p,) = load_training_set(cfg, toy.make_tokenizer(), grader, file)
        return p.trace_right, p.trace_reward

    assert load("0.5") == load("0.5") == (1.0, 0.5) and load("True") == (1.0, 1.0)
    with pytest.raises(InputError, match="no problem is left.*dropped 1: wrong trace"):
        load("-1")


@pytest.mark.parametrize(
    "text, words",
    [
        ("def f(r, a):\n  return (", "its.py, line 2: SyntaxError"),
        ("import math\n\nmath.squirt", "its.py, line 3: AttributeError"),
        ("import beside", "beside.py, line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)", "its.py, line 2: SystemExit: 3"),
        ("import os\nos._exit(3)", "do not start"),
        ("g = h = lambda r, a: 1", "no function 'f'; its functions: g, h"),
        ("f = 5", "no function 'f'"),
        ("\ndef f(response): return 1", r"its.py, line 2: f\(response\) must take \(response, ans"),
        ("def f(a, b, c): return 1", "line 1"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "beside.py").write_text("x = 0\n1 / x", "utf-8")
    with pytest.raises(InputError, match=rf"^--reward .*its.py:f: .*{words}"):
        Grader(1, reward=rewarding(tmp_path, text))


def test_a_wrong_name_is_refused_before_anything_is_made(train, tmp_path):
    for name, words in (("f.py", "expected FILE.py:function"), ("no.py:f", "no such file")):
        with pytest.raises(InputError, match=words):
            train(tmp_path / "run", "--reward", name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "result, words",
    [
        ("1 / 0", "line 3: ZeroDivisionError"),
        ("None", "line 2: expected a finite number, got None"),
        ("'1'", "got '1'"),
        ("float('nan')", "got nan"),
        ("1e300", "got 1e.300; at most 1e.18"),  # no float32
        ("10**400", "OverflowError"),
        ("__import__('sys').exit()", "line 3: SystemExit"),
        ("__import__('decimal').Decimal(1)", r"got Decimal"),
    ],
)
def test_a_broken_function_ends_the_run_with_its_place_and_the_job(tmp_path, result, words):
    with Grader(1, reward=rewarding(tmp_path, LENGTH + f"{result} if '3' in response else 1")) as g:
        assert g.right_and_reward([RIGHT]) == [(1.0, 1.0)]
        with pytest.raises(InputError, match=rf"its.py.*{words}.*boxed\{{3\}}.*'2'"):
            g.right_and_reward([RIGHT, WRONG])
        assert g.right_and_reward([RIGHT]) == [(1.0, 1.0)] and not g.failures


def test_a_hang_or_a_crash_costs_its_own_reward_only(tmp_path):
    """And what the function prints or reads is neither a reply nor a job."""
    text = (
        "import os, sys, beside\nprint('at import')\n"
        "def f(response, answer):\n"
        "    print('a word', flush=True)\n"
        "    assert sys.stdin.read() == ''\n"
        "    while 'hang' in response: pass\n"
        "    if 'crash' in response: os._exit(3)\n"
        "    if 'memory' in response: bytearray(2**31)\n"
        "    return len(response)\n"
    )
    (tmp_path / "beside.py").touch()
    jobs = [(word, "2") for word in ("hang", "a", "crash", "memory", r"\boxed{2}")]
    with Grader(2, timeout=1.0, reward=rewarding(tmp_path, text)) as grader:
        rewards = grader.right_and_reward(jobs)
        assert rewards == [(0, 0), (0, 1), (0, 0), (0, 0), (1, 9)]
        assert grader.failures == {"reward_timeout": 1, "reward_crash": 2}
        assert grader(jobs) == [0, 0, 0, 0, 1]  # evaluation has the verifier's word alone
        workers = [w for pool in (grader.pool, grader.rewards.pool) for w in pool.workers]
    assert workers and not any(worker.alive() for worker in workers)


@pytest.mark.slow  # its quicker relatives: one process
def test_a_rank_that_alone_meets_the_error_says_it(tiny_model, tmp_path):
    text = "import os\ndef f(response, answer):\n    return 1 / (os.environ['RANK'] == '0')\n"
    args = "--model", tiny_model, "--out", tmp_path / "run", "--reward", rewarding(tmp_path, text)
    result = run("luffy.py", *args, "--problems_per_step", 4, ranks=2, check=False)
    assert result.returncode
    assert result.stderr.count("its.py, line 3: ZeroDivisionError") == 1, result.stderr
