"""PRIME, arXiv:2502.01456: rewards of single tokens, from a model that learns from verdicts alone.

    python -m forks.prime                                                   # on the toy
    torchrun --nproc_per_node=8 -m forks.prime --model Qwen2.5-Math-1.5B

A second copy φ of the model has q_t = log π_φ - log π_ref. It learns that β Σ_t q_t is the log-odds
of a right response. Advantages come from the q of a token and of later ones, and from the verdict.

Source: PRIME-RL/PRIME@18ad596, dp_prime.py, core_algos.py, run_prime_main.sh. As there: β .05, clip
.2, 1024 trajectories in four updates of the policy and of φ, whose q is that before its update;
learning rates 5e-7 and 1e-6, gradients clipped at 1 and 10, no KL, no entropy. Not as there:
- 128 problems x 8 rollouts, not 256 x 4; 8192 tokens, not 3072.
- π_ref is π_old, the policy that sampled: their option that needs no third model.
- q_t is divided by the largest |Σ_{u>=t} q_u| of the batch, not of a rank's part of it.
- A problem with fewer than .2 or more than .8 right rollouts is not replaced by another one.
The toy's recipe comes before the row: two updates, lr 3e-4, and so 6e-4 for φ. Flags of group
advantages change nothing. φ takes as much memory as the policy: 7B
needs eight GPUs of 141 GiB.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import luffy
from forks.second_model import SecondModel, memory, shares
from luffy import MicroBatch, Policy, Run, flag, gather, launch, rank
from machinery.processes import InputError

luffy.ALGORITHMS["prime"] = dict(rollouts=8, traces=0, clip=0.2, token_mean=True, scale=1.0)
luffy.ALGORITHMS["prime"] |= dict(entropy_coef=0.0, updates_per_step=4, lr=5e-7)
luffy_load, luffy_update, luffy_check = luffy.load, luffy.update, luffy.check


@dataclass(frozen=True)
class Config(luffy.Config):
    beta: float = flag(0.05, "of φ's log-odds, β Σ q", above=0)
    prm_lr: float | None = flag(None, "of φ's AdamW; none: 2 x --lr", above=0)
    prm_max_grad_norm: float = flag(10.0, "a longer gradient of φ is scaled down to it", above=0)
    more_memory = memory


def check(cfg: Config, ranks: int) -> None:
    luffy_check(cfg, ranks)
    if cfg.traces or cfg.continuations:
        raise InputError("--traces, --continuations: must be 0; rollouts alone have a process")


def verdict_loss(q: Tensor, segment: Tensor, reward: Tensor, beta: float) -> Tensor:
    """(N,) q of B trajectories' tokens, (N,) whose, (B,) 1 if right -> cross-entropies (B,)."""
    q_sum = torch.zeros_like(reward).index_add(0, segment, q)
    return F.binary_cross_entropy_with_logits(beta * q_sum, reward, reduction="none")


def to_go(x: Tensor) -> Tensor:
    """Σ_{u>=t} x_u of one trajectory: (T,) -> (T,)."""
    return x.flip(0).cumsum(0).flip(0)


def process_rewards(qs: list[Tensor]) -> list[Tensor]:
    """q_t of all trajectories of the batch, each (T,), in units of the largest return."""
    largest = max(to_go(q).abs().max() for q in qs)
    return [q / (largest + 1e-6) for q in qs]


def returns(process: list[Tensor], outcome: Tensor, n: int) -> list[Tensor]:
    """Of groups of n trajectories in a row, each (T,): Σ_{u>=t} of both rewards over baselines.

    r - the mean of the other n - 1; for a token n / (n - 1) times q - the mean of all trajectories'
    means, as the official code has it.
    """
    means = torch.stack([p.mean() for p in process]).view(-1, n).mean(dim=1).repeat_interleave(n)
    base = outcome.view(-1, n).mean(dim=1).repeat_interleave(n)
    scale = n / (n - 1)
    return [scale * (to_go(p - m) + r - b) for p, m, r, b in zip(process, means, outcome, base)]


def whiten(x: Tensor) -> Tensor:
    """Over all tokens of the batch: (N,) -> (N,)."""
    return (x - x.mean()) * (x.var() + 1e-8).rsqrt()


class Prime:
    """`load` and `update` in place of luffy's. The model of rewards, φ, is what they share."""

    def load(self, cfg: Config, run: Run, *args) -> tuple:
        loaded = luffy_load(cfg, run, *args)
        phi = Policy(copy.deepcopy(loaded[-1]), cfg.temperature)
        self.phi = SecondModel(phi, "prm", run, cfg)
        return loaded

    def update(self, policy: nn.Module, optimizer, trajectories: list, cfg: Config) -> dict:
        n = cfg.updates_per_step
        for share in shares(trajectories, n, cfg):  # packed as for φ: at first q is exactly 0
            luffy.record_old_logprobs(policy, [[], share], cfg)

        def loss_of(logp_entropy: tuple[Tensor, Tensor], batch: MicroBatch) -> Tensor:
            q = logp_entropy[0] - batch.logp_old  # (N,)
            batch.give(q=q)
            reward = q.new_tensor([t.reward for t in batch.trajectories])
            return verdict_loss(q, batch.segment, reward, cfg.beta).sum()

        how = cfg.prm_lr or 2 * cfg.lr, cfg.prm_max_grad_norm, cfg
        metrics = self.phi.learn(trajectories, n, loss_of, lambda t: 1, *how)
        everyones = gather([(t.q.clone().cpu(), t.reward) for t in trajectories])
        qs, rewards = zip(*sum(everyones, []))
        of_all = returns(process_rewards(qs), torch.tensor(rewards), cfg.rollouts)
        of_all = whiten(torch.cat(of_all)).split([len(q) for q in qs])
        first = sum(map(len, everyones[: rank()]))  # of this rank
        for t, advantage in zip(trajectories, of_all[first:]):
            t.advantage = advantage
        return luffy_update(policy, optimizer, trajectories, cfg) | metrics


if __name__ == "__main__":
    prime = Prime()
    replaced = dict(Config=Config, check=check, load=prime.load, update=prime.update)
    launch(partial(luffy.main, "prime", **replaced))
