"""LUFFY, small enough to read: RL with verifiable rewards under off-policy guidance.

Every group of rollouts of a problem holds one correct reasoning trace of a stronger teacher. All
are scored by rule, advantages are taken over the mixed group, and the trace's tokens are shaped by
f, so that right but unlikely ones are learnt, too. (arXiv:2504.14945; equations as in its v5)

    python luffy.py                                                # the toy, minutes on a laptop
    torchrun --nproc_per_node=8 luffy.py --model Qwen2.5-Math-7B   # the paper's run
    python luffy.py --model Qwen2.5-Math-7B --dry_run 8x80         # will it fit? needs no GPU
    torchrun ... luffy.py --model Qwen2.5-Math-7B --preflight      # will it run? minutes

The equations, in the paper's symbols:
    A_i   = r_i - mean(r_1..r_G)           over rollouts and trace together   Eq. 4, without / std
    x_it  = π_θ / π_old  on rollouts,      π_θ / π_φ  on traces, with π_φ := 1
    f(x)  = x / (x + γ)                    policy shaping
    J     = 1/Z [ Σ_traces Σ_t f(x_it) A_i + Σ_rollouts Σ_t x_it A_i ]        Eq. 6; f(x) = x: Eq. 5
            + c/Z Σ_all Σ_t H_it           entropy bonus, on trace tokens too
with π_θ the policy, π_old the policy that sampled the rollouts, π_φ the teacher, c --entropy_coef.
An SFT loss is Σ_t log π_θ of the traces, with a Z of its own: their number of tokens.

Notation: P problems, G trajectories in a group (rollouts, then the trace), N response tokens of a
micro-batch, S tokens of its packed row (and each group's prompt, once), D width, V vocabulary.

Read down to the line "that was the method": the algorithm as functions of tensors, then the loop,
`train`, and the functions of a step in the order of its calls. Elsewhere: prompts and traces as
tokens (data), the verifier (verify), log π_θ and its entropy (machinery.model.token_logprobs).
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data import Problem, batch_at, load_benchmarks, load_training_set, text_of
from machinery import flags, plan, preflight, rivals, samplers
from machinery.batches import MicroBatch, Tokens, Trajectory, deal, pack
from machinery.flags import flag
from machinery.kinds import PretrainedConfig, PreTrainedModel, Tokenizer
from machinery.metrics import Means, add_token_metrics, failure_metrics, trajectory_metrics
from machinery.model import Policy, end_ids, find, fit_context, load_config, load_model
from machinery.model import load_tokenizer, recipe, token_logprobs as token_logprobs
from machinery.optimizer import ShardedAdamW, data_parallel
from machinery.prefixes import continue_prefixes, keep_uncertain
from machinery.processes import all_reduce, gather, init_processes, launch, progress, rank, say
from machinery.processes import my_share, say_and_go_on, seed_of, world_size
from machinery.run_directory import Due, Run
from machinery.samplers import NoSampler, Sample, Sampler, TorchSampler
from machinery.scores import evaluate, report
from verify import Grader


@dataclass(frozen=True)
class Config:
    """One run: LUFFY's by default. docs/differences.md lists what differs from paper and code."""

    # what to run
    model: str = flag("toy", "the toy, a directory that from_pretrained loads, or a hub name")
    algo: str = flag("luffy", "a row of ALGORITHMS")
    data: str = flag("Elliott/Openr1-Math-46k-8192", "problems and traces: data.load_problems")
    template: str = flag("auto", "of prompts: auto, own (the tokenizer's), or a jinja file")
    eval_data: str = flag("", "to evaluate on before, after and between: sources A,B; or none")
    out: str = flag("", "run directory; the same one resumes [runs/MODEL-ALGO-seedSEED]")
    seed: int = flag(0, "of rollouts and of the order of problems", 0)
    steps: int = flag(500, "rollout batches", 1, 1e5)
    # a group
    problems_per_step: int = flag(128, "P, problems of a rollout batch", 1, 1e6)
    rollouts: int = flag(7, "trajectories of a problem that the policy samples", 0, 1e4)
    traces: int = flag(1, "off-policy ones: 0 or 1", 0, 1)
    max_prompt_tokens: int = flag(1024, "a problem with a longer prompt is left out", 1)
    max_response_tokens: int = flag(8192, "of a rollout, EOS included", 1)
    max_trace_tokens: int = flag(0, "a problem with a longer trace is left out; 0: as a rollout", 0)
    untraced: str = flag("drop", "problems without a trace", choices=("drop", "rollout"))
    unreadable: str = flag("keep", "problems whose gold no parser reads", choices=("keep", "drop"))
    temperature: float = flag(1.0, "of the rollouts; top_p is 1", 0.01, 100)
    lenient: bool = flag(False, "the official code's reward: a right answer needs no box")
    reward: str = flag("", "FILE.py:function of (response, answer), a number; empty: 1 if right")
    # the objective
    shaping: str = flag("luffy", "f on trace tokens, a row of SHAPINGS")
    gamma: float = flag(0.1, "the paper's γ in f(x) = x / (x + γ), not a discount", 1e-6, 1e6)
    clip: float | None = flag(None, "PPO's ε on rollout tokens; none: no clipping", above=0)
    shape_rollouts: bool = flag(False, "the ratio f(π_θ) / f(π_old) in place of π_θ / π_old")
    tis_cap: float | None = flag(None, "factor min(π_old / π_sampler, cap); none: 1", above=0)
    baseline: str = flag("group", "whose mean is subtracted", choices=("group", "rollouts"))
    trace_advantage: float | None = flag(None, "a trace's; none: from the group, as any other's")
    normalize_std: bool = flag(False, "advantages / std of the group: GRPO, not Dr. GRPO")
    token_mean: bool = flag(False, "Z: tokens, not trajectories x max_response_tokens")
    sft_coef: float = flag(1.0, "of the SFT loss's tokens: times 1 / their number", 0)
    entropy_coef: float = flag(2.5e-4, "c; the official 0.001 in our units, x 8192 / 32768", 0)
    # other papers' rules, which LUFFY leaves alone
    route: str = flag("all", "who learns, a row of ROUTES")
    advantage: str = flag("group", "what the group's advantages become, a row of ADVANTAGES")
    objective: str = flag("mixed", "of a token, a row of OBJECTIVES")
    schedule: str = flag("constant", "which fields change over the run, a row of SCHEDULES")
    clip_high: float | None = flag(None, "ε above 1, where it differs; none: as clip", above=0)
    sequence_mean: bool = flag(False, "Z: trajectories x their own tokens")
    rl_coef: float = flag(1.0, "of the RL part; the entropy bonus does not have it", 1e-6)
    continuations: int = flag(0, "so many of the rollouts go on from a prefix of the trace", 0)
    prefix: str = flag("none", "how much of the trace, a row of rivals.PREFIXES")
    prefix_learns: float = flag(1.0, "share of prefix tokens that learn, by entropy", 0, 1)
    # the optimizer
    updates_per_step: int = flag(2, "optimizer steps on a rollout batch, each on its problems", 1)
    lr: float = flag(1e-6, "AdamW's", above=0, high=1)
    beta1: float = flag(0.9, "AdamW's", 0, below=1)
    beta2: float = flag(0.999, "AdamW's", 0, below=1)
    weight_decay: float = flag(0.01, "AdamW's", 0, 1)
    scale: float = flag(64.0, "of the loss, before the clip: the official sum's, 512 / 8", 1e-6)
    max_grad_norm: float = flag(1.0, "a longer gradient is scaled down to it", 1e-3)
    # the machine
    device: str = flag("auto", "auto: a GPU if there is one", choices=("auto", "cuda", "cpu"))
    sampler: str = flag("auto", "auto: vllm on a GPU", choices=("auto", "vllm", "torch"))
    tensor_parallel: int = flag(1, "GPUs that share one vLLM engine", 1)
    cache_gib: float = flag(0.0, "vLLM's keys and values on a GPU; 0: what the plan leaves", 0, 1e4)
    token_budget: int = flag(32768, "tokens of a micro-batch: memory, and rounding only", 1)
    checkpointing: bool = flag(True, "compute activations again in the backward pass")
    offload_optimizer: bool = flag(False, "AdamW's step and state on the host, not on the GPU")
    graders: int = flag(2, "verifier processes of each rank", 1, 256)
    grade_timeout: float = flag(5.0, "seconds for a response, then its reward is 0", 0.01, 1e5)
    save_every: int = flag(50, "steps between checkpoints", 1)
    keep: int = flag(0, "checkpoints that stay, the newest; 0: all", 0)
    eval_every: int = flag(0, "steps between evaluations; 0: only before and after", 0)
    eval_samples: int = flag(0, "k, at temperature 0.6; 0: its repeats in the file, else 8", 0, 1e4)
    sample_every: int = flag(10, "steps between files of sampled groups, for report.html", 1)
    sample_groups: int = flag(8, "groups in such a file", 1)
    note: str = flag("", "shown on report.html")
    track: str = flag("", "and log there, too", choices=("", "wandb", "trackio", "tensorboard"))
    dry_run: str = flag("", "print the plan for this machine, or for GPUSxGIB (8x80), and stop")
    preflight: bool = flag(False, "prove on this machine what the run needs, and stop")

    @property
    def samples(self) -> bool:
        """Does a run need a sampler? SFT without evaluation does not."""
        return self.rollouts > 0 or self.eval_data not in ("", "none")


# The paper's arms, as changes of Config's defaults; rivals.ROWS has other papers'. Ablations differ
# in one field: mixed_shaped from luffy, mixed from mixed_shaped, on_policy_* from on_policy.
# fmt: off
ALGORITHMS: dict[str, dict[str, Any]] = {
    "luffy": dict(rollouts=7, traces=1, shaping="luffy", clip=None),
    "mixed_shaped": dict(rollouts=7, traces=1, shaping="luffy", clip=0.2),
    "mixed": dict(rollouts=7, traces=1, shaping="none", clip=0.2),
    "on_policy": dict(rollouts=8, traces=0, clip=0.2),
    "on_policy_noclip": dict(rollouts=8, traces=0, clip=None),
    "on_policy_shaped": dict(rollouts=8, traces=0, clip=0.2, shape_rollouts=True),
    "grpo": dict(rollouts=8, traces=0, clip=0.2, normalize_std=True, token_mean=True, scale=1.0),
    "rl_sft": dict(rollouts=7, traces=1, shaping="log", clip=None, trace_advantage=1.0,
                   baseline="rollouts", sft_coef=0.1),
    "sft": dict(rollouts=0, traces=1, shaping="log", trace_advantage=1.0, entropy_coef=0.0,
                lr=5e-5, problems_per_step=64, updates_per_step=1, steps=2150, scale=1.0),
}
ALGORITHMS |= rivals.ROWS
# fmt: on

# Values that depend on the step: (config, steps done) -> the fields that are different then.
SCHEDULES: dict[str, Callable[[Config, int], dict[str, Any]]] = {
    "constant": lambda cfg, step: {}
} | rivals.SCHEDULES


def at_step(cfg: Config, step: int) -> Config:  # after the last step: as in it
    return replace(cfg, **SCHEDULES[cfg.schedule](cfg, min(step, cfg.steps - 1)))


# ============================================================================ the algorithm
def group_advantages(
    rewards: Tensor, *, normalize_std: bool = False, count: int | None = None
) -> Tensor:
    """Eq. 4 over the mixed group: (P, G) rewards -> (P, G) advantages r - mean(r).

    normalize_std divides by the standard deviation (+ 1e-6), as GRPO and the paper's Eq. 4 do;
    the paper's experiments (Dr. GRPO) do not. count: statistics over the first `count` columns.
    """
    group = rewards[:, :count]
    advantages = rewards - group.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (group.std(dim=1, keepdim=True) + 1e-6)
    return advantages


# Who learns: (P, G) right or wrong, number of rollouts -> (P, G) bool. The others count in Z alone.
ROUTES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda right, rollouts: torch.ones_like(right, dtype=torch.bool)
} | rivals.ROUTES

# From group_advantages' and more -> advantages of own tokens, of trace tokens: see rivals.
ADVANTAGES = {"group": lambda group, *_: (group, group)} | rivals.ADVANTAGES


def shape(x: Tensor, gamma: float) -> Tensor:
    """Policy shaping f(x) = x / (x + γ). Its slope x f'(x) is γ / (x + γ)² times that of x."""
    return x / (x + gamma)


class Shaping(NamedTuple):
    """What a trace token's advantage is multiplied by."""

    f: Callable[[Tensor, float, Tensor], Tensor]  # of log x = log π_θ - log π_φ, γ, detached π_θ
    is_sft: bool = False  # normalised as the SFT loss is: a mean over the trace tokens
    log_pi_phi: Callable[[Tensor], Tensor] | None = None  # of log π_old; None: LOG_PI_PHI


SHAPINGS = {
    "luffy": Shaping(lambda log_x, gamma, pi: shape(log_x.exp(), gamma)),  # Eq. 6
    "none": Shaping(lambda log_x, gamma, pi: log_x.exp()),  # Eq. 5
    "log": Shaping(lambda log_x, gamma, pi: log_x, is_sft=True),  # with A = 1: minus the SFT loss
} | {name: Shaping(**row) for name, row in rivals.SHAPINGS.items()}
LOG_PI_PHI = 0.0  # of a trace token, but for data with trace_logps: the paper sets π_φ := 1


def token_factors(
    logp: Tensor,
    logp_behavior: Tensor,
    off_policy: Tensor,
    shaping: str,
    gamma: float,
    shape_rollouts: bool,
) -> Tensor:
    """x on rollout tokens, f(x) on trace tokens: what multiplies A in Eq. 6. Tensors (N,).

    shape_rollouts: an ablation of the paper, rollouts with the ratio f(π_θ) / f(π_old).
    """
    log_x = logp - logp_behavior
    x = log_x.exp()
    if shape_rollouts:
        x = shape(logp.exp(), gamma) / shape(logp_behavior.exp(), gamma)
    return torch.where(off_policy, SHAPINGS[shaping].f(log_x, gamma, logp.detach().exp()), x)


def mixed_policy_objective(
    logp: Tensor,
    logp_behavior: Tensor,
    advantage: Tensor,
    off_policy: Tensor,
    *,
    shaping: str = "luffy",
    gamma: float = 0.1,
    clip: float | None = None,
    clip_high: float | None = None,
    shape_rollouts: bool = False,
) -> Tensor:
    """Eq. 6 without its 1/Z: the objective of each token, to be maximised. All tensors (N,).

    logp_behavior is log π_old on rollouts and log π_φ on traces; off_policy (bool) marks the trace
    tokens. Clipping acts on rollout tokens alone, as in Eq. 6. On traces it would change nothing:
    with π_φ = 1 the ratio π_θ is at most 1, and the minimum takes the clamped value only where
    π_θ < 1 - ε and A < 0, which a right trace never has.
    """
    factor = token_factors(logp, logp_behavior, off_policy, shaping, gamma, shape_rollouts)
    objective = factor * advantage
    if clip is not None or clip_high is not None:
        low, high = rivals.epsilons(clip, clip_high)
        clipped = torch.min(objective, factor.clamp(1 - low, 1 + high) * advantage)
        objective = torch.where(off_policy, objective, clipped)
    return objective


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "mixed": lambda mixed, tokens, clip, clip_high: mixed
} | rivals.OBJECTIVES


def inverse_z(
    trajectories: float, tokens: float, sft_tokens: float, max_tokens: int, token_mean: bool
) -> tuple[float, float]:
    """1/Z for RL tokens and for SFT tokens, from counts over all ranks in an update.

    Z is trajectories x max_tokens (Dr. GRPO), however long they are; with token_mean it is their
    number of tokens. Either counts a token alike in long and in short responses.
    """
    z = tokens if token_mean else trajectories * max_tokens
    return 1 / max(z, 1), 1 / max(sft_tokens, 1)


# ============================================================================ the loop
def train(cfg: Config, base: str) -> None:
    """The method in one loop. The functions of a step follow in this order; `load` comes last."""
    run = Run(cfg)
    with Grader(cfg.graders, cfg.grade_timeout, cfg.lenient, cfg.reward) as grader:
        tokenizer, problems, watched, held_out, sampler, model = load(cfg, run, base, grader)
        policy, optimizer = learner(model, cfg)
        run.begin(model, tokenizer, problems, held_out, optimizer)

        def look(step: int, due: Due) -> None:
            if due.show:
                run.log_watched(step, watch(policy, watched, at_step(cfg, step)), tokenizer)
            if due.evaluate and held_out:
                sampler.push(model.named_parameters())
                run.log_evaluation(step, evaluate(sampler, held_out, grader, tokenizer, cfg))
                sampler.sleep()

        if run.first_step == 0:
            look(0, run.due(0))
        for step in run.steps():  # from the last checkpoint on
            now = at_step(cfg, step)
            optimizer.set_lr(now.lr)
            batch = batch_at(problems, step, cfg.problems_per_step, cfg.seed)
            with run.clock("sync"):
                if cfg.rollouts:  # SFT has none
                    sampler.push(model.named_parameters())
            with run.clock("sample"):
                trajectories = rollout(sampler, my_share(batch), step, now)
            with run.clock("sync"):
                sampler.sleep()
            with run.clock("score"):
                metrics = score(trajectories, grader, tokenizer, now)
            trajectories = deal(trajectories, batch, cfg.updates_per_step)  # to ranks, by tokens
            with run.clock("update"):
                metrics |= update(policy, optimizer, trajectories, now)
            due = run.due(step + 1)
            run.log_step(step + 1, metrics, trajectories, tokenizer, due.show)
            look(step + 1, due)
            if due.save:
                run.save(step + 1, model, tokenizer)
    report(run.out)


def learner(model: PreTrainedModel, cfg: Config) -> tuple[DDP, ShardedAdamW]:
    """The policy as all ranks train it, and its AdamW."""
    policy = data_parallel(Policy(model, cfg.temperature))
    settings = cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay, 1e-8 / cfg.scale
    return policy, ShardedAdamW(policy.parameters(), *settings, offload=cfg.offload_optimizer)


class VLLMSampler:
    """One vLLM engine in this process, beside the trainer: the weights go to it in memory.

    It samples between `push` and `sleep`. On a GPU its weights and its cache are gone otherwise,
    so that the trainer has the memory.
    """

    def __init__(
        self, path: str, config: PretrainedConfig, ends: list, longest: int, cache: int, tp: int = 1
    ):
        """On all ranks together, after the process group and before the trainer takes memory.

        ends: tokens that end a response; longest: tokens of a prompt and its response; cache: bytes
        of keys and values, on each GPU; tp: consecutive ranks that share an engine.
        """
        self.ends, self.frees_memory, self.awake = ends, torch.cuda.is_available(), True
        with samplers.vllm_environment() as LLM:
            self.llm = LLM(
                path,
                load_format="dummy",  # the weights come by `push`
                max_model_len=longest,
                kv_cache_memory_bytes=cache,
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                tensor_parallel_size=tp,
                **samplers.vllm_options(config, longest),
            )
        self.ranks = samplers.engine_ranks() if tp > 1 else None  # those that share this engine
        self.sleep()

    def push(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Wake up, and sample from these parameters from now on."""
        weights = [(name, p.detach()) for name, p in named_parameters]
        if self.frees_memory:  # wake and fill the weights before the cache takes its memory
            torch.cuda.empty_cache()  # what the trainer's allocator holds but does not use
            self.llm.wake_up(tags=["weights"])
        self.llm.apply_model(lambda model: model.load_weights(weights) and None)
        if self.frees_memory:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():  # it holds keys and values of other weights
            raise RuntimeError("vLLM still holds keys and values of old weights")
        self.awake = True

    def generate(
        self, prompts: list, n: int, *, seeds: list[int], temperature: float, max_tokens: int
    ) -> list[list[Sample]]:
        """n samples for each prompt (token ids): see Sampler.generate."""
        from vllm import SamplingParams

        jobs, first = samplers.jobs_of_engine(list(zip(prompts, seeds)), self.ranks)
        if n == 0 or not jobs:
            return [[] for _ in prompts]
        samplers.check_awake(self.awake)
        options = dict(temperature=temperature, max_tokens=max_tokens, stop_token_ids=self.ends)
        options |= dict(n=n if temperature else 1, logprobs=0, flat_logprobs=True, detokenize=False)
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt, _ in jobs],
            [SamplingParams(seed=seed, **options) for _, seed in jobs],
            use_tqdm=partial(tqdm, leave=False) if rank() == 0 else False,
        )
        mine = [samplers.to_samples(o, self.ends) for o in outputs[first : first + len(prompts)]]
        return [(samples * n)[:n] for samples in mine]  # a greedy response was asked for once

    def sleep(self) -> None:
        """Leave the memory to the trainer. `generate` then needs another `push`."""
        if self.frees_memory and self.awake:
            self.llm.sleep(level=2)
        self.awake = False


def rollout(
    sampler: Sampler, batch: dict[int, Problem], step: int, cfg: Config
) -> list[Trajectory]:
    """The groups of problems, by their position: the policy's rollouts, then the trace.

    A trace never goes through the sampler, and the policy does not see it while it rolls out.
    """
    prompts = [problem.prompt_ids for problem in batch.values()]
    seeds = [seed_of(cfg.seed, step, i) for i in batch]
    how: Any = dict(temperature=cfg.temperature, max_tokens=cfg.max_response_tokens)
    groups = sampler.generate(prompts, cfg.rollouts - cfg.continuations, seeds=seeds, **how)
    # No more, but for some rivals; with --untraced rollout: one in place of a missing trace.
    continued = continue_prefixes(sampler, batch, step, cfg)
    trajectories = []
    for (i, problem), group in zip(batch.items(), groups):
        trajectories += [Trajectory.sampled(i, problem, sample) for sample in group] + continued[i]
        if cfg.traces and problem.trace_ids:
            trajectories.append(Trajectory.of_trace(i, problem))
    return trajectories


def grade(trajectories: list[Trajectory], grader: Grader, tokenizer: Tokenizer) -> None:
    """Eq. 1: the verdict and the reward of each trajectory that has none yet."""
    new = [t for t in trajectories if isnan(t.right)]
    rollouts = [t for t in new if not t.off_policy]
    texts = [t.problem.opened + text_of(t.response, tokenizer) for t in rollouts]
    jobs = [(text, t.problem.answer) for text, t in zip(texts, rollouts)]
    # Rule-based: the reward is 1 if right, else 0, unless --reward says otherwise.
    for t, (right, reward) in zip(rollouts, grader.right_and_reward(jobs)):
        t.right, t.reward = right, reward  # 0 where the grader failed
    for t in new:
        if t.off_policy:  # graded once, by load_training_set
            t.right, t.reward = t.problem.trace_right, t.problem.trace_reward


def score(
    trajectories: list[Trajectory], grader: Grader, tokenizer: Tokenizer, cfg: Config
) -> dict[str, float]:
    """Rewards, advantages, and who learns; -> metrics."""
    failed_before = grader.failures.copy()
    grade(trajectories, grader, tokenizer)
    set_advantages(trajectories, cfg)
    failures = failure_metrics(grader.failures - failed_before)
    return failures | trajectory_metrics(trajectories, cfg.rollouts)


def set_advantages(trajectories: list[Trajectory], cfg: Config) -> None:
    """Eq. 4, and who learns: this rank's groups, each with all of its trajectories in a row."""
    rows = -1, cfg.rollouts + cfg.traces  # (P, G): of all ranks, for some rules see the batch
    everyones = gather([(t.reward, t.right, len(t.response)) for t in trajectories])
    rewards, right, lengths = torch.tensor(sum(everyones, [])).T.reshape(3, *rows)
    count = cfg.rollouts if cfg.baseline == "rollouts" else None
    group = group_advantages(rewards, normalize_std=cfg.normalize_std, count=count)
    known = [x[:, :count] for x in (group, rewards, lengths)]
    found = ADVANTAGES[cfg.advantage](*known, cfg.rollouts - cfg.continuations, cfg.rollouts)
    own, of_trace = (torch.cat([x, group[:, x.shape[1] :]], dim=1) for x in found)
    if cfg.trace_advantage is not None:
        of_trace = torch.full_like(group, cfg.trace_advantage)
    learns = ROUTES[cfg.route](right, cfg.rollouts).expand_as(right)
    for i, t in enumerate(trajectories, sum(map(len, everyones[: rank()]))):
        t.learns = bool(learns.reshape(-1)[i])
        t.advantage = t.by_token(own.reshape(-1)[i].item(), of_trace.reshape(-1)[i].item())


def update(
    policy: DDP, optimizer: ShardedAdamW, trajectories: list[Trajectory], cfg: Config
) -> dict[str, float]:
    """`updates_per_step` updates by AdamW, each on its share of the problems; -> metrics."""
    # scale: a factor on the loss is its inverse on the clip here, and on AdamW's eps in `train`.
    n, max_norm = cfg.updates_per_step, cfg.max_grad_norm / cfg.scale
    share = cfg.problems_per_step // n  # problems of an update
    mini_batches = [[t for t in trajectories if t.position // share == i] for i in range(n)]
    record_old_logprobs(policy, mini_batches, cfg)
    means, norms = Means(), []
    with progress("update", sum(len(t.response) for t in trajectories)) as bar:
        for mini_batch in mini_batches:
            keep_uncertain(mini_batch, cfg.prefix_learns)
            set_normaliser(mini_batch, cfg)
            add_up_gradients(policy, mini_batch, cfg, means, bar)
            # Without any advantage only the entropy bonus is left. Adam normalises even a tiny
            # gradient, so that an update of full size would come of it.
            if all_reduce(any(t.signal for t in mini_batch)):
                norms.append(optimizer.step(max_norm))
            optimizer.zero_grad()
    means.add("grad_norm", norms)  # the same on every rank, before the clip
    means.add("clipped", [norm > max_norm for norm in norms])
    return {"grad_norm": 0.0} | means.reduce() | {"skipped_updates": n - len(norms)}


def record_old_logprobs(policy: DDP, mini_batches: list[list[Trajectory]], cfg: Config) -> None:
    """log π_old of rollouts that are trained on later in the step, when the policy has moved.

    In a step's first mini-batch π_old is the policy itself, and needs no pass of its own. The
    trainer computes it, for the sampler's numerics differ. Traces need none: π_φ := 1, unless their
    shaping asks for it. Of prefixes that learn in part it records the entropies, too, and at once.
    """
    needs_old = SHAPINGS[cfg.shaping].log_pi_phi is not None
    later = [t for t in sum(mini_batches[1:], []) if not t.off_policy or needs_old]
    first = [t for t in mini_batches[0] if t.prefix and cfg.prefix_learns < 1]
    for micro_batch in pack([t for t in first + later if t.logp_old is None], cfg.token_budget):
        with torch.no_grad():
            logp, entropy = policy.module(micro_batch)
        micro_batch.give(logp_old=logp, entropy_old=entropy)


def set_normaliser(mini_batch: list[Trajectory], cfg: Config) -> None:
    """inv_z of each trajectory: coefficient / Z, or 0 if it does not learn; and entropy's c / Z.

    It is fixed before the first backward pass, so that micro-batches and ranks just add up. What a
    route leaves out counts in RL's Z, and so makes the others no heavier; SFT's Z is without it.
    """
    is_sft = SHAPINGS[cfg.shaping].is_sft
    of_rl = [len(t.response) - t.trace_tokens * is_sft for t in mini_batch]  # tokens
    of_traces = sum(t.trace_tokens for t in mini_batch if t.learns)
    count, tokens, sft_tokens = map(all_reduce, (sum(map(bool, of_rl)), sum(of_rl), of_traces))
    longest = 1 if cfg.sequence_mean else cfg.max_response_tokens
    inv_z, sft_inv_z = inverse_z(count, tokens, sft_tokens, longest, cfg.token_mean)
    sft = cfg.sft_coef * sft_inv_z
    for t, length in zip(mini_batch, of_rl):
        own = inv_z / max(length, 1) if cfg.sequence_mean else inv_z
        rl, bonus = cfg.rl_coef * own, cfg.entropy_coef * (own if tokens else sft_inv_z)
        t.inv_z, t.bonus = t.learns * t.by_token(rl, sft if is_sft else rl), t.learns * bonus
        t.sft_ratio = sft / rl if cfg.objective in rivals.WITH_SFT else 0.0


def add_up_gradients(
    policy: DDP, mini_batch: list[Trajectory], cfg: Config, means: Means, bar: tqdm
) -> None:
    """The gradient of one update, micro-batch by micro-batch; the ranks all-reduce it once."""
    # Apart, so that what has none is spared the backward pass; the metrics need it, too.
    micro_batches = pack([t for t in mini_batch if not t.has_gradient], cfg.token_budget)
    micro_batches += pack([t for t in mini_batch if t.has_gradient], cfg.token_budget)
    for micro_batch in micro_batches:
        last = micro_batch is micro_batches[-1]  # with a backward pass on every rank: they meet
        backward = last or micro_batch.trajectories[0].has_gradient
        # Without a backward pass DDP is bypassed: its forward may start a collective that the
        # other ranks do not make.
        forward = policy if backward else policy.module
        with nullcontext() if last else policy.no_sync():
            with torch.set_grad_enabled(backward):
                logp, entropy = forward(micro_batch)  # (N,), (N,)
            loss = token_loss(logp, entropy, micro_batch, cfg, means)
            if backward:
                (loss * world_size()).backward()  # DDP averages over ranks; 1/Z is global
        bar.update(len(logp))


def token_loss(
    logp: Tensor, entropy: Tensor, micro_batch: MicroBatch, cfg: Config, means: Means
) -> Tensor:
    """A micro-batch's part of -J, from log π_θ and entropies (N,); records its tokens."""
    off_policy, rivals_pi_phi = micro_batch.off_policy, SHAPINGS[cfg.shaping].log_pi_phi
    # π_old: in a step's first update it is the policy itself
    logp_old = torch.where(micro_batch.logp_old.isnan(), logp.detach(), micro_batch.logp_old)
    logp_behavior = torch.where(off_policy, micro_batch.logp_phi.nan_to_num(LOG_PI_PHI), logp_old)
    if rivals_pi_phi:
        logp_behavior = torch.where(off_policy, rivals_pi_phi(logp_old), logp_old)
    tokens = logp.requires_grad_(), logp_behavior, micro_batch.advantage, off_policy
    how: Any = {name: getattr(cfg, name) for name in ("shaping", "gamma", "shape_rollouts")}
    clip, clip_high = cfg.clip, cfg.clip_high
    objective = mixed_policy_objective(*tokens, clip=clip, clip_high=clip_high, **how)
    more = entropy.detach(), micro_batch.segment, micro_batch.sft_ratio
    objective = OBJECTIVES[cfg.objective](objective, Tokens(*tokens, *more), clip, clip_high)
    if cfg.tis_cap is not None:  # π_old is not quite what the sampler sampled from
        tis = (logp_old - micro_batch.logp_sampler).exp().clamp(max=cfg.tis_cap)
        objective = torch.where(off_policy, objective, tis * objective)
    loss = -(micro_batch.inv_z * objective + micro_batch.bonus * entropy).sum()
    # What report.html shows of a token is recorded here; its slope is of this very objective.
    factor = token_factors(logp.detach(), logp_behavior, off_policy, **how)
    (slope,) = torch.autograd.grad(objective.sum(), logp, retain_graph=True)
    micro_batch.give(logp=logp, logp_behavior=logp_behavior, factor=factor, slope=slope)
    add_token_metrics(means, micro_batch, logp.detach(), logp_old, entropy.detach(), factor, slope)
    return loss


def watch(policy: DDP, traces: list[Trajectory], cfg: Config) -> list[Trajectory]:
    """Record what the policy makes of some traces, as `update` would, but SRFT's SFT; -> them."""
    for micro_batch in pack(traces, cfg.token_budget):
        with torch.no_grad():
            logp, entropy = policy.module(micro_batch)
        token_loss(logp, entropy, micro_batch, cfg, Means())
    return traces


# ============================================================================ that was the method
def load(
    cfg: Config, run: Run, base: str, grader: Grader
) -> tuple[Tokenizer, list[Problem], list[Trajectory], list[Problem], Sampler, PreTrainedModel]:
    """-> tokenizer, problems, the first groups' traces, problems to evaluate on, sampler, model."""
    path = str(run.checkpoint or base)
    tokenizer, config = load_tokenizer(path), load_config(path)
    prompt, longest = cfg.max_prompt_tokens, plan.longest(cfg)
    fit_context(config, prompt, longest - prompt)
    problems = load_training_set(cfg, tokenizer, grader, run.out / "trace_rewards.json")
    held_out = load_benchmarks(cfg.eval_data, tokenizer, prompt)
    kind, ends = samplers.sampler_kind(cfg.sampler, cfg.samples), end_ids(path, tokenizer)
    say(f"sampler     {kind}")
    sampler: Sampler = NoSampler()
    if kind == "vllm":
        cache = plan.cache_bytes(cfg, config, world_size())
        sampler = VLLMSampler(path, config, ends, longest, cache, cfg.tensor_parallel)
    # The trainer's model comes after vLLM, which looks at what the GPU has free.
    model = load_model(path, config, cfg.checkpointing)
    if kind == "torch":
        sampler = TorchSampler(path, config, ends, of=model)
    first = batch_at(problems, 0, cfg.problems_per_step, cfg.seed)[: cfg.sample_groups]
    watched = [Trajectory.of_trace(i, p, 1.0) for i, p in enumerate(first) if p.trace_ids]
    return tokenizer, problems, watched, held_out, sampler, model


def parse_args(argv: list[str] | None = None, algo: str = "luffy") -> Config:
    """Config's defaults, then the row of --algo, then the model's own recipe, then flags."""
    given = {"algo": algo} | flags.parse(Config, argv, (__doc__ or "").split("\n")[0])
    algo, model = given["algo"], given.get("model", "toy")
    cfg = flags.make(Config, ALGORITHMS.get(algo, {}), recipe(model), given)
    return replace(cfg, out=cfg.out or flags.directory(cfg.model, algo, cfg.seed))


def check(cfg: Config, ranks: int) -> None:
    """InputErrors on what cannot run, before anything is loaded."""
    tables: Any = dict(algo=ALGORITHMS, shaping=SHAPINGS, route=ROUTES, schedule=SCHEDULES)
    tables |= dict(advantage=ADVANTAGES, objective=OBJECTIVES, prefix=rivals.PREFIXES)
    flags.check(cfg, ranks, tables, (at_step(cfg, step) for step in range(cfg.steps)))
    Grader(1, cfg.grade_timeout, reward=cfg.reward).close()  # is there such a function?


def main(algo: str = "luffy", **replaced: Any) -> None:
    """algo: the row that is trained by default. replaced: functions of a fork, by their names."""
    globals().update(replaced)
    cfg = parse_args(algo=algo)
    if cfg.dry_run:
        return plan.show(cfg, partial(check, cfg), flags.differences(cfg, Config()))
    init_processes(cfg.device)
    check(cfg, world_size())
    say_and_go_on(flags.title(cfg, parse_args, SHAPINGS[cfg.shaping]))
    proof = partial(preflight.run, Grader, load, learner, rollout, update)
    (proof if cfg.preflight else train)(cfg, find(cfg.model, cfg.device))


if __name__ == "__main__":
    launch(main)
