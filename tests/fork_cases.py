"""Reference values of the official code of ORZ and PRIME, put through forks.orz and forks.prime.

As method_cases.py: each `evaluate_` takes a case, a micro-batch with what an official function
returned for it, and returns the fields that our code computes, in the case's shapes. Below them is
what the two forks' tests share.
"""

import json
import textwrap
from pathlib import Path

import torch
from conftest import SHARED, run
from torch import Tensor

import luffy
from forks import orz, prime


class Rows:
    """A case's (B, T) fields as (N,) tensors of its response tokens, in float64, and back."""

    def __init__(self, case: dict):
        self.case, self.mask = case, torch.tensor(case["mask"], dtype=torch.bool)
        self.lengths = self.mask.sum(dim=1).tolist()
        self.rewards = torch.tensor(case["rewards"], dtype=torch.float64)  # (B,)
        self.segment = self.mask.nonzero()[:, 0]  # (N,), its row

    def field(self, name: str) -> Tensor:
        values = torch.tensor(self.case[name], dtype=torch.float64)[self.mask]
        return values.requires_grad_()

    def padded(self, values: Tensor) -> list[list[float]]:
        full = torch.zeros(self.mask.shape, dtype=torch.float64)
        full[self.mask] = values.detach()
        return full.tolist()

    def total(self, losses: Tensor, batches: list[list[int]], by_token: bool) -> Tensor:
        """Official: the mean over micro-batches of the mean over their tokens (or rows)."""
        total = torch.zeros((), dtype=torch.float64)
        rows = self.segment if by_token else torch.arange(len(losses))
        for batch in batches:
            mine = losses[torch.isin(rows, torch.tensor(batch))]
            inv_z, _ = luffy.inverse_z(len(batch), len(mine), 0, 1, token_mean=True)
            total = total + inv_z * mine.sum() / len(batches)
        return total

    def policy(self, advantage: Tensor, batches: list[list[int]]) -> dict:
        logp, old = self.field("log_prob"), self.field("old_log_prob").detach()
        of_trace = torch.zeros(len(logp), dtype=torch.bool)
        clip = self.case["params"]["clip"]
        objective = luffy.mixed_policy_objective(logp, old, advantage, of_trace, clip=clip)
        loss = self.total(-objective, batches, by_token=True)
        (grad,) = torch.autograd.grad(loss, logp)
        return {"loss": loss.item(), "grad_log_prob": self.padded(grad)}


def evaluate_orz(case: dict) -> dict:
    rows, packs = Rows(case), case["packs"]
    returns, old = rows.rewards[rows.segment], rows.field("old_values").detach()
    raw = orz.gae(returns, old)
    advantage, values = orz.normalise(raw), rows.field("values")
    losses = orz.value_loss(values, returns, old, case["params"]["value_clip"])
    value_loss = rows.total(losses, packs, by_token=True)
    (grad,) = torch.autograd.grad(value_loss, values)
    return rows.policy(advantage, packs) | {
        "advantages_raw": rows.padded(raw),
        "returns": rows.padded(returns),
        "advantages": rows.padded(advantage),
        "value_loss": value_loss.item(),
        "grad_values": rows.padded(grad),
    }


def evaluate_prime_advantage(case: dict) -> dict:
    rows = Rows(case)
    q = (rows.field("prm_log_prob") - rows.field("ref_log_prob")).detach()
    order = sorted(range(len(rows.lengths)), key=lambda b: case["problem"][b])  # groups in a row
    qs = q.split(rows.lengths)
    process = prime.process_rewards([qs[b] for b in order])
    of_order = prime.returns(process, rows.rewards[order], case["params"]["group"])
    place = [order.index(b) for b in range(len(order))]
    returns = torch.cat([of_order[i] for i in place])
    advantage = prime.whiten(returns)
    return rows.policy(advantage, [list(range(len(order)))]) | {
        "process_reward": rows.padded(torch.cat([process[i] for i in place])),
        "returns": rows.padded(returns),
        "advantages": rows.padded(advantage),
    }


def evaluate_prime_bce(case: dict) -> dict:
    rows, size = Rows(case), case["params"]["micro_batch"]
    logp, ref = rows.field("prm_log_prob"), rows.field("ref_log_prob").detach()
    losses = prime.verdict_loss(logp - ref, rows.segment, rows.rewards, case["params"]["beta"])
    batches = torch.arange(len(losses)).split(size)
    loss = rows.total(losses, [batch.tolist() for batch in batches], by_token=False)
    (grad,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.item(), "grad_prm_log_prob": rows.padded(grad)}


# ------------------------------------------------------------------ for tests
def cases(*methods: str) -> list[dict]:
    file = SHARED / "method_cases.json"
    every = json.loads(file.read_text()) if file.exists() else []
    return [case for case in every if case["method"] in methods]


def assert_same_numbers(found: dict, case: dict) -> None:
    for field, value in found.items():
        value, expected = (torch.tensor(x, dtype=torch.float64) for x in (value, case[field]))
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9, msg=field)
    made = {"returns", "process_reward", "value_loss"}
    made |= {name for name in case if name.startswith(("loss", "grad", "advantages"))}
    assert set(found) == made & set(case), "a part of the case was not computed"


TRAIN = textwrap.dedent("""
    import importlib, sys
    sys.path.insert(0, ".")
    from dataclasses import replace
    import luffy
    from machinery.processes import init_processes, launch

    def grade(trajectories, grader, tokenizer):  # an untrained model is never right
        for t in trajectories:
            t.right = t.reward = float(sum(t.response) % 3 == 0)

    def main():
        name, model, more, *runs = sys.argv[1:]
        fork = importlib.import_module(f"forks.{name}")
        made = getattr(fork, name.capitalize())()
        replaced = dict(Config=fork.Config, load=made.load, update=made.update, grade=grade)
        vars(luffy).update(replaced, report=lambda out: None)
        flags = "--problems_per_step 8 --max_response_tokens 32 --token_budget 300 --save_every 2"
        flags += " --lr 1e-3 --eval_data none --graders 1 --sample_every 100"
        cfg = luffy.parse_args(["--model", model, *flags.split(), *more.split()], algo=name)
        init_processes()
        for out, steps in zip(runs[::2], runs[1::2]):
            luffy.train(replace(cfg, out=out, steps=int(steps)), model)

    launch(main)
""")


def train(
    tmp_path: Path, name: str, model: Path, *runs: tuple[str, int], more: str = "", ranks: int = 1
) -> list:
    """Runs of a fork, (directory, steps) after (directory, steps) -> their metrics.jsonl."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    wanted = [x for out, steps in runs for x in (tmp_path / out, steps)]
    run(script, name, model, more, *wanted, ranks=ranks)
    files = [tmp_path / out / "metrics.jsonl" for out, _ in runs]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
