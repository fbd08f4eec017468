"""TRAPO: who gets how much of the trace, what of it is learnt, and the official code's values."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run

import luffy
from data import Problem
from forks import trapo
from machinery import toy
from machinery.processes import InputError
from machinery.samplers import Sample
from verify import Grader


def test_help_by_the_rewards_so_far():
    assert trapo.prefix_ratio([]) == 0
    assert [trapo.prefix_ratio([1.0] * n + [0.0] * (4 - n)) for n in (0, 1, 2)] == [0.25, 0.25, 0]
    assert [trapo.prefix_ratio([1.0] * n + [0.0] * (6 - n)) for n in (3, 4)] == [0.5, 0]
    assert [trapo.prefix_ratio([1.0] * n + [0.0] * (7 - n)) for n in (0, 6, 7)] == [1, 1, 0]


def test_of_two_prefixes_alike_the_second_counts():
    assert trapo.prefix_counts([0, 0, 5, 5, 10, 20]) == [False, False, False, True, True, True]
    assert trapo.prefix_counts([0, 0, 5, 5, 0, 0]) == [False, False, False, True, False, False]


class Echo:
    """A sampler that answers any prompt with two tokens, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, n, **_):
        self.asked.append((n, [list(prompt) for prompt in prompts]))
        return [[Sample([9, 1], [-1.0, -1.0])] * n for _ in prompts]


class Judge(Grader):
    """Right are the answer "always", and "trace" where all the trace is there."""

    def __init__(self, trace: str):
        super().__init__()
        self.trace = trace

    def __call__(self, jobs):
        return [float(answer == "always" or text == self.trace) for text, answer in jobs]


def test_a_failing_problem_gets_more_and_more_and_a_solved_one_nothing():
    tokenizer, trace = toy.make_tokenizer(), [10, 11, 12, 13, 14, 15, 16, 17, 1]
    never, always = (
        Problem("", answer, prompt_ids=[5, 6], trace_ids=trace, source="s")
        for answer in ("never", "always")
    )
    sampler, groups = Echo(), trapo.MicroGroups()
    groups.grader, groups.tokenizer = Judge(luffy.text_of(trace, tokenizer)), tokenizer
    cfg = luffy.Config(**luffy.ALGORITHMS["trapo"])
    found = groups.rollout(sampler, {3: never, 4: always}, 0, cfg)
    assert [t.position for t in found] == [3] * 8 + [4] * 8
    assert [t.prefix for t in found] == [0] * 4 + [2, 2, 4, 9] + [0] * 8
    assert [t.reward for t in found] == [0.0] * 7 + [1.0] * 9
    assert found[5].response == [10, 11, 9, 1] and list(found[7].response) == trace
    # four calls, whatever the rewards, and the whole trace is not continued
    assert [(n, len(prompts)) for n, prompts in sampler.asked] == [(4, 2), (2, 2), (1, 2), (1, 1)]
    assert sampler.asked[1][1] == [[5, 6, 10, 11], [5, 6]]
    metrics = groups.score(found, groups.grader, tokenizer, cfg)
    assert (metrics["given/25%"], metrics["given/100%"]) == (0.5, 0.5)
    assert metrics["right/unaided"] == 8 / 12 and metrics["grader_failures"] == 0


def test_advantages_of_a_group_by_hand():
    cfg = luffy.Config(**luffy.ALGORITHMS["trapo"])
    problem = SimpleNamespace(prompt_ids=[5])
    made = [
        luffy.Trajectory(0, problem, [7] * 3, prefix=prefix, right=right, reward=right)
        for prefix, right in zip([0, 0, 0, 0, 1, 1, 2, 3], [0, 0, 0, 1.0, 0, 1.0, 0, 1.0])
    ]
    trapo.set_advantages(made, cfg)
    mean = 3 / 8
    for t, expected in zip(made[3:], ([1 - mean] * 3, [0, -mean, -mean], [1, 1 - mean, 1 - mean])):
        assert torch.as_tensor(t.advantage).expand(3).tolist() == pytest.approx(expected)
    assert made[6].advantage.tolist() == pytest.approx([1, 1, -mean])
    assert made[7].advantage == 1  # no token of its own


def test_other_sizes_of_a_group_are_refused():
    for name, value in (("rollouts", 4), ("traces", 1), ("continuations", 0)):
        cfg = luffy.Config(**luffy.ALGORITHMS["trapo"] | {name: value})
        with pytest.raises(InputError, match=f"--{name} {value}"):
            trapo.check(cfg, 1)


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_run(tiny_model, tmp_path):
    args = "--steps 2 --problems_per_step 4 --max_response_tokens 64 --token_budget 300 --lr 1e-3"
    args += " --entropy_coef 1e-3 --graders 1 --eval_data none"
    for ranks in (1, 2):
        where = ("--model", tiny_model, "--out", tmp_path / str(ranks))
        run("-m", "forks.trapo", *where, *args.split(), ranks=ranks)
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "12"
    )
    assert len(one) == 2 and one[0]["given/100%"] == 1 and one[1]["grad_norm"] > 0
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
