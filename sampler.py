"""Sampling responses. A sampler has two methods: `load_weights` and `generate`.

TorchSampler needs transformers alone. Its samples for a prompt are a function of the weights and
the prompt's seed: the rest of the batch and the number of ranks matter by rounding only.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from run import device, from_pretrained, progress


@dataclass(frozen=True)
class Sample:
    """One sampled response and the log-probs of its tokens under the sampling distribution."""

    tokens: list[int]  # up to and with EOS, if it came in time
    logps: list[float]


class TorchSampler:
    """Sampling with transformers alone, where there is no vLLM. It keeps a copy of the policy.

    A prompt is prefilled once for its n samples, and a row leaves the batch when it is finished.
    """

    def __init__(self, path: str | Path, eos: int, max_rows: int = 512):
        self.model = from_pretrained(path, attn_implementation="sdpa").eval()
        self.eos, self.max_rows = eos, max_rows

    @torch.no_grad()
    def load_weights(self, named_parameters) -> None:
        own = dict(self.model.named_parameters())
        for name, parameter in named_parameters:
            own[name].copy_(parameter)

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
            for row, x, lp in zip(live.tolist(), token.tolist(), logp.tolist()):
                samples[row].tokens.append(x)
                samples[row].logps.append(lp)
            going = (token != self.eos).nonzero()[:, 0]
            bar.update(len(live) - len(going))
            if len(going) == 0 or t + 1 == max_tokens:
                break
            if len(going) < len(live):
                cache.batch_select_indices(going)
                token, live, mask = token[going], live[going], mask[going]
            mask = F.pad(mask, (0, 1), value=1)
            logits = self.logits(token[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
        return samples

    def logits(self, ids, mask, positions, cache) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                          past_key_values=cache, logits_to_keep=1).logits[:, -1]


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs (B,) from logits (B, V): the distribution function, inverted."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    logp = F.log_softmax(logits.float() / temperature, dim=-1)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)
    return token[:, 0], logp.gather(1, token)[:, 0]
