"""Sampling responses. A sampler has two methods: `load_weights` and `generate`.

VLLMSampler is for GPUs, TorchSampler needs transformers alone. In both, the samples for a prompt
are a function of the weights and the prompt's seed: the rest of the batch and the number of ranks
matter by rounding only.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from model import from_pretrained
from run import barrier, device, progress, rank, world_size

TORCH_ROWS = 512  # responses that TorchSampler decodes together
DROP_EVERY = 8  # tokens: dropping finished rows copies the whole cache
MAX_SEQUENCES, MAX_PREFILL = 256, 8192  # of a vLLM engine on a GPU: responses, and prompt tokens


@dataclass(frozen=True)
class Sample:
    """One sampled response and the log-probs of its tokens under the sampling distribution."""

    tokens: list[int]  # up to and with EOS, if it came in time
    logps: list[float]


class TorchSampler:
    """Sampling with transformers alone, where there is no vLLM.

    A prompt is prefilled once for its n samples, and rows leave the batch when they are finished.
    """

    def __init__(self, path: str | Path, config, eos: int, *, max_rows: int = TORCH_ROWS):
        self.model = from_pretrained(path, config=config, attn_implementation="grouped").eval()
        self.eos, self.max_rows = eos, max_rows

    def load_weights(self, named_parameters) -> None:
        """Sample from these parameters from now on: they are shared, not copied."""
        own = dict(self.model.named_parameters())
        for name, parameter in named_parameters:
            own[name].data = parameter.data

    def generate(self, prompts: list, n: int, *, seeds: list[int], temperature: float,
                 max_tokens: int) -> list[list[Sample]]:
        """n samples for each prompt (token ids). A prompt's samples depend on its seed alone.

        temperature 0 is greedy. The log-probs are those of the distribution sampled from.
        """
        groups: list[list[Sample]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.max_rows // max(1, n))
        with progress("sample", n * len(prompts)) as bar:
            for i in range(0, len(prompts) if n else 0, size):
                some = by_length[i:i + size]
                samples = self.decode([prompts[j] for j in some], n, [seeds[j] for j in some],
                                      temperature, max_tokens, bar)
                for k, j in enumerate(some):
                    groups[j] = samples[k * n:(k + 1) * n]
        return groups

    @torch.inference_mode()
    def decode(self, prompts, n, seeds, temperature, max_tokens, bar) -> list[Sample]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.eos] * (width - len(p)) + list(p) for p in prompts])  # (P, width)
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
        samples = [Sample([], []) for _ in uniform]
        for t in range(max_tokens):
            token, logp = draw(logits, uniform[live, t], temperature)  # (live,), (live,)
            here = [samples[row] for row in live.tolist()]
            for sample, x, lp in zip(here, token.tolist(), logp.tolist()):
                if sample.tokens[-1:] != [self.eos]:  # else it is finished, but not dropped yet
                    sample.tokens.append(x)
                    sample.logps.append(lp)
            going = [k for k, sample in enumerate(here) if sample.tokens[-1] != self.eos]
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
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                          past_key_values=cache, logits_to_keep=1).logits[:, -1]


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                      scaling: float, **options) -> tuple[Tensor, None]:
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


class VLLMSampler:
    """One vLLM engine in this process, beside the trainer: weights go to it in memory.

    On a GPU it sleeps while the trainer works, and its weights and its cache are gone meanwhile: it
    always samples from the parameters last given, as they are when `generate` begins.
    """

    def __init__(self, path: str | Path, config, eos: int, *, max_tokens: int, cache_bytes: int,
                 tensor_parallel: int = 1):
        """On all ranks together, after the process group and before the trainer takes memory.

        max_tokens: of a prompt and its response; cache_bytes: of keys and values, on each GPU;
        tensor_parallel: consecutive ranks that share an engine, and sample for each other.
        """
        for name, value in {
            "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
            "RANK": str(rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size()),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",  # as torchrun sets them
        }.items():
            os.environ.setdefault(name, value)
        import vllm  # slow to import, and only here

        self.eos, self.sleeps = eos, torch.cuda.is_available()
        if self.sleeps:
            options = dict(dtype="bfloat16", enable_sleep_mode=True, max_num_seqs=MAX_SEQUENCES,
                           max_num_batched_tokens=MAX_PREFILL,
                           gpu_memory_utilization=0.01)  # of no use here; but checked as if free
        else:  # vLLM's CPU build
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False  # else load_weights does not reach them
            if rank() == 0:  # what an earlier run left, under the very names of this one
                for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
                    left.unlink()
            barrier()
            options = dict(dtype="float32", enforce_eager=True, enable_chunked_prefill=False,
                           max_num_batched_tokens=max(4096, max_tokens))  # seeded chunks crash
        set_num_threads = torch.set_num_threads
        self.llm = vllm.LLM(
            str(path), load_format="dummy", generation_config="vllm", max_model_len=max_tokens,
            hf_overrides={"max_position_embeddings": config.max_position_embeddings,
                          "rope_parameters": config.rope_parameters},
            kv_cache_memory_bytes=cache_bytes, logprobs_mode="processed_logprobs",
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher", **options)
        torch.set_num_threads = set_num_threads  # the CPU build takes it away
        self.group = None
        if tensor_parallel > 1:  # the ranks that share this engine
            from vllm.distributed.parallel_state import get_tp_group

            self.group = get_tp_group().cpu_group
        if self.sleeps:
            self.llm.sleep(level=2)

    def load_weights(self, named_parameters) -> None:
        """Sample from these parameters from now on; `generate` takes their values."""
        self.weights = [(name, p.detach()) for name, p in named_parameters]

    def generate(self, prompts: list, n: int, *, seeds: list[int], temperature: float,
                 max_tokens: int) -> list[list[Sample]]:
        """n samples for each prompt (token ids), as TorchSampler.generate."""
        from vllm import SamplingParams

        everyones, here = [list(zip(prompts, seeds))], 0
        if self.group:  # the ranks of an engine must ask it for the same
            everyones = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(everyones, list(zip(prompts, seeds)), self.group)
            here = dist.get_rank(self.group)
        jobs = [job for jobs in everyones for job in jobs]
        if n == 0 or not jobs:
            return [[] for _ in prompts]
        self.wake()
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt, _ in jobs],
            [SamplingParams(n=n if temperature else 1, seed=seed, temperature=temperature,
                            max_tokens=max_tokens, stop_token_ids=[self.eos], logprobs=0,
                            detokenize=False) for _, seed in jobs],
            use_tqdm=partial(tqdm, leave=False, delay=2) if rank() == 0 else False)
        if self.sleeps:
            self.llm.sleep(level=2)
        first = sum(map(len, everyones[:here]))
        # vLLM gives a greedy response once: the n samples are that one, n times
        return [(list(map(to_sample, output.outputs)) * n)[:n]
                for output in outputs[first:first + len(prompts)]]

    def wake(self) -> None:
        """The order matters: memory for the weights, all of them, then memory for the cache."""
        if self.sleeps:
            torch.cuda.empty_cache()  # what the trainer's allocator holds but does not use
            self.llm.wake_up(tags=["weights"])
        self.llm.apply_model(lambda model: model.load_weights(self.weights) and None)
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():  # it holds keys and values of other weights
            raise RuntimeError("vLLM still holds keys and values of old weights")


def to_sample(output) -> Sample:
    """From vLLM's CompletionOutput."""
    logps = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs)]
    return Sample(list(output.token_ids), logps)
