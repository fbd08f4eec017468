"""What samples: the protocol, sampling with transformers alone, what vLLM's engine is started with.

VLLMSampler itself stands in luffy.py. In both samplers the samples for a prompt are a function of
the weights and the prompt's seed: the rest of the batch and the number of ranks matter by rounding
only.
"""

import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from machinery import probe
from machinery.kinds import PretrainedConfig, PreTrainedModel
from machinery.model import from_pretrained
from machinery.processes import InputError, barrier, device, progress, rank, say
from machinery.processes import use_expandable_segments, world_size

TORCH_ROWS = 512  # responses that TorchSampler decodes together
DROP_EVERY = 8  # tokens: dropping finished rows copies the whole cache
BLOCK = 128  # words whose probabilities are summed before they are searched
MAX_SEQUENCES, MAX_PREFILL = 256, 8192  # of a vLLM engine on a GPU: responses, and prompt tokens


@dataclass
class Sample:
    """One sampled response and the log-probs of its tokens under the sampling distribution."""

    tokens: list[int]  # up to and with the token that ends it, if that came in time
    logps: list[float]
    truncated: bool = False  # it did not


class Sampler(Protocol):
    """Samples from what was pushed last (TorchSampler at first from the model that it loaded).

    After `sleep`, `generate` raises RuntimeError.
    """

    def push(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Wake up, and sample from these parameters from now on."""

    def generate(
        self, prompts: list, n: int, *, seeds: list[int], temperature: float, max_tokens: int
    ) -> list[list[Sample]]:
        """n samples for each prompt (token ids), of max_tokens or what the context leaves it.

        Of the batch they depend on their own prompt and seed alone, but for rounding. temperature
        0 is greedy. The log-probs are those of the distribution sampled from.
        """

    def sleep(self) -> None:
        """Leave the memory to the trainer. `generate` then needs another `push`."""


class NoSampler:
    """Of a run that samples nothing: SFT without evaluation."""

    def push(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None: ...

    def generate(self, prompts: list, n: int, **_: Any) -> list[list[Sample]]:
        return [[] for _ in prompts]

    def sleep(self) -> None: ...


def check_awake(awake: bool) -> None:
    if not awake:
        raise RuntimeError("the sampler sleeps: push the policy's weights before generate")


class TorchSampler:
    """Sampling with transformers alone, where there is no vLLM.

    A prompt is prefilled once for its n samples, and rows leave the batch when they are finished.
    """

    def __init__(
        self,
        path: str | Path,
        config: PretrainedConfig,
        ends: Sequence[int],
        max_rows: int = TORCH_ROWS,
        of: PreTrainedModel | None = None,
    ):
        """ends: the tokens that end a response. of: a model of these weights; they are shared."""
        from machinery.caches import new_cache  # slow to import

        self.new_cache = new_cache
        self.model = from_pretrained(path, config=config).eval()
        self.ends, self.max_rows, self.context = [*ends], max_rows, config.max_position_embeddings
        self.awake = self.cached = True  # awake: with the weights that it has loaded itself
        self.check(path)
        if of is not None:  # now, not before the first step: until then there would be a copy more
            self.push(of.named_parameters())

    @torch.no_grad()
    def check(self, path: str | Path) -> None:
        """Use the cache if samples have the log-probs that the model gives their tokens."""
        model, own, ends = self.model, self.model.config._attn_implementation, self.ends
        prompts = [ids[: 20 + 6 * i] for i, ids in enumerate(probe.random_sequences(model))]
        self.ends = list(range(0, model.get_input_embeddings().weight.shape[0], 2))  # rows leave

        def pairs(attention: str) -> Iterator[tuple[Tensor, Tensor]]:
            model.set_attn_implementation(attention)
            groups = TorchSampler.generate(  # not a subclass's
                self, prompts, 4, seeds=[0, 1], temperature=1.0, max_tokens=4
            )
            model.set_attn_implementation(own)
            for ids, sample in ((ids, s) for ids, group in zip(prompts, groups) for s in group):
                logps = torch.tensor(sample.logps, device=device())
                yield logps, probe.own_logps(model, ids + sample.tokens)[len(ids) - 1 :]

        with probe.short_windows(model):
            if problem := probe.differs(model, lambda: pairs("grouped")):
                say(f"sampler     without a cache of keys and values, slowly: {problem}")
                self.cached = False
                problem = probe.differs(model, lambda: pairs(own))
        if problem:
            raise probe.refused(model, path, problem)
        model.set_attn_implementation("grouped" if self.cached else own)
        self.ends = ends

    def push(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """As Sampler.push. The parameters are shared, not copied: there is no memory to leave."""
        own = dict(self.model.named_parameters())
        for name, parameter in named_parameters:
            own[name].data = parameter.data
        self.awake = True

    def sleep(self) -> None:
        self.awake = False

    def generate(
        self, prompts: list, n: int, *, seeds: list[int], temperature: float, max_tokens: int
    ) -> list[list[Sample]]:
        groups: list[list[Sample]] = [[] for _ in prompts]
        if prompts and n:
            check_awake(self.awake)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.max_rows // max(1, n)) if self.cached else 1  # prompt: no padding
        with progress("sample", n * len(prompts)) as bar:
            for i in range(0, len(prompts) if n else 0, size):
                some = by_length[i : i + size]
                asked, their_seeds = [prompts[j] for j in some], [seeds[j] for j in some]
                samples = self.decode(asked, n, their_seeds, temperature, max_tokens, bar)
                for k, j in enumerate(some):
                    groups[j] = samples[k * n : (k + 1) * n]
        return groups

    @torch.inference_mode()
    def decode(self, prompts, n, seeds, temperature, max_tokens, bar) -> list[Sample]:
        width = max(map(len, prompts))
        ids = torch.tensor([self.ends[:1] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ids, mask = ids.to(device()), mask.to(device())  # (P, width)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        uniform = [torch.rand(n, max_tokens, generator=g) for g in generators]
        uniform = torch.cat(uniform).to(device())  # (B, max_tokens), B = n x prompts
        cache = self.new_cache(self.model) if self.cached else NoCache(ids[:, :0])
        logits = self.logits(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        cache.batch_repeat_interleave(n)
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        live = torch.arange(len(uniform), device=device())  # the rows that are not finished
        samples = [Sample([], [], truncated=True) for _ in uniform]
        room = [min(max_tokens, self.context - len(p)) for p in prompts for _ in range(n)]
        for t in range(max_tokens):
            token, logp = draw(logits, uniform[live, t], temperature)  # (live,), (live,)
            here = [samples[row] for row in live.tolist()]
            for sample, x, lp in zip(here, token.tolist(), logp.tolist()):
                if sample.truncated:  # else it is finished, but not dropped yet
                    sample.tokens.append(x)
                    sample.logps.append(lp)
                    sample.truncated = x not in self.ends
            full = [t + 1 == room[row] for row in live.tolist()]
            going = [k for k, sample in enumerate(here) if sample.truncated and not full[k]]
            if not going:
                break
            if any(full) or t % DROP_EVERY == 0 and len(going) < len(live):
                bar.update(len(live) - len(going))
                going = torch.tensor(going, device=device())
                cache.batch_select_indices(going)
                token, live, mask = token[going], live[going], mask[going]
            mask = F.pad(mask, (0, 1), value=1)
            logits = self.logits(token[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
        return samples

    def logits(self, ids, mask, positions, cache) -> Tensor:
        if isinstance(cache, NoCache):
            cache.ids = torch.cat([cache.ids, ids], dim=1)
            return self.model(input_ids=cache.ids, use_cache=False).logits[:, -1]
        where = dict(attention_mask=mask, position_ids=positions, past_key_values=cache)
        return self.model(input_ids=ids, logits_to_keep=1, **where).logits[:, -1]


class NoCache:
    """In place of a cache: the rows' tokens, which the model then reads again for each new one."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def batch_repeat_interleave(self, n: int) -> None:
        self.ids = self.ids.repeat_interleave(n, 0)

    def batch_select_indices(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs (B,) from logits (B, V): the distribution function, inverted."""
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError("the sampler's logits are not finite: see metrics.jsonl")
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    p = (logits.float() / temperature).softmax(-1)
    # first the block that it falls in, then the word in there: float64 sums over all words are slow
    blocks = F.pad(p, (0, -p.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    cdf = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    goal = (uniform * cdf[:, -1])[:, None]
    block = torch.searchsorted(cdf, goal, right=True)
    goal -= F.pad(cdf, (1, 0)).gather(1, block)
    cdf = blocks[torch.arange(len(p), device=p.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
    goal = goal.minimum(cdf[:, -1:] * (1 - 1e-12))  # sums differ by rounding: no word of p = 0
    token = block * BLOCK + torch.searchsorted(cdf, goal, right=True)
    return token[:, 0], p.gather(1, token)[:, 0].log()


# ------------------------------------------------------------------ vLLM
def sampler_kind(kind: str, samples: bool = True) -> str:
    """--sampler -> "vllm" or "torch", or "none" for a run that does not sample.

    Raises InputError if vLLM is asked for and not installed.
    """
    if not samples:
        return "none"
    on_gpu = "vllm" if torch.cuda.is_available() else "torch"
    kind = on_gpu if kind == "auto" else kind
    if kind == "vllm" and find_spec("vllm") is None:
        raise InputError(
            f"--sampler {kind}: vLLM is not installed. pip install -r requirements.txt, or "
            "--sampler torch (slow)"
        )
    return kind


ENGINES: list[Any] = []


@contextmanager
def vllm_environment() -> Iterator[Any]:
    """Set the environment that vLLM starts in; undo its change of torch.set_num_threads.

    Gives vllm.LLM, which is slow to import. An engine lives as long as the process: one that is
    collected ends torch's process groups, which other ranks may still need. Without expandable
    segments: torch refuses them in a pool such as vLLM's, which turns them off around weights and
    cache, not where it records graphs.
    """
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "RANK": str(rank()),  # these as torchrun sets them
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)
    set_num_threads = torch.set_num_threads
    use_expandable_segments(False)
    try:
        from vllm import LLM

        def engine(*args: Any, **options: Any) -> Any:
            ENGINES.append(LLM(*args, **options))
            return ENGINES[-1]

        yield engine
    finally:
        use_expandable_segments(True)
        torch.set_num_threads = set_num_threads  # the CPU build takes it away


def engine_ranks() -> Any:
    """The ranks that share this one's engine, as a process group of gloo."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().cpu_group


def jobs_of_engine(mine: list, group: Any) -> tuple[list, int]:
    """The ranks of an engine must submit the same jobs: -> all of them, the index of my first."""
    if group is None:
        return mine, 0
    everyones: list[list] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyones, mine, group)
    return sum(everyones, []), sum(map(len, everyones[: dist.get_rank(group)]))


def vllm_options(config: PretrainedConfig, max_tokens: int) -> dict[str, Any]:
    """For LLM(): the context as `fit_context` left it; the machine, a GPU or (in tests) a CPU."""
    context = "max_position_embeddings", "rope_parameters"
    common = {
        # Logits in float32: in bfloat16 those above 16 are .125 apart, and an update moves less.
        "hf_overrides": {name: getattr(config, name) for name in context}
        | {"head_dtype": "float32"},
        "generation_config": "vllm",  # none of the model's: what is asked for counts
        "distributed_executor_backend": "external_launcher",  # torchrun's processes, and one alone
    }
    if torch.cuda.is_available():
        if missing := no_compiler():
            say(f"vllm        {missing}")
        return common | dict(
            dtype="bfloat16",
            enable_sleep_mode=True,
            sleep_mode_offload_cudagraph=True,  # else about 1 GiB stays with the engine
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=MAX_PREFILL,
            # The cache has its size already, but so much has to be free at the start.
            gpu_memory_utilization=0.01,
        )
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False  # it packs weights where a push does not reach them
    if rank() == 0:  # what an earlier run left, under the very names of this one
        for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
            if left.stat().st_uid == os.getuid() and not is_mapped(left):
                left.unlink()
    barrier()
    return common | dict(
        dtype="float32",
        enforce_eager=True,
        enable_chunked_prefill=False,  # prompts cut into chunks crash if their samples are seeded
        max_num_batched_tokens=max(4096, max_tokens),
    )


def is_mapped(file: Path) -> bool:
    """Has a living process this file of ours in its memory?"""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or is another user's
            if str(file) in maps.read_text("utf-8", "replace"):
                return True
    return False


def no_compiler() -> str:
    """What Triton lacks on this machine to compile its kernels, and the fix; "" if nothing.

    Without Triton, vLLM takes its older runner, and says so below our log level.
    """
    compiler = os.environ.get("CC") or "gcc"
    if not shutil.which(compiler) and (compiler != "gcc" or not shutil.which("clang")):
        return f"no C compiler {compiler} for Triton: apt install gcc, or name another in $CC"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.is_file():
        return f"no {header} for Triton: apt install python3-dev, or a Python with its headers"
    return ""


def engine_facts(llm: Any) -> dict[str, str]:
    """What a vLLM engine came to be, as far as its objects tell: else "unknown"."""
    runner = "llm_engine.model_executor.driver_worker.worker.model_runner"
    config = "llm_engine.vllm_config"
    facts: dict[str, Callable[[], Any]] = {
        "runner": lambda: "V2" if attrgetter(f"{config}.use_v2_model_runner")(llm) else "V1",
        "attention": lambda: attrgetter(f"{runner}.attn_groups")(llm)[0][0].backend.get_name(),
        "graphs": lambda: attrgetter(f"{config}.compilation_config.cudagraph_mode.name")(llm),
        "head": lambda: attrgetter(f"{config}.model_config.head_dtype")(llm),
    }

    def told(fact: Callable[[], Any]) -> str:
        try:
            return str(fact())
        except (AttributeError, IndexError):  # another version's objects
            return "unknown"

    return {name: told(fact) for name, fact in facts.items()}


def to_samples(output: Any, ends: Sequence[int]) -> list[Sample]:
    """From vLLM's RequestOutput with flat log-probs: one a token. RuntimeError if they are not."""
    samples = []
    for o in output.outputs:
        tokens, flat = list(o.token_ids), o.logprobs
        if flat.token_ids != tokens:
            raise RuntimeError(
                f"vLLM gave log-probs of {len(flat.token_ids)} tokens, but sampled {len(tokens)}"
            )
        if not all(map(math.isfinite, flat.logprobs)):
            raise FloatingPointError("vLLM's log-probs are not finite: see metrics.jsonl")
        samples.append(Sample(tokens, list(flat.logprobs), tokens[-1] not in ends))
    return samples
