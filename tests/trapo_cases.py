"""Reference values of TRAPO's official code, put through the functions of this project.

The official Z is max_response_tokens alone, ours that times trajectories: rl_coef converts it.
"""

from types import SimpleNamespace

import torch

import luffy
from forks import trapo
from luffy import ALGORITHMS, Config, Trajectory
from machinery.batches import collate
from machinery.metrics import Means


def evaluate_trapo(case: dict) -> dict:
    """A case -> its fields that our code computes, in its shapes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return evaluate(case)
    finally:
        torch.set_default_dtype(before)


def evaluate(case: dict) -> dict:
    how, rows, width = case["params"], len(case["mask"]), len(case["mask"][0])
    problem, rewards = SimpleNamespace(prompt_ids=[0]), case["rewards"]
    lengths, prefixes = ([sum(r) for r in case[k]] for k in ("mask", "off_policy_mask"))
    group = rows // len(set(case["problem"]))
    cfg = Config(
        **ALGORITHMS["trapo"]
        | dict(rollouts=group, continuations=0, max_response_tokens=width, entropy_coef=0.0)
        | dict(token_mean=how["token_mean"], rl_coef=1.0 if how["token_mean"] else float(rows))
    )
    trajectories = [
        Trajectory(p, problem, [0] * n, prefix=prefix, right=r, reward=r)
        for p, n, prefix, r in zip(case["problem"], lengths, prefixes, rewards)
    ]
    for t, logp_old in zip(trajectories, case["old_log_prob"]):
        t.logp_old = torch.tensor(logp_old)[: len(t.response)]
    trapo.set_advantages(trajectories, cfg)
    luffy.set_normaliser(trajectories, cfg)
    logp = torch.tensor(case["log_prob"], requires_grad=True)
    flat = torch.cat([row[:n] for row, n in zip(logp, lengths)])
    loss = luffy.token_loss(flat, torch.zeros_like(flat), collate(trajectories), cfg, Means())
    loss.backward()
    counts = [trapo.prefix_counts(prefixes[i : i + group]) for i in range(0, rows, group)]
    return {
        "prefix_counts": sum(counts, []),
        "advantages": luffy.group_advantages(torch.tensor(rewards).view(-1, group)).flatten(),
        "loss": loss.item(),
        "grad_log_prob": logp.grad.tolist(),
    }
