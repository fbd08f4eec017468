"""What TorchSampler has in place of transformers' own: a cache of keys and values, attention."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROOM = 32  # tokens that a copy of the cache makes room for


class Growing(DynamicLayer):
    """Writes a token's keys and values in place, where DynamicLayer copies all that it has."""

    shown = None  # keys, a view of the beginning of their room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any):
        if (start := self.get_seq_length()) == 0:
            return super().update(key_states, value_states)
        end = start + key_states.shape[2]
        if self.keys is not self.shown or end > self.rooms[0].shape[2]:  # rows left, or it is full
            self.rooms = [F.pad(x, (0, 0, 0, ROOM)) for x in (self.keys, self.values)]
        for room, new in zip(self.rooms, (key_states, value_states)):
            room[:, :, start:end] = new
        self.keys, self.values = self.shown, _ = [room[:, :, :end] for room in self.rooms]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.rooms = self.shown = None  # else all layers' old rooms stay until the next token


def new_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    # its layers of windows and of states stay transformers' own
    cache.layers = [Growing() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def grouped_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float, **options
) -> tuple[Tensor, None]:
    """transformers' sdpa, but query heads that share a key read it; there, each gets a copy."""
    if unknown := [k for k in ("softcap", "s_aux", "position_bias") if options.get(k) is not None]:
        raise NotImplementedError(f"its attention has a {' and a '.join(unknown)}")
    if query.shape[2] > 1:  # prompts
        how = dict(scaling=scaling, **options)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    heads = query.view(len(query), key.shape[1], -1, query.shape[3])  # as if they were positions
    out = F.scaled_dot_product_attention(heads, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(len(query), 1, -1, value.shape[3]), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)
