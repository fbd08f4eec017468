"""Rewards: what is right, and that no response can hold the others up."""

import time

import pytest

from verify import Grader, extract_answer, grade

RIGHT = [
    (r"\boxed{42}", "42"), (r"\boxed{025}", "25"), (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"), (r"\boxed{(1, 2)}", "(1,2)"),
    (r"first \boxed{1}, no: \boxed{2}", "2"),
    (r"<think>\boxed{1}</think>\boxed{2}", "2"), (r"\boxed{\text{east}}", r"\text{east}"),
    (r"\boxed{C}", "C"), (r"\boxed{1} and then \boxed{unfinished", "1"),
]
WRONG = [
    ("the answer is 42", "42"), (r"\boxed{41}", "42"), (r"\boxed{123457}", "123456"),
    (r"<think>\boxed{2}</think> it is 2", "2"), (r"<think>\boxed{2}", "2"), (r"\boxed{}", "2"),
    (r"\boxed{42", "42"), (r"\boxed{1} no, \boxed{2}", "1"), ("", "1"), (r"\boxed{D}", "C"),
]


@pytest.mark.parametrize("response, answer", RIGHT)
def test_right(response, answer):
    assert grade(response, answer) == 1.0


@pytest.mark.parametrize("response, answer", WRONG)
def test_wrong(response, answer):
    assert grade(response, answer) == 0.0


def test_extraction():
    assert extract_answer(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert extract_answer(r"\boxed{a\boxed{b}}") == "b"
    assert extract_answer("</think>" + r"\boxed{1}") == "1"
    assert extract_answer("no box") is None


HANG = (r"\boxed{99999999!}", "42")


def test_a_hang_costs_its_own_job_only():
    right, wrong = (r"\boxed{7}", "7"), (r"\boxed{8}", "7")
    with Grader(workers=2, timeout=1.0) as grader:
        grader([right])  # the workers' start is not what is timed
        start = time.monotonic()
        rewards = grader([HANG, right, HANG, wrong] + [right, wrong] * 50)
        assert rewards == [0.0, 1.0, 0.0, 0.0] + [1.0, 0.0] * 50
        assert grader.timeouts == 2 and grader.crashes == 0
        assert time.monotonic() - start < 20
        assert grader([wrong, right]) == [0.0, 1.0]  # the pool is whole again
    assert grader.workers == []


def test_a_worker_that_dies_is_replaced():
    with Grader(workers=1, timeout=5.0) as grader:
        grader([(r"\boxed{7}", "7")])
        grader.workers[0].process.kill()
        grader.workers[0].process.wait()
        assert grader([(r"\boxed{7}", "7"), (r"\boxed{7}", "7")]) == [1.0, 1.0]
        assert grader.crashes == 1 and grader.timeouts == 0
