"""Scores: unbiased, by source, and a command that prints them."""

from itertools import combinations

import pytest
from conftest import run

from eval import pass_at_k, summarize, table


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for bad in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def test_summary_by_hand():
    records = [(1.0, 10, False), (0.0, 20, True), (0.0, 30, True), (0.0, 40, True)]
    scores = summarize(records, k=2)
    assert scores == {"problems": 2, "k": 2, "avg": 0.25, "pass": 0.5, "length": 25.0,
                      "truncated": 0.75}
    assert "| hard (2) | avg@2 | 0.250 |" in table({"model": {"hard": scores}})


def test_the_command(tiny_model):
    out = run("eval.py", "--model", tiny_model, "--bench", "toy/dev", "--samples", 2,
              "--max_response_tokens", 40).stdout
    for words in ("| easy (64) | avg@2 |", "| hard (64) | pass@2 |", "| ood (64) | truncated |"):
        assert words in out
    bad = run("eval.py", "--model", tiny_model, "--bench", "toy/exam", check=False)
    assert bad.returncode != 0 and "toy/exam" in bad.stderr and "Traceback" not in bad.stderr
