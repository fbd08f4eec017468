"""ExGRPO: what is kept, drawn and replayed, and that the pool outlives a kill."""

import json
import random
from array import array
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from conftest import run

import luffy
from data import Problem
from forks import exgrpo
from luffy import Means, Trajectory
from machinery.batches import collate
from machinery.processes import InputError, init_processes


def test_problems_are_drawn_by_how_often_they_were_solved():
    solved = {p: s for p, s in enumerate([1, 4, 4, 4, 5, 7])}
    rng, n = random.Random(0), 20_000
    share = Counter(p for _ in range(n) for p in exgrpo.draw(solved, 1, 4.0, rng))
    density = {1: 0.011109, 4: 1.0, 5: 0.606531, 7: 0.011109}  # e^-½(s-4)²
    for p, s in solved.items():
        expected = density[s] / sum(density.values()) / (3 if s == 4 else 1)
        assert share[p] / n == pytest.approx(expected, abs=0.01), (p, s)
    assert sorted(exgrpo.draw(solved, 9, 4.0, rng)) == list(solved)  # each once, if all are wanted
    assert exgrpo.draw({}, 2, 4.0, rng) == []


def test_a_replayed_token_by_hand():
    """f(w) = w/(w + .1) with w = π/π_past, and its slope .1 w/(w + .1)²; new ones are plain."""
    problem, past = Problem("", "", prompt_ids=(2,)), torch.tensor([0.5, 0.8]).log()
    replayed = Trajectory(0, problem, [5, 6], off_policy=True, advantage=0.25, logp_old=past)
    new = Trajectory(0, problem, [7], advantage=-0.5)
    cfg = exgrpo.Config(**luffy.ALGORITHMS["exgrpo"] | dict(max_response_tokens=10))
    luffy.set_normaliser([replayed, new], cfg)
    logp = torch.tensor([0.25, 0.8, 0.3]).log()
    loss = luffy.token_loss(logp, torch.zeros(3), collate([replayed, new]), cfg, Means())
    f, slope = [0.5 / 0.6, 1 / 1.1], [0.1 * 0.5 / 0.36, 0.1 / 1.21]
    assert replayed.factor.tolist() == pytest.approx(f)
    assert replayed.slope.tolist() == pytest.approx([0.25 * x for x in slope])
    assert loss.item() == pytest.approx(-(0.25 * sum(f) - 0.5) / 20)


class Fixed:
    """A policy with these mean entropies, by the first token of a response."""

    def __init__(self, entropies):
        self.entropies = entropies

    def __call__(self, batch):
        of_each = [self.entropies[t.response[0]] for t in batch.trajectories]
        entropy = torch.tensor(of_each)[batch.segment]
        return torch.zeros_like(entropy), entropy


@pytest.fixture
def pool(monkeypatch):
    """One whose luffy makes no updates: groups of 4, problems 0, 1, ... with one rollout each."""
    monkeypatch.setitem(exgrpo.plain, "update", lambda *args: {})
    monkeypatch.setitem(exgrpo.plain, "batch_at", lambda problems, *args: problems[:2])
    pool = exgrpo.Pool()
    pool.all = [Problem("", str(p), prompt_ids=(2,)) for p in range(4)]
    pool.number = {id(problem): p for p, problem in enumerate(pool.all)}
    pool.cfg = exgrpo.Config(rollouts=4, problems_per_step=2, replay_from=0.3)
    pool.replays = {}
    return pool


def group(pool, p: int, *rollouts: tuple[int, float], position: int = 0) -> list[Trajectory]:
    """From (token, right) of each rollout; log π_old is -token."""
    made = [Trajectory(position, pool.all[p], [x], right=r, reward=r) for x, r in rollouts]
    for t in made:
        t.logp = torch.tensor([-float(t.response[0])])
    return made


def kept(pool):
    """problem -> s, {token: log π_past}"""
    return {
        p: (s, {array("i", tokens)[0]: logp.item() for tokens, logp in found.items()})
        for p, (s, found) in pool.kept.items()
    }


def test_what_is_kept_and_what_retires(pool):
    half = [(11, 1.0), (12, 1.0), (12, 1.0), (13, 0.0)]
    none, whole = [(14, 0.0)] * 4, [(15, 1.0)] * 4
    update = lambda group: pool.update(None, None, group, pool.cfg)  # noqa: E731
    update(group(pool, 0, *half))  # too early: the pool starts after this batch
    assert pool.started and kept(pool) == {}
    update(group(pool, 0, *half) + group(pool, 1, *half, position=1))
    expected = {0: (3, {11: -11.0, 12: -12.0}), 1: (3, {11: -11.0, 12: -12.0})}
    assert kept(pool) == expected
    again = group(pool, 0, (11, 0.0), (16, 0.0), (16, 0.0), (12, 1.0))
    again[3].logp, again[3].logp_old = None, torch.tensor([-9.0])
    update(again)  # log π_past stays; s is the latest
    assert kept(pool) == expected | {0: (1, {11: -11.0, 12: -12.0})}
    assert update(group(pool, 0, *none))["pool"] == 2 and kept(pool)[0][0] == 1
    update(group(pool, 0, *whole))
    update(group(pool, 0, *half))
    assert kept(pool) == {1: expected[1]} and pool.retired == {0}


def test_the_kept_rollout_of_the_lowest_entropy_takes_the_last_place(pool, monkeypatch):
    pool.started, pool.policy = True, Fixed({11: 0.5, 12: 0.2, 13: 0.9})
    pool.update(None, None, group(pool, 3, (11, 1.0), (12, 1.0), (13, 1.0), (14, 0.0)), pool.cfg)
    batch = pool.batch_at(pool.all, 7, 2, 0)
    (i,) = pool.replays
    assert batch[i] is pool.all[3] and batch[1 - i] is pool.all[1 - i]  # half of the batch
    batches = [[pool.batch_at(pool.all, step, 2, 0) for _ in "ab"] for step in range(20)]
    places = {tuple(batch.index(pool.all[3]) for batch in twice) for twice in batches}
    assert places == {(0, 0), (1, 1)}  # of seed and step alone
    batch = pool.batch_at(pool.all, 7, 2, 0)
    numbers = [pool.number[id(problem)] for problem in batch]
    wrong = [(14, 0.0)] * 4
    own = group(pool, numbers[0], *wrong) + group(pool, numbers[1], *wrong, position=1)
    monkeypatch.setitem(exgrpo.plain, "rollout", lambda *args: list(own))
    found = pool.rollout(None, dict(enumerate(batch)), 7, pool.cfg)
    t = found.pop(4 * i + 3)
    assert found == [x for n, x in enumerate(own) if n != 4 * i + 3]
    assert (t.position, t.problem, t.response, t.off_policy) == (i, pool.all[3], [12], True)
    assert t.right == t.reward == 1.0 and t.logp_old.tolist() == [-12.0]
    found.insert(4 * i + 3, t)
    metrics = luffy.trajectory_metrics(found, 4)
    assert metrics["reward"] == 0.0 and metrics["trace_reward"] == 1.0
    assert metrics["groups/none"] == 1.0  # of the policy's own rollouts


def test_traces_are_refused():
    with pytest.raises(InputError, match="--traces"):
        exgrpo.check(exgrpo.Config(traces=1), 1)


def grade(trajectories, *_):
    """A third of the responses is right, so that an untrained model has something to keep."""
    for t in trajectories:
        if t.right != t.right:
            t.right = t.reward = float(sum(t.response) % 3 == 0)


def flags(model, out, steps):
    sizes = {"problems_per_step": 4, "max_response_tokens": 40, "lr": 1e-2, "replay_from": 0.1}
    sizes |= {"graders": 1, "save_every": 2, "eval_data": "none", "model": model, "out": out}
    pairs = (sizes | {"steps": steps}).items()
    return [str(x) for name, value in pairs for x in (f"--{name}", value)]


@pytest.fixture
def train(monkeypatch):
    """The fork in this process, as main would run it -> the rows of metrics.jsonl, the pool."""
    monkeypatch.setattr(luffy, "Config", exgrpo.Config)
    monkeypatch.setattr(luffy, "report", lambda out: None)
    monkeypatch.setattr(luffy, "grade", grade)
    init_processes()

    def in_this_process(model, out, steps):
        pool = exgrpo.Pool()
        for name in exgrpo.PLACES:
            monkeypatch.setattr(luffy, name, getattr(pool, name))
        cfg = luffy.parse_args(flags(model, out, steps), algo="exgrpo")
        luffy.check(cfg, 1)
        luffy.train(cfg, str(model))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], pool

    yield in_this_process
    dist.destroy_process_group()


def test_a_resumed_run_has_the_same_bits(tiny_model, tmp_path, train):
    whole, pool = train(tiny_model, tmp_path / "whole", 4)
    train(tiny_model, tmp_path / "part", 3)
    rows, resumed = train(tiny_model, tmp_path / "part", 4)
    assert rows == whole
    assert [row["replayed"] for row in whole] == [0, 0, 2, 2]  # of 4; kept from step 2 on
    assert all(row["grad_norm"] > 0 and row["trace_f"] > 0.5 for row in whole[2:])
    assert (resumed.started, resumed.retired) == (pool.started, pool.retired) and pool.kept
    assert str(resumed.kept) == str(pool.kept)


SCRIPT = """
import sys; sys.path[:0] = [".", "tests"]
from functools import partial
import luffy
from forks import exgrpo
from machinery.processes import launch
from test_fork_exgrpo import grade
pool = exgrpo.Pool()
replaced = {name: getattr(pool, name) for name in exgrpo.PLACES}
launch(partial(luffy.main, "exgrpo", Config=exgrpo.Config, grade=grade, **replaced))
"""


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_run(tiny_model, tmp_path):
    """Also where one process takes the pool over from two."""
    (tmp_path / "fork.py").write_text(SCRIPT)
    out = [tmp_path / "1", tmp_path / "2"]
    run(tmp_path / "fork.py", *flags(tiny_model, out[0], 4))
    run(tmp_path / "fork.py", *flags(tiny_model, out[1], 3), ranks=2)
    run(tmp_path / "fork.py", *flags(tiny_model, out[1], 4))
    one, two = ([json.loads(x) for x in (d / "metrics.jsonl").open()] for d in out)
    assert [row["replayed"] for row in one] == [0, 0, 2, 2]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
