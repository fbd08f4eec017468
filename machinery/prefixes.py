"""Rollouts that go on from a prefix of their problem's trace. The rules are in rivals.py."""

import random
from collections.abc import Mapping
from typing import Any

import torch

from machinery.batches import Trajectory
from machinery.flags import Config
from machinery.processes import gather, rank, seed_of
from machinery.rivals import PREFIXES, most_uncertain
from machinery.samplers import Sample, Sampler


def continue_prefixes(
    sampler: Sampler, batch: Mapping[int, Any], step: int, cfg: Config
) -> dict[int, list[Trajectory]]:
    """Position -> `continuations` rollouts of its problem, from one prefix of its trace.

    The response is the prefix and what follows it, cut at max_response_tokens. How much is given is
    a function of seed, step and position. A problem without a trace, which only --untraced rollout
    leaves in, has `traces` rollouts, from nothing.
    """
    seeds = {i: seed_of(cfg.seed, step, i, "prefix") for i in batch}
    more: dict[int, list[Trajectory]] = {i: [] for i in batch}
    if cfg.untraced == "rollout":
        untraced = {i: p for i, p in batch.items() if not p.trace_ids}
        nothing = dict.fromkeys(untraced, 0.0)
        return more | continue_from(sampler, untraced, nothing, seeds, cfg.traces, cfg)
    if not cfg.continuations:
        return more
    draw = PREFIXES[cfg.prefix]
    ratios = {i: draw(step / cfg.steps, random.Random(seeds[i])) for i in batch}
    return continue_from(sampler, batch, ratios, seeds, cfg.continuations, cfg)


def continue_from(
    sampler: Sampler,
    batch: Mapping[int, Any],
    ratios: Mapping[int, float],
    seeds: Mapping[int, int],
    n: int,
    cfg: Config,
) -> dict[int, list[Trajectory]]:
    """Position -> n rollouts that go on from this ratio of the trace of its problem."""
    heads: dict[int, list[int]] = {}
    for i, p in batch.items():  # never the trace's EOS
        heads[i] = list(p.trace_ids[: int(ratios[i] * (len(p.trace_ids) - 1))])
    length = cfg.max_response_tokens
    prompts = [[*p.prompt_ids, *heads[i]] for i, p in batch.items()]
    # Not less than `length`: samples may not depend on the other problems' prefixes.
    how: Any = dict(temperature=cfg.temperature, max_tokens=length)
    samples = sampler.generate(prompts, n, seeds=[seeds[i] for i in batch], **how)

    def whole(i: int, sample: Sample) -> Trajectory:
        tokens, given = [*heads[i], *sample.tokens], len(heads[i])
        logps = [*[0.0] * given, *sample.logps][:length]
        rest = dict(prefix=given, truncated=sample.truncated or len(tokens) > length)
        return Trajectory(i, batch[i], tokens[:length], logp_sampler=logps, **rest)

    return {i: [whole(i, sample) for sample in group] for i, group in zip(batch, samples)}


def keep_uncertain(mini_batch: list[Trajectory], share: float) -> None:
    """Of the update's prefix tokens, on all ranks, only this share keeps its advantage.

    The most uncertain ones, by the old policy's entropy: see rivals.most_uncertain.
    """
    if share == 1:
        return
    given = [t for t in mini_batch if t.prefix]
    entropies = [torch.as_tensor(t.entropy_old)[: t.prefix].cpu() for t in given]
    everyones = gather(torch.cat([torch.empty(0), *entropies]))
    kept = most_uncertain(torch.cat(everyones), share).split([len(x) for x in everyones])[rank()]
    for t, keep in zip(given, kept.split([t.prefix for t in given])):
        advantage = torch.as_tensor(t.advantage).expand(len(t.response)).clone()
        advantage[: t.prefix] *= keep
        t.advantage = advantage
