"""ExGRPO, arXiv:2510.02245: RL that replays its own successes. No teacher.

    python -m forks.exgrpo                                                     # on the toy
    torchrun --nproc_per_node=8 -m forks.exgrpo --model Qwen2.5-Math-7B

Once more than .35 of a batch is right, right rollouts of problems with s of 8 right, 0 < s < 8, are
kept, with log π_past. Half of the next problems come from this pool: an s by the density N(4, 1),
one of its problems, and of that the kept rollout with the lowest entropy under the policy, in the
place of one new one. It counts as a trace with w = π/π_past: f(w) = w/(w + .1). A problem that is
solved 8 times of 8 leaves the pool for good.

Source: ElliottYan/LUFFY@01f4ae0, ExGRPO/: exp_scripts/run_exgrpo.sh, mix_src/experience/ and
mix_src/mix_trainer_experience.py. As there: 128 problems, 2 updates, lr 1e-6, entropy .001, no std,
no clip, sums / 8192 (so scale 64), 700 steps. Not as there:
- The entropy is a mean over the response. There it is one over padding, by another batch's mask.
- No clip before replay starts (there .2). A gradient longer than 500 is not skipped.
- A problem that leaves the pool stays in the training set (there not beyond the epoch).
On the toy no rollout of a hard problem is ever right: only others are kept, and learnt.
"""

import math
import random
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import luffy
from luffy import Trajectory
from machinery.flags import flag
from machinery.processes import InputError, gather, launch, rank, seed_of, world_size

luffy.SHAPINGS["exgrpo"] = luffy.SHAPINGS["luffy"]._replace(log_pi_phi=lambda logp_old: logp_old)
luffy.ALGORITHMS["exgrpo"] = dict(rollouts=8, traces=0, clip=None, shaping="exgrpo", steps=700)
PLACES = "load", "batch_at", "rollout", "update"
plain = {name: getattr(luffy, name) for name in (*PLACES, "check")}


@dataclass(frozen=True)
class Config(luffy.Config):
    replay: float = flag(0.5, "share of a step's problems that come from the pool", 0, 1)
    replay_from: float = flag(0.35, "it starts when more of a batch is right", 0, 1)


def check(cfg: Config, ranks: int) -> None:
    if cfg.traces or cfg.continuations:
        raise InputError("--traces, --continuations: here kept rollouts are traces; leave at 0")
    if luffy.SHAPINGS[cfg.shaping].log_pi_phi is None:
        raise InputError(f"--shaping {cfg.shaping}: a kept rollout needs its π_past; use exgrpo")
    plain["check"](cfg, ranks)


def draw(solved: dict[int, int], n: int, mean: float, rng: random.Random) -> list[int]:
    """Up to n of the problems in problem -> s: each time an s by N(mean, 1), then one with it."""
    left, chosen = dict(sorted(solved.items())), []
    while left and len(chosen) < n:
        count = Counter(left.values())
        weights = [math.exp(-((s - mean) ** 2) / 2) / count[s] for s in left.values()]
        chosen += rng.choices(list(left), weights)
        del left[chosen[-1]]
    return chosen


def successes(group: list[Trajectory]) -> dict[bytes, Tensor]:
    """Tokens of each right one (int32) -> log π_old of them, from before the step's updates."""
    logps = [(t, t.logp if t.logp_old is None else t.logp_old) for t in group if t.right]
    return {array("i", t.response).tobytes(): logp.cpu().clone() for t, logp in logps}


class Pool:
    """What is kept, the same on all ranks, and functions in the place of luffy's."""

    def __init__(self) -> None:  # a problem goes by its number in the training set
        self.started, self.retired = False, set()
        self.kept: dict[int, tuple[int, dict]] = {}  # its s when last seen, its successes

    def state_dict(self) -> dict:
        share = {p: kept for p, kept in self.kept.items() if p % world_size() == rank()}
        return share | {"pool": (self.started, self.retired, list(self.kept))}

    def load_state_dict(self, state: dict) -> None:
        self.started, self.retired, problems = state["pool"]
        self.kept = {p: state[p] for p in problems}

    def load(self, cfg: Config, run: Any, *args: Any) -> tuple:
        self.cfg = cfg
        loaded = plain["load"](cfg, run, *args)
        self.policy = luffy.Policy(loaded[-1], cfg.temperature)
        self.number = {id(x): n for n, p in enumerate(loaded[1]) for x in (p, *p.others)}
        run.keep("pool", self)
        return loaded

    @torch.no_grad()
    def batch_at(self, problems: list, step: int, size: int, seed: int) -> list:
        """luffy's batch with problems from the pool, while the memory is still the trainer's."""
        rng, solved = random.Random(seed_of(seed, step)), {p: s for p, (s, _) in self.kept.items()}
        drawn = draw(solved, int(self.cfg.replay * size), self.cfg.rollouts / 2, rng)
        places = dict(zip(rng.sample(range(size), len(drawn)), drawn))
        how: Any = dict(off_policy=True, right=1.0, reward=1.0)
        candidates = [
            Trajectory(i, problems[p], array("i", tokens).tolist(), logp_old=logp, **how)
            for i, p in places.items()
            for tokens, logp in self.kept[p][1].items()
        ]
        mine = list(enumerate(candidates))[rank() :: world_size()]
        for micro_batch in luffy.pack([t for _, t in mine], self.cfg.token_budget):
            micro_batch.give(entropy_old=self.policy(micro_batch)[1].cpu())
        entropies = [(t.entropy_old.mean().item(), n) for n, t in mine]
        order = sorted(sum(gather(entropies), []), reverse=True)  # the lowest comes last, and stays
        self.replays = {candidates[n].position: candidates[n] for _, n in order}
        batch = plain["batch_at"](problems, step, size, seed)
        return [problems[places[i]] if i in places else p for i, p in enumerate(batch)]

    def rollout(self, *args: Any) -> list[Trajectory]:
        """The kept ones in the place of the last. One of 16 is sampled in vain, but in one call."""
        trajectories = plain["rollout"](*args)
        last = {t.position: n for n, t in enumerate(trajectories)}
        for i in self.replays.keys() & last.keys():
            trajectories[last[i]] = self.replays[i]
        return trajectories

    def update(self, policy: Any, optimizer: Any, trajectories: list, cfg: Config) -> dict:
        metrics, size = plain["update"](policy, optimizer, trajectories, cfg), cfg.rollouts
        seen = []
        for group in (trajectories[n : n + size] for n in range(0, len(trajectories), size)):
            p, s = self.number[id(group[0].problem)], int(sum(t.right for t in group))
            seen.append((group[0].position, p, s, successes(group)))
        everyones = sorted(sum(gather(seen), []))  # by position
        for _, p, s, new in everyones:
            if s == size:
                self.retired.add(p)
            elif s and self.started:  # what is there already keeps its log π_past
                self.kept[p] = s, new | self.kept.get(p, (0, {}))[1]
        self.kept = {p: kept for p, kept in self.kept.items() if p not in self.retired}
        right = sum(s for _, _, s, _ in everyones)
        self.started |= right > cfg.replay_from * size * len(everyones)
        return metrics | {"replayed": len(self.replays), "pool": len(self.kept)}  # problems


if __name__ == "__main__":
    pool = Pool()
    replaced = {name: getattr(pool, name) for name in PLACES}
    launch(partial(luffy.main, "exgrpo", Config=Config, check=check, **replaced))
