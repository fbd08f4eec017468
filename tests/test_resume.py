"""Kill it at any moment and start the same command again: nothing happened."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, Forked, command, few, run
from safetensors.torch import load_file


def luffy(model, out, *more, program="luffy.py"):
    return (
        program,
        "--model",
        model,
        "--out",
        out,
        "--steps",
        6,
        "--save_every",
        2,
        "--problems_per_step",
        4,
        "--updates_per_step",
        2,
        "--max_response_tokens",
        64,
        "--lr",
        1e-2,
        "--eval_samples",
        1,
        "--sample_every",
        2,
        *more,
    )


def start(*args, ranks: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args, ranks=ranks),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_step(process, n: int) -> None:
    for line in process.stdout:
        if line.startswith(f"step {n} "):
            return
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def args(tiny_model, tmp_path_factory):
    """What they say but for --out, without pictures, and with few evaluations."""
    evaluated = few(tmp_path_factory.mktemp("few"), problems=3)
    return lambda out, *more: luffy(
        tiny_model, out, *evaluated, *more, program="tests/no_pictures.py"
    )


@pytest.fixture(scope="module")
def whole(args, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*args(out))
    return out


def assert_same_run(a, b):
    for name in ("metrics.jsonl", "evals.jsonl", "watched.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    one, two = (load_file(d / "checkpoint-000006" / "model.safetensors") for d in (a, b))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_kill_9_in_mid_step_and_again(args, tmp_path, whole):
    out = tmp_path / "run"
    process = Forked(*args(out, "--steps", 1000))
    process.wait_for("step 5 ")  # checkpoints 2 and 4 are there, step 6 or its saving is under way
    time.sleep(0.05)
    process.kill()
    process.wait()
    for later in out.glob("checkpoint-*"):  # on a busy machine it may have come further
        if later.name > "checkpoint-000004":
            shutil.rmtree(later)
    half_written = out / ".checkpoint-000006.tmp"  # as if killed while saving
    half_written.mkdir(exist_ok=True)
    (half_written / "model.safetensors").write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    result = run(*args(out))
    assert "after step 4" in result.stdout
    assert_same_run(out, whole)
    # a second start finds everything done, and changes nothing
    run(*args(out))
    assert_same_run(out, whole)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_a_checkpoint_and_the_curves(tiny_model, tmp_path, ranks):
    out = tmp_path / "run"
    more = "--steps", 1000, "--save_every", 1000, *few(tmp_path)
    process = start(*luffy(tiny_model, out, *more), ranks=ranks)
    wait_for_step(process, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun then sends another
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 or ranks > 1, errors
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (out / f"checkpoint-{last:06d}" / "model.safetensors").exists(), rest
    assert (out / "curves.png").stat().st_size > 10_000


def test_another_configuration_is_refused(args, whole):
    before = time.time()
    result = run(*args(whole, "--gamma", 0.2, "--lr", 1e-4), check=False)
    assert result.returncode != 0
    for words in ("gamma was 0.1, now 0.2", "lr was 0.01, now 0.0001", "--out"):
        assert words in result.stderr
    assert all(f.stat().st_mtime < before for f in whole.rglob("*"))


@pytest.mark.slow
def test_more_steps_continue_a_finished_run_by_one_rank_or_two(args, tmp_path, whole):
    """The optimizer's shards do not depend on how many ranks wrote them."""
    run(*args(tmp_path / "1", "--steps", 4))
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    run(*args(tmp_path / "1"))  # its end at step 4 was evaluated, too
    assert (tmp_path / "1" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    run(*args(tmp_path / "2"), ranks=2)
    one, two = (
        load_file(d / "checkpoint-000006" / "model.safetensors") for d in (tmp_path / "2", whole)
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
