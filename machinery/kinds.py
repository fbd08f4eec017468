"""Kinds of transformers' objects, for annotations: to import it takes longer than to print help.

It is imported by the functions that load or make something of its.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, Qwen2ForCausalLM
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    GenerationConfig = PretrainedConfig = PreTrainedModel = Qwen2ForCausalLM = Tokenizer = Any
