"""DAPO's refill: which groups go, what comes in their place, the same for one rank and two."""

import json
import textwrap
from dataclasses import replace

import pytest
from conftest import run

import luffy
from data import Problem, batch_at
from forks import dapo
from machinery import toy
from machinery.samplers import Sample
from verify import Grader

PROBLEMS = [
    Problem("", "mixed" if i % 3 == 0 else "wrong", prompt_ids=[5, i], source="s")
    for i in range(10, 34)
]
CFG = dapo.Config(**luffy.ALGORITHMS["dapo"] | dict(rollouts=4, problems_per_step=8))


def test_flat():
    assert dapo.is_flat([0.0, 0.0]) and dapo.is_flat([1.0, 1.0]) and dapo.is_flat([])
    assert not dapo.is_flat([0.0, 1.0, 1.0])


class Echo:
    def __init__(self):
        self.seeds, self.calls = [], 0

    def generate(self, prompts, n, *, seeds, **_):
        self.calls += bool(n)
        self.seeds += seeds
        return [[Sample([9, 1], [-1.0, -1.0]) for _ in range(n)] for _ in prompts]


class Judge(Grader):
    """Of four responses to a problem "mixed" one is right."""

    def __call__(self, jobs):
        self.failures["timeout"] += 1
        return [float(answer == "mixed" and i % 4 == 0) for i, (_, answer) in enumerate(jobs)]


def refilled(cfg, positions=range(8), step=1):
    """-> a rank's batch after `step`'s rollout: position -> its problem; the fork; the sampler."""
    fork, sampler = dapo.Refill(), Echo()
    fork.grader, fork.tokenizer, fork.problems = Judge(), toy.make_tokenizer(), PROBLEMS
    batch = batch_at(PROBLEMS, step, cfg.problems_per_step, cfg.seed)
    found = fork.rollout(sampler, {i: batch[i] for i in positions}, step, cfg)
    assert [t.position for t in found] == [i for i in positions for _ in range(cfg.rollouts)]
    return {t.position: t.problem for t in found}, fork, sampler, found


def test_a_flat_group_is_replaced_until_it_is_mixed():
    plain, fork, *_ = refilled(replace(CFG, refill=0))
    assert list(plain.values()) == batch_at(PROBLEMS, 1, 8, CFG.seed) and fork.sampled == 8
    once, *_ = refilled(replace(CFG, refill=1))
    for i, problem in plain.items():
        if problem.answer == "mixed":
            assert once[i] is problem
    assert once != plain
    many, fork, sampler, found = refilled(replace(CFG, refill=50))
    assert {problem.answer for problem in many.values()} == {"mixed"}
    assert all(many[i] is once[i] for i in once if once[i].answer == "mixed")
    assert len(set(sampler.seeds)) == len(sampler.seeds) == fork.sampled > 8
    assert sampler.calls < 50  # it stops when no group is flat
    metrics = fork.score(found, fork.grader, fork.tokenizer, CFG)
    assert metrics["groups/sampled"] == fork.sampled / 8 and metrics["groups/mixed"] == 1
    assert metrics["grader_failures/timeout"] == fork.grader.failures["timeout"] > 1


def test_a_place_does_not_depend_on_the_others():
    whole, *_ = refilled(CFG)
    assert whole == {**refilled(CFG, [0, 2, 4, 6])[0], **refilled(CFG, [1, 3, 5, 7])[0]}


TWO = textwrap.dedent("""
    import sys; sys.path.insert(0, ".")
    from functools import partial
    import luffy
    from forks import dapo
    from machinery.processes import launch
    def grade(trajectories, grader, tokenizer):  # odd positions, so rank 1, need all rounds
        for i, t in enumerate(trajectories):
            t.right = t.reward = float(t.position % 2 == 0 and i % 2 == 0)
    luffy.grade, r = grade, dapo.Refill()
    replaced = dict(Config=dapo.Config, load=r.load, rollout=r.rollout, score=r.score)
    launch(partial(luffy.main, algo="dapo", **replaced))
""")


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_run(tiny_model, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    args = "--steps 2 --problems_per_step 4 --max_response_tokens 32 --lr 1e-3 --refill 2"
    args += " --graders 1 --eval_data none --token_budget 300"
    for ranks in (1, 2):
        where = ("--model", tiny_model, "--out", tmp_path / str(ranks))
        run(tmp_path / "two.py", *where, *args.split(), ranks=ranks)
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "12"
    )
    assert one[1]["groups/sampled"] == 2 and one[1]["grad_norm"] > 0  # half once, half 3 times
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
