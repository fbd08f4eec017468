"""The objective says what the equations say, and what the official code computes."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import ALL_ROWS

from luffy import ALGORITHMS, Config, group_advantages, mixed_policy_objective, shape
from luffy import token_logprobs
from machinery.rivals import ROWS

CASES = json.loads((Path(__file__).parent / "objective_cases.json").read_text())
F64 = torch.float64


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_value_and_gradient_equal_the_official_code(case):
    logp = torch.tensor(case["log_prob"], dtype=F64, requires_grad=True)
    off = torch.tensor(case["off_policy_mask"]).bool()
    mask = torch.tensor(case["mask"], dtype=F64)
    behavior = torch.tensor(case["old_log_prob"], dtype=F64).masked_fill(off, 0.0)
    advantage = torch.tensor(case["advantages"], dtype=F64)
    if advantage.dim() == 1:
        advantage = advantage[:, None]
    shaped = case["reshape"] != "no_reshape"
    objective = mixed_policy_objective(
        logp,
        behavior,
        advantage,
        off,
        shaping="luffy" if shaped else "none",
        clip=case["clip"],
        gamma=float(case["reshape"].split("_")[-1]) if shaped else 0.1,
    )
    z = mask.shape[1] if case["normaliser"] == "length T" else mask.sum()
    loss = -(objective * mask).sum() / z
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    torch.testing.assert_close(
        logp.grad, torch.tensor(case["grad_log_prob"], dtype=F64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("algo", [algo for algo in ALL_ROWS if algo not in ROWS])
def test_every_arm_equals_a_plain_loop_over_tokens(algo):
    cfg = Config(**ALGORITHMS[algo])
    rng = random.Random(algo)
    rows = [
        (
            math.log(rng.uniform(0.001, 1)),
            math.log(rng.uniform(0.001, 1)),
            rng.uniform(-1, 1),
            rng.random() < 0.3,
        )
        for _ in range(200)
    ]
    expected = []
    for logp, logp_old, advantage, is_trace in rows:
        pi, pi_old, gamma = math.exp(logp), math.exp(logp_old), cfg.gamma
        if is_trace:
            f = {"luffy": pi / (pi + gamma), "none": pi, "log": logp}[cfg.shaping]
            expected.append(f * advantage)
            continue
        ratio = pi / pi_old
        if cfg.shape_rollouts:
            ratio = (pi / (pi + gamma)) / (pi_old / (pi_old + gamma))
        low, high = (1 - cfg.clip, 1 + cfg.clip) if cfg.clip is not None else (0, math.inf)
        expected.append(min(ratio * advantage, min(max(ratio, low), high) * advantage))
    logp, old, advantage, off = (torch.tensor(column) for column in zip(*rows))
    found = mixed_policy_objective(
        logp.to(F64),
        old.to(F64).masked_fill(off, 0.0),
        advantage.to(F64),
        off,
        shaping=cfg.shaping,
        gamma=cfg.gamma,
        clip=cfg.clip,
        shape_rollouts=cfg.shape_rollouts,
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-5, atol=1e-6)


def gradient(p: float, advantage: float, off_policy: bool, **kwargs) -> float:
    logp = torch.tensor([p], dtype=F64).log().requires_grad_()
    behavior = torch.zeros_like(logp) if off_policy else logp.detach()
    mixed_policy_objective(
        logp, behavior, torch.tensor([advantage], dtype=F64), torch.tensor([off_policy]), **kwargs
    ).sum().backward()
    return logp.grad.item()


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 1.0])
def test_gradients_by_hand(p):
    """d objective / d logp of one token: shaped, unshaped, SFT, and REINFORCE at ratio 1."""
    assert gradient(p, 0.875, True) == pytest.approx(0.1 * p / (p + 0.1) ** 2 * 0.875)
    assert gradient(p, 0.875, True, shaping="none") == pytest.approx(p * 0.875)
    assert gradient(p, 1.0, True, shaping="log") == pytest.approx(1.0)
    for kwargs in ({}, {"clip": 0.2}):
        assert gradient(p, -0.125, False, **kwargs) == pytest.approx(-0.125)


def test_shaping_lifts_the_unlikely_and_spares_the_likely():
    """The factors that the README and the design quote."""
    for p, factor in ((0.001, 9.8), (0.1, 2.5), (1.0, 0.083)):
        plain = gradient(p, 1.0, True, shaping="none")
        assert gradient(p, 1.0, True) / plain == pytest.approx(factor, rel=0.01)
    assert shape(torch.tensor(0.1), 0.1).item() == pytest.approx(0.5)


def test_a_very_unlikely_trace_token_has_a_finite_gradient():
    for shaping in ("luffy", "none", "log"):
        logp = torch.tensor([-200.0, -200.0], requires_grad=True)
        off = torch.tensor([True, False])
        mixed_policy_objective(
            logp, torch.tensor([0.0, -200.0]), torch.ones(2), off, shaping=shaping
        ).sum().backward()
        assert logp.grad.isfinite().all(), shaping


def test_advantages_by_hand():
    trace_right = torch.tensor([[0.0] * 7 + [1.0]])
    assert group_advantages(trace_right).tolist() == [[-0.125] * 7 + [0.875]]
    assert group_advantages(torch.ones(2, 8)).abs().max() == 0
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    # count=3: the baseline does not see the trace in the last column
    rollouts = group_advantages(rewards, count=3)[0, :3]
    assert rollouts.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    std = (1 / 3) ** 0.5  # of 1, 0, 0, 1, unbiased
    assert group_advantages(rewards, normalize_std=True)[0].tolist() == pytest.approx(
        [0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], rel=1e-4
    )
    assert group_advantages(torch.zeros(1, 8), normalize_std=True).tolist() == [[0.0] * 8]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_head_equals_the_naive_one(temperature):
    torch.manual_seed(0)
    hidden = torch.randn(20, 16, dtype=F64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=F64, requires_grad=True)
    targets = torch.randint(50, (20,))
    a, b = torch.randn(20, dtype=F64), torch.randn(20, dtype=F64)
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    naive = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    chunked = token_logprobs(hidden, weight, targets, temperature=temperature, chunk=7)
    for x, y in zip(naive, chunked):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    for x, y in zip(
        *(
            torch.autograd.grad((a * logp + b * entropy).sum(), (hidden, weight))
            for logp, entropy in (naive, chunked)
        )
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_the_heads_gradient_in_bfloat16_is_added_up_in_float32():
    """And from float32 logits: else it would be off by 0.6 or 0.8 %."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1024, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    targets = torch.randint(50, (1024,))

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        w = weight.to(dtype).requires_grad_()
        logp, _ = token_logprobs(hidden.to(dtype), w, targets, chunk=16)
        logp.sum().backward()
        return w.grad.double()

    exact = gradient(F64)
    assert (gradient(torch.bfloat16) - exact).norm() < 3e-3 * exact.norm()
