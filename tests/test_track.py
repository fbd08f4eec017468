"""A tracker has what metrics.jsonl and evals.jsonl have, whatever happened to the run."""

import json
import struct
import sys
import textwrap
from collections import defaultdict
from importlib.util import find_spec

import pytest
from conftest import few, run
from test_resume import luffy, start, wait_for_step

from machinery import processes, track
from machinery.files import read_jsonl, to_jsonl, write


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}")


# wandb is no requirement of testing: it is heavy
TRACKERS = [pytest.param(name, marks=needs(name)) for name in ("tensorboard", "trackio", "wandb")]
HISTORY = """
    import json
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage
    (run,) = Api().runs("luffy")
    print("history", json.dumps(SQLiteStorage.get_logs("luffy", run.name, run_id=run.id)))
"""


def of_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out)).Reload()
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            yield event.step, key, event.value


def of_trackio(out):
    """By another process: its database is where a variable said when it was imported."""
    printed = run("-c", textwrap.dedent(HISTORY)).stdout.split("history ")[1]
    for row in json.loads(printed):
        step = row.pop("step")
        yield from ((step, key, value) for key, value in row.items() if key != "timestamp")


def of_wandb(out):
    """Of the newest of the files that `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    file = max(out.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    for data in leveldb_records(file.read_bytes()[7:]):
        record = Record.FromString(data)
        for item in record.history.item:
            key = item.key or item.nested_key[0]
            if not key.startswith("_"):
                yield record.history.step.num, key, json.loads(item.value_json)


def leveldb_records(log):
    part, at, block = b"", 0, 32768
    while at + 7 <= len(log):
        left = block - (at + 7) % block  # of a block; the file's own seven bytes are in the first
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        part += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield part
            part = b""


def tracked(tracker, out):
    """key -> [(step, value), ...], as it came."""
    found = defaultdict(list)
    for step, key, value in getattr(sys.modules[__name__], f"of_{tracker}")(out):
        found[key].append((step, pytest.approx(value, rel=1e-6)))  # tensorboard: float32
    return dict(found)


def logged(out):
    found = defaultdict(list)
    for row in read_jsonl(out / "metrics.jsonl"):
        for key in row.keys() - {"step"}:
            found[key].append((row["step"], row[key]))
    for row in read_jsonl(out / "evals.jsonl"):
        for source, score in row["scores"].items():
            found[f"eval/{source}"].append((row["step"], score["avg"]))
    return dict(found)


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.slow  # its quicker relatives: the next two
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_killed_run_that_goes_on_has_each_step_once_and_its_last(tiny_model, tmp_path, tracker):
    out = tmp_path / "run"
    arguments = luffy(tiny_model, out, "--save_every", 3, "--track", tracker, *few(tmp_path))
    process = start(*arguments, "--steps", 1000)
    wait_for_step(process, 5)  # so steps 4 and 5 come twice
    process.kill()
    process.wait()
    run(*arguments, "--steps", 7)
    expected = logged(out)
    assert [step for step, _ in expected["reward"]] == [1, 2, 3, 4, 5, 6, 7]
    assert {step for step, _ in expected["eval/hard"]} == {0, 7}
    assert tracked(tracker, out) == expected


ENDING = """
    import sys; sys.path.insert(0, ".")
    import luffy
    import trackio.run
    from machinery.processes import launch
    trackio.run.BATCH_SEND_INTERVAL = 3600  # until it is asked to finish
    how, score, calls = sys.argv.pop(1), luffy.score, []
    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise {"error": RuntimeError, "ctrl-c": KeyboardInterrupt}[how]("in step 3")
        return score(*args)
    luffy.score = fail
    launch(luffy.main)
"""


@needs("trackio")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "ctrl-c"])
def test_a_run_that_ends_early_leaves_no_step_behind(tiny_model, tmp_path, how):
    """trackio writes every half second, and the program leaves at once."""
    (tmp_path / "ending.py").write_text(textwrap.dedent(ENDING))
    arguments = luffy(tiny_model, tmp_path / "run", "--track", "trackio", *few(tmp_path))[1:]
    result = run(tmp_path / "ending.py", how, *arguments, check=False)
    code, words = {"error": (1, "in step 3"), "ctrl-c": (130, "interrupted")}[how]
    assert result.returncode == code and words in result.stderr
    assert tracked("trackio", tmp_path / "run") == logged(tmp_path / "run")
    assert [step for step, _ in logged(tmp_path / "run")["reward"]] == [1, 2]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_tracking_begins_late_and_goes_on_from_an_earlier_step(tmp_path, tracker):
    """It has what the log has: no step that the log lost, and the new values of those after."""

    def rows(steps, reward):
        return to_jsonl([{"step": step, "reward": reward, "length": step} for step in steps])

    write(tmp_path / "metrics.jsonl", rows([1, 2, 3], 0.25))
    write(tmp_path / "evals.jsonl", to_jsonl([{"step": 2, "scores": {"hard": {"avg": 0.5}}}]))
    log = track.start(tracker, tmp_path, {})
    log({"reward": 0.5, "length": 4, "lost": 1}, 4)
    processes.ending.close()
    assert tracked(tracker, tmp_path)["lost"] == [(4, 1.0)]
    write(tmp_path / "metrics.jsonl", rows([1, 2], 0.25))
    log = track.start(tracker, tmp_path, {})
    log({"reward": 0.75, "length": 3}, 3)
    processes.ending.close()
    write(tmp_path / "metrics.jsonl", rows([1, 2], 0.25) + rows([3], 0.75))
    assert tracked(tracker, tmp_path) == logged(tmp_path)


def test_a_run_keeps_its_name(monkeypatch, tmp_path):
    """wandb and trackio know it by that. Another directory of the same name is another run."""
    names = []

    def tracker(out, name, config):
        names.append(name)
        return print, print

    monkeypatch.setitem(track.TRACKERS, "wandb", tracker)
    for parent in ("a", "a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True, exist_ok=True)
        track.start("wandb", tmp_path / parent / "run", {})
    assert names[0] == names[1] != names[2] and names[0].startswith("run-")
    processes.ending.pop_all()
