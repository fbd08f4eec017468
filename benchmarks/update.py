"""Our update against padded ones, and against what the machine's matrix products allow.

    python benchmarks/update.py        # CPU, five minutes; prints the tables of its README

All variants take the same 128 trajectories (prompts of 16 to 48 tokens, responses of up to 128) of
the same tiny Qwen2 to a step of AdamW on the same Dr. GRPO loss, with each token's entropy as a
metric, in one process of one thread, in turns. Before that their gradients are compared. The
padded ones pad as TRL does, with a plain head on the responses. Useful FLOP are the model's without
padding or recomputation: 6 a matrix parameter and token (in the head: of responses only), and
attention within a trajectory (causal: half of all pairs). The matrix rate is that of 1024 x 1024
products, measured in every round.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace

from tqdm import tqdm

from tiny import Ours, Lengths, luffy, machine, matrix_rate, save, spread, torch

from machinery.model import from_pretrained

VARIANTS = {  # (padded?, trajectories or tokens of a micro-batch); TRL's default are 8 trajectories
    "ours, 512 tokens": (False, 512),
    "ours, 2,048 tokens": (False, 2048),
    "ours, 8,192 tokens": (False, 8192),
    "padded, 8 trajectories": (True, 8),
    "padded, 128 trajectories": (True, 128),
}


def padded(model, trajectories: list, batch: int) -> None:
    """Prompts padded on the left, responses on the right, to the widest of all."""
    widest = max(len(t.problem.prompt_ids) for t in trajectories)
    longest = max(len(t.response) for t in trajectories)
    z = len(trajectories) * 128
    for i in range(0, len(trajectories), batch):
        some = trajectories[i : i + batch]
        ids, mask = torch.zeros(2, len(some), widest + longest, dtype=torch.long)
        for row, t in enumerate(some):
            tokens = torch.tensor([*t.problem.prompt_ids, *t.response])
            start = widest - len(t.problem.prompt_ids)
            ids[row, start : start + len(tokens)] = tokens
            mask[row, start : start + len(tokens)] = 1
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state[:, widest - 1 : -1])
        log_p = logits.log_softmax(-1)
        logp = log_p.gather(2, ids[:, widest:, None])[..., 0]
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        assert entropy.isfinite().all()
        advantage = torch.tensor([t.advantage for t in some])[:, None]
        objective = (logp - logp.detach()).exp() * advantage
        (-(objective * mask[:, widest:]).sum() / z).backward()


def useful_flops(model, trajectories: list) -> float:
    config = model.config
    head = model.lm_head.weight.numel()
    layers = (
        sum(
            p.numel()
            for name, p in model.named_parameters()
            if p.dim() == 2 and "embed" not in name
        )
        - head
    )
    tokens = [len(t.problem.prompt_ids) + len(t.response) for t in trajectories]
    responses = sum(len(t.response) for t in trajectories)
    # forward Q K and P V: 2 products of 2 FLOP x n x n / 2 x width; backward twice that
    attention = sum(config.num_hidden_layers * 6 * config.hidden_size * n * n for n in tokens)
    return 6 * layers * sum(tokens) + 6 * head * responses + attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    luffy.init_processes()
    with tempfile.TemporaryDirectory() as directory:
        path = save(directory)
        ours = Ours(path)
        model = from_pretrained(path, attn_implementation="sdpa").train()
    ours.sampler.push(ours.model.named_parameters())
    trajectories = luffy.rollout(ours.sampler, ours.mine, 0, ours.cfg)
    luffy.score(trajectories, Lengths(), ours.tokenizer, ours.cfg)
    assert all(t.advantage for t in trajectories)  # else ours would save their backward pass
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def run(name: str, keep: list | None = None) -> None:
        """A step, or the gradient alone."""
        is_padded, size = VARIANTS[name]
        if is_padded:
            padded(model, trajectories, size)
            if keep is None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                adamw.step()
            else:
                keep += [p.grad.clone() for p in model.parameters()]
            adamw.zero_grad()
        else:
            optimizer = (
                ours.optimizer
                if keep is None
                else SimpleNamespace(
                    step=lambda _: (
                        keep.extend(p.grad.clone() for p in ours.model.parameters()) or 0.0
                    ),
                    zero_grad=ours.optimizer.zero_grad,
                )
            )
            luffy.update(ours.policy, optimizer, trajectories, replace(ours.cfg, token_budget=size))

    gradients = {name: [] for name in VARIANTS}
    for name, gradient in gradients.items():
        run(name, keep=gradient)
    exact = torch.cat([g.flatten() for g in gradients["padded, 8 trajectories"]])
    errors = {
        name: ((torch.cat([g.flatten() for g in gradient]) - exact).norm() / exact.norm()).item()
        for name, gradient in gradients.items()
    }
    seconds, rates = {name: [] for name in VARIANTS}, []
    for _ in tqdm(range(args.rounds)):
        rates.append(matrix_rate())
        for name in VARIANTS:
            start = time.perf_counter()
            run(name)
            seconds[name].append(time.perf_counter() - start)
    flops = useful_flops(model, trajectories)
    tokens = sum(len(t.problem.prompt_ids) + len(t.response) for t in trajectories)
    print(
        f"{machine()}; {tokens:,} tokens, {flops / 1e9:.0f} useful GFLOP; {args.rounds} rounds, "
        f"median (lowest to highest); matrix rate {spread([r / 1e9 for r in rates], '.0f')} "
        "GFLOP/s\n"
    )
    print(
        "| | seconds | time, padded (8) / it | useful FLOP/s, share of the matrix rate "
        "| gradient differs by |\n|---|---|---|---|---|"
    )
    base = seconds["padded, 8 trajectories"]
    for name, mine in seconds.items():
        ratios = spread([b / a for a, b in zip(mine, base)])
        shares = spread([flops / s / r for s, r in zip(mine, rates)])
        print(
            f"| {name} | {statistics.median(mine):.2f} | {ratios} | {shares} | {errors[name]:.0e} |"
        )


if __name__ == "__main__":
    luffy.launch(main)
