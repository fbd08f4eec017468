"""What a person reads of a step is what the metrics say."""

import torch

from machinery.metrics import Means, one_line


def test_means_are_over_all_parts_alike():
    means = Means()
    means.add("x", torch.tensor([1.0, 2.0]))
    means.add("x", [6.0])
    means.add("y", torch.tensor([]))  # a micro-batch without such tokens
    for values in ([1.0, 3.0], [], [2.0]):
        means.peak("z", torch.tensor(values))
    assert means.reduce() == {"x": 3.0, "z": 3.0}


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
