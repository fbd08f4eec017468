"""ORZ, arXiv:2503.24290: PPO with a critic, without discount, on the policy's own rollouts.

    python -m forks.orz                                                     # on the toy
    torchrun --nproc_per_node=8 -m forks.orz --model Qwen2.5-Math-1.5B

A second copy of the model has a value head and learns V(s_t), the reward to expect after t tokens.

Source: Open-Reasoner-Zero/Open-Reasoner-Zero@3fdd9a0, orz_7b_ppo.py. As there: 128 problems, one
update of the policy and 12 of the critic on a batch, both clips .2, learning rates 1e-6 and 5e-6,
AdamW (.9, .95) without decay, neither KL nor entropy bonus. Not as there:
- 8 rollouts of a problem, not 64; 8192 tokens, not 8000; no warm-up of 50 steps; V starts at 0.
- A loss is one mean over the tokens of its update, not a mean of the means of packed rows.
- The advantages are float32, not bfloat16. A right answer counts although its response was cut off.
The toy's recipe comes before the row: two updates of the policy, lr 3e-4, 1.5e-3 for V, which
is too much there (seed 0: V is hardly better than a constant); --critic_lr 3e-4 fits the rewards.
The flags of group advantages change nothing. The critic takes as much memory as the policy: 7B
needs eight GPUs of 141 GiB.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import luffy
from forks.second_model import SecondModel, memory
from luffy import MicroBatch, Run, Trajectory, flag, gather, launch, pack, rank

luffy.ALGORITHMS["orz"] = dict(rollouts=8, traces=0, clip=0.2, token_mean=True, scale=1.0)
luffy.ALGORITHMS["orz"] |= dict(entropy_coef=0.0, updates_per_step=1, beta2=0.95, weight_decay=0.0)
luffy_load, luffy_update = luffy.load, luffy.update


@dataclass(frozen=True)
class Config(luffy.Config):
    critic_updates: int = flag(12, "of the critic on a rollout batch, at most one for a problem", 1)
    critic_lr: float | None = flag(None, "of the critic's AdamW; none: 5 x --lr", above=0)
    value_clip: float = flag(0.2, "a value that moved further from V_old stops learning", above=0)
    more_memory = memory


def gae(returns: Tensor, old: Tensor) -> Tensor:
    """Advantages with γ = λ = 1: the return r less V_old(s_t), (N,)."""
    return returns - old


def normalise(advantages: Tensor) -> Tensor:
    """Over all tokens of the batch, on all ranks: (N,) -> (N,). The variance is biased."""
    centred = advantages - advantages.mean()
    return centred * centred.square().mean().clamp(min=1e-8).rsqrt()


def value_loss(values: Tensor, returns: Tensor, old: Tensor, clip: float) -> Tensor:
    """½ (V - r)², or the same of V kept within `clip` of V_old, if that is larger: all (N,)."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (near - returns).square())


def targets(trajectories: list[Trajectory]) -> tuple[Tensor, Tensor]:
    """Of each response token the return, which is r, and V_old: (N,), (N,)."""
    returns = [torch.full_like(t.value, t.reward) for t in trajectories]
    return torch.cat(returns), torch.cat([t.value for t in trajectories])


class Values(nn.Module):
    """The model with a value head, float32 also on bfloat16: -> V(s_t) of response tokens (N,)."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk, width = trunk, trunk.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False, device=trunk.device)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: MicroBatch) -> Tensor:
        how = dict(position_ids=batch.position_ids, packing=batch.packing)
        hidden = self.trunk(batch.input_ids, use_cache=False, **how).last_hidden_state[0]  # (S, D)
        return self.head(hidden[batch.before].float())[:, 0]  # s_t: before the token


class Orz:
    """`load` and `update` in place of luffy's. The critic is what they share."""

    def load(self, cfg: Config, run: Run, *args) -> tuple:
        loaded = luffy_load(cfg, run, *args)
        values = Values(copy.deepcopy(loaded[-1].base_model))
        self.critic = SecondModel(values, "critic", run, cfg)
        return loaded

    def update(self, policy: nn.Module, optimizer, trajectories: list, cfg: Config) -> dict:
        for micro_batch in pack(trajectories, cfg.token_budget):
            with torch.no_grad():
                micro_batch.give(value=self.critic.model.module(micro_batch))  # V_old
        everyones = gather(gae(*targets(trajectories)).cpu())  # (N,) of each rank
        normal = normalise(torch.cat(everyones)).split([len(a) for a in everyones])
        mine = normal[rank()].split([len(t.response) for t in trajectories])
        for t, advantage in zip(trajectories, mine):
            t.advantage = advantage
        metrics = luffy_update(policy, optimizer, trajectories, cfg)

        def loss_of(values: Tensor, batch: MicroBatch) -> Tensor:
            return value_loss(values, *targets(batch.trajectories), cfg.value_clip).sum()

        how = cfg.critic_lr or 5 * cfg.lr, cfg.max_grad_norm, cfg
        return metrics | self.critic.learn(
            trajectories, cfg.critic_updates, loss_of, lambda t: len(t.response), *how
        )


if __name__ == "__main__":
    orz = Orz()
    launch(partial(luffy.main, "orz", Config=Config, load=orz.load, update=orz.update))
