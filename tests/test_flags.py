"""Each flag of each program: its range, and what a text may not be."""

import importlib
import json
import math
import re
from dataclasses import fields

import pytest
import torch.distributed as dist
from conftest import ALL_ROWS

import eval
import luffy
import verify
from machinery import look, page
from machinery.arguments import Parser, filled, path
from machinery.flags import check_values, make, title, unread
from machinery.processes import InputError, init_processes

PLAIN = luffy.Config
HUGE = "9" * 400
FORKS = "dapo", "exgrpo", "opd", "orz", "prime", "relift", "trapo"
# 0 is refused unless it means something, and so is a negative number.
ZERO = """seed rollouts traces max_trace_tokens trace_advantage sft_coef entropy_coef continuations
    prefix_learns beta1 beta2 weight_decay cache_gib eval_every eval_samples refill replay
    keep replay_from reward_coef sft_problems sft_entropy""".split()
ZERO_OF_EVAL = "seed", "temperature"
NEGATIVE = ["trace_advantage"]
NEEDED = {"eval": ["--bench", "toy"], "look": ["toy"], "verify": ["1", "1"]}
PARSERS = {  # a program -> what makes its parser
    "eval": eval.parse_args,
    "look": look.parse_args,
    "verify": verify.main,
    "report": lambda: page.main(["x"]),
    "compare": lambda: eval.compare(["x"]),
}


class Made(Exception):
    pass


def parser_of(program: str, monkeypatch) -> Parser:
    def stop(parser, *_):
        raise Made(parser)

    with monkeypatch.context() as patched:
        patched.setattr(Parser, "parse_args", stop)
        with pytest.raises(Made) as made:
            PARSERS[program]()
    return made.value.args[0]


def numbers_of(parser: Parser) -> list[str]:
    texts = None, str, filled, path
    return [a.dest for a in parser._actions if a.option_strings and a.type not in texts]


def config_of(fork: str, monkeypatch):
    """-> its Config, and what takes a command line up to its checks."""
    module = importlib.import_module(f"forks.{fork}" if fork else "luffy")
    config = getattr(module, "Config", luffy.Config)
    monkeypatch.setattr(luffy, "Config", config)
    tables = dict.fromkeys(("algo", "shaping"), ())
    return config, lambda argv: check_values(luffy.parse_args(argv, fork or "luffy"), tables)


def refused(take, argv: list[str], capsys) -> str:
    """What was said, or "" if it was taken. Anything but a refusal goes through."""
    try:
        take(argv)
    except InputError as error:
        return str(error)
    except SystemExit as error:
        assert error.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    return ""


def assert_range(name: str, take, capsys, needed=(), zero=ZERO) -> None:
    for value in ("-1", "0", "nan", "inf", "-inf", "1e300", HUGE, "-" + HUGE, "", "x"):
        said = refused(take, [*needed, f"--{name}={value}"], capsys)
        good = value == "0" and name in zero or value == "-1" and name in NEGATIVE
        assert f"--{name}" in said if not good else not said, (name, value, said)


@pytest.mark.parametrize("fork", ["", *FORKS])
def test_each_number_of_a_config_has_a_range(fork, monkeypatch, capsys):
    config, take = config_of(fork, monkeypatch)
    for f in fields(config):
        is_new = not fork or f.name not in {f.name for f in fields(PLAIN)}
        if is_new and f.type not in (str, bool):
            assert_range(f.name, take, capsys)


@pytest.mark.parametrize("program", PARSERS)
def test_each_number_of_a_program_has_a_range(program, monkeypatch, capsys):
    parser = parser_of(program, monkeypatch)
    for name in numbers_of(parser):
        zero = ZERO_OF_EVAL if program == "eval" else ZERO
        assert_range(name, parser.parse_args, capsys, NEEDED[program], zero)


def test_a_flag_without_a_value_is_no_traceback(monkeypatch, capsys):
    """`--flag=--`, no UTF-8, and an empty text where only some text means something."""
    _, take = config_of("", monkeypatch)
    needed = {f.name for f in fields(luffy.Config) if f.type is str and f.default}
    needed |= {"out", "dry_run"}
    flags = {f"--{f.name}": (take, f.name in needed) for f in fields(luffy.Config)}
    is_path = {"--out"}
    for program in PARSERS:
        parser = parser_of(program, monkeypatch)
        for action in parser._actions:
            for flag in action.option_strings:
                flags[f"{program} {flag}"] = parser.parse_args, action.type in (filled, path)
                is_path |= {f"{program} {flag}"} if action.type is path else set()
    for name, (take, needs_text) in flags.items():
        flag, too_long = name.split()[-1], ["x" * 300] * (name in is_path)
        for value in ("--", "\udcff", *[""] * needs_text, *too_long):
            assert flag in refused(take, [f"{flag}={value}"], capsys), (name, value)


def test_a_recipe_in_a_models_config_is_checked_as_flags_are(tmp_path):
    for recipe, words in (
        ({"stepz": 5}, "--stepz: no such flag"),
        ({"steps": math.inf}, "--steps inf: expected int"),
        ({"algo": ["sft"]}, "--algo ['sft']: expected str"),
        ({"steps": "5"}, "--steps '5': expected int"),
        ({"lr": None}, "--lr None: expected float"),
        ({"steps": True}, "--steps True: expected int"),
        ({"clip": "no"}, "--clip 'no': expected float or NoneType"),
        ({"gamma": math.inf}, "--gamma inf: must be at least 1e-06 and at most 1e+06"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            check_values(make(luffy.Config, {}, recipe, {}), {})
    check_values(make(luffy.Config, {}, {"lr": 1, "clip": None}, {}), {})
    for text, taken in (("[]", True), ("null", True), ("5", True), ('{"luffy_recipe": 5}', False)):
        (tmp_path / "config.json").write_text(text)  # load_config refuses the first three
        said = "" if taken else "config.json: its luffy_recipe is no object"
        assert said in refused(luffy.parse_args, ["--model", str(tmp_path)], None)


def said_of(*argv) -> list[str]:
    cfg = luffy.parse_args(list(argv))
    lines = title(cfg, luffy.parse_args, luffy.SHAPINGS[cfg.shaping]).split("\n")[1:]
    return [line.split()[1] for line in lines if line.startswith("unused")]


def test_a_flag_that_nothing_reads_is_said():
    assert said_of("--algo", "on_policy", "--gamma", "0.3", "--seed", "2") == ["--gamma"]
    assert said_of("--algo", "mixed", "--gamma", "0.3", "--sft_coef", "2") == [
        "--gamma",
        "--sft_coef",
    ]
    assert said_of("--gamma", "0.3", "--eval_data", "none", "--eval_every", "5") == ["--eval_every"]
    assert said_of("--algo", "on_policy_shaped", "--gamma", "0.3", "--clip", "0.1") == []
    assert said_of("--algo", "trsft", "--gamma", "0.3") == []
    assert said_of("--algo", "rl_sft", "--sft_coef", "0.3", "--temperature", "0.5") == []
    sft = ["--temperature", "0.5", "--tis_cap", "2", "--clip_high", "1"]
    assert said_of("--algo", "sft", *sft) == ["--temperature", "--clip_high", "--tis_cap"]
    for name in ALL_ROWS:  # none has a field that it does not read
        cfg = luffy.parse_args(["--algo", name])
        assert not unread(cfg, luffy.Config(), luffy.SHAPINGS[cfg.shaping]), name


def test_relift_takes_no_problem_without_a_trace(monkeypatch):
    relift = importlib.import_module("forks.relift")
    with pytest.raises(InputError, match="--untraced rollout: not with relift"):
        relift.check(relift.Config(rollouts=8, traces=0, untraced="rollout"), 1)


# What takes as long as it is large
SIZES = """steps problems_per_step rollouts eval_samples graders max_prompt_tokens tensor_parallel
    max_response_tokens max_trace_tokens updates_per_step continuations""".split()
RUN = """--steps 2 --problems_per_step 4 --max_response_tokens 16 --max_trace_tokens 96 --clip 0.2
    --eval_data none --graders 1 --token_budget 300 --tis_cap 2""".split()


def ends_of(f) -> list[float]:
    if f.type in (str, bool):
        return []
    limits = f.metadata["limits"]
    ends = {
        max(limits["low"], limits["above"] + 1e-12),
        min(limits["high"], limits["below"] - 1e-3),
    }
    return sorted(end for end in ends if end < 9 or f.name not in SIZES)


@pytest.mark.slow
def test_both_ends_of_each_range_train(tmp_path, tiny_model, monkeypatch):
    """What `check` lets through overflows nowhere: weights and metrics stay finite."""
    monkeypatch.setattr(luffy, "report", lambda out: None)
    trained = []
    for f, end in [(field, end) for field in fields(luffy.Config) for end in ends_of(field)]:
        value, out = int(end) if f.type is int else end, tmp_path / f"{f.name}{end}"
        argv = [*RUN, "--model", str(tiny_model), f"--{f.name}={value}", "--out", str(out)]
        init_processes("cpu")
        try:
            cfg = luffy.parse_args(argv)
            luffy.check(cfg, 1)
            luffy.train(cfg, str(tiny_model))
            trained.append(f"{f.name}={value}")
        except InputError as error:  # no prompt is as short, nothing is as long
            assert f"--{f.name}" in str(error) or "no problem is left" in str(error)
            continue
        finally:
            dist.destroy_process_group()
        rows = [json.loads(row) for row in (out / "metrics.jsonl").open()]
        assert len(rows) == min(cfg.steps, 2), trained[-1]
        assert all(math.isfinite(x) for row in rows for x in row.values()), (trained[-1], rows)
    assert len(trained) > 40, trained
