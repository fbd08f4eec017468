"""Trajectories, and micro-batches of them: packed rows, without padding.

A row has the prompt of a group once, and each response to it goes on from it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from machinery.processes import device, gather, rank, world_size


@dataclass
class Trajectory:
    """A response to a problem: a rollout of the policy, or the problem's trace."""

    position: int  # of its problem in the step's batch
    problem: Any  # data.Problem
    response: Sequence[int]  # up to and with the token that ends it
    off_policy: bool = False  # a trace
    truncated: bool = False  # no token ended it in time
    prefix: int = 0  # so many leading tokens of a rollout are the trace's
    logp_sampler: list[float] | None = None  # of a rollout, by the sampler: metrics, --tis_cap
    # set by score()
    right: float = math.nan  # the verifier's word, 1 or 0
    reward: float = math.nan
    advantage: float | Tensor = math.nan  # one number, or (response,)
    learns: bool = True  # or counts in the metrics and in RL's Z alone
    # set by set_normaliser()
    inv_z: float | Tensor = math.nan  # coefficient / Z of its tokens (response,); 0: does not learn
    bonus: float = 0.0  # what the entropy of each of its tokens is multiplied by
    sft_ratio: float = 0.0  # where a trace learns by RL and by SFT: SFT's inv_z / RL's
    # set by update() and watch(), tensors (response,)
    logp_old: Tensor | None = None  # log π_old; None: π_θ itself, in a step's first update
    entropy_old: Tensor | None = None  # the old policy's entropies, where logp_old is given
    logp: Tensor | None = None  # log π_θ
    logp_behavior: Tensor | None = None  # log π_old or, on a trace, log π_φ
    factor: Tensor | None = None  # x or, on trace tokens, f(x)
    slope: Tensor | None = None  # ∂ objective / ∂ log π_θ

    @classmethod
    def sampled(cls, position: int, problem: Any, sample: Any) -> "Trajectory":
        """A rollout, from a sampler's Sample."""
        rest = dict(logp_sampler=sample.logps, truncated=sample.truncated)
        return cls(position, problem, sample.tokens, **rest)

    @classmethod
    def of_trace(cls, position: int, problem: Any, advantage: float = math.nan) -> "Trajectory":
        return cls(position, problem, problem.trace_ids, off_policy=True, advantage=advantage)

    @property
    def signal(self) -> bool:
        """Has it an advantage that counts, or an SFT part? After set_normaliser()."""
        inv_z, advantage = torch.as_tensor(self.inv_z), torch.as_tensor(self.advantage)
        by_sft = self.learns and self.sft_ratio * self.trace_tokens > 0
        return bool((inv_z * advantage).any()) or by_sft

    @property
    def has_gradient(self) -> bool:
        return self.signal or self.bonus != 0

    @property
    def trace_tokens(self) -> int:
        return len(self.response) if self.off_policy else self.prefix

    def by_token(self, own: float, of_trace: float) -> float | Tensor:
        """One value for its own tokens, another for the trace's; (response,) if it has both."""
        if 0 < self.prefix < len(self.response) and of_trace != own:
            rest = len(self.response) - self.prefix
            return torch.tensor([of_trace] * self.prefix + [own] * rest)
        return of_trace if self.trace_tokens else own


class Packing(NamedTuple):
    """Who sees whom in a row: it is cut into pieces, and each sees keys of its own.

    A piece is a prompt, a response, or both where a prompt has but one. It sees what comes before
    it in its trajectory, and itself, causally. With responses a and b to a prompt p, and c alone:

        row   p p p | a a | b b b | c c c c                lengths 3, 2, 3, 4; S = 12
        keys  p p p | p p p a a | p p p b b b | c c c c    key_lengths 3, 5, 6, 4; K = 18
    """

    lengths: list[int]  # tokens of the pieces; sum S
    key_lengths: list[int]  # of their keys, the last of which are their own; sum K
    keys: Tensor | None  # (K,), where those stand in the row; None: each piece sees itself alone
    ends: Tensor  # int32, cumulative sums of lengths from 0 on
    key_ends: Tensor  # and of key_lengths

    @classmethod
    def of(cls, pieces: list[tuple[int, Sequence[int]]]) -> "Packing":
        """From the length of each, and where its keys stand in the row."""
        lengths, keys = map(list, zip(*pieces))
        key_lengths, where = list(map(len, keys)), None
        if key_lengths != lengths:
            where = torch.tensor([i for k in keys for i in k], device=device())
        ends = (
            torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device())
            for n in (lengths, key_lengths)
        )
        return cls(lengths, key_lengths, where, *ends)


@dataclass(frozen=True)
class MicroBatch:
    """Trajectories in a single row, where a prompt that several of them have stands once."""

    trajectories: list[Trajectory]
    input_ids: Tensor  # (1, S)
    position_ids: Tensor  # (1, S), in the token's trajectory: each response goes on from its prompt
    packing: Packing
    response_index: Tensor  # (N,), where the response tokens stand in the row
    before: Tensor  # (N,), and the tokens before them, which predict them: at first a prompt's last
    segment: Tensor  # (N,) int, the trajectory that a response token belongs to
    off_policy: Tensor  # (N,) bool: the trace's tokens
    advantage: Tensor  # (N,)
    inv_z: Tensor  # (N,)
    bonus: Tensor  # (N,)
    sft_ratio: Tensor  # (N,)
    logp_old: Tensor  # (N,), NaN where it is π_θ itself
    logp_phi: Tensor  # (N,), the teacher's, on traces of data that have it; else NaN
    logp_sampler: Tensor  # (N,), 0 on traces

    def give(self, **values: Tensor) -> None:
        """Set fields of the trajectories: to each its part of an (N,) tensor.

        Raises FloatingPointError where one is not finite.
        """
        for name, value in values.items():
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"{name} of a response is not finite: this update was not made. "
                    "See the end of metrics.jsonl; try a smaller --lr"
                )
            parts = value.detach().split([len(t.response) for t in self.trajectories])
            for t, part in zip(self.trajectories, parts):
                setattr(t, name, part)


class Tokens(NamedTuple):
    """What an objective may depend on, of each response token of a micro-batch: all (N,)."""

    logp: Tensor  # log π_θ, with gradient
    logp_behavior: Tensor  # log π_old, or log π_φ on the trace's tokens
    advantage: Tensor
    off_policy: Tensor  # bool
    entropy: Tensor  # without gradient
    segment: Tensor  # int, its trajectory
    sft_ratio: Tensor


def deal(trajectories: list[Trajectory], batch: Sequence[Any], updates: int) -> list[Trajectory]:
    """A step's groups, dealt to the ranks anew: in each update to each about as many tokens.

    In sampling a rank has as many problems as any other, and one with long responses would let the
    others wait. trajectories: this rank's, of before and of now. batch: the problems by position.
    """
    if world_size() == 1:
        return trajectories
    # Ranks have the problems of the batch: they are not sent, and stay what they are.
    sent = [replace(t, problem=None) if t.problem is batch[t.position] else t for t in trajectories]
    groups: dict[int, list[Trajectory]] = {}
    for t in sorted(sum(gather(sent), []), key=lambda t: t.position):
        t.problem = t.problem or batch[t.position]
        groups.setdefault(t.position, []).append(t)
    mine = []
    for i in range(updates):
        share = len(batch) // updates
        tokens = {p: length(groups[p]) for p in groups if p // share == i}
        load = [0] * world_size()
        for p in sorted(tokens, key=lambda p: -tokens[p]):
            least = load.index(min(load))
            load[least] += tokens[p]
            mine += [p] * (least == rank())
    return [t for p in sorted(mine) for t in groups[p]]


def shared(t: Trajectory) -> Hashable:
    """Trajectories for which this is the same have one prompt in a row."""
    return tuple(t.problem.prompt_ids)


def length(trajectories: list[Trajectory]) -> int:
    """Tokens of a row of these."""
    prompts = {shared(t): len(t.problem.prompt_ids) for t in trajectories}
    return sum(prompts.values()) + sum(len(t.response) for t in trajectories)


def pack(trajectories: list[Trajectory], token_budget: int) -> list[MicroBatch]:
    """Rows of up to `token_budget` tokens, longest groups first; a longer trajectory is alone.

    A group is in one row if it has room there, else in parts, each with the prompt. A row's pieces
    have twice as many keys at most, but for a part alone: they are copied, and take memory.
    """
    groups: dict[Hashable, list[Trajectory]] = defaultdict(list)
    for t in trajectories:
        groups[shared(t)].append(t)
    parts = []
    for group in groups.values():
        room = token_budget - len(group[0].problem.prompt_ids)
        parts += fill([(len(t.response), [t]) for t in group], room)
    sizes = [max(length(part), sum(length([t]) for t in part) // 2) for part in parts]
    return [collate(row) for row in fill(list(zip(sizes, parts)), token_budget)]


def fill(parts: list[tuple[int, list[Trajectory]]], room: int) -> list[list[Trajectory]]:
    """Parts of so many tokens, each left whole, one after the other in rows with such room."""
    rows, left = [], 0
    for tokens, part in sorted(parts, key=lambda x: x[0], reverse=True):
        if tokens > left or not rows:
            rows.append([])
            left = room
        rows[-1].extend(part)
        left -= tokens
    return rows


def collate(trajectories: list[Trajectory]) -> MicroBatch:
    """Their row: a prompt stands before the first response to it, and serves the others, too."""
    uses, prompts = Counter(map(shared, trajectories)), {}
    row, positions, responses, before, pieces = [], [], [], [], []
    for t in trajectories:
        key, prompt, start = shared(t), t.problem.prompt_ids, len(row)
        if key not in prompts:
            prompts[key] = range(start, start + len(prompt))
            row.extend(prompt)
            positions.append(range(len(prompt)))
            if uses[key] > 1:  # else it is one piece with its response
                pieces.append((len(prompt), prompts[key]))
                start = len(row)
        responses.append(range(len(row), len(row) + len(t.response)))
        row.extend(t.response)
        positions.append(range(len(prompt), len(prompt) + len(t.response)))
        keys = [*prompts[key], *responses[-1]]
        before.append(keys[len(prompt) - 1 : -1])
        pieces.append((len(row) - start, keys))

    def tensor(rows: list, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=dtype, device=device())

    def per_token(values: list) -> Tensor:
        """From a number a trajectory, or a tensor with one a token."""
        parts = (torch.as_tensor(value, device=device()) for value in values)
        return torch.cat([p.expand(len(t.response)) for p, t in zip(parts, trajectories)])

    def logp_phi(t: Trajectory) -> list[float]:
        known = list(getattr(t.problem, "trace_logps", ()))[: t.trace_tokens]
        return known + [math.nan] * (len(t.response) - len(known))

    is_trace = [[i < t.trace_tokens for i in range(len(t.response))] for t in trajectories]
    logp_old = [math.nan if t.logp_old is None else t.logp_old for t in trajectories]
    return MicroBatch(
        trajectories=trajectories,
        input_ids=tensor([row])[None],
        position_ids=tensor(positions)[None],
        packing=Packing.of(pieces),
        response_index=tensor(responses),
        before=tensor(before),
        segment=per_token(list(range(len(trajectories)))),
        off_policy=tensor(is_trace),
        advantage=per_token([t.advantage for t in trajectories]),
        inv_z=per_token([t.inv_z for t in trajectories]),
        bonus=per_token([t.bonus for t in trajectories]),
        sft_ratio=per_token([t.sft_ratio for t in trajectories]),
        logp_old=per_token(logp_old),
        logp_phi=tensor([logp_phi(t) for t in trajectories], torch.float32),
        logp_sampler=tensor([t.logp_sampler or [0.0] * len(t.response) for t in trajectories]),
    )
