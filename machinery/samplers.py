"""What samples: the protocol, sampling with transformers alone, what vLLM's engine is started with.

VLLMSampler itself stands in luffy.py. In both samplers the samples for a prompt are a function of
the weights and the prompt's seed: the rest of the batch and the number of ranks matter by rounding
only.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from machinery.model import from_pretrained
from machinery.processes import InputError, barrier, device, progress, rank, world_size

TORCH_ROWS = 512  # responses that TorchSampler decodes together
DROP_EVERY = 8  # tokens: dropping finished rows copies the whole cache
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
        """n samples for each prompt (token ids).

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
    ):
        """ends: the tokens that end a response."""
        self.model = from_pretrained(path, config=config, attn_implementation="grouped").eval()
        self.ends, self.max_rows = list(ends), max_rows
        self.awake = True  # with the weights that it has loaded itself

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
        size = max(1, self.max_rows // max(1, n))
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
        ids = torch.tensor(
            [self.ends[:1] * (width - len(p)) + list(p) for p in prompts]
        )  # (P, width)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ids, mask = ids.to(device()), mask.to(device())
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.cat([torch.rand(n, max_tokens, generator=g) for g in generators])
        uniform = uniform.to(device())  # (B, max_tokens), B = n x prompts
        cache = DynamicCache(config=self.model.config)
        logits = self.logits(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        cache.batch_repeat_interleave(n)
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        live = torch.arange(len(uniform), device=device())  # the rows that are not finished
        samples = [Sample([], [], truncated=True) for _ in uniform]
        for t in range(max_tokens):
            token, logp = draw(logits, uniform[live, t], temperature)  # (live,), (live,)
            here = [samples[row] for row in live.tolist()]
            for sample, x, lp in zip(here, token.tolist(), logp.tolist()):
                if sample.truncated:  # else it is finished, but not dropped yet
                    sample.tokens.append(x)
                    sample.logps.append(lp)
                    sample.truncated = x not in self.ends
            going = [k for k, sample in enumerate(here) if sample.truncated]
            if not going or t + 1 == max_tokens:
                break
            if t % DROP_EVERY == 0 and len(going) < len(live):
                bar.update(len(live) - len(going))
                going = torch.tensor(going, device=device())
                cache.batch_select_indices(going)
                token, live, mask = token[going], live[going], mask[going]
            mask = F.pad(mask, (0, 1), value=1)
            logits = self.logits(token[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
        return samples

    def logits(self, ids, mask, positions, cache) -> Tensor:
        where = dict(attention_mask=mask, position_ids=positions, past_key_values=cache)
        return self.model(input_ids=ids, logits_to_keep=1, **where).logits[:, -1]


def grouped_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **options,
) -> tuple[Tensor, None]:
    """transformers' sdpa, but query heads that share a key read it; there, each gets a copy."""
    if unknown := {k for k in ("softcap", "s_aux", "position_bias") if options.get(k) is not None}:
        raise NotImplementedError(f"grouped_attention lacks what this model needs: {unknown}")
    if query.shape[2] > 1:  # prompts
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    heads = query.view(len(query), key.shape[1], -1, query.shape[3])  # as if they were positions
    out = F.scaled_dot_product_attention(heads, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(len(query), 1, -1, value.shape[3]), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs (B,) from logits (B, V): the distribution function, inverted."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    logp = F.log_softmax(logits.float() / temperature, dim=-1)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    return token[:, 0], logp.gather(1, token)[:, 0]


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


@contextmanager
def vllm_environment() -> Iterator[Any]:
    """Set the environment that vLLM starts in; undo its change of torch.set_num_threads.

    Gives vllm.LLM, which is slow to import.
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
    try:
        from vllm import LLM

        yield LLM
    finally:
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
        "hf_overrides": {name: getattr(config, name) for name in context},
        "generation_config": "vllm",  # none of the model's: what is asked for counts
        "distributed_executor_backend": "external_launcher",  # torchrun's processes, and one alone
    }
    if torch.cuda.is_available():
        return common | dict(
            dtype="bfloat16",
            enable_sleep_mode=True,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=MAX_PREFILL,
            # The cache has its size already, but so much has to be free at the start.
            gpu_memory_utilization=0.01,
        )
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False  # it packs weights where a push does not reach them
    if rank() == 0:  # what an earlier run left, under the very names of this one
        for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
            left.unlink()
    barrier()
    return common | dict(
        dtype="float32",
        enforce_eager=True,
        enable_chunked_prefill=False,  # prompts cut into chunks crash if their samples are seeded
        max_num_batched_tokens=max(4096, max_tokens),
    )


def to_samples(output: Any, ends: Sequence[int]) -> list[Sample]:
    """From vLLM's RequestOutput."""
    samples = []
    for o in output.outputs:
        logps = [at[token].logprob for token, at in zip(o.token_ids, o.logprobs)]
        samples.append(Sample(list(o.token_ids), logps, o.token_ids[-1] not in ends))
    return samples


def no_compiler() -> str:
    return ""


def engine_facts(llm: Any) -> dict[str, str]:
    return {}
