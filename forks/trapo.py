"""TRAPO: rollouts start with a part of the trace, and with more of it while the policy fails.

A problem's 8 rollouts come in micro-groups of 4, 2, 1 and 1. The first has no help. Before each
other one the rewards so far decide whether it gets 25, 50 or 100 % of the trace. What the policy
wrote has the advantage r - mean over the 8. The prefix is learnt by TrSFT: advantage 1, weight
min(1, π/.1), and the same Z. (arXiv:2512.17636; Su-my/TRAPO@982cb8f)

    python -m forks.trapo
    torchrun --nproc_per_node=8 -m forks.trapo --model Qwen2.5-Math-7B

A rollout that gets the whole trace writes nothing, but its reward counts in the mean, and in the
metrics. right/unaided is the policy's own, given/25% a share of groups. A step samples four times.

What differs: their prefix goes on to a paragraph's end if one comes within 30 %. It is of the
thought alone, and of a second trace for the last rollout; here of the one trace, with its answer.
Their script has 8 problems and one update a step, lr 1e-6 (the paper: 128, 5e-6), entropy .001 on
a micro-batch's mean; here 128, two, 1e-6, 2.5e-4 on our Z. Theirs is max_response_tokens: scale 64.
"""

from functools import partial
from typing import Any

import torch

import luffy
from machinery.batches import Trajectory
from machinery.metrics import Means, failure_metrics
from machinery.prefixes import continue_from
from machinery.processes import InputError, launch, seed_of

# Rollouts so far -> the next ones, their share of the trace, the sum of rewards that spares it
MICRO_GROUPS = {0: (4, 0.0, 0), 4: (2, 0.25, 2), 6: (1, 0.5, 4), 7: (1, 1.0, 7)}
FIXED = dict(rollouts=8, traces=0, continuations=4, prefix="none")  # continuations: needs traces
luffy.ALGORITHMS["trapo"] = FIXED | dict(shaping="trsft", trace_advantage=1.0, clip=None)
plain = {name: getattr(luffy, name) for name in ("load", "check", "score", "set_advantages")}


def prefix_ratio(rewards: list[float]) -> float:
    """The rewards of a group so far (0, 4, 6 or 7) -> the next micro-group's share of the trace."""
    _, ratio, enough = MICRO_GROUPS[len(rewards)]
    return ratio if sum(rewards) < enough else 0.0


def prefix_counts(prefixes: list[int]) -> list[bool]:
    """Lengths of a group's prefixes (G,) -> (G,) who learns it: of two alike, the second."""
    return [n > 0 and n != after for n, after in zip(prefixes, [*prefixes[1:], 0])]


def set_advantages(trajectories: list[Trajectory], cfg: luffy.Config) -> None:
    """luffy.set_advantages, but 0 on the tokens of a prefix that does not count."""
    plain["set_advantages"](trajectories, cfg)
    for i in range(0, len(trajectories), cfg.rollouts):
        group = trajectories[i : i + cfg.rollouts]
        for t, counts in zip(group, prefix_counts([t.prefix for t in group])):
            if t.prefix and not counts:
                t.advantage = torch.as_tensor(t.advantage).expand(len(t.response)).clone()
                t.advantage[: t.prefix] = 0.0


def check(cfg: luffy.Config, ranks: int) -> None:
    for name, value in FIXED.items():
        if getattr(cfg, name) != value:
            raise InputError(f"--{name} {getattr(cfg, name)}: micro-groups need {value}; omit it")
    plain["check"](cfg, ranks)


class MicroGroups:
    """Samples and grades in turns, as many on every rank: they may share a sampler."""

    def load(self, cfg: luffy.Config, run: Any, base: str, grader: Any) -> tuple:
        loaded = plain["load"](cfg, run, base, grader)
        self.grader, self.tokenizer = grader, loaded[0]
        return loaded

    def rollout(self, sampler: Any, batch: dict, step: int, cfg: luffy.Config) -> list[Trajectory]:
        groups, self.failed_before = {i: [] for i in batch}, self.grader.failures.copy()
        for done, (n, _, _) in MICRO_GROUPS.items():
            ratios = {i: prefix_ratio([t.reward for t in group]) for i, group in groups.items()}
            seeds = {i: seed_of(cfg.seed, step, i, done) for i in batch}
            asked = {i: p for i, p in batch.items() if ratios[i] < 1}
            new = continue_from(sampler, asked, ratios, seeds, n, cfg)
            whole = {i: p.trace_ids for i, p in batch.items() if ratios[i] == 1}
            new |= {i: [Trajectory(i, batch[i], x, prefix=len(x))] for i, x in whole.items()}
            luffy.grade(sum(new.values(), []), self.grader, self.tokenizer)
            groups = {i: group + new[i] for i, group in groups.items()}
        return sum(groups.values(), [])

    def score(self, trajectories: list, grader: Any, tokenizer: Any, cfg: luffy.Config) -> dict:
        metrics, means = plain["score"](trajectories, grader, tokenizer, cfg), Means()
        means.add("right/unaided", [t.right for t in trajectories if not t.prefix])
        for done, (_, ratio, _) in list(MICRO_GROUPS.items())[1:]:
            given = [t.prefix > 0 for t in trajectories[done :: cfg.rollouts]]
            means.add(f"given/{ratio:.0%}", given)  # of groups
        return metrics | failure_metrics(grader.failures - self.failed_before) | means.reduce()


if __name__ == "__main__":
    m = MicroGroups()
    replaced = dict(check=check, load=m.load, rollout=m.rollout, score=m.score)
    launch(partial(luffy.main, algo="trapo", set_advantages=set_advantages, **replaced))
