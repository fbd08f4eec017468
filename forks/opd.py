"""On-policy distillation: a teacher says of each token that the policy sampled how likely it is.

A token's advantage is log π_teacher - log π_old, without gradient. This lowers KL(π || π_teacher)
on the policy's own rollouts. There is no trace, and a reward only by --reward_coef, times the
group's r - mean. (NeMo RL 0.8's estimator opd; thinking-machines-lab/tinker-cookbook@53aaf8d)

    python luffy.py                                             # makes a teacher for the toy
    python -m forks.opd --teacher runs/toy-luffy-seed0/checkpoint-000200
    torchrun --nproc_per_node=8 -m forks.opd --model Qwen2.5-Math-7B --teacher DIR

The teacher has the policy's vocabulary, reads its prompts, and is frozen: no checkpoint holds it.
Each rank keeps it in the host's memory, and on the GPU while it scores, where activations
come later. A step has two forward passes more. The metric teacher_kl estimates the KL a token.

What differs: Tinker's π_old is the sampler's. Its loss is a sum over tokens, without a clip; one
update a step, 512 groups, lr 1e-4 (LoRA; 5e-5 for all weights). Here π_old is the trainer's, the
clip .2 (--clip none), the loss a mean over tokens; two updates, 128 groups of 8, lr 1e-6.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import luffy
from machinery.batches import Trajectory, pack
from machinery.flags import flag
from machinery.metrics import Means
from machinery.model import Policy, find, fit_context, load_config, load_model, load_tokenizer
from machinery.processes import InputError, device, launch

luffy.ALGORITHMS["opd"] = dict(rollouts=8, traces=0, clip=0.2, **luffy.rivals.TOKEN_MEAN)
plain = {name: getattr(luffy, name) for name in ("check", "load", "update")}  # main replaces them


@dataclass(frozen=True)
class Config(luffy.Config):
    teacher: str = flag("", "needed: a directory that from_pretrained loads, or a hub name")
    reward_coef: float = flag(0.0, "of the group's advantage, beside the teacher's", 0)


def distilled(logp_teacher: Tensor, logp_old: Tensor, of_reward: Tensor) -> Tensor:
    """Advantages of a rollout's tokens, from log-probs (N,) and its r - mean: (N,), no gradient."""
    return (logp_teacher - logp_old + of_reward).detach()


def check(cfg: Config, ranks: int) -> None:
    if not cfg.teacher:
        raise InputError(
            "--teacher: name a model with the policy's vocabulary. For the toy, `python luffy.py` "
            "makes one: --teacher runs/toy-luffy-seed0/checkpoint-000200"
        )
    if cfg.traces or cfg.continuations:
        raise InputError("--traces, --continuations: must be 0; a teacher judges rollouts alone")
    plain["check"](cfg, ranks)


def load_teacher(cfg: Config, base: str) -> Policy:
    """Frozen, in this machine's precision. InputError unless base has the same vocabulary."""
    try:
        path = find(cfg.teacher, cfg.device)
        vocabulary, config = load_tokenizer(path).get_vocab(), load_config(path)
        if vocabulary != load_tokenizer(base).get_vocab():
            raise InputError(f"--model {cfg.teacher}: its vocabulary is not that of the policy")
        fit_context(config, cfg.max_prompt_tokens, cfg.max_response_tokens)
        model = load_model(path, config, checkpointing=False)
    except InputError as error:
        raise InputError(str(error).replace("--model", "--teacher", 1)) from error
    return Policy(model, cfg.temperature).eval().requires_grad_(False).to("cpu")


@torch.no_grad()
def record_teacher_logprobs(teacher: Policy, rollouts: list[Trajectory], token_budget: int) -> None:
    """Sets logp_teacher of each rollout, (N,) of its tokens."""
    teacher.to(device())
    for micro_batch in pack(rollouts, token_budget):
        micro_batch.give(logp_teacher=teacher(micro_batch)[0])
    teacher.to("cpu")


class Distillation:
    def load(self, cfg: Config, run: Any, base: str, grader: Any) -> tuple:
        self.teacher = load_teacher(cfg, base)
        return plain["load"](cfg, run, base, grader)

    def update(self, policy: Any, optimizer: Any, trajectories: list, cfg: Config) -> dict:
        luffy.record_old_logprobs(policy, [[], trajectories], cfg)  # as if all came later
        record_teacher_logprobs(self.teacher, trajectories, cfg.token_budget)
        means = Means()
        for t in trajectories:
            of_reward = cfg.reward_coef * torch.as_tensor(t.advantage, device=device())
            t.advantage = distilled(t.logp_teacher, t.logp_old, of_reward)
            means.add("teacher_kl", t.logp_old - t.logp_teacher)
        return plain["update"](policy, optimizer, trajectories, cfg) | means.reduce()


if __name__ == "__main__":
    d = Distillation()
    replaced = dict(Config=Config, check=check, load=d.load, update=d.update)
    launch(partial(luffy.main, algo="opd", **replaced))
