"""What a person reads of a step is what the metrics say."""

import math
from types import SimpleNamespace

import pytest
import torch

from data import Problem
from machinery import metrics
from machinery.batches import Trajectory
from machinery.metrics import Means, add_token_metrics, one_line, trajectory_metrics


def test_means_are_over_all_parts_alike():
    means = Means()
    means.add("x", torch.tensor([1.0, 2.0]))
    means.add("x", [6.0])
    means.add("y", torch.tensor([]))  # a micro-batch without such tokens
    for values in ([1.0, 3.0], [], [2.0]):
        means.peak("z", torch.tensor(values))
    assert means.reduce() == {"x": 3.0, "z": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_metric(value):
    for t in (Trajectory(0, Problem("", "a"), [7, 1], right=1.0, reward=value),):
        with pytest.raises(FloatingPointError, match=f"^reward is {value}: "):
            trajectory_metrics([t], rollouts=1)
    means = Means()
    means.peak("sampler_ratio_max", torch.tensor([1.0, math.inf]))
    with pytest.raises(FloatingPointError, match="sampler_ratio_max is inf"):
        means.reduce()


def test_the_share_of_traces_is_a_ratio_of_sums_over_micro_batches_and_ranks(monkeypatch):
    def add(means, off_policy, inv_z, slope):
        zero = torch.zeros(len(slope))
        batch = SimpleNamespace(
            off_policy=torch.tensor(off_policy), inv_z=torch.tensor(inv_z), logp_sampler=zero
        )
        add_token_metrics(means, batch, zero, zero, zero, zero, torch.tensor(slope))

    means, other_rank = Means(), Means()
    add(means, [True, False], [0.5, 0.5], [2.0, -1.0])  # 1 of 1.5
    add(means, [False, False], [0.25, 0.0], [4.0, 9.0])  # 0 of 1: the last one does not learn
    assert means.reduce()["trace_share"] == pytest.approx(1 / 2.5)
    add(other_rank, [True], [0.5], [-3.0])  # 1.5 of 1.5
    both = [(dict(m.parts), m.peaks) for m in (means, other_rank)]
    monkeypatch.setattr(metrics, "gather", lambda _: both)
    assert means.reduce()["trace_share"] == pytest.approx(2.5 / 4)
    monkeypatch.undo()
    still = Means()
    add(still, [True, False], [0.5, 0.5], [0.0, 0.0])
    assert "trace_share" not in still.reduce()


def test_one_line():
    row = {
        "step": 7,
        "reward": 0.25,
        "reward/easy": 1.0,
        "reward/a/b": 0.0,
        "length": 20.4,
        "truncated": 0.041,
        "grad_norm": 10.25,
        "entropy": 0.3,
    }
    line = one_line(row, {"sample": 1.26})
    for part in (
        "step 7 | reward .25 (easy 1.00 a/b .00, trace -)",
        "groups 0/mix/1 -/-/-",
        "len 20",
        "trunc 4%",
        "H .30",
        "π(trace) -",
        "gnorm 10.250",
        "sample 1.3s",
    ):
        assert part in line
    unnamed = {key: value for key, value in row.items() if not key.startswith("reward/")}
    assert "reward .25 (trace -)" in one_line(unnamed, {})
    assert "warning" not in one_line(row | {"sampler_kl": 0.01}, {})
    assert "\nwarning     sampler_kl 0.3:" in one_line(row | {"sampler_kl": 0.3}, {})


def test_problems_without_a_source_have_no_reward_of_their_own():
    def row(source):
        problem = Problem([], "1", source=source)
        return trajectory_metrics([Trajectory(0, problem, [2], right=1.0, reward=1.0)], 1)

    assert {key for key in row("easy") if key.startswith("reward/")} == {"reward/easy"}
    assert not {key for key in row("") if key.startswith("reward/")}
