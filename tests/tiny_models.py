"""A tiny random model of each architecture that transformers has, with the toy's tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from machinery import toy

SIZES: dict[str, Any] = dict(  # by whatever names a config has
    hidden_size=64, n_embd=64, d_model=64, dim=64,
    intermediate_size=96, ffn_dim=96, n_inner=96, moe_intermediate_size=32,
    num_hidden_layers=4, n_layer=4, n_layers=4, num_layers=4,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512, n_positions=512, max_seq_len=512,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    sliding_window=24, attention_chunk_size=24,
)  # fmt: skip
MAMBA = dict(mamba_chunk_size=16, mamba_n_heads=4, mamba_d_state=16)
SCALES = dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5)
OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "granite": SCALES | dict(logits_scaling=4.0),
    "granitemoe": SCALES | dict(logits_scaling=4.0),
    "gptj": dict(rotary_dim=8),
    "codegen": dict(rotary_dim=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=16),
    "mamba2": dict(num_heads=8, head_dim=16),
    "cwm": dict(bos_token_id=2),
    "modernbert-decoder": dict(bos_token_id=2),
    "bamba": MAMBA,
    "falcon_h1": MAMBA | dict(mamba_d_ssm=128, mamba_d_head=32),
    "granitemoehybrid": MAMBA,
    "gemma3n_text": dict(layer_types=["sliding_attention", "full_attention"] * 2),
    "kimi_linear": dict(num_experts_per_token=2),
    "nemotron_h": dict(chunk_size=16),
    "zaya": dict(num_experts_per_tok=1),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
}
OF_PARTS = "gemma3", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe"  # text, images
SIZES_OF_PARTS = dict(
    depth=2, out_hidden_size=64, intermediate_size_mlp=32, shared_expert_intermediate_size=32,
    expert_intermediate_size=32, hidden_size_per_layer_input=16, vocab_size_per_layer_input=55,
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16,
)  # fmt: skip

LARGE = (  # whatever the sizes above are, or minutes a step on a CPU (kimi_linear)
    "blenderbot blt emu3 gemma4_text git got_ocr2 kimi_linear longcat_flash mllama "
    "phi4_multimodal xlm"
)
NOT_MADE = (  # of two models, of another package, or with a config of many parts
    "cohere_compass_text dbrx dots1 gemma3n gemma3n_text gemma4_assistant gemma4_unified_assistant "
    "musicgen musicgen_melody plbart qwen4_exp qwen4_exp_text reformer whisper zamba zamba2"
)
LEFT_OUT = {*LARGE.split(), *NOT_MADE.split()}
ARCHITECTURES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]


def make_tiny(name: str, directory: Path, **changes: Any) -> Path:
    """With weights large enough for each part to matter: transformers draws biases as 0."""
    torch.manual_seed(0)
    config, tokenizer = tiny_config(name), toy.make_tokenizer()
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_config(name: str):
    given = AutoConfig.for_model(name)
    known = given.to_dict()
    tokenizer = toy.make_tokenizer()
    sizes = {k: v for k, v in SIZES.items() if k in known}
    sizes |= {k: 1 for k in ("n_group", "topk_group") if k in known}
    if "qk_rope_head_dim" in known:  # latent attention has heads of its own
        sizes |= dict(qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, kv_lora_rank=32)
        sizes |= dict(q_lora_rank=32, num_key_value_heads=4)
        sizes.pop("head_dim", None)
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    if name in OF_PARTS:
        names = [k for k in ("text_config", "vision_config") if known.get(k)]
        parts = {k: small_part(known[k]) for k in names}
        parts["text_config"] |= tokens
        return AutoConfig.for_model(name, **parts)
    return AutoConfig.for_model(name, **sizes | tokens | OF_ITS_OWN.get(name, {}))


def small_part(known: dict[str, Any]) -> dict[str, Any]:
    sizes = {k: v for k, v in (SIZES | SIZES_OF_PARTS).items() if k in known}
    if not known.get("sliding_window"):
        sizes.pop("sliding_window", None)
    if known.get("layer_types"):
        sizes["layer_types"] = known["layer_types"][2:6]  # of both kinds
    return sizes | {"model_type": known["model_type"]}
