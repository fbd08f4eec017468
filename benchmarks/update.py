"""Our update: prompts shared by a group, or one a trajectory, or padded; and the machine's limit.

    python benchmarks/update.py [--model DIR]    # CPU; prints the tables of its README

All variants take the same trajectories of the same model to a step of AdamW on the same Dr. GRPO
loss, with each token's entropy as a metric, in one process of one thread, in turns: the tiny shape
of tiny.py or, with --model, its real one. Before that their gradients are compared. The padded ones
pad as TRL does, with a plain head on the responses. Seconds are CPU seconds. FLOP are the model's
without padding or recomputation: 6 a matrix parameter and token (in the head: of responses only),
and attention (causal: half of all pairs); a shared prompt counts once. The matrix rate is that of
1024 x 1024 products, measured in every round.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from types import SimpleNamespace
from unittest.mock import patch

import torch.nn.functional as F
from tqdm import tqdm

from tiny import Ours, Lengths, luffy, machine, matrix_rate, save, show, show_head, spread, torch

from machinery.batches import MicroBatch, Trajectory, pack
from machinery.model import from_pretrained

# (what of it, tokens or trajectories of a micro-batch); TRL's default are 8 trajectories
VARIANTS = {
    "a group's prompt once": ("shared", 512),
    "a prompt a trajectory": ("own", 512),
    "padded, 8 trajectories": ("padded", 8),
}
MORE = {
    "a group's prompt once, 2,048 tokens": ("shared", 2048),
    "a prompt a trajectory, 2,048 tokens": ("own", 2048),
    "padded, 128 trajectories": ("padded", 128),
}


def pack_apart(trajectories: list[Trajectory], token_budget: int) -> list[MicroBatch]:
    """Rows without two trajectories of a group, so that no prompt is shared."""
    groups: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(t.position, []).append(t)
    columns = zip_longest(*groups.values())
    return sum((pack([t for t in column if t], token_budget) for column in columns), [])


def padded(model, trajectories: list[Trajectory], batch: int, z: float) -> None:
    """Prompts padded on the left, responses on the right, to the widest of all."""
    widest = max(len(t.problem.prompt_ids) for t in trajectories)
    longest = max(len(t.response) for t in trajectories)
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


def flops(model, trajectories: list[Trajectory], shared: bool) -> float:
    layers = sum(p.numel() for p in model.base_model.layers.parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight.numel()
    copies = {t.position if shared else i: t.problem for i, t in enumerate(trajectories)}
    prompts = [len(problem.prompt_ids) for problem in copies.values()]
    responses = [(len(t.problem.prompt_ids), len(t.response)) for t in trajectories]
    tokens = sum(n for _, n in responses)
    pairs = sum(p * p / 2 for p in prompts) + sum(n * p + n * n / 2 for p, n in responses)
    # a pair: forward Q K and P V, 2 FLOP a channel each; backward twice that
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * pairs
    return 6 * layers * (sum(prompts) + tokens) + 6 * head * tokens + attention


class Update:
    """Trajectories of a model, and an update on them by each variant."""

    def __init__(self, path: str, shape: str):
        self.ours = ours = Ours(path, shape)
        self.model = from_pretrained(path, attn_implementation="sdpa").train()
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        ours.sampler.push(ours.model.named_parameters())
        self.trajectories = luffy.rollout(ours.sampler, ours.mine, 0, ours.cfg)
        luffy.score(self.trajectories, Lengths(), ours.tokenizer, ours.cfg)
        # else ours would save their backward pass
        assert all(t.advantage for t in self.trajectories)

    def run(self, kind: str, size: int, keep: list | None = None) -> None:
        """A step, or with `keep` the gradient alone, into it."""
        if kind == "padded":
            padded(self.model, self.trajectories, size, self.z())
            if keep is None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.adamw.step()
            else:
                keep += [p.grad.clone() for p in self.model.parameters()]
            return self.adamw.zero_grad()
        optimizer, cfg = self.ours.optimizer, replace(self.ours.cfg, token_budget=size)
        if keep is not None:

            def step(max_norm: float) -> float:
                keep.extend(p.grad.clone() for p in self.ours.model.parameters())
                return max_norm

            optimizer = SimpleNamespace(step=step, zero_grad=optimizer.zero_grad)
        with patch.object(luffy, "pack", pack_apart) if kind == "own" else nullcontext():
            luffy.update(self.ours.policy, optimizer, self.trajectories, cfg)

    def z(self) -> float:
        return len(self.trajectories) * self.ours.cfg.max_response_tokens

    def gradient(self, kind: str, size: int) -> torch.Tensor:
        self.run(kind, size, keep=(kept := []))
        return torch.cat([g.flatten() for g in kept])

    def differ_in_float64(self) -> float:
        """How far the gradients of a few groups differ, shared or not; the model stays float64."""
        ours, self.ours.policy = self.ours, None  # its DDP has float32 buckets
        for module in ours.model.double().modules():
            if type(module).__name__.endswith("RMSNorm"):  # transformers' go through float32
                module.forward = lambda x, m=module: F.rms_norm(
                    x, x.shape[-1:], m.weight, m.variance_epsilon
                )
        for p in ours.model.parameters():
            p.grad = None
        ours.policy = luffy.data_parallel(luffy.Policy(ours.model, 1.0))
        ours.optimizer = luffy.ShardedAdamW(ours.policy.parameters(), lr=1e-6)
        self.trajectories = [t for t in self.trajectories if t.position < 2]
        return difference(self.gradient("own", 512), self.gradient("shared", 512))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def measure(path: str, shape: str, variants: dict, rounds: int) -> None:
    """Print a table."""
    update = Update(path, shape)
    exact = update.gradient(*variants["a prompt a trajectory"])
    errors = {name: difference(update.gradient(*how), exact) for name, how in variants.items()}
    seconds, rates = {name: [] for name in variants}, []
    with tqdm(total=rounds * len(variants), desc=shape) as bar:
        for _ in range(rounds):
            rates.append(matrix_rate())
            for name, how in variants.items():
                start = time.process_time()
                update.run(*how)
                seconds[name].append(time.process_time() - start)
                bar.update()
    work = {
        name: flops(update.model, update.trajectories, kind == "shared")
        for name, (kind, _) in variants.items()
    }
    prompts = sum(len(problem.prompt_ids) for problem in update.ours.problems)
    responses = sum(len(t.response) for t in update.trajectories)
    each, once = responses + 8 * prompts, responses + prompts
    print(
        f"\n{shape} shape: {len(update.trajectories)} responses, {each:,} tokens with a prompt "
        f"each, {once:,} with a group's prompt once (ratio {each / once:.2f}); {machine()}; "
        f"{rounds} rounds, median (lowest to highest); matrix rate "
        f"{spread([r / 1e9 for r in rates], '.0f')} GFLOP/s; in float64 the gradients of shared "
        f"prompts and own ones differ by {update.differ_in_float64():.0e}\n"
    )
    show_head(
        *("", "CPU seconds", "a prompt a trajectory / it", "padded (8) / it"),
        *("FLOP/s, share of the matrix rate", "gradient differs by"),
    )
    for name, mine in seconds.items():
        ratios = [
            spread([b / a for a, b in zip(mine, seconds[base])])
            for base in ("a prompt a trajectory", "padded, 8 trajectories")
        ]
        share = spread([work[name] / s / r for s, r in zip(mine, rates)])
        show(name, f"{statistics.median(mine):.2f}", *ratios, share, f"{errors[name]:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a directory: the real shape in place of the tiny one")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    luffy.init_processes()
    if args.model:
        return measure(args.model, "real", VARIANTS, args.rounds)
    with tempfile.TemporaryDirectory() as directory:
        measure(save(directory), "tiny", VARIANTS | MORE, args.rounds)


if __name__ == "__main__":
    luffy.launch(main)
