"""What a run will do and need, before it starts: batch sizes, tokens and memory of each GPU.

The memory of an update is not a formula: the trainer's own Policy runs forward and backward on fake
tensors, which have sizes but no data, while every allocation is counted.
"""

import json
import os
import re
import weakref
from collections.abc import Callable
from math import ceil
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from machinery.batches import Packing
from machinery.checkpoints import number_saved
from machinery.flags import Config
from machinery.kinds import PretrainedConfig
from machinery.model import FITS_A_LAPTOP, Policy, fit_context, full_name, on_paper
from machinery.model import parameter_sizes, shape_of
from machinery.processes import InputError, gather, say
from machinery.samplers import TORCH_ROWS

GIB = 2**30
RESERVE = 6 * GIB  # assumed: CUDA, NCCL, vLLM's graphs, fragmentation
ENGINE = 4 * GIB  # assumed: vLLM's buffers for MAX_PREFILL tokens and MAX_SEQUENCES responses
CARD = 0.985  # of the GiB that it is named for are there: 79.2 on an A100, 23.6 on an RTX 4090
ADVICE = "A smaller --token_budget has fewer activations"
OF_STATE = "More GPUs share the optimizer's state, --offload_optimizer true keeps it on the host. "
MEAN_TOKENS = dict(prompt=200, rollout=2200, trace=4200)  # the paper's run, by arXiv:2604.23747


# ------------------------------------------------------------------ memory
class AllocationCounter(TorchDispatchMode):
    """Bytes of the tensors that operations make: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return out

    def count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def activation_bytes(config, dtype: torch.dtype, checkpointing: bool, lengths: list[int]) -> int:
    """The most that a micro-batch of these trajectories adds to weights and gradients.

    It takes seconds, so what was counted once is kept: before and after `fit_context`, too.
    """
    shape = {k: v for k, v in config.to_diff_dict().items() if k not in OF_CONTEXT}
    key = json.dumps(shape, sort_keys=True, default=str), dtype, checkpointing, *lengths
    if key not in COUNTED:
        COUNTED[key] = count_activations(config, dtype, checkpointing, lengths)
    return COUNTED[key]


COUNTED: dict[tuple, int] = {}
OF_CONTEXT = "max_position_embeddings", "rope_parameters"


def count_activations(config, dtype: torch.dtype, checkpointing: bool, lengths: list[int]) -> int:
    tokens = sum(lengths)
    with FakeTensorMode():
        try:
            policy = Policy(on_paper(config, dtype).train(), temperature=1.0)
        except KeyError as error:  # an attention that is not to be had in packed rows
            raise no_plan(config) from error
        if policy.model._is_stateful:  # its state would run on through a packed row
            raise no_plan(config)
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = SimpleNamespace(
            input_ids=torch.zeros(1, tokens, dtype=torch.long),
            packing=Packing(lengths, lengths, torch.arange(tokens), *2 * [torch.empty(0)]),
            position_ids=torch.zeros(1, tokens, dtype=torch.long),
            response_index=torch.arange(1, tokens),
            before=torch.arange(tokens - 1),
        )  # as if there were no prompts, and keys gathered as if there were
        for p in policy.parameters():
            p.grad = torch.zeros_like(p)
        with AllocationCounter() as counter:
            for p in policy.parameters():
                counter.count(p.untyped_storage())
                counter.count(p.grad.untyped_storage())
            before = counter.now
            try:
                logp, entropy = policy(batch)
            except (NotImplementedError, TypeError) as error:
                raise no_plan(config) from error
            (logp + entropy).sum().backward()
    return counter.peak - before


def cache_bytes_per_token(cfg: Config, config: PretrainedConfig, size: int) -> int:
    """Keys and values of one token on one GPU."""
    config = config.get_text_config()
    if not (heads := attention_heads(config)):
        return 0  # a state-space model
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = ceil((getattr(config, "num_key_value_heads", None) or heads) / cfg.tensor_parallel)
    return 2 * config.num_hidden_layers * heads * width * size


def no_plan(config: PretrainedConfig) -> InputError:
    return InputError(
        f"no plan of the memory of a {config.model_type}, which is trained one trajectory at a "
        "time. Try it without --dry_run, with --cache_gib N for vLLM's keys and values"
    )


def attention_heads(config: PretrainedConfig) -> int:
    return getattr(config.get_text_config(), "num_attention_heads", None) or 0


def memory(
    cfg: Config, config: PretrainedConfig, ranks: int, capacity: int | None
) -> list[tuple[str, str, int]]:
    """(phase, purpose, bytes) on each GPU of `capacity` bytes; None: on a CPU, in float32.

    The last row is the sampler's keys and values: below 0, what is missing before there are any.
    Raises InputError if vLLM could not share out the model's heads.
    """
    if attention_heads(config) % cfg.tensor_parallel:
        raise InputError(
            f"--tensor_parallel {cfg.tensor_parallel}: the model's "
            f"{attention_heads(config)} attention heads cannot be divided by it"
        )
    on_gpu = capacity is not None
    sizes, dtype = parameter_sizes(config), torch.bfloat16 if on_gpu else torch.float32
    weights = dtype.itemsize * sum(sizes)
    share = max(sum(sizes) / ranks, max(sizes))  # ShardedAdamW does not cut tensors
    row = longest_row(cfg, ranks)
    masters, offload = on_gpu or cfg.offload_optimizer, on_gpu and cfg.offload_optimizer
    state = f"{'float32 masters and ' if masters else ''}Adam's state, 1/{ranks} of it"
    moments_size = 0 if offload else round(share * 8)  # else they are in the host's memory
    state_size = 0 if offload else round(share * (12 if masters else 8))
    activations = activation_bytes(config, dtype, cfg.checkpointing, row)
    table = [
        ("always", "weights", weights),
        ("always", "gradients", weights),
        ("always", state, state_size),
        ("always", "reserve (assumed)", RESERVE if on_gpu else 0),
        ("updating", f"activations of {sum(row):,} tokens", activations),
    ]
    if more := getattr(cfg, "more_memory", None):  # what a fork's Config says that it adds
        table += more(weights, state_size, moments_size)
    rollouts = sampled(cfg, ranks)
    response = longest(cfg) * cache_bytes_per_token(cfg, config, dtype.itemsize)
    if not cfg.samples:
        return [*table, ("sampling", "keys and values", 0)]
    if cfg.sampler == "torch" or not on_gpu:
        return [*table, ("sampling", "keys and values", min(rollouts, TORCH_ROWS) * response)]
    table += [
        ("sampling", "vLLM's weights", weights // cfg.tensor_parallel),
        ("sampling", "vLLM's prefill and sampler (assumed)", ENGINE),
    ]
    left = capacity - total(table, "sampling")
    cached = round(cfg.cache_gib * GIB) or min(left, max(rollouts, 1) * 2 * response)
    return [*table, ("sampling", "keys and values", cached)]


def verdict(
    table: list[tuple[str, str, int]], cfg: Config, config: PretrainedConfig, capacity: int
) -> str:
    """ "" if a run fits into GPUs of `capacity` bytes, else why not."""
    sizes = {phase: total(table, phase) for phase in ("updating", "sampling")}
    response = longest(cfg) * cache_bytes_per_token(cfg, config, 2)
    missing = response - table[-1][-1] if cfg.samples and cfg.sampler != "torch" else 0
    problems = [
        f"{phase} takes {size / GIB:.1f} GiB, {(size - capacity) / GIB:.1f} too many"
        for phase, size in sizes.items()
        if size > capacity
    ]
    if missing > 0 and sizes["sampling"] <= capacity:
        problems += [f"vLLM's keys and values lack {missing / GIB:.1f} GiB for one response"]
    return "; ".join(problems)


def advice(cfg: Config) -> str:
    return ADVICE if cfg.offload_optimizer else OF_STATE + ADVICE


def cache_bytes(cfg: Config, config: PretrainedConfig, ranks: int) -> int:
    """For VLLMSampler: --cache_gib, or else what the plan has. InputError if that does not fit."""
    if cfg.cache_gib or not torch.cuda.is_available():
        return round((cfg.cache_gib or 0.25) * GIB)
    capacity = free_memory()
    table = memory(cfg, config, ranks, capacity)
    if problem := verdict(table, cfg, config, capacity):
        raise InputError(
            f"does not fit in the {capacity / GIB:.1f} GiB that are free: {problem}, as --dry_run "
            f"shows. {advice(cfg)}. --cache_gib N for keys and values tries it all the same"
        )
    return table[-1][-1]


def evaluation_cache_bytes(config: PretrainedConfig) -> int:
    """For VLLMSampler without a trainer: what the weights leave, vLLM's and the ones it gets."""
    if not torch.cuda.is_available():
        return GIB // 4
    capacity, needed = free_memory(), 2 * 2 * sum(parameter_sizes(config)) + RESERVE + ENGINE
    if capacity <= needed:  # the weights are in bfloat16
        raise InputError(
            f"does not fit in the {capacity / GIB:.1f} GiB that are free: without any keys and "
            f"values vLLM and the weights take {needed / GIB:.1f}. Free the GPU or use a larger one"
        )
    return capacity - needed


def free_memory() -> int:
    """Bytes that nobody holds on the fullest of the ranks' GPUs: those of an engine must agree."""
    return min(gather(torch.cuda.mem_get_info()[0]))


# ------------------------------------------------------------------ batches
def longest(cfg: Config) -> int:
    """Tokens of a prompt and its response or trace."""
    return cfg.max_prompt_tokens + max(cfg.max_response_tokens, cfg.max_trace_tokens)


def sampled(cfg: Config, ranks: int) -> int:
    """Rollouts of a rank in a step."""
    return cfg.problems_per_step // ranks * cfg.rollouts


def trained(cfg: Config, ranks: int, prompt: float = 0, response: float = 0) -> tuple:
    """Of a rank in an update: trajectories, tokens, micro-batches. 0: as long as can be."""
    prompt = prompt or cfg.max_prompt_tokens
    response = response or longest(cfg) - cfg.max_prompt_tokens
    problems = cfg.problems_per_step // cfg.updates_per_step // ranks
    group = cfg.rollouts + cfg.traces
    tokens = prompt + group * response  # of a group, which has its prompt once
    if together := cfg.token_budget // tokens:
        rows = ceil(problems / together)
    else:  # in parts, each of some responses and the prompt
        rows = problems * ceil(group / max(1, (cfg.token_budget - prompt) // response))
    return problems * group, problems * tokens, rows


def longest_row(cfg: Config, ranks: int) -> list[int]:
    """Lengths of trajectories that fill the largest micro-batch, if none shared its prompt."""
    tokens = max(longest(cfg), min(cfg.token_budget, int(trained(cfg, ranks)[1])))
    whole, rest = divmod(tokens, longest(cfg))
    return [longest(cfg)] * whole + [rest] * (rest > 0)


# ------------------------------------------------------------------ the plan
def machine(text: str, parameters: int) -> tuple[int, int | None]:
    """--dry_run's machine as (processes, bytes of each GPU; None for a CPU)."""
    if text != "this":
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if not match:
            raise InputError(f"--dry_run {text}: expected GPUSxGIB, such as 8x80")
        return int(match[1]), round(int(match[2]) * CARD * GIB)
    ranks = int(os.environ.get("WORLD_SIZE", 0))  # under torchrun
    if torch.cuda.is_available():
        return ranks or torch.cuda.device_count(), free_memory()
    if parameters < FITS_A_LAPTOP:  # then the plan is for this machine's CPU
        return ranks or 1, None
    return ranks or 8, round(80 * CARD * GIB)  # the paper's machine


def show(cfg: Config, check: Callable[[int], None], differences: str) -> None:
    """Print the plan of a run, once. Raises InputError as the run itself would.

    check: a number of ranks -> InputError if the config cannot run on them.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    config = shape_of(cfg.model)
    sizes = parameter_sizes(config)
    parameters = sum(sizes)
    ranks, capacity = machine(cfg.dry_run, parameters)
    check(ranks)
    fit_context(config, cfg.max_prompt_tokens, longest(cfg) - cfg.max_prompt_tokens)
    is_here = cfg.dry_run == "this" and torch.cuda.is_available()
    what = "that are free" if is_here else f"({CARD:.1%} of a card's name)"
    gpu = f"{(capacity or 0) / GIB:.1f} GiB {what}, bfloat16"
    say(f"recipe      LUFFY's{differences}")
    say(f"model       {full_name(cfg.model)}, {parameters:,} parameters")
    say(f"machine     {ranks} x {'CPU, float32' if capacity is None else gpu}")
    show_batches(cfg, ranks)
    unit, name, size = (2**20, "process, MiB", 4) if capacity is None else (GIB, "GPU, GiB", 2)
    if capacity is not None:
        saved = number_saved(cfg)
        needed = size * parameters, 12 * parameters, 12 * max(sizes)
        weights, state, copies = (x / GIB for x in needed)
        twice = f"{state:.1f} GiB of optimizer state, twice"
        say(f"disk        {saved} checkpoints of {weights:.1f} GiB, and {twice}")
        say(f"host        {weights:.1f} GiB for each GPU while the model is loaded")
        if cfg.offload_optimizer:
            of_all = f"{state:.1f} GiB for masters and Adam's state of all GPUs"
            say(f"            {of_all}, up to {copies:.1f} for the copies of each")
    table = memory(cfg, config, ranks, capacity)
    say(f"memory      of each {name}")
    show_memory(table, unit)
    response = longest(cfg) * cache_bytes_per_token(cfg, config, size)
    fit, missing = table[-1][-1] / response, (response - table[-1][-1]) / GIB
    lacking = f"not one response fits in: {missing:.1f} GiB are missing"
    some = f"{fit:.1f} of the longest responses fit in at once"
    say(f"            {lacking if cfg.samples and fit < 1 else some}")
    if capacity is not None:
        problem = verdict(table, cfg, config, capacity)
        reason = f": {problem}. {advice(cfg)}" if problem else ""
        fits = "DOES NOT FIT" if problem else "fits"
        say(f"verdict     {fits} in {capacity / GIB:.1f} GiB{reason}")


def show_batches(cfg: Config, ranks: int) -> None:
    group, rollouts = cfg.rollouts + cfg.traces, sampled(cfg, ranks)
    share, most, micro_batches = trained(cfg, ranks)
    say(
        f"step        {cfg.problems_per_step} problems x ({cfg.rollouts} rollouts + {cfg.traces} "
        f"trace) = {cfg.problems_per_step * group:,} trajectories, {cfg.updates_per_step} updates"
    )
    longest_ones = f"at most {rollouts * cfg.max_response_tokens:,} tokens"
    say(f"each rank   samples {rollouts} rollouts a step: {longest_ones}")
    rows = f"at most {most:,} tokens in {micro_batches} micro-batches"
    say(f"            trains on {share} trajectories an update: {rows}")
    if cfg.max_response_tokens > MEAN_TOKENS["rollout"]:
        (tokens_sampled, tokens, rows), mean = expected(cfg, ranks), mean_tokens(cfg)
        say(
            f"            expected: {tokens_sampled:,} sampled; {tokens:,.0f} trained "
            f"on, in {rows} micro-batches\n            (rollouts of "
            f"{mean['rollout']:,} and traces of {mean['trace']:,} tokens, arXiv:2604.23747)"
        )


def mean_tokens(cfg: Config) -> dict[str, int]:
    """Of a prompt, a rollout, a trace: the paper's run's, where this run has room for them."""
    room = dict(prompt=cfg.max_prompt_tokens, rollout=cfg.max_response_tokens)
    room["trace"] = cfg.max_trace_tokens or cfg.max_response_tokens
    return {name: min(mean, room[name]) for name, mean in MEAN_TOKENS.items()}


def expected(cfg: Config, ranks: int) -> tuple[int, float, int]:
    """By those means: tokens that a rank samples in a step, trains on in an update; its rows."""
    mean, group = mean_tokens(cfg), cfg.rollouts + cfg.traces
    response = (cfg.rollouts * mean["rollout"] + cfg.traces * mean["trace"]) / group
    return sampled(cfg, ranks) * mean["rollout"], *trained(cfg, ranks, mean["prompt"], response)[1:]


def show_memory(table: list[tuple[str, str, int]], unit: int) -> None:
    for phase in ("always", "updating", "sampling"):
        for when, purpose, size in table:
            if when == phase and size:
                purpose += ": missing" * (size < 0)
                say(f"  {phase:10}{purpose:44}{abs(size) / unit:7.1f}")
    for phase in ("updating", "sampling"):
        say(f"  {'in all':10}{phase:44}{total(table, phase) / unit:7.1f}")


def total(table: list[tuple[str, str, int]], phase: str) -> int:
    return sum(max(0, size) for when, _, size in table if when in ("always", phase))
