"""Does a model compute what we take it to compute? Asked once at load, on random sequences.

The reference is the model's own forward in evaluation mode, of one sequence, with transformers'
eager attention. What packed rows or a cache of ours change beyond rounding is not used then.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from machinery.batches import Trajectory, collate
from machinery.kinds import PreTrainedModel
from machinery.processes import InputError, device, say

LENGTHS = 40, 24  # tokens of the sequences
PROMPT = 9  # of them, where two share it
WINDOW = 16  # of sliding attention meanwhile: longer ones would not show in such sequences
WINDOWS = "sliding_window", "attention_chunk_size", "index_topk", "keep_window_size"
NEAR = 8  # a leak between sequences is in their first tokens: of so many the mean is taken
# Noise on what routers see. PhiMoE's router_jitter_noise also counts where nothing is random.
JITTER = "jitter_noise", "input_jitter_noise"
ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 0.25}  # nats, of such a mean


def owners(model: PreTrainedModel) -> list[Any]:
    """All that may hold a number which a forward pass reads: modules and configs."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    nested = [getattr(c, name) for c in configs.values() for name in getattr(c, "sub_configs", {})]
    return [*configs.values(), *filter(None, nested), *model.modules()]


def switch_off_dropout(model: PreTrainedModel) -> None:
    """All that is random in train mode: π_old and π_θ are one function of the weights."""
    for owner in owners(model):
        is_dropout = isinstance(owner, nn.modules.dropout._DropoutNd)
        for name, value in list(vars(owner).items()):
            random = "drop" in name or name in JITTER or is_dropout and name == "p"
            if random and isinstance(value, float):
                setattr(owner, name, 0.0)


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    found = [(o, name, vars(o).get(name)) for o in owners(model) for name in WINDOWS]
    found = [(o, name, value) for o, name, value in found if type(value) is int]
    for owner, name, value in found:
        setattr(owner, name, min(value, WINDOW))
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


@contextmanager
def other_weights(model: PreTrainedModel) -> Iterator[None]:
    """Random ones. In an untrained model biases are 0, and a leak or a cap does not show."""
    generator = torch.Generator(device()).manual_seed(0)
    kept = [(p, p.data) for p in model.parameters() if p.is_floating_point()]
    for p, data in kept:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        p.data = noise * p.shape[-1] ** -0.5 if p.dim() > 1 else data + 0.1 * noise
    try:
        yield
    finally:
        for p, data in kept:
            p.data = data


def random_sequences(model: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    return [torch.randint(size, (n,), generator=generator).tolist() for n in LENGTHS]


def own_logps(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """By the model alone: log-probs (S - 1,) of all tokens but the first."""
    tokens = torch.tensor([ids], device=device())
    logp = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logp.gather(1, tokens[0, 1:, None])[:, 0]


def gap(found: Tensor, own: Tensor) -> float:
    """The largest mean difference of NEAR log-probs in a row."""
    parts = (found - own[: len(found)]).abs().split(NEAR)
    return torch.stack([part.mean() for part in parts]).max().item()


def of_policy(policy: nn.Module, sequences: list[list[int]], prompt: int = 1) -> list[Tensor]:
    """Log-probs of each sequence's tokens after its first `prompt`, by one micro-batch."""
    trajectories = [
        Trajectory(i, SimpleNamespace(prompt_ids=ids[:prompt]), ids[prompt:])
        for i, ids in enumerate(sequences)
    ]
    return list(policy(collate(trajectories))[0].split([len(t.response) for t in trajectories]))


def differs(model: PreTrainedModel, compute: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> str:
    """How far pairs of log-probs are apart, or what went wrong; "" if by no more than rounding.

    With the model's weights, and with others.
    """
    try:
        gaps = [gap(found, own) for found, own in compute()]
        with other_weights(model):
            gaps += [gap(found, own) for found, own in compute()]
    except InputError:
        raise
    except Exception as error:  # of 150 models' own code
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    far = [x for x in gaps if not x <= ROUNDING.get(model.dtype, 0.25)]  # NaN is no rounding
    return f"log-probs differ by {max(far):.2g} from the model's own" if far else ""


def refused(model: PreTrainedModel, path: Any, problem: str) -> InputError:
    return InputError(
        f"--model {path}: a {model.config.model_type} cannot be trained here. Its log-probs are no "
        f"function of weights and tokens before, or cannot be had: {problem}. Take a causal "
        "language model of another architecture"
    )


@torch.no_grad()
def choose_attention(policy: nn.Module, path: Any) -> None:
    """Packed rows, or one trajectory at a time where they differ. InputError if that does, too."""
    model = policy.model
    (one, other), own = random_sequences(model), model.config._attn_implementation
    sequences = [one, other, other[:PROMPT] + one[PROMPT:]]  # the last two share a prompt

    def pairs(attention: str) -> Iterator[tuple[Tensor, Tensor]]:
        # Not in train mode: what is random there, or routes otherwise, would agree with itself.
        model.eval().set_attn_implementation("eager")
        whole = [own_logps(model, ids)[PROMPT - 1 :] for ids in sequences]
        halves = [own_logps(model, ids[: len(ids) // 2])[PROMPT - 1 :] for ids in sequences]
        model.train().set_attn_implementation(attention)
        found = of_policy(policy, sequences, PROMPT)
        yield from zip(found, whole)
        yield from ((f[: len(half)], half) for f, half in zip(found, halves))  # sees no future?

    with short_windows(model):
        packed = differs(model, partial(pairs, "packed"))
        if not packed and model.config._attn_implementation == "packed":
            return
        for attention in dict.fromkeys((own, "eager")):
            if not (alone := differs(model, partial(pairs, attention))):
                break
    model.train().set_attn_implementation(attention)
    if alone:
        raise refused(model, path, alone)
    say(f"attention   one trajectory at a time; packed ones: {packed or 'not for this model'}")


def leaves_out(policy: nn.Module) -> bool:
    """Do some parameters get no gradient from a short sequence? Unlucky experts, image encoders."""
    (logp,) = of_policy(policy, [random_sequences(policy.model)[0][:3]])
    found, reached, new = set(), set(), [logp.grad_fn]
    while new:
        node = new.pop()
        if node is not None and node not in found:
            found.add(node)
            reached.add(getattr(node, "variable", None))
            new += [following for following, _ in node.next_functions]
    return any(p.requires_grad and p not in reached for p in policy.parameters())
