"""ReLIFT, arXiv:2506.07527: RL, and SFT on the problems that RL could not solve, in turns.

    python -m forks.relift                                                     # on the toy
    torchrun --nproc_per_node=8 -m forks.relift --model Qwen2.5-Math-7B

A problem of which no rollout is right enters a queue, at its front. When this holds enough after
RL's updates, there is one SFT step on the traces of its first ones, by an AdamW of its own.

Source: TheRoadQaQ/ReLIFT@eb95454, relift/trainer.py, actor.py, examples/math-7b/train.sh. As there:
8 rollouts, no trace, std or clip in RL; 128 traces (here: as many as --problems_per_step); both lr
1e-6 (here: --lr); gradients clipped to .7 (RL) and 1.0 (SFT). Not as there:
- The SFT loss is one mean over the tokens of all its traces. There it is a mean of micro-batches'
  means, divided by 8 too often: --sft_max_grad_norm 8 clips as there; AdamW sees no difference.
- Queue and second AdamW are resumed. Wrong traces are dropped. 500 steps, not three epochs.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import luffy
from luffy import Means, ShardedAdamW, Trajectory
from machinery.flags import flag
from machinery.processes import InputError, gather, launch, progress, rank, world_size

luffy.ALGORITHMS["relift"] = dict(rollouts=8, traces=0, clip=None, max_grad_norm=0.7)
plain_load, plain_update, plain_check = luffy.load, luffy.update, luffy.check


@dataclass(frozen=True)
class Config(luffy.Config):
    sft_problems: int = flag(0, "traces of an SFT step; 0: as many as --problems_per_step", 0)
    sft_lr: float | None = flag(None, "of SFT's AdamW; none: --lr", above=0)
    sft_max_grad_norm: float = flag(1.0, "SFT's longer gradient is scaled down to it", above=0)
    sft_entropy: float = flag(1e-3, "coefficient of the mean entropy in an SFT step", 0)

    def more_memory(self, weights: int, state: int, moments: int) -> list[tuple[str, str, int]]:
        return [("always", "the state of SFT's AdamW", moments)]


def check(cfg: Config, ranks: int) -> None:
    if 0 < cfg.sft_problems < ranks:  # a rank without a trace would not meet the others
        raise InputError(f"--sft_problems {cfg.sft_problems}: less than {ranks} ranks")
    if not cfg.rollouts:
        raise InputError("--rollouts 0: without them no problem is known to be unsolved")
    if cfg.untraced != "drop":
        raise InputError("--untraced rollout: not with relift, whose SFT steps need every trace")
    plain_check(cfg, ranks)


def as_sft(cfg: Config) -> Config:
    """With it luffy's loss of traces is -mean log π - sft_entropy mean entropy."""
    return replace(cfg, shaping="log", objective="mixed", sft_coef=1, entropy_coef=cfg.sft_entropy)


def unsolved(trajectories: list[Trajectory]) -> dict[int, Any]:
    """Position -> problem, where no rollout is right."""
    solved = {t.position for t in trajectories if t.right and not t.off_policy}
    return {t.position: t.problem for t in trajectories if t.position not in solved}


class SFT(ShardedAdamW):
    """SFT's AdamW, the queue, and the functions of luffy that have to know of them."""

    def __init__(self) -> None:
        self.queue, self.params = [], []  # numbers of problems, newest first, the same on all ranks

    def share_masters(self, rl: ShardedAdamW) -> None:
        """With two sets of masters of bfloat16 parameters each step would undo the other's."""
        self.params, self.owner, self.mine = rl.params, rl.owner, rl.mine
        self.offload = rl.offload
        self.settings = rl.settings | dict(eps=1e-8)  # this loss has no scale
        self.optimizers = {i: self.optimizer_of(master) for i, master in self.mine.items()}

    def state_dict(self) -> dict:
        return super().state_dict() | {"queue": self.queue}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.queue = state["queue"]

    def load(self, cfg: Config, run: Any, *args: Any) -> tuple:
        loaded = plain_load(
            replace(cfg, traces=1, untraced="drop"), run, *args
        )  # those with a trace
        self.run, self.problems = run, loaded[1]
        self.number = {id(x): n for n, p in enumerate(self.problems) for x in (p, *p.others)}
        return loaded

    def update(self, policy: Any, rl: ShardedAdamW, trajectories: list, cfg: Config) -> dict:
        if not self.params:  # only now is there an AdamW of RL
            self.share_masters(rl)
            self.run.keep("sft", self)
        metrics, means = plain_update(policy, rl, trajectories, cfg), Means()
        new = [(i, self.number[id(problem)]) for i, problem in unsolved(trajectories).items()]
        self.queue = [number for _, number in sorted(sum(gather(new), []))] + self.queue
        size = cfg.sft_problems or cfg.problems_per_step
        if len(self.queue) >= size:
            chosen, self.queue = self.queue[:size], self.queue[size:]
            mine = [(i, self.problems[n]) for i, n in enumerate(chosen)][rank() :: world_size()]
            sft = [Trajectory(i, p, p.trace_ids, off_policy=True, advantage=1.0) for i, p in mine]
            luffy.set_normaliser(sft, as_sft(cfg))
            with progress("sft", sum(len(t.response) for t in sft)) as bar:
                luffy.add_up_gradients(policy, sft, as_sft(cfg), means, bar)
            self.set_lr(cfg.sft_lr or cfg.lr)
            means.add("grad_norm", [self.step(cfg.sft_max_grad_norm)])
            self.zero_grad()
        of_sft = {f"sft/{name}": value for name, value in means.reduce().items()}
        return metrics | of_sft | {"queue": len(self.queue)}  # sft/trace_f: the mean log π


if __name__ == "__main__":
    sft = SFT()
    replaced = dict(Config=Config, check=check, load=sft.load, update=sft.update)
    launch(partial(luffy.main, "relift", **replaced))
