"""Benchmarks still run the program that they time, and compare what they say."""

import sys

import pytest
import torch.distributed as dist
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import tiny
import update

from machinery.processes import init_processes


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    init_processes()
    path = tiny.save(tmp_path_factory.mktemp("tiny"))
    yield tiny.Ours(path, problems_per_step=2, max_response_tokens=8)
    dist.destroy_process_group()


def test_the_step_that_is_timed_learns(ours):
    before = [p.clone() for p in ours.model.parameters()]
    row = ours.step(0)
    assert row["tokens"] == sum(len(t.response) for t in row["trajectories"]) > 16
    assert all((a != b).any() for a, b in zip(before, ours.model.parameters()))


def test_rows_without_shared_prompts_hold_each_trajectory_once(ours):
    trajectories = ours.step(1)["trajectories"]
    rows = [row.trajectories for row in update.pack_apart(trajectories, token_budget=512)]
    for row in rows:
        assert len({t.position for t in row}) == len(row)
    found = sum(rows, [])
    assert len(found) == 16 and {*map(id, found)} == {*map(id, trajectories)}
