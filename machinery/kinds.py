"""Classes of transformers for annotations alone: to import it takes longer than to print help.

Functions that load or make one of its objects import it themselves.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, Qwen2ForCausalLM
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    GenerationConfig = PretrainedConfig = PreTrainedModel = Qwen2ForCausalLM = Tokenizer = Any
