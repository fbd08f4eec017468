"""ReLIFT: its SFT step is the official one, and its queue and second AdamW outlive a kill."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import run

import luffy
from data import Problem
from forks import relift
from luffy import ShardedAdamW, Trajectory
from machinery.processes import InputError, init_processes


def test_who_is_unsolved():
    a, b, c = (Problem("", x) for x in "abc")
    rollouts = [(0, a, 0), (0, a, 1), (4, b, 0), (4, b, 0), (2, c, 0), (2, c, 0)]
    trajectories = [Trajectory(i, p, [1], right=right) for i, p, right in rollouts]
    trajectories.append(Trajectory(2, c, [1], off_policy=True, right=1.0))  # no rollout
    assert relift.unsolved(trajectories) == {4: b, 2: c}
    assert relift.unsolved(trajectories[:2]) == {}


def test_two_adamws_on_bfloat16_parameters_see_each_others_steps():
    """As two AdamWs on one float32 copy, in any order, and by way of a checkpoint."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, 20).bfloat16())
    master = p.detach().float().clone()
    rl, sft = ShardedAdamW([p], 1e-4), relift.SFT()
    sft.share_masters(rl)
    sft.set_lr(3e-4)
    sft.queue = [3, 1]
    theirs = [torch.optim.AdamW([master], lr, weight_decay=0.01, fused=True) for lr in (1e-4, 3e-4)]
    for step in range(12):
        if step == 6:  # killed and resumed
            saved, p = [kept.state_dict() for kept in (rl, sft)], torch.nn.Parameter(p.detach())
            rl, sft = ShardedAdamW([p], 1e-4), relift.SFT()
            sft.share_masters(rl)
            sft.set_lr(3e-4)
            rl.load_state_dict(saved[0]), sft.load_state_dict(saved[1])
            assert sft.queue == [3, 1]
        which = step % 3 % 2
        p.grad = torch.randn(50, 20).bfloat16()
        norm = (rl, sft)[which].step(1.0)
        master.grad = p.grad.float() * (1.0 / torch.tensor(norm + 1e-6)).clamp(max=1.0)
        theirs[which].step()
        assert torch.equal(rl.mine[0], master) and torch.equal(sft.mine[0], master)
        assert torch.equal(p, master.bfloat16())


def flags(model, out, *more):
    sizes = {"problems_per_step": 4, "sft_problems": 3, "max_response_tokens": 48, "lr": 1e-2}
    sizes |= {"graders": 1, "save_every": 2, "eval_data": "none", "model": model, "out": out}
    pairs = (sizes | dict(zip(more[::2], more[1::2]))).items()
    return [str(x) for name, value in pairs for x in (f"--{name}", value)]


@pytest.fixture
def train(monkeypatch):
    """The fork in this process, as main would run it -> the rows of metrics.jsonl."""
    monkeypatch.setattr(luffy, "Config", relift.Config)
    monkeypatch.setattr(luffy, "report", lambda out: None)
    init_processes()

    def in_this_process(model, out, *more):
        sft = relift.SFT()
        monkeypatch.setattr(luffy, "load", sft.load)
        monkeypatch.setattr(luffy, "update", sft.update)
        cfg = luffy.parse_args(flags(model, out, *more), algo="relift")
        luffy.check(cfg, 1)
        luffy.train(cfg, str(model))
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    yield in_this_process
    dist.destroy_process_group()


@pytest.mark.slow  # its quicker relative: the same for forks.exgrpo
def test_a_resumed_run_has_the_same_bits(tiny_model, tmp_path, train):
    """An untrained model solves nothing: 4 problems a step enter the queue, 3 leave it."""
    whole = train(tiny_model, tmp_path / "whole", "steps", 4)
    train(tiny_model, tmp_path / "part", "steps", 2)
    assert train(tiny_model, tmp_path / "part", "steps", 4) == whole
    assert [row["queue"] for row in whole] == [1, 2, 3, 4]
    assert all(row["sft/grad_norm"] > 0.1 and row["sft/trace_f"] < -1 for row in whole)
    assert whole[-1]["sft/trace_f"] > whole[0]["sft/trace_f"]  # of log π, over other traces


def test_a_step_that_solves_everything_leaves_the_queue_alone(monkeypatch):
    sft, problem = relift.SFT(), Problem("", "")
    sft.problems, sft.number, sft.params = [problem], {id(problem): 0}, [None]
    monkeypatch.setattr(relift, "plain_update", lambda *args: {})
    cfg = replace(relift.Config(), problems_per_step=2)
    solved, failed = (Trajectory(0, problem, [1], right=right) for right in (1.0, 0.0))
    assert sft.update(None, None, [solved], cfg) == {"queue": 0}
    assert sft.update(None, None, [failed], cfg) == {"queue": 1}  # not yet enough
    assert sft.update(None, None, [solved], cfg) == {"queue": 1}


def test_too_few_traces_for_the_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(relift, "world_size", lambda: 4)
    with pytest.raises(InputError, match="--sft_problems 3"):
        relift.check(relift.Config(sft_problems=3), 4)


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_run(tiny_model, tmp_path):
    """Also where one process takes the queue over from two."""
    out = [tmp_path / "1", tmp_path / "2"]
    run("-m", "forks.relift", *flags(tiny_model, out[0], "steps", 3))
    run("-m", "forks.relift", *flags(tiny_model, out[1], "steps", 2), ranks=2)
    run("-m", "forks.relift", *flags(tiny_model, out[1], "steps", 3))
    one, two = ([json.loads(x) for x in (d / "metrics.jsonl").open()] for d in out)
    assert [row["queue"] for row in one] == [1, 2, 3]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
