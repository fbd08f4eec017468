"""Checkpoints: a model that from_pretrained loads, the shards of its optimizer, their checksums.

One is complete or absent: written under another name, read back and on the disk, then renamed.
"""

import json
import re
import shutil
import zlib
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from machinery.files import read_json, sync, write, writing
from machinery.flags import Config
from machinery.kinds import GenerationConfig, PreTrainedModel, Tokenizer
from machinery.processes import InputError, gather, progress, rank, world_size

CHECKSUMS = "checksums.json"  # file -> its bytes and their CRC-32; the last file that is written
TRIED = 2**26  # bytes of the weights that are written before the first step


# ------------------------------------------------------------------ those that are there
def checkpoints(directory: Path) -> list[Path]:
    """The newest last. A half-written one has another name, and so has somebody's copy."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def to_resume(directory: Path) -> Path | None:
    """The newest checkpoint, by all ranks. Raises InputError if it is damaged."""
    *older, newest = [None, *gather(checkpoints(directory))[0]]
    problem = newest and damage(newest)
    if not problem:
        return newest
    whole = next((c for c in reversed(older[1:]) if not damage(c)), None)
    advice = (
        f"{whole.name} is the newest that resumes: remove {newest.name}, and the same command goes "
        "on from there"
        if whole
        else "No other one resumes: name another --out, and with --model one that loads"
    )
    raise InputError(f"{newest} is damaged: {problem}. {advice}")


def damage(checkpoint: Path) -> str:
    """What is wrong with its files, or "". By all ranks, which share the reading."""
    try:
        sums = read_json(checkpoint / CHECKSUMS)
        unknown = {p.name for p in checkpoint.glob("*.safetensors")} - sums.keys() or not sums
        if unknown or not all(isinstance(x, list) and len(x) == 2 for x in sums.values()):
            raise InputError("not the bytes and checksum of each file")
    except InputError as error:
        return f"it has no {CHECKSUMS} that can be read ({error})"
    found = ""
    with progress("check", len(sums)) as bar:
        for name, expected in list(sums.items())[rank() :: world_size()]:
            file = checkpoint / name
            try:
                if (size := file.stat().st_size) != expected[0]:
                    found = f"{name} has {size:,} of its {expected[0]:,} bytes"
                elif checksum(file) != expected:
                    found = f"{name} has other bytes than were saved"
            except OSError as error:  # it is not there, or the disk has lost a block of it
                found = f"{name} cannot be read ({error.strerror})"
            bar.update(world_size())
    return next(filter(None, gather(found)), "")


def checksum(file: Path) -> list[int]:
    size = crc = 0
    with file.open("rb") as opened:
        while part := opened.read(2**22):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return [size, crc]


# ------------------------------------------------------------------ saving
def save_model(
    directory: Path, model: PreTrainedModel, tokenizer: Tokenizer, **some: dict[str, Tensor]
) -> None:
    """Anew. some: state_dict, not all of its weights."""
    shutil.rmtree(directory, ignore_errors=True)
    with writing(directory, RuntimeError, SafetensorError):
        model.save_pretrained(directory, **some)
        tokenizer.save_pretrained(directory)
        for_older_readers(directory)


def for_older_readers(directory: Path) -> None:
    """transformers 4 looks for RoPE in other places, and takes 10000 if there is nothing."""
    file = directory / "config.json"
    config = read_json(file)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # else it has several, by kind of layer
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        plain = scaling.get("rope_type", "default") == "default"
        moved = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        config |= moved | {"rope_scaling": None if plain else scaling}
        write(file, json.dumps(config, indent=2))
    file = directory / "tokenizer_config.json"
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":  # the same class by its older name
        write(file, json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def save_state(file: Path, state: Any) -> None:
    """A rank's share of something; read back."""
    with writing(file, RuntimeError):
        torch.save(state, file)
        load_state(file)


def load_state(file: Path) -> Any:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def complete(half_written: Path, final: Path) -> None:
    """By all ranks, when each has written its files: on the disk, with checksums, then renamed."""
    # A rank on another node may not see all of them yet; each one was seen by who wrote it.
    names = sorted(set(sum(gather([p.name for p in half_written.iterdir()]), [])))
    mine = {}
    with writing(half_written, SafetensorError):
        for file in (half_written / name for name in names[rank() :: world_size()]):
            sync(file)
            mine[file.name] = checksum(file)
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as weights:
                    weights.keys()
    sums: dict[str, list[int]] = {}
    for some in gather(mine):
        sums |= some
    if rank() == 0:
        write(half_written / CHECKSUMS, json.dumps(sums, indent=1))
        with writing(final):
            half_written.rename(final)
            sync(final.parent)


def spare(directory: Path) -> list[Path]:
    """The optimizers' shards that the next save removes first: of all but the newest checkpoint."""
    return [file for old in checkpoints(directory)[:-1] for file in old.glob("*-[0-9]*.pt")]


def remove(checkpoint: Path) -> None:
    """Renamed first, so that none is there in part."""
    gone = checkpoint.with_name(f".{checkpoint.name}.tmp")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def remove_half_written(directory: Path) -> None:
    """What a run that is dead was writing."""
    for path in [*directory.glob(".*.tmp"), *directory.glob("samples/.*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ------------------------------------------------------------------ before the first step
def number_saved(cfg: Config) -> int:
    """Checkpoints that a run has at a time."""
    every = ceil(cfg.steps / cfg.save_every)
    return min(every, cfg.keep + 1) if cfg.keep else every


def sizes(model: PreTrainedModel, states: list[Any]) -> tuple[int, int]:
    """Bytes of a checkpoint: of the weights, of all ranks' shards."""
    mine = sum(x.nbytes for x in tree_leaves(states) if isinstance(x, Tensor))
    return sum(p.nbytes for p in model.parameters()), sum(gather(mine))


def try_state(file: Path, state: Any) -> None:
    """Of each tensor one number is saved, and loads. A view of it would be saved whole."""
    first = tree_map(lambda x: x.flatten()[:1].clone() if isinstance(x, Tensor) else x, state)
    save_state(file, first)


def try_model(scratch: Path, model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> None:
    """Save what a checkpoint has, the first of its weights alone, and have transformers read it.

    Raises InputError if it cannot be saved, or is not read as it was. text: for the tokenizer.
    """
    import transformers

    make_savable(model.generation_config)
    state, some, size = model.state_dict(), {}, 0
    for name, tensor in state.items():
        some[name], size = tensor, size + tensor.nbytes
        if size > TRIED:
            break
    try:
        save_model(scratch, model, tokenizer, state_dict=some)
        for file in scratch.iterdir():
            with writing(file):
                sync(file)
        config = transformers.AutoConfig.from_pretrained(scratch)
        loaded = transformers.AutoTokenizer.from_pretrained(scratch)
        if (scratch / "generation_config.json").exists():
            transformers.GenerationConfig.from_pretrained(scratch)
        for name in ("rope_parameters", "vocab_size", "max_position_embeddings"):
            was, now = (getattr(c, name, None) for c in (model.config, config))
            if was != now:
                raise ValueError(f"{name} is {was} and is read as {now}")
        if loaded(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ValueError(f"its tokenizer gives other tokens for {text!r:.60}")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(
            f"--model {model.config.name_or_path}: a checkpoint of it would not be one that "
            f"transformers reads as it was ({error}). Mend it in the model's directory"
        ) from error
    shutil.rmtree(scratch)


def make_savable(generation: GenerationConfig | None) -> None:
    """transformers loads a temperature without do_sample, but it does not save it."""
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True
