"""Bad input ends at once, with a message that names the flag and the fix."""

import json
import shutil
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch.distributed as dist
from conftest import run

import luffy
from machinery import toy
from machinery.processes import InputError
from machinery.run_directory import Run
from luffy import ALGORITHMS, Config, check, parse_args
from machinery.flags import differences


@pytest.fixture
def refused(monkeypatch):
    """What luffy.py says of its arguments, in this process: to start another takes seconds."""

    def refused(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["luffy.py", *map(str, args)])
        try:
            with pytest.raises(InputError) as error:
                luffy.main()
        finally:
            dist.destroy_process_group()
        return str(error.value)

    return refused


@pytest.mark.parametrize(
    "args, words",
    [
        (["--gama", "1"], "--gama"),
        (["--steps", "x"], "--steps"),
        (["--token_mean", "maybe"], "true or false"),
        (["--step", "3"], "--step"),
    ],
)
def test_flags_that_do_not_parse(capsys, args, words):
    with pytest.raises(SystemExit) as exit:
        parse_args(args)
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_no_clip_is_no_clip_on_either_side():
    assert parse_args(["--algo", "dapo", "--clip", "none"]).clip_high is None
    assert parse_args(["--algo", "dapo", "--clip", "0.1"]).clip_high == 0.28
    assert parse_args(["--algo", "cispo"]).clip_high == 4.0  # its cap alone


def test_a_lenient_run_says_what_it_rewards(monkeypatch, capsys, tiny_model):
    monkeypatch.setattr(luffy, "train", lambda *args: None)
    for lenient in ("true", "false"):
        flags = ["--model", str(tiny_model), "--lenient", lenient]
        monkeypatch.setattr(sys, "argv", ["luffy.py", *flags])
        luffy.main()
        dist.destroy_process_group()
        notes = [line for line in capsys.readouterr().out.splitlines() if "docs/rewards" in line]
        assert len(notes) == (lenient == "true")


def test_every_row_names_fields_and_is_reached_by_its_name():
    names = {f.name for f in fields(Config)}
    for algo, row in ALGORITHMS.items():
        assert row.keys() <= names
        cfg = parse_args(["--algo", algo, "--model", "Qwen/Qwen2.5-Math-7B"])
        assert all(getattr(cfg, k) == v for k, v in row.items())
        assert cfg.rollouts + cfg.traces in (1, 4, 8, 9)


def test_the_papers_recipe_is_the_default_and_the_toy_changes_sizes_only():
    cfg = parse_args(["--model", "Qwen/Qwen2.5-Math-7B"])
    paper = dict(
        problems_per_step=128,
        rollouts=7,
        traces=1,
        updates_per_step=2,
        lr=1e-6,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.01,
        max_grad_norm=1.0,
        temperature=1.0,
        max_prompt_tokens=1024,
        max_response_tokens=8192,
        gamma=0.1,
        steps=500,
        clip=None,
        normalize_std=False,
        entropy_coef=2.5e-4,
        shaping="luffy",
    )
    assert {k: getattr(cfg, k) for k in paper} == paper
    arms = {
        "rollouts",
        "traces",
        "shaping",
        "gamma",
        "clip",
        "shape_rollouts",
        "baseline",
        "trace_advantage",
        "normalize_std",
        "token_mean",
        "sft_coef",
    }
    assert not arms & toy.RECIPE.keys()
    assert parse_args(["--algo", "sft"]).lr == toy.RECIPE["lr"]
    assert parse_args(["--lr", "1", "--clip", "none", "--token_mean", "true"]).token_mean is True


@pytest.mark.parametrize(
    "args, words",
    [
        (["--algo", "ppo"], ["--algo ppo", "mixed_shaped"]),
        (["--route", "x"], ["--route x", "all"]),
        (["--schedule", "x"], ["--schedule x", "constant"]),
        (["--lr", "nan"], ["--lr nan", "above 0"]),
        (["--gamma", "inf"], ["--gamma inf"]),
        (["--beta1", "1"], ["--beta1 1", "below 1"]),
        (["--seed", "9" * 401], ["--seed 9", "at most"]),
        (["--problems_per_step", "9"], ["--problems_per_step 9", "multiple of 2"]),
        (["--traces", "2"], ["--traces 2"]),
        (["--rollouts", "0", "--traces", "0"], ["--rollouts 0", "two rewards"]),
        (["--rollouts", "0"], ["two rewards"]),
        (["--algo", "sft", "--traces", "0"], ["--rollouts 0 --traces 0"]),
        (["--prefix", "uniform"], ["--prefix uniform", "--continuations"]),
        (["--continuations", "8"], ["--continuations 8", "--rollouts 7"]),
        (["--algo", "uft", "--max_trace_tokens", "9000"], ["--max_trace_tokens 9000"]),
        (["--algo", "gspo", "--token_mean", "true"], ["--token_mean", "--sequence_mean"]),
        (["--rl_coef", "0"], ["--rl_coef 0", "at least"]),
        (["--algo", "rl_sft", "--rollouts", "1"], ["two rewards"]),
        (["--gamma", "0"], ["--gamma"]),
        (["--shaping", "cubic"], ["--shaping cubic", "luffy"]),
        (["--updates_per_step", "0"], ["--updates_per_step", "at least 1"]),
        (["--tensor_parallel", "0"], ["--tensor_parallel", "at least 1"]),
        (["--save_every", "0"], ["--save_every", "at least 1"]),
        (["--temperature", "0"], ["--temperature"]),
        (["--tis_cap", "0"], ["--tis_cap"]),
        (["--cache_gib", "-1"], ["--cache_gib"]),
        (["--sampler", "sglang"], ["--sampler", "vllm"]),
        (["--track", "mlflow"], ["--track mlflow", "one of wandb, trackio, tensorboard"]),
        (["--tensor_parallel", "2"], ["--tensor_parallel 2"]),
    ],
)
def test_configurations_that_cannot_run(args, words):
    with pytest.raises(InputError) as error:
        check(parse_args(args), ranks=1)
    assert all(word in str(error.value) for word in words)


def test_vllm_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("machinery.samplers.find_spec", lambda name: None)
    cfg = parse_args(["--sampler", "vllm"])
    with pytest.raises(InputError, match="pip install -r requirements.txt"):
        check(cfg, ranks=1)
    check(parse_args(["--sampler", "vllm", "--dry_run"]), ranks=1)
    real = parse_args(["--model", "Qwen2.5-Math-7B"])  # auto: on a GPU, vLLM
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(InputError, match="vLLM is not installed"):
        check(real, ranks=8)
    check(parse_args([]), ranks=1)  # the toy needs none


def test_trackers_that_are_not_installed(monkeypatch, tmp_path):
    cfg = parse_args(["--track", "wandb"])
    (tmp_path / "wandb").mkdir()  # its own logs, where a run was started: no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="--track wandb: not installed; pip install wandb"):
        check(cfg, ranks=1)
    check(replace(cfg, dry_run="1x80"), ranks=1)


def dry_run(tiny_model, tmp_path) -> tuple:
    (tmp_path / "model").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "model")
    return "--model", tmp_path / "model", "--dry_run", "2x80", "--out", tmp_path / "run"


def test_a_dry_run_needs_no_weights_and_leaves_nothing(tiny_model, tmp_path, monkeypatch, capsys):
    flags = dry_run(tiny_model, tmp_path)
    monkeypatch.setattr(sys, "argv", ["luffy.py", *map(str, flags)])
    luffy.main()
    out = capsys.readouterr().out
    assert out.count(" parameters") == 1 and "fits in 78.8 GiB" in out
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="multiple of 6"):
        check(parse_args(["--model", "Qwen2.5-Math-7B", "--dry_run", "3x80"]), 3)


@pytest.mark.slow  # its quicker relative: one process
def test_a_dry_run_of_two_processes_says_it_once(tiny_model, tmp_path):
    out = run("luffy.py", *dry_run(tiny_model, tmp_path), ranks=2).stdout
    assert out.count(" parameters") == 1 and not (tmp_path / "run").exists()


def test_a_response_longer_than_the_context(refused, tiny_model, tmp_path):
    error = refused("--model", tiny_model, "--out", tmp_path / "run", "--max_response_tokens", 300)
    assert "--max_response_tokens 300" in error and "256" in error


def test_models_that_are_not_there(refused, tmp_path):
    flags = "--model", tmp_path / "absent", "--data", "toy", "--out", tmp_path / "run"
    error = refused(*flags)
    assert "--model" in error and "absent" in error


def test_the_first_line_says_how_the_run_differs_from_luffy():
    def words(*args):
        model = ["--model", "Qwen/Qwen2.5-Math-7B"]
        return differences(parse_args([*args, *model]), parse_args(model))

    assert words() == ""
    assert words("--algo", "mixed") == ", but shaping none, clip 0.2"
    assert words("--clip", "0.2", "--seed", "3") == ", but clip 0.2"


def test_data_that_cannot_be_trained_on(refused, tiny_model, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "b2,c5,-;e?"}],
        "reward_model": {"ground_truth": "5"},
    }
    wrong = row | {"target": [{"role": "assistant", "content": "\\boxed{4}"}]}
    (tmp_path / "bare.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "wrong.jsonl").write_text(json.dumps(wrong) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    for name, words in (("bare", "no trace"), ("wrong", "wrong trace"), ("empty", "no rows")):
        error = refused(
            "--model", tiny_model, "--data", tmp_path / f"{name}.jsonl", "--out", tmp_path / "run"
        )
        assert words in error and f"{name}.jsonl" in error


def test_the_directory_of_something_else_is_refused(refused, tiny_model, tmp_path):
    before = (tiny_model / "config.json").read_bytes()
    assert "--out" in refused("--model", tiny_model, "--out", tiny_model)  # it has a config.json
    assert (tiny_model / "config.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("five years of work")
    error = refused("--model", tiny_model, "--out", tmp_path)
    assert "--out" in error and "not a run" in error
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_runs_of_earlier_versions_go_on_and_runs_with_a_schedule_keep_their_steps(tmp_path):
    cfg = parse_args(["--out", str(tmp_path), "--steps", "9"])

    def resumed(cfg, **old):
        config = asdict(cfg) | {"steps": 8} | old
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        return Run(cfg)

    before = {k: v for k, v in asdict(cfg).items() if k not in ("route", "rl_coef")}
    (tmp_path / "config.json").write_text(json.dumps(before | {"steps": 8}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    Run(cfg)  # fields that it had not are what they are by default; and there may be more steps
    with pytest.raises(InputError, match="rl_coef was 1.0, now 2.0"):
        resumed(replace(cfg, rl_coef=2.0), rl_coef=1.0)
    with pytest.raises(InputError, match="steps was 8, now 9"):
        resumed(replace(cfg, schedule="falling"))
