"""A dataclass as a command line: each field is a flag, with its help and its range in one line."""

import argparse
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import Field, field, fields
from math import inf
from pathlib import Path
from typing import Any, get_args

import torch

from machinery import track
from machinery.arguments import LARGEST, Parser, filled, outside, path
from machinery.processes import InputError
from machinery.samplers import sampler_kind

Config = Any  # luffy.Config, wherever the machinery names it: an import would be a circle


def flag(
    default: Any,
    help: str,
    low: float = -LARGEST,
    high: float = LARGEST,
    *,
    above: float = -inf,
    below: float = inf,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a config: low <= value <= high, above < value < below, or one of `choices`.

    A text may be empty if it is so by default, where that means something.
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "limits": limits, "choices": choices})


def parse(config: type, argv: list[str] | None, description: str) -> dict[str, Any]:
    """The flags that are given -> field -> value. Exits with a message if one is malformed."""
    parser = Parser(description=description)
    alone: dict[str, Any] = {f.name: True for f in fields(config) if f.type is bool}
    alone["dry_run"] = "this"  # what a flag means without a value
    never_empty = {f.name for f in fields(config) if f.default} | {"dry_run"}
    for f in fields(config):
        text = filled if f.name in never_empty else str
        kind = {bool: truth, float | None: float_or_none, str: text}.get(f.type, f.type)
        parser.add_argument(
            f"--{f.name}",
            type=(lambda text: str(path(text))) if f.name == "out" else kind,
            metavar=getattr(f.type, "__name__", str(f.type)),
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"),
            **(dict(nargs="?", const=alone[f.name]) if f.name in alone else {}),
        )
    given = vars(parser.parse_args(argv))
    if given.get("clip", 0) is None:  # --clip none: on neither side, whatever the row has
        given.setdefault("clip_high", None)
    return given


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("true or false")
    return text.lower() == "true"


def float_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def make(
    config: type, row: dict[str, Any], recipe: dict[str, Any], given: dict[str, Any]
) -> Config:
    """The config of an algorithm's row, then a model's recipe, then flags.

    Raises InputError on a recipe, which stands in a file, that has other fields, or of other kinds.
    """
    by_name = {f.name: f for f in fields(config)}
    wrong = [f"--{name}: no such flag" for name in sorted(recipe.keys() - by_name.keys())]
    wrong += filter(None, (no_kind(by_name[n], v) for n, v in recipe.items() if n in by_name))
    if wrong:
        raise InputError(
            f"--model {given.get('model')}: the luffy_recipe in its config.json has {wrong[0]}"
        )
    return config(**row | recipe | given)


def no_kind(f: Field, value: Any) -> str:
    """What is wrong with the type of a field's value; "" if it is one of its own."""
    kinds = get_args(f.type) or (f.type,)
    if type(value) in kinds or type(value) is int and float in kinds:
        return ""
    return f"--{f.name} {value!r:.60}: expected {' or '.join(kind.__name__ for kind in kinds)}"


def check_values(cfg: Config, tables: Mapping[str, Iterable[str]]) -> None:
    """Raise InputError on a value out of its range. tables: field -> the names it may have."""
    for f in fields(cfg):
        value, m = getattr(cfg, f.name), f.metadata
        choices: Container = tables.get(f.name, m["choices"])
        if choices and value not in choices:
            known = ", ".join(filter(None, choices))
            raise InputError(f"--{f.name} {value}: expected one of {known}")
        if words := no_kind(f, value):  # by a row or a schedule
            raise InputError(words)
        if type(value) in (int, float) and (words := outside(value, **m["limits"])):
            raise InputError(f"--{f.name} {value!s:.60}: {words}")


def check(
    cfg: Config, ranks: int, tables: Mapping[str, Iterable[str]], steps: Iterable[Config]
) -> None:
    """Raise InputError on a config that cannot run, before anything is loaded.

    tables: field -> the names it may have; steps: the config of each step, as a schedule has it.
    """
    check_values(cfg, tables)
    check_schedule(cfg, steps, tables)
    if not cfg.dry_run:  # are they installed?
        track.check(cfg.track)
        sampler_kind(cfg.sampler, cfg.samples)
    shards = cfg.updates_per_step * ranks
    rows = cfg.rollouts + (cfg.traces if cfg.baseline == "group" else 0)
    if rows < 2 and not (cfg.rollouts == 0 and cfg.trace_advantage is not None):
        raise InputError(
            f"--rollouts {cfg.rollouts} --traces {cfg.traces} --baseline {cfg.baseline}: an "
            "advantage needs at least two rewards"
        )
    rules = cfg.route, cfg.advantage, cfg.baseline, cfg.continuations, cfg.rollouts > 0
    as_any_group = rules == ("all", "group", "group", 0, True)
    if cfg.untraced == "rollout" and cfg.traces + cfg.continuations and not as_any_group:
        raise InputError(
            f"--untraced rollout: not with --algo {cfg.algo}, whose advantages or routes take the "
            "last of a group for a trace; --untraced drop leaves such problems out"
        )
    if cfg.continuations > cfg.rollouts:
        raise InputError(
            f"--continuations {cfg.continuations}: they are some of the rollouts, so at most "
            f"--rollouts {cfg.rollouts}"
        )
    if cfg.continuations and cfg.max_trace_tokens > cfg.max_response_tokens:
        raise InputError(
            f"--max_trace_tokens {cfg.max_trace_tokens}: with --continuations at most "
            f"--max_response_tokens {cfg.max_response_tokens}, for a prefix is part of a response"
        )
    if cfg.rollouts + cfg.traces == 0:
        raise InputError("--rollouts 0 --traces 0: a group needs one of them")
    if cfg.prefix != "none" and not cfg.continuations:
        raise InputError(f"--prefix {cfg.prefix}: for how many rollouts? --continuations N")
    if cfg.token_mean and cfg.sequence_mean:
        raise InputError("--token_mean and --sequence_mean: Z can be one of them only")
    if cfg.problems_per_step % shards:
        raise InputError(
            f"--problems_per_step {cfg.problems_per_step}: must be a multiple of {shards} "
            f"(--updates_per_step {cfg.updates_per_step} x {ranks} processes)"
        )
    if ranks % cfg.tensor_parallel:
        raise InputError(
            f"--tensor_parallel {cfg.tensor_parallel}: must divide the number of processes, {ranks}"
        )


# What a schedule may change: read anew in each step. The rest is read once, when a run starts.
SCHEDULED = {"route", "shaping", "gamma", "clip", "shape_rollouts", "tis_cap", "baseline"}
SCHEDULED |= {"trace_advantage", "normalize_std", "token_mean", "rl_coef", "sft_coef"}
SCHEDULED |= {"entropy_coef", "lr", "max_grad_norm", "advantage", "objective", "clip_high"}
SCHEDULED |= {"sequence_mean", "prefix_learns"}


def check_schedule(
    cfg: Config, steps: Iterable[Config], tables: Mapping[str, Iterable[str]]
) -> None:
    """Raise InputError if a config of a step has a value that it cannot have."""
    for now in set(steps):
        check_values(now, tables)
        for f in fields(cfg):
            if getattr(now, f.name) != getattr(cfg, f.name) and f.name not in SCHEDULED:
                raise InputError(f"--schedule {cfg.schedule}: cannot change {f.name} in a run")


def directory(model: str, algo: str, seed: int) -> str:
    """The run directory, if --out names none."""
    path = Path(model)
    name = "-".join(path.parts[-2:]).removeprefix(path.anchor)
    return f"runs/{name}-{algo}-seed{seed}"


def title(cfg: Config, parse_args: Callable[[list[str]], Config], shaping: tuple) -> str:
    """What runs, how it differs from plain LUFFY, and what is of no effect in it."""
    plain = ["--model", cfg.model]
    lines = [f"{cfg.algo} on {cfg.model} in {cfg.out}: luffy{differences(cfg, parse_args(plain))}"]
    lines += unread(cfg, parse_args([*plain, "--algo", cfg.algo]), shaping)
    if cfg.lenient:
        note = "a repeated question counts, for what it comes to is the answer: docs/rewards.md"
        lines.append(f"lenient     {note}")
    return "\n".join(lines)


def has_gamma(f: Callable) -> bool:
    log_x = torch.linspace(-5, 0, 9)
    return not torch.equal(f(log_x, 0.1, log_x.exp()), f(log_x, 0.2, log_x.exp()))


# Flags; what a run has to have, or it reads none of them; has it? s: its row of SHAPINGS
READ_WITH: list[tuple[str, str, Callable[[Config, Any], bool]]] = [
    ("shaping trace_advantage untraced", "traces", lambda cfg, s: with_traces(cfg)),
    (
        "gamma",
        "a shaping with γ",
        lambda cfg, s: cfg.shape_rollouts or with_traces(cfg) and has_gamma(s.f),
    ),
    (
        "sft_coef",
        "an SFT loss",
        lambda cfg, s: with_traces(cfg) and (s.is_sft or cfg.objective != "mixed"),
    ),
    ("prefix_learns", "continuations", lambda cfg, s: cfg.continuations),
    ("temperature clip clip_high tis_cap", "rollouts", lambda cfg, s: cfg.rollouts),
    ("shape_rollouts normalize_std", "rollouts", lambda cfg, s: cfg.rollouts),
    ("eval_every eval_samples", "eval_data", lambda cfg, s: cfg.eval_data not in ("", "none")),
    ("sampler cache_gib tensor_parallel", "a sampler", lambda cfg, s: cfg.samples),
]


def with_traces(cfg: Config) -> bool:
    return cfg.traces + cfg.continuations > 0


def unread(cfg: Config, row: Config, shaping: Any) -> list[str]:
    """A line for each flag that is not as in the algorithm's row, and that nothing reads."""
    if type(cfg).__base__ is not object or cfg.schedule != "constant":
        return []  # a fork's functions, or the fields of another step, may read more
    return [
        f"unused      --{name} {getattr(cfg, name)}: --algo {cfg.algo} runs without {what} here"
        for names, what, has in READ_WITH
        for name in names.split()
        if getattr(cfg, name) != getattr(row, name) and not has(cfg, shaping)
    ]


def differences(cfg: Config, plain: Config) -> str:
    """How a config differs from another one, in words; but in what is said elsewhere."""
    same = {"model", "algo", "out", "seed", "dry_run", "preflight", "note", "track"}
    names = [f.name for f in fields(cfg) if f.name not in same]
    differ = [f"{n} {getattr(cfg, n)}" for n in names if getattr(cfg, n) != getattr(plain, n)]
    return f", but {', '.join(differ)}" if differ else ""
