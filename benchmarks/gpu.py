"""Our update on a GPU, in a real model's shape with random weights: its share of the matrix rate.

    python benchmarks/gpu.py [--shape Qwen/Qwen2.5-Math-1.5B] [--tokens 65536]

All variants take the same trajectories to a step of AdamW on LUFFY's loss, in turns: groups of 7
rollouts of mixed lengths and a trace, prompts of 200 tokens, responses of up to 8,192. The padded
ones pad on the right, so that causal attention needs no mask and keeps its fast kernel: a row of a
micro-batch is a trajectory, with a prompt of its own. Gradients are compared first. FLOP are those
of update.py, without padding or recomputation. The matrix rate is that of 8192 x 8192 products in
bfloat16. Without a GPU it checks itself: --shape toy --tokens 2000. A measurement is printed as it
comes, the table at the end.
"""

import argparse
import random
import statistics
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import torch
from tqdm import tqdm
from update import difference, flops, luffy, show, show_head, spread

from data import Problem
from machinery.arguments import ranged
from machinery.batches import Trajectory
from machinery.model import fit_context, on_paper, shape_of, token_logprobs
from machinery.plan import GIB
from machinery.preflight import now, timed
from machinery.printing import print_what_can_be
from machinery.processes import device, init_processes

ON_GPU = torch.cuda.is_available()
PROMPT, LONGEST = (200 if ON_GPU else 20), 8192
VARIANTS = {  # (what of it, tokens or trajectories of a micro-batch); all with checkpointing
    "a group's prompt once, chunked head": ("packed", 32768),
    "padded, 8 trajectories, chunked head": ("chunked", 8),
    "one trajectory, chunked head": ("chunked", 1),
    "one trajectory, plain head": ("plain", 1),
}


def make(tokens: int, vocabulary: int, longest: int) -> list[Trajectory]:
    """Groups with so many response tokens in all, or a few more; mean lengths as the paper's."""
    rng, found = random.Random(0), []
    while sum(len(t.response) for t in found) < tokens:
        position = len(found) // 8
        problem = Problem("", "", prompt_ids=[rng.randrange(vocabulary) for _ in range(PROMPT)])
        for i in range(8):
            mean = 4200 if i == 7 else 2200
            n = min(longest, 16 + int(rng.expovariate(1 / mean)))
            response = [rng.randrange(vocabulary) for _ in range(n)]
            t = Trajectory(position, problem, response, off_policy=i == 7)
            t.advantage, t.right, t.reward = rng.choice([-0.5, 0.5]), 1.0, 1.0
            found.append(t)
    return found


def add_up_padded(model, trajectories: list[Trajectory], size: int, head: str, z: float) -> None:
    """Gradients of the same loss, from rows that are padded to the longest of `size`."""
    for i in range(0, len(trajectories), size):
        some = trajectories[i : i + size]
        rows = [torch.tensor([*t.problem.prompt_ids, *t.response]) for t in some]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device())
        lengths = torch.tensor([len(row) for row in rows], device=device())
        real = torch.arange(PROMPT, ids.shape[1], device=device()) < lengths[:, None]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden, targets = hidden[:, PROMPT - 1 : -1], ids[:, PROMPT:]
        weight = model.get_output_embeddings().weight
        if head == "chunked":
            logp, _ = token_logprobs(hidden.flatten(0, 1), weight, targets.flatten())
            logp = logp.view(targets.shape)
        else:
            log_p = (hidden @ weight.T).float().log_softmax(-1)
            logp = log_p.gather(2, targets[..., None])[..., 0]
            with torch.no_grad():
                entropy = -(log_p.exp() * log_p).sum(-1)
            assert entropy[real].isfinite().all()
        off_policy = torch.tensor([[t.off_policy] for t in some], device=device())
        advantage = torch.tensor([[t.advantage] for t in some], device=device())
        logp_behavior = torch.where(off_policy, luffy.LOG_PI_PHI, logp.detach())
        objective = luffy.mixed_policy_objective(logp, logp_behavior, advantage, off_policy)
        (-(objective * real).sum() / z).backward()


class Update:
    """Trajectories, a model, and a step on them by each variant."""

    def __init__(self, shape: str, tokens: int):
        config = shape_of(shape)
        if shape != "toy":
            fit_context(config, PROMPT, LONGEST)
        torch.manual_seed(0)
        with device():
            self.model = on_paper(config, torch.bfloat16 if ON_GPU else torch.float32).train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        longest = min(LONGEST, config.max_position_embeddings - PROMPT)
        self.trajectories = make(tokens, config.vocab_size, longest)
        n = len(self.trajectories) // 8
        self.cfg = luffy.Config(problems_per_step=n, updates_per_step=1, entropy_coef=0.0)
        self.policy = luffy.data_parallel(luffy.Policy(self.model, 1.0))
        self.optimizer = luffy.ShardedAdamW(self.policy.parameters(), lr=1e-6)

    def run(self, kind: str, size: int, keep: list | None = None) -> None:
        """A step, or with `keep` the gradient alone, into it."""
        model, optimizer = self.model, self.optimizer
        model.set_attn_implementation("packed" if kind == "packed" else "sdpa")
        if keep is not None:

            def step(max_norm: float) -> float:
                keep.extend(p.grad.clone() for p in model.parameters())
                return max_norm

            optimizer = SimpleNamespace(step=step, zero_grad=optimizer.zero_grad)
        if kind == "packed":
            cfg = replace(self.cfg, token_budget=size)
            luffy.update(self.policy, optimizer, self.trajectories, cfg)
        else:
            z = len(self.trajectories) * self.cfg.max_response_tokens
            add_up_padded(model, self.trajectories, size, kind, z)
            optimizer.step(self.cfg.max_grad_norm / self.cfg.scale)
            optimizer.zero_grad()

    def gradient(self, how: tuple) -> torch.Tensor:
        self.run(*how, keep=(kept := []))
        return torch.cat([g.flatten() for g in kept])

    def measure(self, how: tuple) -> tuple[float, float]:
        """-> seconds of a step, and the most GiB that were allocated."""
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        _, seconds = timed(lambda: self.run(*how) or now())
        return seconds, torch.cuda.max_memory_allocated() / GIB if ON_GPU else 0.0


def matrix_rate() -> float:
    n = 8192 if ON_GPU else 512
    a, b = torch.randn(2, n, n, device=device()).to(torch.bfloat16).unbind()
    found = [timed(lambda: (a @ b, now())[1])[1] for _ in range(13)]
    return 2 * n**3 / statistics.median(found[3:])


def main() -> None:
    print_what_can_be()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="Qwen/Qwen2.5-Math-1.5B")
    of_all = "of all responses, at least [65536]"
    parser.add_argument("--tokens", type=ranged(int, 1), default=65536, help=of_all)
    parser.add_argument("--rounds", type=ranged(int, 1), default=3)
    args = parser.parse_args()
    if not ON_GPU and args.shape != "toy":
        parser.error(f"--shape {args.shape}: there is no GPU; --shape toy runs without")
    init_processes("auto")
    update = Update(args.shape, args.tokens)
    tokens = sum(len(t.response) for t in update.trajectories)
    *others, last = VARIANTS
    seconds, most, rates = {name: [] for name in VARIANTS}, dict.fromkeys(VARIANTS, 0.0), []
    with tqdm(total=(1 + args.rounds) * len(VARIANTS)) as bar:
        plain, errors = update.gradient(VARIANTS[last]), {last: 0.0}
        for name in others:
            bar.update()
            errors[name] = difference(update.gradient(VARIANTS[name]), plain)
            bar.write(f"{name}: gradient differs from the last variant's by {errors[name]:.0e}")
        del plain
        bar.update()
        for _ in range(args.rounds):
            rates.append(matrix_rate())
            bar.write(f"matrix rate {rates[-1] / 1e12:.0f} TFLOP/s")
            for name, how in VARIANTS.items():
                s, gib = update.measure(how)
                seconds[name].append(s)
                most[name] = max(most[name], gib)
                bar.write(f"{name}: {s:.2f} s, {gib:.1f} GiB")
                bar.update()
    where = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(
        f"\n{date.today()}, {where}, torch {torch.__version__}; the shape of {args.shape}; "
        f"{len(update.trajectories)} trajectories, {tokens:,} response tokens; {args.rounds} "
        f"rounds, median (lowest to highest); matrix rate "
        f"{spread([r / 1e12 for r in rates], '.0f')} TFLOP/s\n"
    )
    head = "s a step", "response tokens/s", "share of the matrix rate", "most memory, GiB"
    show_head("", *head, "gradient differs by")
    for name, mine in seconds.items():
        speed = f"{tokens / statistics.median(mine):,.0f}"
        work = flops(update.model, update.trajectories, VARIANTS[name][0] == "packed")
        share = spread([work / s / r for s, r in zip(mine, rates)])
        show(name, spread(mine), speed, share, f"{most[name]:.1f}", f"{errors[name]:.0e}")


if __name__ == "__main__":
    luffy.launch(main)
