"""A model that learns beside the policy: forks.orz's critic, forks.prime's rewards. Not a fork."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from machinery.batches import MicroBatch, Trajectory, pack
from machinery.flags import Config
from machinery.optimizer import ShardedAdamW, data_parallel
from machinery.processes import all_reduce, world_size
from machinery.run_directory import Run


def shares(trajectories: list[Trajectory], n: int, cfg: Config) -> list[list[Trajectory]]:
    """Those of the problems of each of n updates: some may be larger by a problem."""
    problems = cfg.problems_per_step
    return [[t for t in trajectories if t.position * n // problems == i] for i in range(n)]


def memory(cfg: Config, weights: int, state: int, moments: int) -> list[tuple[str, str, int]]:
    """Rows of machinery.plan.memory for it, as a method of a fork's Config."""
    return [("always", "the second model, its gradients and state", 2 * weights + state)]


class SecondModel:
    """A module that takes a MicroBatch, and its optimizer; checkpoints hold it under `name`."""

    def __init__(self, module: nn.Module, name: str, run: Run, cfg: Config):
        self.model, self.name = data_parallel(module), name
        settings = cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay
        self.optimizer = ShardedAdamW(
            self.model.parameters(), *settings, offload=cfg.offload_optimizer
        )
        run.keep(name, self.optimizer)  # with the masters of all parameters
        self.optimizer.share()

    def learn(
        self,
        trajectories: list[Trajectory],
        updates: int,
        loss_of: Callable[[Any, MicroBatch], Tensor],
        size: Callable[[Trajectory], int],
        lr: float,
        max_norm: float,
        cfg: Config,
    ) -> dict[str, float]:
        """Updates on a rollout batch, each on its share of the problems; -> metrics.

        loss_of: the module's output, micro-batch -> a sum. An update's loss is that over all its
        micro-batches and ranks, divided by the sum of `size`.
        """
        self.optimizer.set_lr(lr)
        done = []
        for share in shares(trajectories, min(updates, cfg.problems_per_step), cfg):
            inv_z = bool(share) / max(1, all_reduce(sum(map(size, share))))
            # A rank without a problem of the share takes part, too: 0 times another one's loss.
            loss = self.add_up_gradients(share or trajectories[:1], loss_of, inv_z, cfg)
            done.append((loss, self.optimizer.step(max_norm)))
            self.optimizer.zero_grad()
        loss, norm = torch.tensor(done).mean(dim=0).tolist()
        return {f"{self.name}/loss": loss, f"{self.name}/grad_norm": norm}

    def add_up_gradients(
        self, trajectories: list[Trajectory], loss_of: Callable, inv_z: float, cfg: Config
    ) -> float:
        """Micro-batch by micro-batch; the ranks all-reduce them once. -> the loss, over all."""
        total, micro_batches = 0.0, pack(trajectories, cfg.token_budget)
        for micro_batch in micro_batches:
            last = micro_batch is micro_batches[-1]
            with nullcontext() if last else self.model.no_sync():
                loss = inv_z * loss_of(self.model(micro_batch), micro_batch)
                (loss * world_size()).backward()  # DDP averages over ranks
            total += loss.item()
        return all_reduce(total)
