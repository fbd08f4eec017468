"""ORZ, arXiv:2503.24290: PPO with a critic, without discount, on the policy's own rollouts.

    python -m forks.orz                                                     # on the toy
    torchrun --nproc_per_node=8 -m forks.orz --model Qwen2.5-Math-7B

A second copy of the base model has a value head, and learns V(s_t): the reward to expect after t
tokens of a response. With γ = λ = 1 and a reward at the end alone, GAE is A_t = r - V(s_t).

Source: Open-Reasoner-Zero/Open-Reasoner-Zero@3fdd9a0, orz_7b_ppo.py. As there: 128 problems, one
update of the policy and 12 of the critic on a batch, clip .2 (of values, too), learning rates 1e-6
and 5e-6, AdamW (.9, .95) without decay, neither KL nor entropy bonus. Not as there:
- 8 rollouts of a problem; theirs are 64. 8192 tokens; theirs are 8000. No warm-up; theirs is 50.
- A loss is one mean over the tokens of its update; theirs is a mean of means over packed rows.
- V starts at 0. The advantages are float32; theirs end as bfloat16.
- A right answer in a response that was cut off is rewarded; theirs must have stopped.
The toy's recipe wins over this row: two updates of the policy, lr 3e-4, and so 1.5e-3 for V.
--dry_run and the default --cache_gib do not count the critic, which takes as much as the policy.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import luffy
from luffy import check as luffy_check, load as luffy_load, update as luffy_update
from machinery.batches import MicroBatch, Trajectory, pack
from machinery.flags import flag
from machinery.metrics import Means
from machinery.optimizer import ShardedAdamW
from machinery.processes import InputError, all_reduce, gather, launch, progress, rank, world_size

# fmt: off
luffy.ALGORITHMS["orz"] = dict(
    rollouts=8, traces=0, clip=0.2, token_mean=True, scale=1.0, entropy_coef=0.0,
    updates_per_step=1, beta2=0.95, weight_decay=0.0)
# fmt: on
