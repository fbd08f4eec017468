"""LUFFY, small enough to read: RL with verifiable rewards under off-policy guidance.

Every group of rollouts of a problem holds one correct reasoning trace of a stronger teacher. All
are scored by rule, advantages are taken over the mixed group, and the trace's tokens get a shaped
weight that lets the policy learn from right but unlikely ones. (arXiv:2504.14945)

    python luffy.py                                                # the toy, minutes on a laptop
    python luffy.py --algo on_policy                               # one switch: RL alone
    torchrun --nproc_per_node=8 luffy.py --model Qwen2.5-Math-7B   # the paper's run
    python luffy.py --model Qwen2.5-Math-7B --dry_run 8x80         # will it fit? needs no GPU

The equations, in the paper's symbols:
    A_i   = r_i - mean(r_1..r_G)           over rollouts and trace together   Eq. 4, without / std
    x_it  = π_θ / π_old  on rollouts,      π_θ / π_φ  on traces, with π_φ := 1
    f(x)  = x / (x + γ)                    policy shaping
    J     = 1/Z [ Σ_traces Σ_t f(x_it) A_i + Σ_rollouts Σ_t x_it A_i ]        Eq. 3 with f: Eq. 6

Notation: P problems, G trajectories in a group (rollouts, then the trace), N response tokens of a
micro-batch, S tokens of its packed row (prompts too), B its trajectories, D width, V vocabulary.

Read from here down and stop after `update`: that is the method. The rest is machinery.
"""

import argparse
import inspect
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import plan
from data import Problem, batch_at, load_benchmarks, load_training_set
from eval import evaluate, report
from model import Policy, find, fit_context, from_pretrained, load_config, load_tokenizer
from model import token_logprobs as token_logprobs  # log π_θ and its entropy
from run import InputError, Means, Run, add_token_metrics, all_reduce, barrier, device
from run import gather, init_processes, launch, progress, rank, say, seed_of
from run import trajectory_metrics, world_size
from sampler import TorchSampler, VLLMSampler
from verify import Grader


@dataclass(frozen=True)
class Config:
    """One run. The defaults are LUFFY's: the paper's, or the official code's where they differ."""

    # what to run
    model: str = "toy"  # "toy", a directory that from_pretrained loads, or a name on the hub
    algo: str = "luffy"  # a row of ALGORITHMS
    data: str = "Elliott/Openr1-Math-46k-8192"  # training problems: see load_problems in data.py
    eval_data: str = ""  # problems to evaluate on before, during and after; "" for none
    out: str = ""  # run directory; "" is runs/MODEL-ALGO-seedSEED
    seed: int = 0
    steps: int = 500  # rollout batches
    # a group
    problems_per_step: int = 128  # P
    rollouts: int = 7  # on-policy trajectories of a problem
    traces: int = 1  # off-policy ones: 0 or 1
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 8192  # traces with their EOS, too
    temperature: float = 1.0  # of the rollouts; top_p = 1
    lenient: bool = False  # the official code's reward: a right answer without a box counts, too
    # the objective
    shaping: str = "luffy"  # f on trace tokens, a row of SHAPINGS
    gamma: float = 0.1  # the paper's γ in f(x) = x / (x + γ), not a discount
    clip: float | None = None  # PPO's ε on rollout tokens; none: no clipping
    shape_rollouts: bool = False  # rollout ratio f(π_θ) / f(π_old) instead of π_θ / π_old
    tis_cap: float | None = None  # rollout tokens x min(π_old / π_sampler, cap); none: x 1
    baseline: str = "group"  # mean reward of the whole group, or of its "rollouts"
    trace_advantage: float | None = None  # none: from the group, as every trajectory's
    normalize_std: bool = False  # divide advantages by the group's std (GRPO); Dr. GRPO does not
    token_mean: bool = False  # Z = tokens of the update; false: trajectories x max_response_tokens
    sft_coef: float = 1.0  # of the SFT loss (shaping "log"), a mean over the update's trace tokens
    entropy_coef: float = 2.5e-4  # of a token, at its weight; the official 0.001 x 8192 / 32768
    # the optimizer
    updates_per_step: int = 2  # optimizer steps on one rollout batch, each on its own problems
    lr: float = 1e-6  # AdamW, constant
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    # the machine
    sampler: str = "auto"  # vllm or torch; auto: vllm on a GPU
    tensor_parallel: int = 1  # GPUs that share one vLLM engine
    cache_gib: float = 0.0  # keys and values of vLLM on a GPU; 0: what the plan leaves
    token_budget: int = 32768  # tokens of a micro-batch: memory, not mathematics
    checkpointing: bool = True  # of activations: recompute layers in the backward pass
    graders: int = 2  # verifier processes of each rank
    grade_timeout: float = 5.0  # seconds, then the reward is 0
    save_every: int = 50  # steps between checkpoints
    eval_every: int = 0  # steps between evaluations; 0: only before and after
    eval_samples: int = 8  # responses to each evaluation problem, at temperature 0.6
    sample_every: int = 10  # steps between files of sampled groups, for report.html
    sample_groups: int = 8  # groups in such a file
    dry_run: str = ""  # print the plan for this machine, or for GPUSxGIB such as 8x80, and stop

    @property
    def samples(self) -> bool:
        """Does a run need a sampler? SFT without evaluation does not."""
        return bool(self.rollouts or self.eval_data)


# The arms of the paper, as changes of Config's defaults: neighbours differ in one switch.
ALGORITHMS: dict[str, dict] = {
    "luffy": dict(rollouts=7, traces=1, shaping="luffy", clip=None),
    "mixed_shaped": dict(rollouts=7, traces=1, shaping="luffy", clip=0.2),
    "mixed": dict(rollouts=7, traces=1, shaping="none", clip=0.2),
    "on_policy": dict(rollouts=8, traces=0, clip=0.2),
    "on_policy_noclip": dict(rollouts=8, traces=0, clip=None),
    "on_policy_shaped": dict(rollouts=8, traces=0, clip=0.2, shape_rollouts=True),
    "grpo": dict(rollouts=8, traces=0, clip=0.2, normalize_std=True, token_mean=True),
    "rl_sft": dict(rollouts=7, traces=1, shaping="log", clip=None, trace_advantage=1.0,
                   baseline="rollouts", sft_coef=0.1),
    "sft": dict(rollouts=0, traces=1, shaping="log", trace_advantage=1.0, entropy_coef=0.0,
                lr=5e-5, problems_per_step=64, updates_per_step=1, steps=2150),
}


# ============================================================================ the algorithm
def group_advantages(rewards: Tensor, *, normalize_std: bool = False,
                     count: int | None = None) -> Tensor:
    """Eq. 4 over the mixed group: (P, G) rewards -> (P, G) advantages r - mean(r).

    normalize_std divides by the standard deviation (+ 1e-6), as GRPO and the paper's Eq. 4 do;
    the paper's experiments (Dr. GRPO) do not. count: statistics over the first `count` columns.
    """
    group = rewards[:, :count]
    advantages = rewards - group.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (group.std(dim=1, keepdim=True) + 1e-6)
    return advantages


def shape(x: Tensor, gamma: float) -> Tensor:
    """Policy shaping f(x) = x / (x + γ): f' is largest where x is small."""
    return x / (x + gamma)


SHAPINGS = {  # f of a trace token, from log x = log π_θ - log π_φ
    "luffy": lambda log_x, gamma: shape(log_x.exp(), gamma),
    "none": lambda log_x, gamma: log_x.exp(),  # Eq. 3
    "log": lambda log_x, gamma: log_x,  # with A = 1: the SFT loss
}


def mixed_policy_objective(logp: Tensor, logp_behavior: Tensor, advantage: Tensor,
                           off_policy: Tensor, *, shaping: str = "luffy", gamma: float = 0.1,
                           clip: float | None = None, shape_rollouts: bool = False) -> Tensor:
    """Eq. 6 without its 1/Z: the objective of each token, to be maximised. All tensors (N,).

    logp_behavior is log π_old on rollouts and log π_φ on traces, where the paper sets π_φ := 1:
    pass 0 there, or the teacher's true log-probs if the data has them. off_policy (bool) marks the
    trace tokens. Clipping acts on rollout tokens only, as in Eq. 6. (π_θ/1 is below 1 - ε for all
    but sure tokens: a clamp would take the gradient from just the tokens that are to be learnt.)
    """
    log_ratio = logp - logp_behavior
    ratio = log_ratio.exp()
    if shape_rollouts:
        ratio = shape(logp.exp(), gamma) / shape(logp_behavior.exp(), gamma)
    on = ratio * advantage
    if clip is not None:
        on = torch.min(on, ratio.clamp(1 - clip, 1 + clip) * advantage)
    off = SHAPINGS[shaping](log_ratio, gamma) * advantage
    return torch.where(off_policy, off, on)


# ============================================================================ the run
def train(cfg: Config, base: str) -> None:
    """The whole method in one loop."""
    run = Run(cfg)
    path = run.checkpoint or base
    with Grader(cfg.graders, cfg.grade_timeout, cfg.lenient) as grader:
        tokenizer, config = load_tokenizer(path), load_config(path)
        fit_context(config, cfg.max_prompt_tokens, cfg.max_response_tokens)
        problems = load_training_set(
            cfg.data, tokenizer, grader, need_traces=cfg.traces > 0,
            max_prompt_tokens=cfg.max_prompt_tokens, max_response_tokens=cfg.max_response_tokens,
            verdicts=run.out / "trace_rewards.json")
        held_out = load_held_out(cfg, tokenizer)
        sampler = make_sampler(path, config, tokenizer.eos_token_id, cfg)
        model = load_model(path, config, cfg)
        policy = DDP(Policy(model, cfg.temperature), gradient_as_bucket_view=True)
        optimizer = ShardedAdamW(policy.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                                 weight_decay=cfg.weight_decay)
        sampler.load_weights(model.named_parameters())
        run.restore(optimizer)
        watched = first_traces(problems, cfg)
        if run.first_step == 0:
            record_old_logprobs(policy, watched, cfg)
            run.log_watched(0, watched, tokenizer)
            run.log_evaluation(0, held_out_scores(sampler, held_out, grader, tokenizer, cfg))
        for step in run.steps():  # from the last checkpoint on
            batch = batch_at(problems, step, cfg.problems_per_step, cfg.seed)
            with run.clock("sample"):
                trajectories = rollout(sampler, batch, step, cfg)
            with run.clock("score"):
                metrics = score(trajectories, grader, tokenizer, cfg)
            with run.clock("update"):
                metrics |= update(policy, optimizer, trajectories, cfg)
            with run.clock("sync"):  # every step: the next rollouts are on-policy
                sampler.load_weights(model.named_parameters())
            evaluation_due, checkpoint_due = run.due(step)
            run.log_step(step + 1, metrics, trajectories, tokenizer)
            if run.shown(step + 1):
                record_old_logprobs(policy, watched, cfg)
                run.log_watched(step + 1, watched, tokenizer)
            if evaluation_due:
                scores = held_out_scores(sampler, held_out, grader, tokenizer, cfg)
                run.log_evaluation(step + 1, scores)
            if checkpoint_due:
                run.save(step + 1, model, tokenizer, optimizer)
    if rank() == 0:
        report(run.out)


def rollout(sampler, batch: list[Problem], step: int, cfg: Config) -> list["Trajectory"]:
    """This rank's share of the step's P groups: the policy's rollouts, then the trace.

    A trace never goes through the sampler, and the policy does not see it while it rolls out.
    """
    mine = range(rank(), len(batch), world_size())
    samples = sampler.generate(
        [batch[i].prompt_ids for i in mine], cfg.rollouts,
        seeds=[seed_of(cfg.seed, step, i) for i in mine],
        temperature=cfg.temperature, max_tokens=cfg.max_response_tokens)
    trajectories = []
    for i, group in zip(mine, samples):
        trajectories += [Trajectory(i, batch[i], s.tokens, logp_sampler=s.logps) for s in group]
        if cfg.traces:
            trajectories.append(Trajectory(i, batch[i], batch[i].trace_ids, off_policy=True))
    return trajectories


def score(trajectories: list["Trajectory"], grader: Grader, tokenizer, cfg: Config) -> dict:
    """Set each trajectory's reward and advantage; -> the metrics of the rewards."""
    rollouts = [t for t in trajectories if not t.off_policy]
    jobs = [(t.problem.opened + tokenizer.decode(t.response), t.problem.answer) for t in rollouts]
    before = grader.failures.copy()
    for t, reward in zip(rollouts, grader(jobs)):
        t.reward = reward
    failures = sum(gather(grader.failures - before), Counter())  # these have reward 0 by default
    for t in trajectories:
        if t.off_policy:
            t.reward = t.problem.trace_reward  # verified once, by load_training_set
    rewards = torch.tensor([t.reward for t in trajectories]).view(-1, cfg.rollouts + cfg.traces)
    advantages = group_advantages(rewards, normalize_std=cfg.normalize_std,  # (P / ranks, G)
                                  count=cfg.rollouts if cfg.baseline == "rollouts" else None)
    if cfg.trace_advantage is not None:
        advantages[:, cfg.rollouts:] = cfg.trace_advantage
    for t, advantage in zip(trajectories, advantages.flatten().tolist()):
        t.advantage = advantage
    metrics = trajectory_metrics(trajectories, rewards[:, :cfg.rollouts], tokenizer.eos_token_id)
    return metrics | {"grader_failures": failures.total()} | {
        f"grader_failures/{kind}": count for kind, count in failures.items()}


def update(policy: nn.Module, optimizer: "ShardedAdamW", trajectories: list["Trajectory"],
           cfg: Config) -> dict:
    """`updates_per_step` steps of AdamW on Eq. 6, each on its share of the problems; -> metrics."""
    def learns(t: Trajectory) -> bool:  # has it a gradient? If not, only the metrics need it
        return t.advantage != 0 or cfg.entropy_coef != 0

    share = cfg.problems_per_step // cfg.updates_per_step
    mini_batches = [[t for t in trajectories if t.position // share == i]
                    for i in range(cfg.updates_per_step)]
    later = sum(mini_batches[1:], [])
    record_old_logprobs(policy, [t for t in later if not t.off_policy], cfg)
    means, grad_norms = Means(), []
    bar = progress("update", sum(len(t.response) for t in trajectories))
    for i, mini_batch in enumerate(mini_batches):
        # Fixed from global counts before the first backward: micro-batches and ranks just add up.
        set_weights(mini_batch, cfg)
        micro_batches = [*pack([t for t in mini_batch if not learns(t)], cfg.token_budget),
                         *pack([t for t in mini_batch if learns(t)], cfg.token_budget)]
        for batch in micro_batches:
            last = batch is micro_batches[-1]
            backward = last or learns(batch.trajectories[0])
            with (nullcontext() if last else policy.no_sync(),  # ranks all-reduce once, at the last
                  torch.set_grad_enabled(backward)):
                # DDP's forward talks to the other ranks; without a gradient it must not.
                logp, entropy = (policy if backward else policy.module)(batch)  # (N,), (N,)
                # Before the first optimizer step the policy still is the old one: ratio 1.
                old = logp.detach() if i == 0 else batch.logp_old
                objective = mixed_policy_objective(
                    logp, old.masked_fill(batch.off_policy, 0.0), batch.advantage,
                    batch.off_policy, shaping=cfg.shaping, gamma=cfg.gamma, clip=cfg.clip,
                    shape_rollouts=cfg.shape_rollouts)
                if cfg.tis_cap is not None:  # π_old is not quite what the sampler sampled from
                    trust = (old - batch.logp_sampler).exp().clamp(max=cfg.tis_cap)
                    objective = torch.where(batch.off_policy, objective, trust * objective)
                loss = -(batch.weight * (objective + cfg.entropy_coef * entropy)).sum()
                if backward:
                    (loss * world_size()).backward()  # DDP averages over ranks; 1/Z is global
            lengths = [len(t.response) for t in batch.trajectories]
            for t, now, before in zip(batch.trajectories, logp.detach().split(lengths),
                                      old.split(lengths)):  # for report.html
                t.logp, t.logp_old = now, None if t.off_policy else before
            shaped = SHAPINGS[cfg.shaping](logp.detach(), cfg.gamma)
            add_token_metrics(means, batch, logp.detach(), old, entropy.detach(), shaped)
            bar.update(len(logp))
        # No advantage, no signal: Adam would blow the entropy bonus up to full steps. So skip.
        if all_reduce(max(abs(t.advantage) for t in mini_batch), dist.ReduceOp.MAX) > 0:
            grad_norms.append(optimizer.step(cfg.max_grad_norm))
        optimizer.zero_grad()
    bar.close()
    skipped = cfg.updates_per_step - len(grad_norms)
    return means.reduce() | {"grad_norm": sum(grad_norms) / max(1, len(grad_norms)),
                             "skipped_updates": skipped}


# ============================================================================ batches
@dataclass
class Trajectory:
    """A response to a problem: a rollout of the policy, or the problem's trace."""

    position: int  # of its problem in the step's batch
    problem: Problem
    response: list[int] | tuple[int, ...]  # ends in EOS unless truncated
    off_policy: bool = False
    logp_sampler: list[float] | None = None  # of a rollout, as the sampler saw it: for a metric
    reward: float = math.nan  # set by score()
    advantage: float = math.nan  # set by score()
    weight: float = math.nan  # 1/Z of each of its tokens, set by update()
    logp_old: Tensor | None = None  # (response,), set by record_old_logprobs() or update()
    logp: Tensor | None = None  # (response,), of the policy that update() updated


@dataclass(frozen=True)
class MicroBatch:
    """Trajectories one after the other in a single row: no padding, so no masks."""

    trajectories: list[Trajectory]
    input_ids: Tensor  # (1, S)
    position_ids: Tensor  # (1, S), from 0 again at each trajectory
    lengths: list[int]  # (B,), sum S
    ends: Tensor  # (B + 1,) int32, their cumulative sums from 0 on
    response_index: Tensor  # (N,), where the response tokens stand in the row
    off_policy: Tensor  # (N,) bool
    advantage: Tensor  # (N,)
    weight: Tensor  # (N,)
    logp_old: Tensor | None  # (N,), 0 on traces; None where nothing was recorded
    logp_sampler: Tensor  # (N,), 0 on traces


def set_weights(trajectories: list[Trajectory], cfg: Config) -> None:
    """1/Z: what one token counts in the loss, given the trajectories of all ranks in this update.

    Dr. GRPO: one constant for all, trajectories x max_response_tokens, so that a long response is
    not made light; token_mean: the number of tokens. The SFT loss is a mean over its own tokens.
    """
    sft = [t.off_policy and cfg.shaping == "log" for t in trajectories]
    rl_lengths = [len(t.response) for t, is_sft in zip(trajectories, sft) if not is_sft]
    sft_tokens = sum(len(t.response) for t, is_sft in zip(trajectories, sft) if is_sft)
    count, tokens, sft_tokens = map(all_reduce, (len(rl_lengths), sum(rl_lengths), sft_tokens))
    z = tokens if cfg.token_mean else count * cfg.max_response_tokens
    for t, is_sft in zip(trajectories, sft):
        t.weight = cfg.sft_coef / sft_tokens if is_sft else 1 / z


def record_old_logprobs(policy: nn.Module, trajectories: list[Trajectory], cfg: Config) -> None:
    """log π_old of what is trained on only after the policy has moved (or is only looked at).

    By the trainer itself: a sampler's log-probs differ by its numerics. Traces need none: π_φ := 1.
    """
    with torch.no_grad():
        for batch in pack(trajectories, cfg.token_budget):
            logps = policy.module(batch)[0].split([len(t.response) for t in batch.trajectories])
            for t, logp in zip(batch.trajectories, logps):
                t.logp_old = logp


def pack(trajectories: list[Trajectory], token_budget: int) -> list[MicroBatch]:
    """Rows of up to `token_budget` tokens, longest trajectories first; a longer one is alone."""
    rows, room = [], 0
    for t in sorted(trajectories, key=lambda t: -len(t.problem.prompt_ids) - len(t.response)):
        length = len(t.problem.prompt_ids) + len(t.response)
        if length > room or not rows:
            rows.append([])
            room = token_budget
        rows[-1].append(t)
        room -= length
    return [collate(row) for row in rows]


def collate(trajectories: list[Trajectory]) -> MicroBatch:
    sequences = [[*t.problem.prompt_ids, *t.response] for t in trajectories]
    lengths = [len(sequence) for sequence in sequences]
    starts = [sum(lengths[:i + 1]) - len(t.response) for i, t in enumerate(trajectories)]

    def tensor(rows: list, dtype=None) -> Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=dtype, device=device())

    def per_token(values: list, dtype=None) -> Tensor:
        return tensor([[v] * len(t.response) for v, t in zip(values, trajectories)], dtype)

    recorded = all(t.logp_old is not None for t in trajectories if not t.off_policy)
    blank = [torch.zeros(len(t.response), device=device()) for t in trajectories]
    return MicroBatch(
        trajectories=trajectories,
        input_ids=tensor(sequences)[None],
        position_ids=tensor([range(n) for n in lengths])[None],
        lengths=lengths,
        ends=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device()),
        response_index=tensor([range(start, start + len(t.response))
                               for start, t in zip(starts, trajectories)]),
        off_policy=per_token([t.off_policy for t in trajectories], torch.bool),
        advantage=per_token([t.advantage for t in trajectories]),
        weight=per_token([t.weight for t in trajectories]),
        logp_old=torch.cat([zero if t.off_policy else t.logp_old
                            for t, zero in zip(trajectories, blank)]) if recorded else None,
        logp_sampler=tensor([t.logp_sampler or [0.0] * len(t.response) for t in trajectories]),
    )


# ============================================================================ the optimizer
class ShardedAdamW:
    """AdamW on float32 masters of the parameters; each rank keeps the state of its share of them.

    The gradients must be the same on all ranks, as after DDP's all-reduce. Memory of a rank: 12
    bytes x parameters / ranks. On float32 parameters the masters are the parameters themselves,
    and with one rank this is torch.optim.AdamW. Pure bfloat16 AdamW is wrong at lr 1e-6: most of
    its updates round to nothing.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 weight_decay: float = 0.01, eps: float = 1e-8):
        self.params = [p for p in params if p.requires_grad]
        load = [0] * world_size()
        self.owner = [0] * len(self.params)
        for i in sorted(range(len(self.params)), key=lambda i: -self.params[i].numel()):
            self.owner[i] = load.index(min(load))  # whole tensors, the largest first
            load[self.owner[i]] += self.params[i].numel()
        self.mine = {i: p.detach().float() for i, p in enumerate(self.params)
                     if self.owner[i] == rank()}
        self.adamw = torch.optim.AdamW(self.mine.values() or [torch.zeros(0)], lr=lr, betas=betas,
                                       weight_decay=weight_decay, eps=eps)

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clip to the global norm `max_norm`, step, round once, share. -> the norm before clipping.

        Raises FloatingPointError, with nothing changed, if the gradient is not finite.
        """
        norm = torch.stack([p.grad.float().norm() for p in self.params]).norm()
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient's norm is {norm.item()}: no step was taken. "
                                     "See the end of metrics.jsonl; try a smaller --lr")
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for i, master in self.mine.items():
            master.grad = self.params[i].grad.float() * scale
            self.adamw.step()  # this one alone: the others have no gradient, and it saves memory
            master.grad = None
            self.params[i].copy_(master)
        if world_size() > 1:
            for work in [dist.broadcast(p.detach(), owner, async_op=True)
                         for p, owner in zip(self.params, self.owner)]:
                work.wait()
        return norm.item()

    def zero_grad(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.grad.zero_()  # in place: the gradients are views of DDP's buckets

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """Index of a parameter -> master and moments, for this rank's share."""
        return {i: {"master": master, **self.adamw.state[master]}
                for i, master in self.mine.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Take this rank's share from the state of all ranks. KeyError if it is not all there."""
        for i, master in self.mine.items():
            saved = dict(state[i])
            master.copy_(saved.pop("master"))
            self.adamw.state[master] = {  # AdamW keeps its scalar `step` on the CPU
                name: value.to(master.device if value.dim() else "cpu", copy=True)
                for name, value in saved.items()}


# ============================================================================ loading
def load_model(path: str | Path, config, cfg: Config) -> nn.Module:
    model = from_pretrained(path, config=config, attn_implementation="packed").train()
    if cfg.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_sampler(path: str | Path, config, eos: int, cfg: Config):
    """Before the trainer's model is loaded: vLLM looks at what the GPU has free."""
    if not cfg.samples:
        return SimpleNamespace(load_weights=lambda named_parameters: None,
                               generate=lambda prompts, n, **options: [[] for _ in prompts])
    say(f"sampler     {sampler_kind(cfg)}")
    if sampler_kind(cfg) == "torch":
        return TorchSampler(path, config, eos)
    return VLLMSampler(path, config, eos, tensor_parallel=cfg.tensor_parallel,
                       max_tokens=cfg.max_prompt_tokens + cfg.max_response_tokens,
                       cache_bytes=plan.cache_bytes(cfg, config, world_size()))


def sampler_kind(cfg: Config) -> str:
    on_gpu = "vllm" if torch.cuda.is_available() else "torch"
    return on_gpu if cfg.sampler == "auto" else cfg.sampler


def load_held_out(cfg: Config, tokenizer) -> list[Problem]:
    """The problems of --eval_data, those that fit."""
    names = filter(None, cfg.eval_data.split(","))
    return load_benchmarks(names, tokenizer, max_prompt_tokens=cfg.max_prompt_tokens)


def first_traces(problems: list[Problem], cfg: Config) -> list[Trajectory]:
    """The traces of the first groups, to watch what the policy makes of them as it learns."""
    first = batch_at(problems, 0, cfg.problems_per_step, cfg.seed)[:cfg.sample_groups]
    return [Trajectory(i, problem, problem.trace_ids, off_policy=True)
            for i, problem in enumerate(first) if problem.trace_ids]


def held_out_scores(sampler, problems: list[Problem], grader: Grader, tokenizer,
                    cfg: Config) -> dict:
    return evaluate(sampler, problems, grader, tokenizer, samples=cfg.eval_samples,
                    temperature=0.6, max_tokens=cfg.max_response_tokens, seed=cfg.seed)


# ============================================================================ the command line
def is_toy(model: str) -> bool:
    """The toy itself, or a checkpoint that descends from it."""
    config = Path(model) / "config.json"
    return model == "toy" or config.is_file() and "luffy_toy" in json.loads(config.read_text())


def parse_args(argv: list[str] | None = None) -> Config:
    """Config's defaults, then the row of --algo, then the toy's sizes if it is one, then flags."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for f in fields(Config):
        kind = {bool: truth, float | None: float_or_none}.get(f.type, f.type)
        optional = dict(nargs="?", const="this") if f.name == "dry_run" else {}
        parser.add_argument(f"--{f.name}", type=kind, metavar=kind.__name__,
                            choices=ALGORITHMS if f.name == "algo" else None,
                            default=argparse.SUPPRESS, **optional,
                            help=f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    algo, model = flags.get("algo", Config.algo), flags.get("model", Config.model)
    recipe = {}
    if is_toy(model):
        from toy import RECIPE as recipe
    cfg = Config(**ALGORITHMS[algo] | recipe | flags)
    path = "-".join(Path(cfg.model).parts[-2:]).removeprefix("/")
    return replace(cfg, out=cfg.out or f"runs/{path}-{algo}-seed{cfg.seed}")


def but(cfg: Config, plain: Config) -> str:
    """How a run differs from another, in words."""
    differ = [f"{f.name} {getattr(cfg, f.name)}" for f in fields(Config)
              if f.name not in ("model", "algo", "out", "seed", "dry_run")
              and getattr(cfg, f.name) != getattr(plain, f.name)]
    return f", but {', '.join(differ)}" if differ else ""


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("true or false")
    return text.lower() == "true"


def float_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def check(cfg: Config, ranks: int) -> None:
    """Raise InputError on a config that cannot run, before anything is loaded."""
    shards = max(1, cfg.updates_per_step) * ranks
    rows = cfg.rollouts + (cfg.traces if cfg.baseline == "group" else 0)
    counts = ("steps", "problems_per_step", "updates_per_step", "max_prompt_tokens",
              "max_response_tokens", "token_budget", "graders", "save_every", "eval_samples",
              "sample_every", "sample_groups", "tensor_parallel")
    for wrong, message in (
        *((getattr(cfg, name) < 1, f"--{name} must be at least 1") for name in counts),
        (cfg.traces not in (0, 1), f"--traces {cfg.traces}: a group holds one trace or none"),
        (cfg.rollouts < 0, f"--rollouts {cfg.rollouts} is negative"),
        (rows < 2 and not (cfg.rollouts == 0 and cfg.trace_advantage is not None),
         f"--rollouts {cfg.rollouts} --traces {cfg.traces} --baseline {cfg.baseline}: an advantage "
         "needs at least two rewards"),
        (cfg.gamma <= 0, "--gamma must be positive"),
        (cfg.tis_cap is not None and cfg.tis_cap <= 0, "--tis_cap must be positive, or none"),
        (cfg.cache_gib < 0, "--cache_gib is negative; 0 takes what the plan leaves"),
        (cfg.shaping not in SHAPINGS, f"--shaping {cfg.shaping}: one of {', '.join(SHAPINGS)}"),
        (cfg.baseline not in ("group", "rollouts"), "--baseline: group or rollouts"),
        (cfg.temperature <= 0, "--temperature must be positive: rollouts must differ"),
        (cfg.problems_per_step % shards != 0,
         f"--problems_per_step {cfg.problems_per_step}: must be a multiple of {shards} "
         f"(--updates_per_step {cfg.updates_per_step} x {ranks} processes)"),
        (cfg.sampler not in ("auto", "vllm", "torch"), "--sampler: auto, vllm or torch"),
        (ranks % max(1, cfg.tensor_parallel) != 0, f"--tensor_parallel {cfg.tensor_parallel}: "
         f"{ranks} processes cannot be shared out by it"),
        (cfg.samples and not cfg.dry_run and sampler_kind(cfg) == "vllm"
         and find_spec("vllm") is None,
         "vLLM is not installed: pip install -r requirements.txt, or --sampler torch (slow)"),
    ):
        if wrong:
            raise InputError(message)


def main() -> None:
    cfg = parse_args()
    try:
        if cfg.dry_run:
            if os.environ.get("RANK", "0") == "0":
                check(cfg, plan.machine(cfg.dry_run, is_toy(cfg.model))[0])
                plan.show(cfg, but(cfg, Config()), is_toy(cfg.model))
            return
        init_processes()
        check(cfg, world_size())
        plain = parse_args(["--model", cfg.model])
        say(f"{cfg.algo} on {cfg.model} in {cfg.out}: luffy{but(cfg, plain)}")
        base = find(cfg.model)
        if cfg.model == "toy":
            import toy

            if rank() == 0:
                toy.base_model()
            barrier()
            base = str(toy.base_model())
        train(cfg, base)
        if (cfg.model, cfg.algo) == ("toy", "luffy"):
            say("next        python luffy.py --algo on_policy"
                "    # RL alone stays at zero on the hard problems")
    except InputError as error:
        sys.exit(f"luffy.py: {error}" if rank() == 0 else 1)


if __name__ == "__main__":
    launch(main)
