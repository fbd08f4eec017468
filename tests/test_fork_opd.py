"""On-policy distillation: the advantage, whom it takes for a teacher, kill and resume."""

import copy
import json
import math
import shutil

import pytest
import torch
from conftest import run
from test_update import OneRank, make_trajectories, plain_logps

import luffy
from forks import opd
from machinery import toy
from machinery.model import from_pretrained
from machinery.processes import InputError


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_three_tokens_by_hand():
    """The teacher likes the first better, the second worse, the third as much."""
    teacher, old = torch.tensor([0.5, 0.01, 0.3]).log(), torch.tensor([0.25, 0.1, 0.3]).log()
    old.requires_grad_()
    found = opd.distilled(teacher, old, torch.tensor(0.0))
    assert found.tolist() == pytest.approx([math.log(2), -math.log(10), 0.0])
    assert not found.requires_grad
    found = opd.distilled(teacher, old, torch.tensor(-0.5))
    assert found.tolist() == pytest.approx([math.log(2) - 0.5, -math.log(10) - 0.5, -0.5])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another random model of the toy's shape."""
    directory = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer = toy.make_tokenizer()
    toy.make_model(tokenizer, seed=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def args(model, teacher, out, steps=4):
    plain = f"--steps {steps} --save_every 2 --problems_per_step 4 --max_response_tokens 16"
    plain += " --lr 3e-3 --graders 1 --eval_data none --token_budget 300 --reward_coef 0.5"
    where = ("--model", model, "--teacher", teacher, "--out", out)
    return ["-m", "forks.opd", *where, *plain.split()]


def test_a_teacher_is_needed_and_must_share_the_vocabulary(tiny_model, teacher, tmp_path):
    cfg = opd.Config(**luffy.ALGORITHMS["opd"])
    with pytest.raises(InputError, match="--teacher: .*python luffy.py"):
        opd.check(cfg, 1)
    with pytest.raises(InputError, match="--teacher .*nowhere: neither"):
        opd.load_teacher(opd.Config(teacher=str(tmp_path / "nowhere")), str(tiny_model))
    shutil.copytree(teacher, tmp_path / "other")
    tokenizer = luffy.load_tokenizer(tmp_path / "other")
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="--teacher .*other: its tokenizer has 1 tokens"):
        opd.load_teacher(opd.Config(teacher=str(tmp_path / "other")), str(tiny_model))
    toy.make_model(tokenizer, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="--teacher .*other: its vocabulary"):
        opd.load_teacher(opd.Config(teacher=str(tmp_path / "other")), str(tiny_model))


def distil(tiny_model, teacher):
    """One step in this process -> its rollouts, the policy before it, metrics."""
    cfg = dict(problems_per_step=4, max_prompt_tokens=32, max_response_tokens=32, lr=1e-3)
    cfg |= dict(token_budget=100, teacher=str(teacher))
    cfg = opd.Config(**luffy.ALGORITHMS["opd"] | cfg)
    fork, model = opd.Distillation(), from_pretrained(tiny_model, attn_implementation="packed")
    fork.teacher, before = opd.load_teacher(cfg, str(tiny_model)), copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    policy, rollouts = OneRank(opd.Policy(model, 1.0)), make_trajectories(cfg)
    for t in rollouts:
        t.logp_sampler = [0.0] * len(t.response)
    optimizer = luffy.ShardedAdamW(policy.parameters(), cfg.lr)
    return rollouts, before, fork.update(policy, optimizer, rollouts, cfg)


def test_the_policy_itself_teaches_it_nothing(tiny_model):
    _, _, metrics = distil(tiny_model, tiny_model)
    assert metrics["teacher_kl"] == 0 and metrics["skipped_updates"] == 2


def test_advantages_are_of_the_policy_before_the_first_update(tiny_model, teacher):
    rollouts, before, metrics = distil(tiny_model, teacher)
    assert metrics["skipped_updates"] == 0
    taught, gaps = from_pretrained(teacher, attn_implementation="packed"), []
    for t in rollouts:
        with torch.no_grad():
            expected = plain_logps(taught, t)[0] - plain_logps(before, t)[0]
        torch.testing.assert_close(t.advantage, expected, rtol=1e-4, atol=1e-5)
        gaps += (-expected).tolist()
        first = t.position < 2  # the ratio of the first update is 1, that of the second is not
        assert torch.allclose(t.factor, torch.ones_like(t.factor), atol=1e-5) == first
    assert metrics["teacher_kl"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


@pytest.mark.slow
def test_it_comes_nearer_to_the_teacher(tiny_model, teacher, tmp_path):
    run(*args(tiny_model, teacher, tmp_path / "run"))
    found = [row["teacher_kl"] for row in rows(tmp_path / "run")]
    assert found[0] > 1.5 * found[3] > 0


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(tiny_model, teacher, tmp_path):
    run(*args(tiny_model, teacher, tmp_path / "whole"))
    run(*args(tiny_model, teacher, tmp_path / "parts", steps=2))
    run(*args(tiny_model, teacher, tmp_path / "parts"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_run(tiny_model, teacher, tmp_path):
    for ranks in (1, 2):
        run(*args(tiny_model, teacher, tmp_path / str(ranks), steps=2), ranks=ranks)
    for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / "2")):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
