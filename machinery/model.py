"""The language model as the trainer uses it: log-probs of packed rows, and how it is loaded."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from machinery import probe, toy
from machinery.batches import MicroBatch, Packing
from machinery.kinds import PretrainedConfig, PreTrainedModel, Tokenizer
from machinery.processes import InputError, barrier, device, gpu_problem, progress, rank, say

FEW = 10  # words, of a tokenizer that knows nothing but special tokens
# Masks that early transformers kept beside the weights of GPT-2, GPT-J, GPT-Neo, GPT-NeoX, CodeGen.
MASKS = ".attn.bias", ".attention.bias", ".masked_bias", ".causal_mask"
NO_LIMIT = 2**20  # tokens, of a model without positions
FITS_A_CPU = 1_000_000_000  # parameters: larger models run there only if --device cpu asks for it
FITS_A_LAPTOP = 100_000_000  # the same where there is a GPU that torch cannot use


# The paper's base models, for a plan on a machine that does not reach the hub.
# fmt: off
QWEN_7B = dict(
    model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
QWEN_HALF_B = dict(  # of docs/real-runs.md's first run
    model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
    num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    max_position_embeddings=32768)
SHAPES: dict[str, dict] = {
    "Qwen/Qwen2.5-Math-7B": QWEN_7B | dict(max_position_embeddings=4096),
    "Elliott/Qwen2.5-Math-7B-16k-think": QWEN_7B | dict(max_position_embeddings=16384),
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B | dict(max_position_embeddings=32768),
    "Qwen/Qwen2.5-Math-1.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=4096),
    "Qwen/Qwen2.5-0.5B": QWEN_HALF_B, "Qwen/Qwen2.5-0.5B-Instruct": QWEN_HALF_B,
    "meta-llama/Llama-3.1-8B": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        tie_word_embeddings=False, max_position_embeddings=131072),
}
# fmt: on


# ------------------------------------------------------------------ finding and loading
@cache
def library() -> Any:
    """transformers, with our attention. To import it takes longer than to print help."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # ours say what takes long
    # without a mask function: none is built
    transformers.AttentionInterface.register("packed", packed_attention)
    return transformers


def full_name(name: str) -> str:
    """A directory if there is one of that name, else a name on the hub, with its organisation."""
    is_bare_qwen = name.startswith("Qwen") and "/" not in name and not os.path.isdir(name)
    return f"Qwen/{name}" if is_bare_qwen else name


def find(name: str, device: str = "auto") -> str:
    """What from_pretrained takes: a directory or a name on the hub. The toy is made, by rank 0.

    device: --device. Raises InputError for a model that is too large for the CPU, unless "cpu".
    """
    if name != "toy":
        if device != "cpu" and not torch.cuda.is_available():
            check_size_on_cpu(name)
        return full_name(name)
    library()  # transformers without its own bars
    if rank() == 0:
        toy.base_model()
    barrier()
    return str(toy.base_model())


def check_size_on_cpu(name: str) -> None:
    parameters = sum(parameter_sizes(shape_of(name)))
    problem = gpu_problem()
    if parameters > (FITS_A_LAPTOP if problem else FITS_A_CPU):
        raise InputError(
            f"--device auto: {full_name(name)} has {parameters:,} parameters, and torch sees no "
            f"GPU{': ' * bool(problem)}{problem}. Run it where there is one, or with --device cpu, "
            "where it may take weeks"
        )


def on_paper(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The trainer's model with random weights or, under FakeTensorMode, without any."""
    how: Any = dict(attn_implementation="packed", dtype=dtype)
    return library().AutoModelForCausalLM.from_config(config, **how)


def parameter_sizes(config: PretrainedConfig) -> list[int]:
    with reading(config.name_or_path), torch.device("meta"):
        return [p.numel() for p in library().AutoModelForCausalLM.from_config(config).parameters()]


def recipe(name: str) -> dict[str, Any]:
    """The defaults of luffy.py that a model overrides: `luffy_recipe` in its config.json.

    Checkpoints have it from the model that they were trained from. `luffy_toy` is an earlier mark.
    """
    config = Path(name, "config.json")
    try:  # os.path: Path's method raises of names that are too long
        own = json.loads(config.read_text("utf-8")) if os.path.isfile(config) else {}
    except ValueError:
        own = {}
    own = own if isinstance(own, dict) else {}  # else load_config says it, with the file's name
    found = toy.RECIPE if name == "toy" or "luffy_toy" in own else own.get("luffy_recipe", {})
    if not isinstance(found, dict):
        raise InputError(f"{config}: its luffy_recipe is no object with flags; take it out")
    return found


def shape_of(name: str) -> PretrainedConfig:
    """A model's config; of the toy and of the paper's models without a file or a network."""
    if name == "toy":
        return toy.make_model(toy.make_tokenizer(), seed=0).config
    if shape := SHAPES.get(full_name(name)):
        return library().AutoConfig.for_model(**shape)
    return load_config(full_name(name))


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever third parties raise of a directory's files is an InputError, in one line."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {error}".split("\n")[0]
        words = re.split(r"(?<=[^.])\. ", words)[0]  # more would be advice to run what is there
        words = words[:300].rstrip(".")
        if not os.path.isdir(path):
            raise InputError(
                f"--model {path}: neither a directory with a model and its tokenizer nor a name on "
                f"the hub that can be reached from here ({words})"
            ) from error
        if pointers := [f.name for f in sorted(Path(path).iterdir()) if is_pointer(f)]:
            raise InputError(
                f"--model {path}: {', '.join(pointers[:3])} is what Git LFS puts in a file's "
                "place: `git lfs pull` there gets the file"
            ) from error
        if of_a_run := sorted(Path(path).glob("checkpoint-[0-9]*")):
            raise InputError(
                f"--model {path}: a run's directory; name a checkpoint of it, as {of_a_run[-1]}"
            ) from error
        raise InputError(
            f"--model {path}: its files cannot be read ({words}). Are they complete, and of an "
            "architecture that transformers knows without code from the hub?"
        ) from error


def is_pointer(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as f:
        return f.read(40).startswith(b"version https://git-lfs")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Raises InputError if it has no words, or some that the model has no embeddings of."""
    with reading(path):
        tokenizer = library().AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        size = load_config(path).get_text_config().vocab_size
        if isinstance(tokenizer.chat_template, dict):  # several, by their names
            tokenizer.chat_template = tokenizer.chat_template.get("default")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(tokenizer.eos_token_id)  # others may be unused, as Gemma's for images
    words = {word: i for word, i in tokenizer.get_vocab().items() if i not in special}
    if len(words) < FEW:  # transformers makes an empty one where there is no file
        raise InputError(
            f"--model {path}: its tokenizer has {len(words)} words. Is its tokenizer.json missing?"
        )
    if beyond := [word for word, i in words.items() if i >= size]:
        raise InputError(
            f"--model {path}: its tokenizer has {len(beyond)} tokens ({beyond[0]!r}, ...) beyond "
            f"the model's vocabulary of {size}: is it another model's?"
        )
    return tokenizer


def end_ids(path: str | Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS, then those of the generation config.

    A chat model ends a turn with one, a document with another.
    """
    file = Path(path, "generation_config.json")
    with reading(path):
        try:
            more = library().GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:
            if file.exists():
                raise
            more = getattr(load_config(path).get_text_config(), "eos_token_id", None)
    more = [] if more is None else more if isinstance(more, list) else [more]
    if wrong := [x for x in more if type(x) is not int]:
        raise InputError(f"--model {path}: {file.name} or config.json has an eos_token_id {wrong}")
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def load_config(path: str | Path) -> PretrainedConfig:
    """Its config, with a context by the name that we know. InputError if there is none."""
    with reading(path):
        config = library().AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "max_position_embeddings", None) is None:
        text = config.get_text_config()
        names = "max_position_embeddings", "max_seq_len", "seq_length"
        known = (getattr(text, name, None) for name in names)
        config.max_position_embeddings = next(filter(None, known), NO_LIMIT)
    return config


def from_pretrained(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A causal language model in this machine's precision: bfloat16 on a GPU, float32 on a CPU.

    Raises InputError unless each of its tensors is in the files, finite and of its shape, and no
    other is. transformers would draw missing ones at random.
    """
    check_files(path)
    how = kwargs | dict(dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    how |= dict(trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
    with reading(path):
        model, info = library().AutoModelForCausalLM.from_pretrained(path, **how)
    model = model.to(device())
    of_another_shape = [f"{n} {tuple(a)}, not {tuple(b)}" for n, a, b in info["mismatched_keys"]]
    named = {
        "lack": sorted(info["missing_keys"]),
        "have besides": sorted(k for k in info["unexpected_keys"] if not k.endswith(MASKS)),
        "have in another shape": sorted(of_another_shape),
        "have not as finite numbers": not_finite(model),
    }
    problems = [
        f"{what} {len(names)} ({', '.join(names[:4])}{', ...' * (len(names) > 4)})"
        for what, names in named.items()
        if names
    ]
    if problems:
        raise InputError(
            f"--model {path}: of the tensors of a {type(model).__name__} its files "
            f"{'; '.join(problems)}. Is the download complete, and config.json of these weights?"
        )
    head = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise InputError(
            f"--model {path}: its files have a head of its own, and its config.json says "
            "tie_word_embeddings, by which other programs leave that head out. Set it to false"
        )
    return model


def check_files(path: str | Path) -> None:
    """InputError where a directory holds two sets of weights, and one would be taken in silence."""
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise InputError(
            f"--model {path}: its adapter_config.json is of an adapter, which is not applied here. "
            "Merge it into the weights (peft's merge_and_unload), or take its files away"
        )
    index = Path(path, "model.safetensors.index.json")
    if not index.is_file():
        return
    with reading(path):
        shard_of = json.loads(index.read_text("utf-8"))["weight_map"]
        for name in {*shard_of.values(), "model.safetensors"}:
            file = Path(path, name)
            if name not in shard_of.values() and not file.exists():
                continue
            with safe_open(file, "pt") as shard:
                if other := [k for k in shard.keys() if shard_of.get(k) != name]:
                    raise InputError(
                        f"--model {path}: {name} has {other[0]}, which is not there by "
                        f"{index.name}. Are these the files of two models? Take one away"
                    )


def not_finite(model: PreTrainedModel) -> list[str]:
    found, parameters = [], dict(model.named_parameters())
    with progress("weights", len(parameters)) as bar:
        for name, p in parameters.items():
            if not p.sum(dtype=torch.float32).isfinite():  # a mask would be as large as p
                found.append(name)
            bar.update()
    return found


def load_model(path: str | Path, config: PretrainedConfig, checkpointing: bool) -> PreTrainedModel:
    """The model to train, without dropout. InputError if we would compute it wrongly."""
    model = from_pretrained(path, config=config).train()
    if checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    probe.switch_off_dropout(model)
    policy = Policy(model, temperature=1.0)
    probe.choose_attention(policy, path)
    model.sparse = probe.leaves_out(policy)
    return model


def fit_context(config: PretrainedConfig, max_prompt_tokens: int, max_response_tokens: int) -> None:
    """Make a config good for prompts and responses of these lengths; says so if it has to change.

    Qwen2.5-Math was made for 4096 tokens. The paper (App. C.1) lengthens it to 16384 by a larger
    RoPE base, without training. Raises InputError for any other model that is too short.
    """
    needed, context = max_prompt_tokens + max_response_tokens, config.max_position_embeddings
    if needed > (limit := rope_limit(config)):
        raise InputError(
            f"--max_prompt_tokens {max_prompt_tokens} + --max_response_tokens "
            f"{max_response_tokens} (or --max_trace_tokens) is more than the {limit} tokens up to "
            "which the model's RoPE is one: in a longer sequence all tokens have other positions, "
            "and so have those that were sampled before. Lower one of the two"
        )
    if needed <= context:
        return
    rope = getattr(config, "rope_parameters", None) or {}
    qwen_math = (config.model_type, context, rope.get("rope_theta")) == ("qwen2", 4096, 10000)
    if not qwen_math or needed > 16384:
        raise InputError(
            f"--max_prompt_tokens {max_prompt_tokens} + --max_response_tokens "
            f"{max_response_tokens} (or --max_trace_tokens, if that is more) is more than the "
            f"model's context, {context} tokens: lower one of the two, or set "
            "max_position_embeddings in its config.json if you know better"
        )
    config.max_position_embeddings = 16384
    config.rope_parameters = rope | {"rope_theta": 40000.0}
    say(f"context     {context} -> 16384 tokens, rope_theta 10000 -> 40000, as in the paper")


def rope_limit(config: PretrainedConfig) -> int:
    """Tokens of the longest sequence whose positions depend on none that come later."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # one a layer type
    changing = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    limits = (kind.get("original_max_position_embeddings", NO_LIMIT) for kind in changing)
    return min(limits, default=NO_LIMIT)


# ------------------------------------------------------------------ the policy
class Policy(nn.Module):
    """The language model as DDP wraps it: -> log-probs and entropies of response tokens.

    With the attention "packed" in one row; with another, each trajectory alone and by the model's
    own head. machinery.probe chooses.
    """

    def __init__(self, model: PreTrainedModel, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.sparse = getattr(model, "sparse", False)  # some get no gradient

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        if self.model.config._attn_implementation != "packed":
            return self.one_by_one(batch)
        hidden = self.model.base_model(  # use_cache=False: a cache would let trajectories mix
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            packing=batch.packing,
        ).last_hidden_state[0]  # (S, D)
        return token_logprobs(  # the hidden state before a token predicts it
            hidden[batch.before],
            self.model.get_output_embeddings().weight,
            batch.input_ids[0, batch.response_index],
            temperature=self.temperature / logit_scale(self.model.config),
        )

    def one_by_one(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        found = []
        for t in batch.trajectories:
            n = len(t.response)
            ids = torch.tensor([*t.problem.prompt_ids, *t.response], device=device())
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0, -n - 1 : -1]
            job = logits_logprobs, logits, ids[-n:], self.temperature
            found.append(checkpoint(*job, use_reentrant=False, preserve_rng_state=False))
        logps, entropies = zip(*found)
        return torch.cat(logps), torch.cat(entropies)


def logits_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, V) logits, (N,) next tokens -> log-probs (N,), entropies (N,), in float32."""
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def logit_scale(config: PretrainedConfig) -> float:
    """What a model multiplies its logits by: Cohere's name for it, and Granite's."""
    return getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(N, D) hidden states, (V, D) head, (N,) next tokens -> log-probs (N,), entropies (N,).

    With gradient, and float32 also from bfloat16. Without ever holding all (N, V) logits, equal to
        logp = log_softmax(hidden @ lm_head_weight.T / temperature)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    chunk: tokens at a time; None: 1024 in bfloat16, for a GPU needs large products, else 256.
    """
    chunk = chunk or (1024 if hidden.dtype == torch.bfloat16 else 256)
    return ChunkedLogprobs.apply(hidden, lm_head_weight, targets, temperature, chunk)


class ChunkedLogprobs(torch.autograd.Function):
    """token_logprobs, `chunk` tokens at a time; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        ctx.temperature, ctx.chunk = temperature, chunk
        logps, entropies = [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            log_p = log_probs(h, weight, temperature)  # (chunk, V)
            logps.append(log_p.gather(1, y[:, None])[:, 0])
            entropies.append(-log_p.exp().mul_(log_p).sum(1))
        logp, entropy = torch.cat(logps), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # In bfloat16 each chunk's part would be rounded to three digits of the sum so far.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        for i in range(0, len(hidden), ctx.chunk):
            s = slice(i, i + ctx.chunk)
            log_p = log_probs(hidden[s], weight, ctx.temperature)
            p = log_p.exp()
            # with z the logits:  d logp(y) / dz = 1_y - p   and   dH / dz = -p (log p + H)
            grad = log_p.add_(entropy[s, None]).mul_(grad_entropy[s, None])
            grad.add_(grad_logp[s, None]).mul_(p).neg_()
            grad.scatter_add_(1, targets[s, None], grad_logp[s, None])
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[s] = grad @ weight
            add_product(grad_weight, grad.T, hidden[s])
            del log_p, p, grad  # else they live on beside the next chunk's: twice the memory
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def log_probs(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(chunk, D), (V, D) -> (chunk, V), float32 also from bfloat16."""
    return F.log_softmax(product(hidden, weight.T).div_(temperature), dim=-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 also from bfloat16.

    Logits of 16 to 32 have a spacing of 0.125 in bfloat16; an update at lr 1e-6 moves them by less.
    """
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


# torch has this product for GPUs alone; so tests on a CPU, and the plan, take the same way.
cpu_kernels = torch.library.Library("aten", "IMPL")
cpu_kernels.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")


def add_product(total: Tensor, a: Tensor, b: Tensor, rows: int = 32768) -> None:
    """total += a @ b, where total may be of more digits: then a few rows at a time, for memory."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        for part, some in zip(total.split(rows), a.split(rows)):
            part.add_(product(some, b))


# ------------------------------------------------------------------ attention
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packing: Packing,
    sliding_window: int | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Causal attention within each trajectory of a row: (1, H, S, D/H) -> (1, S, H, D/H).

    The prompt's keys and values are copied for each response that sees them: see Packing.
    sliding_window: a token sees so many, itself included; None: all before it.
    """
    options |= dict(mask=attention_mask)
    lacking = "softcap", "s_aux", "position_bias", "mask"
    if unknown := [name for name in lacking if options.get(name) is not None]:
        raise NotImplementedError(f"its attention has a {' and a '.join(unknown)}")
    if packing.keys is not None:
        key, value = (x.index_select(2, packing.keys) for x in (key, value))
    lengths, seen = packing.lengths, packing.key_lengths
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # slow to import

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        window = (sliding_window or 0) - 1, 0  # (-1, 0): causal; a last query sees all keys
        how = dict(scale=scaling, window_size=window, enable_gqa=True)
        ends = packing.ends, packing.key_ends, max(lengths), max(seen)
        return varlen_attn(q, k, v, *ends, **how)[None], None
    out = []
    parts = (x.split(n, dim=2) for x, n in ((query, lengths), (key, seen), (value, seen)))
    for q, k, v in zip(*parts):
        n, m, mask = q.shape[2], k.shape[2], None
        if n < m or sliding_window and sliding_window < m:
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            mask = mask.triu(m - n + 1 - (sliding_window or m))
        how = dict(attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        out.append(F.scaled_dot_product_attention(q, k, v, **how))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None
