"""DAPO's dynamic sampling: a group that teaches nothing is replaced by another problem's.

A group whose rewards are all alike has no advantage. Its place in the batch is given to another
problem, which is sampled and graded at once, --refill times at most. (arXiv:2503.14476;
volcengine/verl@b178a3c, recipe dapo) --algo may be any row; the default is rivals' dapo.

    python -m forks.dapo
    torchrun --nproc_per_node=8 -m forks.dapo --model Qwen2.5-Math-7B

What it costs: the samples of the groups that go, and each round waits for its longest response
before the update can start. The metric groups/sampled is the number of groups sampled for each that
is trained on. The others are of the groups that stay, and do not show how good the policy is.

What differs: verl samples thrice the batch (1536 for 512) until enough groups are mixed, and fails
after 10 times. Here a place has 1 + 3 tries, and keeps a last flat group. Round n shuffles the data
by a seed of its own: a problem may come twice in an epoch. Not here: the penalty of long responses.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import luffy
from data import batch_at
from machinery.flags import flag
from machinery.metrics import failure_metrics
from machinery.processes import all_reduce, launch, seed_of

HELP = "times that a group of one reward is replaced: each costs sampling before the update"
plain = {name: getattr(luffy, name) for name in ("load", "rollout", "score")}  # main replaces them

luffy.ALGORITHMS["dapo_refill"] = luffy.ALGORITHMS["dapo"]


@dataclass(frozen=True)
class Config(luffy.Config):
    refill: int = flag(3, HELP, 0)


def is_flat(rewards: list[float]) -> bool:
    """All alike: every advantage of the group is 0. So is a group that has not been sampled yet."""
    return len(set(rewards)) <= 1


class Refill:
    """Samples a batch in rounds, each a function of seed, step and round alone."""

    def load(self, cfg: Config, run: Any, base: str, grader: Any) -> tuple:
        loaded = plain["load"](cfg, run, base, grader)
        self.grader, self.tokenizer, self.problems = grader, *loaded[:2]
        return loaded

    def rollout(self, sampler: Any, batch: dict, step: int, cfg: Config) -> list:
        self.failed_before, self.sampled = self.grader.failures.copy(), 0
        groups: dict[int, list] = {i: [] for i in batch}
        for n in range(1 + cfg.refill):
            now = replace(cfg, seed=seed_of(cfg.seed, n)) if n else cfg
            problems = batch_at(self.problems, step, cfg.problems_per_step, now.seed)
            flat = [i for i in batch if is_flat([t.reward for t in groups[i]])]
            if not all_reduce(len(flat)):  # of no rank; they may share a sampler
                break
            new = plain["rollout"](sampler, {i: problems[i] for i in flat}, step, now)
            luffy.grade(new, self.grader, self.tokenizer)
            groups |= {i: [t for t in new if t.position == i] for i in flat}
            self.sampled += len(flat)
        return sum(groups.values(), [])

    def score(self, trajectories: list, grader: Any, tokenizer: Any, cfg: Config) -> dict:
        metrics = plain["score"](trajectories, grader, tokenizer, cfg)
        metrics["groups/sampled"] = all_reduce(self.sampled) / cfg.problems_per_step
        return metrics | failure_metrics(grader.failures - self.failed_before)  # of all rounds


if __name__ == "__main__":
    r = Refill()
    replaced = dict(Config=Config, load=r.load, rollout=r.rollout, score=r.score)
    launch(partial(luffy.main, algo="dapo_refill", **replaced))
