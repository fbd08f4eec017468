"""kill -9 at random moments, and a disk that is full at each write: the same bits in the end.

FAULTS=30 pytest -n 0 -m slow tests/test_faults.py    # as many kills of each kind, not four
"""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT, command, run

from machinery import checkpoints

KILLS = int(os.environ.get("FAULTS", "4"))
SMALL = "--steps 8 --save_every 2 --problems_per_step 8 --updates_per_step 2 --lr 1e-2".split()
SMALL += "--max_response_tokens 48 --eval_samples 1 --sample_every 2 --sample_groups 2".split()
SMALL += ["--graders", "1"]

# torchrun's work without its and the imports' time: a line a job in, a line of how it ended out.
FORKS = textwrap.dedent("""
    import json, os, signal, socket, sys, time
    from contextlib import contextmanager, suppress
    sys.path.insert(0, ".")
    from machinery import files
    full, times, of = [], [], files.writing

    @contextmanager
    def writing(path, *more):  # the disk is full from the n-th such file on
        times.extend([path] if full and str(path).endswith(full[0]) else [])
        if full and len(times) == full[1] and not os.path.exists(full[2]):
            with open(full[2], "wb", buffering=0) as ballast, suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
        with of(path, *more):
            yield

    files.writing = writing
    import luffy, matplotlib.pyplot, transformers.models.qwen2.modeling_qwen2
    from machinery.processes import launch

    def fork(rank, ranks, port, args, errors):
        if pid := os.fork():
            return pid
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(os.open(errors, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
        if ranks > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if not full:  # the pictures take as long as the run
            luffy.report = lambda out: None
        sys.argv = ["luffy.py", *args]
        launch(luffy.main)

    for line in sys.stdin:
        ranks, args, errors, victim, moment, *full = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start, ended, told = time.monotonic(), {}, float("inf")
        pids = [fork(rank, ranks, port, args, errors) for rank in range(ranks)]
        while len(ended) < ranks:
            now = time.monotonic() - start
            if now > moment:
                moment = float("inf")
                if pids[victim] not in ended:
                    os.kill(pids[victim], signal.SIGKILL)
            if any(ended.values()) and told > now or now > told + 30:
                for pid in set(pids) - set(ended):
                    os.kill(pid, signal.SIGTERM if told > now else signal.SIGKILL)
                told = min(told, now)
            for pid in set(pids) - set(ended):
                found, status = os.waitpid(pid, os.WNOHANG)
                ended |= {pid: status} if found else {}
            time.sleep(0.005)
        print(json.dumps([max(ended.values()), time.monotonic() - start]), flush=True)
""")
KILLED = textwrap.dedent("""
    import os, signal, sys, threading, time
    sys.path.insert(0, ".")
    import luffy
    from machinery.processes import launch
    moment = float(sys.argv.pop(1))
    def kill_torchrun():
        time.sleep(moment)
        os.kill(os.getppid(), signal.SIGKILL)
    if os.environ["RANK"] == "1":
        threading.Thread(target=kill_torchrun, daemon=True).start()
    launch(luffy.main)
""")


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("metrics.jsonl", "evals.jsonl", "watched.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    names = [c.name for c in checkpoints.checkpoints(a)]
    assert names == [c.name for c in checkpoints.checkpoints(b)] and names
    for name in names:
        files = [(d / name / "model.safetensors").read_bytes() for d in (a, b)]
        assert files[0] == files[1], name


def assert_whole(out: Path) -> None:
    """No checkpoint of a killed run is there in part, and no step is logged twice."""
    for checkpoint in checkpoints.checkpoints(out):
        sums = json.loads((checkpoint / checkpoints.CHECKSUMS).read_text())
        there = {name for name in sums if (checkpoint / name).exists()}
        assert all(checkpoints.checksum(checkpoint / name) == sums[name] for name in there)
        assert all("optimizer" in name for name in sums.keys() - there)


def words(process: Path) -> str:
    """Of its command line."""
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has ended
        return ""


@pytest.fixture(scope="module")
def forks():
    """(ranks, arguments, file of stderr, rank to kill, after these seconds) -> status, seconds."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, text=True, **pipes)

    def start(*job):
        print(json.dumps(job), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield start
    process.stdin.close()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_kill_9_of_a_rank_at_random_moments(forks, tiny_model, tmp_path, ranks):
    args, errors = ["--model", str(tiny_model), *SMALL, "--save_every", "1"], tmp_path / "errors"
    whole, never = tmp_path / "whole", 1e9
    status, seconds = forks(ranks, [*args, "--out", str(whole)], str(errors), 0, never)
    assert status == 0, errors.read_text()
    kills = finished = resumed = 0
    out = tmp_path / "run0"
    while kills < KILLS or out.exists():
        resumed += bool(checkpoints.checkpoints(out))
        victim, moment = random.randrange(ranks), random.random() * seconds
        moment = moment if kills < KILLS else never
        errors.write_text("")
        status, _ = forks(ranks, [*args, "--out", str(out)], str(errors), victim, moment)
        print(f"{out.name}, rank {victim} at {moment:.2f} s: {status}", flush=True)
        assert "luffy.py: " not in errors.read_text(), errors.read_text()
        if status == 0:
            assert_same_run(out, whole)
            finished += 1
            out = tmp_path / f"run{finished}"
        else:
            kills += 1
            assert_whole(out)
    print(f"{ranks} ranks: {kills} kills, {resumed} resumed, {finished} runs to their end")


@pytest.mark.slow
def test_kill_9_of_torchrun_at_random_moments(tiny_model, tmp_path):
    """The next one starts at once; no rank of the one before may write beside it."""
    script, args = tmp_path / "killed.py", ("--model", tiny_model, *SMALL)
    script.write_text(KILLED)
    start, out = time.monotonic(), tmp_path / "run"
    run("luffy.py", *args, "--out", tmp_path / "whole", ranks=2)
    longest = 0.25 * (time.monotonic() - start)  # it is counted from when all is imported
    kills = 0
    while kills < (KILLS // 3 or 1):
        moment = random.random() * longest
        line = command(script, moment, *args, "--out", out, ranks=2)
        with (tmp_path / "errors").open("w") as errors:  # of ranks that live on, too
            how = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
            status = subprocess.run(line, **how).returncode
        kills += status != 0
        print(f"{kills} kills, {moment:.1f} s: {status}", flush=True)
        assert "luffy.py: " not in (tmp_path / "errors").read_text()
        if status == 0:
            assert_same_run(out, tmp_path / "whole")
            shutil.rmtree(out)
        else:
            assert_whole(out)
    run("luffy.py", *args, "--out", out, ranks=2)
    assert_same_run(out, tmp_path / "whole")
    deadline = time.monotonic() + 60
    while alive := [x for x in map(words, Path("/proc").glob("[0-9]*")) if str(script) in x]:
        assert time.monotonic() < deadline, alive
        time.sleep(1)


@pytest.mark.slow
def test_of_two_starts_one_is_refused(tiny_model, tmp_path):
    """At once, and a moment later; by one process and by two; the first one is not harmed."""
    args = "luffy.py", "--model", tiny_model, *SMALL
    refused = 0
    for n, (ranks, later) in enumerate([(1, 0), (1, 6), (2, 0), (2, 8), (1, 2), (2, 3)]):
        out, both = tmp_path / f"run{n}", []
        for _ in range(2):
            line = command(*args, "--out", out, ranks=ranks)
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            both.append(subprocess.Popen(line, cwd=ROOT, text=True, **pipes))
            time.sleep(later)
        printed = [process.communicate()[1] for process in both]
        failed = [errors for process, errors in zip(both, printed) if process.returncode]
        # on a busy machine the second may come when the first has ended
        assert len(failed) < 2 and all("is writing there" in errors for errors in failed), printed
        refused += len(failed)
        steps = [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 9)]
    print(f"{refused} of {n + 1} second starts refused")
    assert refused


PLACES = [("/.lock", 1), ("/config.json", 1), ("/samples", 1), ("trace_rewards.json", 1)]
PLACES += [("/.try.tmp", 1), (".try.tmp/optimizer-0.pt", 1), ("watched.jsonl", 3)]
PLACES += [("evals.jsonl", 2), ("metrics.jsonl", 4), ("timing.jsonl", 3)]
PLACES += [("step-000002.jsonl", 1), ("/.checkpoint-000004.tmp", 1), ("0004.tmp/optimizer-0.pt", 1)]
PLACES += [("0004.tmp/checksums.json", 1), ("curves.png", 1), ("report.html", 1)]


@pytest.fixture
def disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(where)]
    if sys.platform != "linux" or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a small disk needs mount, and so root")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.slow
def test_a_full_disk_at_each_write(forks, tiny_model, tmp_path, disk):
    args, errors, out = ["--model", str(tiny_model), *SMALL], tmp_path / "errors", disk / "run"
    ballast, job = disk / "ballast", (1, [*args, "--out", str(out)], str(errors), 0, 1e9)
    run("luffy.py", *args, "--out", tmp_path / "whole")
    for name, n in PLACES:
        errors.write_text("")
        status, _ = forks(*job, name, n, str(ballast))
        said = errors.read_text()
        print(f"{name}, {n}: {said.strip().splitlines()[-1:]}", flush=True)
        assert ballast.exists(), name
        assert status == 256 and "Traceback" not in said, (name, said)
        assert "cannot be written" in said or "are free on that disk" in said, (name, said)
        ballast.unlink()
        status, _ = forks(*job)
        assert status == 0, errors.read_text()
        assert_same_run(out, tmp_path / "whole")
        shutil.rmtree(out)


@pytest.mark.slow
def test_four_processes_resume_exactly_after_any_step(forks, tiny_model, tmp_path):
    """DDP sums four gradients in an order that depends on how its buckets are made."""
    args = ["--model", str(tiny_model), *SMALL, "--save_every", "1", "--eval_data", "none"]
    whole, errors = tmp_path / "whole", tmp_path / "errors"
    for last in (8, 1, 2, 3, 7):
        out = whole if last == 8 else tmp_path / f"run{last}"
        for steps in sorted({last, 8}):
            more = ["--out", str(out), "--steps", str(steps)]
            status, _ = forks(4, args + more, str(errors), 0, 1e9)
            assert status == 0, errors.read_text()
        for file in ("metrics.jsonl", "checkpoint-000008/model.safetensors"):
            assert (out / file).read_bytes() == (whole / file).read_bytes(), (last, file)
