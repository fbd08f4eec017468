"""Other papers' methods, as rows that luffy.py joins to its own tables. Pure functions, no state.

ROWS        fields of Config; the rest of this file is what they name
ROUTES      who learns: (P, G) right, number of rollouts -> (P, G) bool
ADVANTAGES  from the group's and more, of all ranks (P, G) -> of own tokens, of trace tokens (P, G)
SHAPINGS    f on trace tokens, from log x, γ and π (without gradient)
OBJECTIVES  what replaces the mixed-policy objective, from it, the tokens and the two clips
SCHEDULES   (config, steps done) -> the fields that are different then
PREFIXES    how much of its trace a rollout is given: steps done / steps, a generator -> a ratio

P problems, G trajectories of a group (rollouts, then the trace), N response tokens. A row with a
repository at a commit, but UFT's, was compared with values of that code: tests/method_cases.py.
Coefficients are in our units; docs/methods.md converts them. What a row does not say is Config's
default: no clip, no division by the standard deviation, all learn.
"""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from machinery.batches import Tokens
from machinery.flags import Config

# An official coefficient of 1 on a mean over a micro-batch's trace tokens, where micro-batches add
# up: about 48 of them, taken to hold a trace each, in an update of 512 trajectories.
MICRO_BATCH_MEAN = 48 / 512

SFT = dict(rollouts=0, traces=1, shaping="log", trace_advantage=1.0, entropy_coef=0.0, lr=5e-5)
SFT |= dict(problems_per_step=64, updates_per_step=1, steps=2150, scale=1.0)
TOKEN_MEAN = dict(token_mean=True, entropy_coef=0.0, scale=1.0)
ON_POLICY = dict(rollouts=8, traces=0, clip=0.2, normalize_std=True, **TOKEN_MEAN)
BESIDE = dict(rollouts=8, traces=1, trace_advantage=1.0, baseline="rollouts")  # SFT beside RL
CHORD = BESIDE | dict(clip=0.2, normalize_std=True, **TOKEN_MEAN)

# fmt: off
ROWS: dict[str, dict[str, Any]] = {
    # arXiv:2604.23747: SFT without the bugs that had depressed it, then RL from its checkpoint
    "sft_2604": SFT | dict(schedule="warmup_cosine"),
    "rl_2604": ON_POLICY | dict(normalize_std=False, clip_high=0.28),
    # SFT with another weight w of a trace token; the rest is sft's, a mean over the trace tokens
    "dft": SFT | dict(shaping="none", token_mean=True),  # w = π, arXiv:2508.05629
    # w = min(1, π/γ), arXiv:2512.17636, Su-my/TRAPO@982cb8f
    "trsft": SFT | dict(shaping="trsft", token_mean=True),
    "sft_shaped": SFT | dict(shaping="luffy", token_mean=True),  # w = γπ/(π+γ)², LUFFY's
    # arXiv:2509.04419, TsinghuaC3I/Unify-Post-Training@ae332f5. `gate`: the trace where no rollout
    # is right (2 for Llama: hpt_2), else the rollouts; the others have 1/Z = 0 in set_normaliser.
    # RL without clip and std; SFT with 1.0 (0.3 at 1.5B). No skip of steps with a norm above 80.
    "hpt": BESIDE | dict(shaping="log", clip=None, route="hpt", sft_coef=MICRO_BATCH_MEAN, lr=5e-6),
    "hpt_2": BESIDE | dict(shaping="log", clip=None, route="hpt_2", sft_coef=MICRO_BATCH_MEAN,
                           lr=5e-6),
    # arXiv:2508.11408, modelscope/Trinity-RFT@0414330: (1 - μ) GRPO + μ SFT, on demonstrations of
    # other problems; here of the same. φ: μ = .1; without φ it falls from .9 to .05 in 200 steps.
    "chord_phi": CHORD | dict(shaping="phi", rl_coef=0.9, sft_coef=0.1),
    "chord_mu": CHORD | dict(shaping="log", schedule="chord_mu"),
    # arXiv:2508.00222, YihongDong/RL-PLUS@eb4aa4d: LUFFY with another weight
    "rl_plus": dict(rollouts=7, traces=1, shaping="rl_plus", clip=None),
    # arXiv:2506.19767, by the replica in Unify-Post-Training@ae332f5: e^-H. srft_plus: e^+H, which
    # the paper's own code has by three accounts. Rollouts: no ratio, no baseline. A trace learns by
    # SFT, too, with a Z of its own: sft_ratio in set_normaliser.
    "srft": dict(rollouts=7, traces=1, objective="srft", advantage="plus_minus", shaping="luffy",
                 clip=None, sft_coef=MICRO_BATCH_MEAN),
    "srft_plus": dict(rollouts=7, traces=1, objective="srft_plus", advantage="plus_minus",
                      shaping="luffy", clip=None, sft_coef=MICRO_BATCH_MEAN),
    # On-policy rules: volcengine/verl@b178a3c, huggingface/trl@f2cd577. RLOO is on_policy times
    # G/(G-1), which AdamW does not see.
    "dapo": ON_POLICY | dict(clip_high=0.28),  # arXiv:2503.14476; forks/dapo.py refills its groups
    "cispo": ON_POLICY | dict(objective="cispo", clip=None, clip_high=4.0),  # 2506.13585: cap 5
    "gspo": ON_POLICY | dict(objective="gspo", clip=3e-4, clip_high=4e-4, token_mean=False,
                             sequence_mean=True),  # 2507.18071
    "gmpo": ON_POLICY | dict(objective="gmpo", clip=0.4, token_mean=False,
                             sequence_mean=True),  # 2507.20673: the clip is of log x
    "reinforce_pp": ON_POLICY | dict(normalize_std=False, advantage="whitened"),  # 2501.03262
    # Rollouts that continue a prefix of their trace
    # arXiv:2507.01679, ZeroYuHuang/prefix_rft@5f5d2a1: x = π/π_old on the prefix, too, with the
    # dual clip; only its 20 % most uncertain tokens learn, of the update (there: of a micro-batch)
    "prefix_rft": dict(rollouts=8, traces=0, continuations=1, prefix="uniform", clip=0.2,
                       shaping="old", objective="dual_clip_all", prefix_learns=0.2),
    # arXiv:2505.16984, liumy2010/UFT@ad3c8ec: SFT (0.001) on the prefix. Not here: its KL to the
    # base model.
    "uft": ON_POLICY | dict(rollouts=4, continuations=4, prefix="fifths", shaping="log",
                            trace_advantage=1.0, sft_coef=1e-3, entropy_coef=1e-3),
}
# fmt: on


# ------------------------------------------------------------------ who learns
def gate(right: Tensor, rollouts: int, at_most: int = 0) -> Tensor:
    """HPT: the trace where at most so many rollouts are right, else the rollouts."""
    unsolved = right[:, :rollouts].sum(dim=1, keepdim=True) <= at_most  # (P, 1)
    is_trace = torch.arange(right.shape[1]) >= rollouts  # (G,)
    return unsolved == is_trace


ROUTES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "hpt": gate,
    "hpt_2": partial(gate, at_most=2),
}


# ------------------------------------------------------------------ advantages
# Each takes the group's advantages, rewards and lengths (P, G), the number of plain rollouts in a
# group and that of all. -> advantages of own tokens (P, G), of trace tokens (P, G)
Pair = tuple[Tensor, Tensor]


def plus_minus(group: Tensor, rewards: Tensor, lengths: Tensor, plain: int, rollouts: int) -> Pair:
    """SRFT: rollouts have 1 if right, -1 if wrong, and no baseline; the trace has the group's."""
    is_trace = torch.arange(rewards.shape[1]) >= rollouts
    return torch.where(is_trace, group, 2 * rewards - 1), group


def whitened(group: Tensor, rewards: Tensor, lengths: Tensor, plain: int, rollouts: int) -> Pair:
    """REINFORCE++ baseline as in verl: whitened over the batch's tokens.

    Their mean is subtracted, too. It is not 0 where lengths differ.
    """
    tokens = lengths.sum()
    centred = group - (lengths * group).sum() / tokens
    variance = (lengths * centred**2).sum() / (tokens - 1)
    return (centred * (variance + 1e-8).rsqrt(),) * 2


def batch_std(group: Tensor, rewards: Tensor, lengths: Tensor, plain: int, rollouts: int) -> Pair:
    """REINFORCE++ baseline as in TRL: divided by the standard deviation of the batch's rewards."""
    return (group / (rewards.std() + 1e-4),) * 2


def others(
    group: Tensor, rewards: Tensor, lengths: Tensor, plain: int, rollouts: int, whiten: bool = False
) -> Pair:
    """RLOO: r - mean of the group's others; a lone one keeps its reward. TRL may whiten them."""
    n = rewards.shape[1]
    advantages = rewards if n == 1 else group * n / (n - 1)
    if whiten:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-4)
    return advantages, advantages


def by_prefix(
    group: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    plain: int,
    rollouts: int,
    lone_is_0: bool = False,
) -> Pair:
    """Prefix-RFT's dr_grpo_prefix, and _v2 with lone_is_0: continuations are a group of their own.

    A prefix is judged by its continuations (centred, if there are several) against the plain
    rollouts. A lone trajectory is not centred, but in _v2 its advantage is 0.
    """

    def centre(r: Tensor) -> Tensor:
        return r if r.shape[1] == 1 and not lone_is_0 else r - r.mean(dim=1, keepdim=True)

    continued = centre(rewards[:, plain:rollouts])
    own = torch.cat([centre(rewards[:, :plain]), continued, group[:, rollouts:]], dim=1)
    is_base = plain > (0 if lone_is_0 else 1)  # of a lone plain rollout: 0
    base = rewards[:, :plain].mean(dim=1, keepdim=True) if is_base else 0
    of_prefix = (continued - base) / (rollouts - plain)
    return own, torch.cat([own[:, :plain], of_prefix, own[:, rollouts:]], dim=1)


ADVANTAGES: dict[str, Callable[..., Pair]] = {
    "plus_minus": plus_minus,
    "whitened": whitened,
    "batch_std": batch_std,
    "others": others,
    "others_white": partial(others, whiten=True),
    "prefix": by_prefix,
    "prefix_v2": partial(by_prefix, lone_is_0=True),
}

# ------------------------------------------------------------------ the objective of a token
SHAPINGS: dict[str, dict[str, Any]] = {
    # CHORD: w = π(1 - π)
    "phi": dict(f=lambda log_x, gamma, pi: pi * (1 - pi) * log_x, is_sft=True),
    # TRAPO's TrSFT: w = min(1, π/γ)
    "trsft": dict(f=lambda log_x, gamma, pi: log_x.exp() / pi.clamp(min=gamma)),
    # RL-PLUS: x = 2π/(π_old + π_ω), π_ω = (π_old + 1)/2, times √(1 - π)
    "rl_plus": dict(
        f=lambda log_x, gamma, pi: log_x.exp() * (1 - pi).sqrt(),
        log_pi_phi=lambda logp_old: ((3 * logp_old.exp() + 1) / 4).log(),
    ),
    # Prefix-RFT: the trace's tokens as if the old policy had sampled them
    "old": dict(f=lambda log_x, gamma, pi: log_x.exp(), log_pi_phi=lambda logp_old: logp_old),
}


def epsilons(clip: float | None, clip_high: float | None) -> tuple[float, float]:
    """How far below 1 and above it a ratio may be: --clip, --clip_high; inf where neither says."""
    low = math.inf if clip is None else clip
    return low, low if clip_high is None else clip_high


def ppo(x: Tensor, advantage: Tensor, clip: float | None, clip_high: float | None) -> Tensor:
    """min(x A, clamp(x) A): PPO's clip."""
    low, high = epsilons(clip, clip_high)
    return torch.min(x * advantage, x.clamp(1 - low, 1 + high) * advantage)


def mean_of_response(values: Tensor, segment: Tensor, counts: Tensor) -> Tensor:
    """Of each trajectory's tokens that count (1 or 0), at each of its tokens: (N,) -> (N,)."""
    zeros = values.new_zeros(int(segment[-1]) + 1)
    total = zeros.index_add(0, segment, values * counts)
    return (total / zeros.index_add(0, segment, counts).clamp(min=1))[segment]


def dual_clip(
    mixed: Tensor,
    t: Tokens,
    clip: float | None,
    clip_high: float | None,
    c: float = 3.0,
    on_traces: bool = False,
) -> Tensor:
    """PPO's clip, and no less than c A where A < 0; on the trace's tokens, too, if they have π_old.

    verl's default, and Trinity-RFT's since October 2025.
    """
    clipped = ppo((t.logp - t.logp_behavior).exp(), t.advantage, clip, clip_high)
    clipped = torch.where(t.advantage < 0, clipped.max(c * t.advantage), clipped)
    return clipped if on_traces else torch.where(t.off_policy, mixed, clipped)


def cispo(mixed: Tensor, t: Tokens, clip: float | None, clip_high: float | None) -> Tensor:
    """sg(clamp(x)) A log π: a clipped token keeps its gradient."""
    low, high = epsilons(clip, clip_high)
    x = (t.logp - t.logp_behavior).exp().clamp(1 - low, 1 + high).detach()
    return torch.where(t.off_policy, mixed, x * t.advantage * t.logp)


def gspo(mixed: Tensor, t: Tokens, clip: float | None, clip_high: float | None) -> Tensor:
    """One ratio for a response: the geometric mean of its tokens'; clipped as one."""
    own = (~t.off_policy).to(t.logp.dtype)
    x = mean_of_response(t.logp - t.logp_behavior, t.segment, own).exp()
    return torch.where(t.off_policy, mixed, ppo(x, t.advantage, clip, clip_high))


def gmpo(mixed: Tensor, t: Tokens, clip: float | None, clip_high: float | None) -> Tensor:
    """GSPO's ratio, of log x clipped token by token, on the side that the advantage pushes to."""
    own = (~t.off_policy).to(t.logp.dtype)
    low, high = epsilons(clip, clip_high)
    log_x = t.logp - t.logp_behavior
    clipped = torch.where(t.advantage > 0, log_x.clamp(max=high), log_x.clamp(min=-low))
    x = mean_of_response(clipped, t.segment, own).exp()
    return torch.where(t.off_policy, mixed, x * t.advantage)


def srft(
    mixed: Tensor, t: Tokens, clip: float | None, clip_high: float | None, sign: float = -1.0
) -> Tensor:
    """Traces: ½ e^(sign H) log π, as SFT, and the mixed objective. Rollouts: log π, no ratio.

    A = 1, a right rollout: 0.1 e^H log π; A = -1, a wrong one: -log π (see plus_minus). H is the
    mean entropy of the response.
    """
    h = mean_of_response(t.entropy, t.segment, torch.ones_like(t.entropy))
    on_trace = mixed + t.sft_ratio * 0.5 * (sign * h).exp() * t.logp
    scale = torch.where(t.advantage > 0, 0.1 * h.exp(), 1.0)
    return torch.where(t.off_policy, on_trace, scale * t.advantage * t.logp)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "dual_clip": dual_clip,
    "dual_clip_all": partial(dual_clip, on_traces=True),
    "cispo": cispo,
    "gspo": gspo,
    "gmpo": gmpo,
    "srft": srft,
    "srft_plus": partial(srft, sign=1.0),
}
WITH_SFT = {"srft", "srft_plus"}  # their traces learn by SFT even where the advantage is 0


# ------------------------------------------------------------------ values over the run
def cosine(progress: float, high: float, low: float) -> float:
    """From high at 0 to low at 1, and low after it."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def mu_at(
    step: int, warmup: int = 0, decay: int = 200, peak: float = 0.9, valley: float = 0.05
) -> float:
    """CHORD's μ: linearly from 0 to the peak, then by a cosine to the valley."""
    if step < warmup:
        return peak * step / warmup
    return cosine((step - warmup) / decay, peak, valley) if step < warmup + decay else valley


def warmup_cosine(cfg: Config, step: int) -> dict[str, float]:
    """The learning rate: up in the first tenth of the steps, down to a tenth by a cosine."""
    warmup = 0.1 * cfg.steps
    if step < warmup:
        return {"lr": cfg.lr * (step + 1) / (warmup + 1)}
    return {"lr": cosine((step - warmup) / (cfg.steps - warmup), cfg.lr, 0.1 * cfg.lr)}


def mu_beside_rl(cfg: Config, step: int) -> dict[str, float]:
    mu = mu_at(step)
    return {"sft_coef": mu, "rl_coef": 1 - mu}


SCHEDULES: dict[str, Callable[[Config, int], dict[str, Any]]] = {
    "warmup_cosine": warmup_cosine,
    "chord_mu": mu_beside_rl,
}


# ------------------------------------------------------------------ prefixes
def uniform(progress: float, rng: random.Random) -> float:
    """Prefix-RFT: from a low end, which falls, to .95."""
    return rng.uniform(cosine(progress, 0.95, 0.05), 0.95)


def fifths(progress: float, rng: random.Random) -> float:
    """UFT: each of five parts with a chance that falls for 300 of 500 steps; then there is none."""
    chance = cosine(progress / 0.6, 0.95, 0.05) if progress < 0.6 else 0.0
    return sum(rng.random() < chance for _ in range(5)) / 5


PREFIXES: dict[str, Callable[[float, random.Random], float]] = {
    "none": lambda progress, rng: 0.0,
    "uniform": uniform,
    "fifths": fifths,
}


def most_uncertain(entropy: Tensor, share: float) -> Tensor:
    """(N,) entropies -> (N,) bool: the largest N - int((1 - share) N) of them."""
    keep = len(entropy) - int((1 - share) * len(entropy))
    kept = torch.zeros_like(entropy, dtype=torch.bool)
    kept[entropy.topk(keep).indices] = True
    return kept
