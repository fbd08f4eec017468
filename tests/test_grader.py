"""The graders' worker processes: no response can hold up or bring down the others."""

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from conftest import ROOT, Judge

from data import Problem
from eval import collect
from machinery import pool
from machinery.files import InputError
from machinery.pool import Pool, Worker
from machinery.responses import Responses, load_rows
from machinery.scores import graded, summarize
from verify import Grader

RIGHT, WRONG = (r"\boxed{x+1}", "1+x"), (r"\boxed{x+2}", "1+y")  # each needs a worker
HANG, HANG_2 = (
    (r"\boxed{\binom{10^9}{5*10^8}}", r"\binom{n}{2}"),
    (r"\boxed{\int_0^1 x^x \sin(e^x) dx}", r"\int_0^1 \sin(x) dx"),
)


@pytest.fixture
def patient(monkeypatch):
    """A hundredth of the time limit for what hangs, all of it for the rest: the machine is busy."""
    ask = Worker.ask

    def patiently(worker, job, timeout):
        return ask(worker, job, timeout / 100 if "10^9" in job[0] or "e^x" in job[0] else timeout)

    monkeypatch.setattr(Worker, "ask", patiently)


@pytest.fixture(scope="module")
def two_workers():
    with Grader(workers=2, timeout=50.0) as grader:
        yield grader


@pytest.fixture
def grader(two_workers):
    """Of several tests, for each worker takes a second to start."""
    two_workers.failures.clear()
    return two_workers


def test_a_hang_costs_its_own_job_only(patient, grader):
    grader([RIGHT, WRONG])
    jobs = [(rf"\boxed{{x+{i}}}", "x+7") for i in range(100)]
    rewards = grader([HANG, RIGHT, HANG_2, WRONG, *jobs])
    assert rewards == [0.0, 1.0, 0.0, 0.0] + [float(i == 7) for i in range(100)]
    assert grader.failures == {"timeout": 2}
    assert grader([WRONG, RIGHT]) == [0.0, 1.0]  # the pool is whole again


@pytest.mark.parametrize("lenient", [pytest.param(False, marks=pytest.mark.slow), True])
def test_after_two_timeouts_the_rest_of_a_gold_is_compared_as_text(patient, lenient):
    gold = r"\binom{n}{2}"
    hangs = [(rf"\boxed{{\binom{{10^9}}{{5*10^{i}}}}}", gold) for i in (8, 7, 6)]
    value, text = (r"\boxed{\frac{n(n-1)}{2}}", gold), (r"\boxed{\binom{n}{ 2}}", gold)
    with Grader(workers=1, timeout=50.0, lenient=lenient) as grader:
        found = grader.verdicts([*hangs, value, text, RIGHT, value])
        assert [v.right for v in found] == [False, False, False, False, True, True, False]
        assert [v.failure for v in found[:4]] == ["timeout", "timeout", "skipped", "skipped"]
        assert "text" in found[3].reason
        assert grader.failures == {"timeout": 2, "skipped": 4 if lenient else 3}
        assert grader([value]) == [1.0]  # in another batch


def test_a_worker_that_dies_is_replaced(monkeypatch):
    with Grader(workers=1, timeout=5.0) as grader:
        assert grader([RIGHT, WRONG]) == [1.0, 0.0]
        for worker in grader.pool.workers:
            worker.process.kill()
            worker.process.wait()
        assert grader([WRONG, RIGHT]) == [0.0, 1.0] and not grader.failures  # no job's fault
        ask = Worker.ask
        monkeypatch.setattr(
            Worker, "ask", lambda worker, *job: (worker.process.kill(), ask(worker, *job))[1]
        )
        assert grader([RIGHT]) == [0.0] and grader.failures == {"crash": 1}
        monkeypatch.undo()
        assert grader([RIGHT]) == [1.0]
    assert not any(worker.alive() for worker in grader.pool.workers)


def test_a_crash_is_tried_again_and_is_no_verdict(monkeypatch):
    """It may be the machine's fault. What still fails is neither right nor wrong."""
    ask, crashes = Worker.ask, []

    def crash(worker, job, timeout):
        how = crashes.pop() if crashes else None
        if how == "told":  # a new worker takes seconds
            return None, "crash"
        if how == "killed":
            worker.process.kill()
        return ask(worker, job, timeout)

    monkeypatch.setattr(Worker, "ask", crash)
    with Grader(workers=1, timeout=50.0) as grader:
        crashes += ["killed"]
        assert grader.judged([RIGHT, WRONG]) == [1.0, 0.0] and not grader.failures
        crashes += ["killed"] * 2
        assert grader.judged([RIGHT, WRONG]) == [None, 0.0] and grader.failures == {"crash": 1}
        crashes += ["told"] * 2
        assert grader.right_and_reward([RIGHT]) == [(0.0, 0.0)]  # of a rollout
        crashes += ["told"] * 2
        assert grader.right_and_reward([RIGHT], failed=None) == [(None, None)]
        crashes += ["told"] * 2
        assert grader.unread(["x+1", "y+1"]) == [None, False]


def test_an_evaluation_stores_no_verdict_as_none_and_grades_again(tmp_path):
    problems = [Problem(str(i), "5") for i in range(3)]
    how = dict(k=2, temperature=1.0, room=[9] * 3, seed=0, model=0, verifier=0)
    failing, sampled, jobs_graded = {1}, [], []

    def judge(jobs):
        jobs_graded.append(len(jobs))
        return [None if int(text[0]) in failing else 1.0 for text, _ in jobs]

    def respond(problems, blocks, grader, samples, **_):
        for block in blocks:
            sampled.append(len(block))
            rows = [
                dict(problem=i, sample=j, response=f"{i}", source="", answer="5", tokens=1)
                | dict(truncated=False)
                for i in block
                for j in range(samples)
            ]
            yield graded(rows, problems, grader, lenient=True)

    def evaluated():
        asked = Responses(tmp_path, "b", problems, range(3), [""] * 3, **how)
        score = summarize(collect(asked, respond, Judge(judge), 4096, False))
        (found,) = load_rows(tmp_path).values()
        assert {row["reward"] for row in found} == ({1.0, None} if failing else {1.0})
        assert len(found) == 6 and summarize(found).get("no_verdict") == score.get("no_verdict")
        return score["avg"], score["lenient"], score.get("no_verdict")

    assert evaluated() == pytest.approx((2 / 3, 2 / 3, 2))
    assert evaluated() == pytest.approx((2 / 3, 2 / 3, 2))
    failing.clear()
    assert evaluated() == evaluated() == (1.0, 1.0, None)
    assert sampled == [3] and jobs_graded == [6, 6] + [2, 2] * 2


def test_workers_that_are_slow_to_start_say_so(monkeypatch, capsys):
    monkeypatch.setattr(pool, "SILENT_SECONDS", 0.01)
    pool.say_once.cache_clear()
    with Grader(workers=1) as grader:
        assert grader([RIGHT]) == [1.0]
    assert capsys.readouterr().err.count("still starting") == 1


def test_more_workers_than_the_system_starts(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(pool.subprocess, "Popen", refuse)
    with Grader(workers=200) as grader, pytest.raises(InputError, match="--graders 200: .*smaller"):
        grader([RIGHT])


def test_closing_ends_a_call():
    grader = Grader(workers=1, timeout=60.0)
    grader([RIGHT])
    errors = []

    def hang():
        try:
            grader([HANG, HANG_2] * 4)
        except (RuntimeError, CancelledError) as error:
            errors.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.5)
    grader.close()
    thread.join(10)
    assert errors and not thread.is_alive()
    assert not any(worker.alive() for worker in grader.pool.workers)
    with pytest.raises(RuntimeError, match="closed"):
        grader([RIGHT, WRONG])


def test_workers_that_do_not_start():
    dead = Pool([sys.executable, "-c", "pass"], workers=1, timeout=1.0)
    with pytest.raises(InputError, match="do not start"):
        for _ in range(2):
            dead.map([1], key=id)
    dead.close()


def test_exceptions_are_counted_by_kind(grader):
    rewards = grader([(r"\boxed{x<2}", r"x\ne 2"), RIGHT])
    assert rewards == [0.0, 1.0] and sum(grader.failures.values()) == 1
    [kind] = grader.failures
    assert kind.endswith("Error")


def test_a_worker_has_little_memory_and_does_not_outlive_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from verify import Grader\nif __name__ == '__main__':\n"
        f"    grader = Grader(1, 1.0)\n    grader([{RIGHT!r}, {WRONG!r}])\n"
        "    print(*(w.process.pid for w in grader.pool.workers if w.starts()), flush=True)\n"
        f"    input()\n    grader([{HANG!r}] * 2)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, script], **pipes)
    workers = parent.stdout.readline().split()
    assert len(workers) == 2
    for pid in workers:
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert 2**30 < int(re.search(r"Max address space +(\d+)", limits)[1]) < 2**31
    parent.stdin.write("\n")
    parent.stdin.flush()
    time.sleep(0.5)
    parent.kill()  # while it waits for the one that hangs
    parent.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.1)


def test_any_thread_may_grade(grader):
    rewards = {}
    threads = [
        threading.Thread(
            target=lambda i=i: rewards.update(
                {i: grader([(rf"\boxed{{x+{j}}}", f"{i}+x") for j in range(4)])}
            )
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {i: [float(i == j) for j in range(4)] for i in range(4)}
