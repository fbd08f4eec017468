"""One run, one directory, one writer; what was saved is what is read, or it is refused by name."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import data
import luffy
from data import Problem
from machinery import checkpoints, files, preflight, toy
from machinery.files import append, lock, read_jsonl, write
from machinery.processes import InputError
from machinery.run_directory import LOGS, Run

PROBLEMS = [Problem("1+1=", "2", prompt_ids=[5, 6], trace_ids=[7, 1], trace_right=1.0)]


class State:
    """In place of an optimizer."""

    def __init__(self, value=0.0):
        self.state = {0: {"master": torch.full((3,), value), "step": 1}}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = {0: state[0]}


@pytest.fixture
def model():
    return toy.make_model(toy.make_tokenizer(), seed=0)


def begin(out, model, problems=PROBLEMS, **config) -> Run:
    run = Run(replace(luffy.parse_args([]), out=str(out), **config))
    run.begin(model, toy.make_tokenizer(), problems, [], State())
    return run


def log(out, *steps) -> None:
    for name in LOGS:
        append(out / name, *({"step": step} for step in steps))


@pytest.fixture
def trained(tmp_path, model):
    """A run with checkpoints of steps 2, 4 and 6, logged up to step 7."""
    run = begin(tmp_path / "run", model)
    for step in range(1, 7):
        log(run.out, step)
        if step % 2 == 0:
            run.save(step, model, toy.make_tokenizer())
    log(run.out, 7)
    return run.out


def logged(out) -> dict:
    return {name: (out / name).read_bytes() for name in LOGS}


# ------------------------------------------------------------------ one writer
def test_a_second_process_is_refused_with_the_first_ones_name(tmp_path):
    script = "import sys, pathlib; sys.path.insert(0, '.'); from machinery.files import lock; "
    script += "lock(pathlib.Path(sys.argv[1])); print('mine', flush=True); sys.stdin.read()"

    def start():
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        command = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.Popen(command, text=True, cwd=ROOT, **pipes)

    first = start()
    assert first.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match=rf"process {first.pid} on \S+ is writing there"):
        lock(tmp_path)
    with pytest.raises(InputError, match="is writing there"):
        Run(replace(luffy.parse_args([]), out=str(tmp_path)))
    assert not (tmp_path / "config.json").exists()
    first.kill()  # kill -9 leaves no lock behind
    first.wait()
    lock(tmp_path)
    second = start()
    _, error = second.communicate()
    assert second.returncode and "is writing there" in error
    lock(tmp_path)  # this process may go on: it holds it
    scratch = tmp_path / ".preflight-run"
    (scratch / "left").mkdir(parents=True)
    preflight.take(scratch)
    assert [p.name for p in scratch.iterdir()] == [".lock"]
    lock_of_another = subprocess.run(
        [sys.executable, "-c", script, str(scratch)], text=True, capture_output=True, cwd=ROOT
    )
    assert "is writing there" in lock_of_another.stderr


def test_where_there_are_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(LOCK_EX=2, LOCK_NB=4, lockf=refuse))
    lock(tmp_path)
    assert f"none in {tmp_path}: [Errno {errno.ENOLCK}]" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process")
def test_a_rank_dies_with_torchrun(monkeypatch):
    rank = "from machinery.processes import die_with_parent; import os, time; die_with_parent(); "
    rank += "print(os.getpid(), flush=True); time.sleep(600)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
    torchrun = subprocess.Popen([sys.executable, "-c", script], **how)
    process = Path("/proc", torchrun.stdout.readline().strip(), "cmdline")
    assert process.read_bytes()
    torchrun.kill()
    torchrun.wait()
    deadline = time.monotonic() + 10
    while process.exists() and process.read_bytes():  # a zombie has no command line
        if time.monotonic() > deadline:
            os.kill(int(process.parent.name), signal.SIGKILL)
            raise AssertionError("it lives on")
        time.sleep(0.05)


def test_a_start_that_died_at_once_does_not_block_the_directory(tmp_path, model):
    out = tmp_path / "run"
    (out / "samples").mkdir(parents=True)
    for left in (out / ".lock", out / ".config.json.tmp", out / "samples" / ".step-000001.tmp"):
        left.write_text("{")
    (out / "samples" / ".step-000001.tmp").unlink()
    (out / "samples").rmdir()
    begin(out, model)
    (out / ".checkpoint-000002.tmp").mkdir()
    (out / ".checkpoint-000002.tmp" / "model.safetensors").write_bytes(b"half")
    begin(out, model)
    assert not list(out.glob(".*.tmp"))
    (tmp_path / "empty" / ".preflight-empty").mkdir(parents=True)
    begin(tmp_path / "empty", model)


# ------------------------------------------------------------------ logs
def test_only_the_end_of_a_log_may_be_broken(tmp_path):
    file = tmp_path / "metrics.jsonl"
    half = '{"step": 3, "words": "π'.encode()[:-1]  # in the middle of a character
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n' + half)
    assert [row["step"] for row in read_jsonl(file)] == [1, 2]
    file.write_bytes(b'{"step": 1}\n{"step"\0 2}\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: not a row"):
        read_jsonl(file)
    file.write_bytes(b'{"step": 1}\n2\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: not a row"):
        read_jsonl(file)
    file.write_bytes(b'{"step": 1}\n{"step": "2"}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: step is '2'"):
        read_jsonl(file, step=int)
    with pytest.raises(InputError, match="cannot be read"):
        read_jsonl(tmp_path)


def test_a_log_without_its_checkpoint_is_not_cut(trained, model):
    """It may be all that there is of a run, whose checkpoints were moved."""
    before = logged(trained)
    for step in (2, 4, 6):
        checkpoints.remove(trained / f"checkpoint-00000{step}")
    (trained / "config.json").write_text((trained / "config.json").read_text().replace("50", "2"))
    with pytest.raises(InputError, match="goes to step 7, and there is no checkpoint"):
        begin(trained, model)
    assert logged(trained) == before


@pytest.mark.parametrize("steps", [(1, 2, 3, 3, 4, 5, 6, 7), (1, 2, 4, 5, 6), (1, 2, 3)])
def test_a_log_with_steps_that_are_missing_or_twice_there_is_refused(trained, model, steps):
    (trained / "metrics.jsonl").unlink()
    append(trained / "metrics.jsonl", *({"step": step} for step in steps))
    with pytest.raises(InputError, match="does not have each step up to the checkpoint's, 6, once"):
        begin(trained, model)


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(trained, model):
    assert [row["step"] for row in read_jsonl(trained / "evals.jsonl")] == [*range(1, 8)]
    assert begin(trained, model).first_step == 6
    assert [row["step"] for row in read_jsonl(trained / "evals.jsonl")] == [*range(1, 7)]


def test_logs_are_whole_if_the_restore_fails(trained, model, monkeypatch):
    before = logged(trained)
    monkeypatch.setattr(State, "load_state_dict", lambda self, state: state["lost"])
    with pytest.raises(InputError, match="its optimizer has no state for 'lost'"):
        begin(trained, model)
    monkeypatch.undo()
    (trained / "watched.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"watched.jsonl, line 2"):
        begin(trained, model)
    assert {k: v for k, v in logged(trained).items() if k[0] != "w"} == {
        k: v for k, v in before.items() if k[0] != "w"
    }


# ------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("steps, at", [(20, [1, 6, 9, 12, 18]), (5, [])])
def test_there_is_something_to_look_at_while_a_run_goes_on(tmp_path, model, monkeypatch, steps, at):
    """After the first step, evaluations and checkpoints, but the last ones: then `report` draws.

    A run goes on without.
    """
    drawn = []

    def draw(out):
        drawn.append(read_jsonl(out / LOGS[0])[-1])
        raise OSError("no space left")

    monkeypatch.setattr("machinery.run_directory.draw", draw)
    every = dict(save_every=6, eval_every=9, sample_every=5)
    run = begin(tmp_path / "run", model, steps=steps, **every)
    for step in run.steps():
        log(run.out, step + 1)
        run.due(step + 1)
    assert [row["step"] for row in drawn] == at


def test_the_newest_two_keep_the_optimizer_and_keep_says_how_many_stay(tmp_path, trained, model):
    assert [c.name[-1] for c in checkpoints.checkpoints(trained)] == ["2", "4", "6"]
    assert {f.parent.name[-1] for f in trained.glob("*/optimizer-0.pt")} == {"4", "6"}
    run = begin(tmp_path / "few", model, keep=2)
    for step in (1, 2, 3, 10):
        run.save(step, model, toy.make_tokenizer())
    assert [c.name[-2:] for c in checkpoints.checkpoints(run.out)] == ["03", "10"]
    assert not list(run.out.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer-0.pt", "tokenizer.json"])
def test_a_flipped_bit_is_refused_with_what_resumes(trained, model, name):
    file, before = trained / "checkpoint-000006" / name, logged(trained)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"6 is damaged: {name} has other bytes.*000004") as error:
        begin(trained, model)
    assert "remove checkpoint-000006" in str(error.value) and logged(trained) == before
    checkpoints.remove(trained / "checkpoint-000006")
    assert begin(trained, model).first_step == 4  # as the message says


def test_truncated_missing_and_empty_are_damage_and_a_copy_is_no_checkpoint(trained, model):
    newest, older = trained / "checkpoint-000006", trained / "checkpoint-000004"
    (trained / "checkpoint-000008.bak").mkdir()
    assert checkpoints.to_resume(trained) == newest
    with (newest / "optimizer-0.pt").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="optimizer-0.pt has 100 of its"):
        checkpoints.to_resume(trained)
    (older / "model.safetensors").unlink()
    words = r"safetensors cannot be read \(No such file"
    assert re.search(words, checkpoints.damage(older))
    with pytest.raises(InputError, match="No other one resumes"):  # that of step 2 has no optimizer
        checkpoints.to_resume(trained)
    for sums in ("", "{}", "[]", '{"model.safetensors": 5}', '{"config.json": [1, 1]}'):
        (newest / "checksums.json").write_text(sums)
        assert "no checksums.json that can be read" in checkpoints.damage(newest), sums
    (trained / "checkpoint-000010").mkdir()
    with pytest.raises(InputError, match="000010 is damaged: it has no checksums.json"):
        checkpoints.to_resume(trained)


def test_a_checkpoint_runs_no_code_and_is_on_the_disk(trained, model, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(State(), trained / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.load_state(trained / "state.pt")
    synced, fsync, rename = set(), os.fsync, Path.rename
    name_of = {}  # inode -> name

    def note(number):
        fsync(number)
        synced.add(os.fstat(number).st_ino)

    def renamed(old, new):
        name_of.update({p.stat().st_ino: p.name for p in [*old.iterdir(), old]})
        name_of.update({(old.parent / log).stat().st_ino: log for log in LOGS})
        assert not [name for inode, name in name_of.items() if inode not in synced]
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", renamed)
    run = begin(trained, model)
    synced.clear()
    run.save(8, model, toy.make_tokenizer())
    assert len(name_of) > 8 and trained.stat().st_ino in synced


# ------------------------------------------------------------------ saving, before it matters
def test_a_generation_config_that_loads_also_saves(tmp_path, model):
    """With a temperature and no do_sample the first save would raise, hours later."""
    model.generation_config.temperature = 0.7
    run = begin(tmp_path / "run", model)
    run.save(1, model, toy.make_tokenizer())
    saved = json.loads((run.out / "checkpoint-000001" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.7 and saved["do_sample"]


def test_rope_is_where_older_readers_look(tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    llama3 |= dict(original_max_position_embeddings=64, rope_theta=5e5)
    for name, rope in (("plain", {"rope_type": "default", "rope_theta": 4e4}), ("long", llama3)):
        config = LlamaConfig(**sizes, vocab_size=99, rope_parameters=rope)
        checkpoints.save_model(tmp_path / name, LlamaForCausalLM(config), toy.make_tokenizer())
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["rope_theta"] == rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        assert saved["rope_scaling"] == (scaling if name == "long" else None)
        read = AutoConfig.from_pretrained(tmp_path / name).rope_parameters
        assert {k: read[k] for k in rope} == rope


def test_what_could_not_be_saved_is_refused_before_the_first_step(tmp_path, model, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**5))
        with pytest.raises(InputError, match=r"--out .*a checkpoint needs .*Make room"):
            begin(out, model)
    with monkeypatch.context() as patch:  # a tokenizer that AutoTokenizer takes for another one
        other = SimpleNamespace(from_pretrained=lambda path: lambda text: {"input_ids": [1]})
        patch.setattr("transformers.AutoTokenizer", other)
        with pytest.raises(InputError, match="--model .*other tokens for"):
            begin(out, model)
    begin(out, model)
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".*.tmp"))
    large = {i: {"master": x} for i, x in enumerate(torch.zeros(2, 10**6))}
    checkpoints.try_state(tmp_path / "state.pt", large)
    assert (tmp_path / "state.pt").stat().st_size < 10**4


def test_a_finished_run_needs_no_room(trained, model, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    begin(trained, model, steps=6)
    with pytest.raises(InputError, match="Make room"):
        begin(trained, model, steps=7)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be written: .*No space left"):
        append(full, {"step": 1})
    (tmp_path / ".config.json.tmp").symlink_to("/dev/full")
    write(tmp_path / "other.json", "{}")
    with pytest.raises(InputError, match=r"config.json cannot be written"):
        write(tmp_path / "config.json", "{}")
    with pytest.raises(InputError, match=r"optimizer-0.pt cannot be written"):
        (tmp_path / "optimizer-0.pt").symlink_to("/dev/full")
        checkpoints.save_state(tmp_path / "optimizer-0.pt", torch.zeros(10**5))


# ------------------------------------------------------------------ what was trained on
def test_a_reward_that_changed_under_a_run_is_said(tmp_path, model, capsys):
    file = tmp_path / "its.py"
    for text, said in (
        ("# one", False),
        ("# one", False),
        ("# another", True),
        ("# another", False),
    ):
        file.write_text(text)
        run = begin(tmp_path / "run", model, reward=f"{file}:f")
        assert ("its file has changed" in capsys.readouterr().out) == said
        if not run.checkpoint:
            log(run.out, 1)
            run.save(1, model, toy.make_tokenizer())


def test_a_fork_does_not_go_on_with_a_run_of_luffy(trained, model):
    from forks import dapo

    cfg = dapo.Config(**asdict(replace(luffy.parse_args([]), out=str(trained))))
    with pytest.raises(InputError, match="refill was 'no flag', now 3"):
        Run(cfg)


def test_other_problems_under_a_resumed_run_are_refused(trained, model):
    for change in (dict(answer="3"), dict(prompt_ids=[5, 7]), dict(trace_reward=0.5)):
        with pytest.raises(InputError, match="--data .*are not those that the run"):
            begin(trained, model, [replace(PROBLEMS[0], **change)])
    assert [row["step"] for row in read_jsonl(trained / "evals.jsonl")][-1] == 7  # not cut
    begin(trained, model)
    begin(trained, model, data="elsewhere.jsonl")  # the same ones


def test_other_data_do_not_take_the_place_of_a_run_without_a_checkpoint(tmp_path, model):
    log(begin(tmp_path, model).out, 1)
    with pytest.raises(InputError, match="data was .*, now 'other.jsonl'"):
        begin(tmp_path, model, data="other.jsonl")
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_verdicts_of_fewer_traces_are_not_taken(tmp_path):
    file = tmp_path / "trace_rewards.json"
    asked = []

    def judge(items):
        asked.extend(items)
        return [1.0] * len(items)

    assert data.share_once(file, "key", "verdicts", judge, [1, 2, 3]) == [1.0] * 3
    file.write_text(json.dumps({"key": [1.0]}))
    assert data.share_once(file, "key", "verdicts", judge, [1, 2, 3]) == [1.0] * 3
    assert data.share_once(file, "none", "verdicts", judge, []) == [] and len(asked) == 6
    file.write_text("{")
    with pytest.raises(InputError, match="trace_rewards.json: not JSON"):
        data.share_once(file, "key", "verdicts", judge, [1])
