"""Reference values of ReLIFT's official SFT step, put through the functions of this project.

A case is a rank's traces in micro-batches. Its loss is the sum of their means, each over the tokens
of its micro-batch, divided by `divisor`. Ours is a mean over an update, so each micro-batch is one.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch

import luffy
from forks import relift
from luffy import Means, Trajectory
from machinery.batches import collate


def evaluate_relift(case: dict) -> dict:
    """A case -> its fields that our code computes, in its shapes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return evaluate(case)
    finally:
        torch.set_default_dtype(before)


def evaluate(case: dict) -> dict:
    how = case["params"]
    logp, entropy = (torch.tensor(case[k], requires_grad=True) for k in ("log_prob", "entropy"))
    cfg = relift.as_sft(relift.Config(sft_entropy=how["entropy_coef"]))
    parts = [cfg, replace(cfg, entropy_coef=0.0), replace(cfg, sft_coef=0.0, entropy_coef=-1.0)]
    whole, sft, mean_entropy = (
        [loss(case, rows, logp, entropy, part) for rows in case["micro_batches"]] for part in parts
    )
    total = sum(whole) / how["divisor"]
    total.backward()
    return {
        "loss_sft": [x.item() for x in sft],
        "loss_entropy": [x.item() for x in mean_entropy],
        "loss": total.item(),
        "grad_log_prob": logp.grad.tolist(),
        "grad_entropy": entropy.grad.tolist(),
    }


def loss(case: dict, rows: list[int], logp: torch.Tensor, entropy: torch.Tensor, cfg):
    """luffy's loss of these rows as one update."""
    lengths = {b: sum(case["mask"][b]) for b in rows}
    problem = SimpleNamespace(prompt_ids=[0])
    traces = [Trajectory(b, problem, [0] * lengths[b], True, advantage=1.0) for b in rows]
    luffy.set_normaliser(traces, cfg)
    logp, entropy = (torch.cat([x[b, : lengths[b]] for b in rows]) for x in (logp, entropy))
    return luffy.token_loss(logp, entropy, collate(traces), cfg, Means())
