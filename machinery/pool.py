"""Worker processes for work that may hang, crash or take all memory: the parent kills those.

The other side is `serve`, in a program of its own. Jobs and replies are lines of JSON. Plain
subprocesses: forking after CUDA is up is an error, and multiprocessing's spawn imports the trainer.
"""

import faulthandler
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from machinery.files import InputError
from machinery.printing import go_on, print_what_can_be

STARTUP_SECONDS = 120  # for a worker to import what it needs, on a machine that starts many
SILENT_SECONDS = 10  # of them
START_ATTEMPTS = 3  # in a row
ASKED = 2  # times, where a worker crashes: it may be the machine's fault
MOST_FAILURES = 2  # of neighbours with the same key: a problem on which all responses hang
# Own session or, on Windows, process group: Ctrl-C is the trainer's business.
ALONE = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
ALONE |= {"start_new_session": True}


class Pool:
    """A job that takes longer than `timeout` seconds costs itself only: its worker is replaced.

    command: a program that calls `serve`; the first job starts it. Any thread may use the pool.
    Call `close()` in the end.
    """

    def __init__(self, command: list[str], workers: int, timeout: float):
        self.command, self.timeout, self.size = command, timeout, workers
        self.threads, self.lock, self.closed = ThreadPoolExecutor(workers), Lock(), False
        self.workers, self.idle = set(), deque()  # always one more worker than threads: one is idle

    def map(self, jobs: list, key: Callable) -> list[tuple]:
        """-> for each job, in order: (its reply, None), or (None, "timeout", "crash" or "skipped").

        key: neighbours with the same key go to the same worker, which may remember things, one
        after the other. After MOST_FAILURES of them the others are skipped. A job on which a
        worker crashes is tried once more. Raises InputError if workers do not start, RuntimeError
        if the pool is closed.
        """
        while jobs and len(self.workers) < self.size + 1:
            self.add_worker()
        groups = self.threads.map(self.run, [list(group) for _, group in groupby(jobs, key)])
        return [result for group in groups for result in group]

    def run(self, jobs: list) -> list[tuple]:
        """In one of the threads."""
        results, worker, failures = [], None, 0
        try:
            for job in jobs:
                if failures == MOST_FAILURES:
                    break
                for _ in range(ASKED):
                    worker = worker or self.next_worker()
                    reply, failure = worker.ask(job, self.timeout)
                    if not worker.alive():
                        self.replace(worker)
                        worker = None
                    if failure != "crash":
                        break
                results.append((reply, failure))
                failures += failure is not None
        finally:
            if worker:
                self.idle.append(worker)
        return results + [(None, "skipped")] * (len(jobs) - len(results))

    def next_worker(self) -> "Worker":
        """One that has started, and is alive."""
        for _ in range(START_ATTEMPTS + self.size):  # all of them may have died while idle
            worker = self.idle.pop()
            if worker.starts():
                return worker
            self.replace(worker)
        raise InputError(
            f"workers do not start, or not in {STARTUP_SECONDS} s: {' '.join(self.command)}. What "
            "it prints says why; fewer processes need less memory: --graders 1"
        )

    def replace(self, worker: "Worker") -> None:
        worker.kill()
        self.workers.remove(worker)
        self.add_worker()

    def add_worker(self) -> None:
        with self.lock:
            if self.closed:
                raise RuntimeError("the pool is closed")
            try:
                worker = Worker(self.command)
            except OSError as error:
                raise InputError(
                    f"--graders {self.size}: the system starts no more than {len(self.workers)} "
                    f"of these processes, and one is a spare ({error}). Name a smaller number"
                ) from error
            self.workers.add(worker)
            self.idle.appendleft(worker)  # last in line: no job waits while it starts

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.workers):
            worker.process.kill()  # a thread that waits for it goes on, and ends
        self.threads.shutdown()
        for worker in self.workers:
            worker.kill()


class Worker:
    """One process."""

    def __init__(self, command: list[str]):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, **ALONE)
        self.ready, self.lines = False, SimpleQueue()
        Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        """In a thread of its own: not every system can wait for a pipe with a time limit."""
        with self.process.stdout as pipe:
            for line in pipe:
                self.lines.put(line)
        self.lines.put(b"")

    def alive(self) -> bool:
        return self.process.poll() is None

    def starts(self) -> bool:
        """Is it there for a job? Waits, if it is new."""
        if self.alive() and not self.ready:
            if (line := self.line(SILENT_SECONDS)) is None:
                say_once(f"graders     are still starting: they have {STARTUP_SECONDS} s for that")
                line = self.line(STARTUP_SECONDS - SILENT_SECONDS)
            self.ready = bool(line)
            if line and (note := line.decode().strip()):
                say_once(note)
        return self.ready and self.alive()

    def ask(self, job, timeout: float) -> tuple:
        """As `Pool.map`, for one job. The process is dead if it did not reply."""
        with suppress(OSError):  # it is dead: there will be no reply
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        line = self.line(timeout)
        if line and line.endswith(b"\n"):
            return json.loads(line), None
        self.process.kill()
        self.process.wait()
        return None, "timeout" if line is None else "crash"

    def line(self, seconds: float) -> bytes | None:
        """The next line it writes; empty if it is dead, None if none came in time."""
        try:
            return self.lines.get(timeout=seconds)
        except Empty:
            return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(OSError):
            self.process.stdin.close()


@cache
def say_once(note: str) -> None:
    """By rank 0; not by processes.say, for the workers would load torch with it."""
    if os.environ.get("RANK", "0") == "0":
        print(note, file=sys.stderr, flush=True)


def serve(load: Callable[[], Callable], timeout: float, memory_bytes: int) -> None:
    """A worker's life: a job a line in, a reply a line out, until there is no parent.

    load: imports what is needed, whose time does not count; -> what is called with a job's values.
    memory_bytes: on top of what it has then.
    """
    jobs = os.fdopen(os.dup(0), encoding="utf-8")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # nobody else reads a job,
    os.dup2(2, 1)  # and what a library prints is no reply
    print_what_can_be()
    go_on()  # nor is it a failure, where the trainer's terminal has gone
    function = load()
    note = limit_memory(memory_bytes)
    with suppress(OSError):  # there is no parent any more
        print(note, file=out, flush=True)
    for line in jobs:
        # Should the parent be killed, no hung worker outlives it. SIGALRM is not everywhere.
        faulthandler.dump_traceback_later(timeout + 2, file=nothing, exit=True)
        reply = function(*json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            print(json.dumps(reply), file=out, flush=True)


def limit_memory(more_bytes: int) -> str:
    """So much on top of what this process has. -> empty, or a note that the system refuses."""
    try:
        import resource

        has, statm = 0, Path("/proc/self/statm")
        if statm.exists():
            has = int(statm.read_text("utf-8").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard in (resource.RLIM_INFINITY, -1) or hard > has + more_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (has + more_bytes,) * 2)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        return f"graders     their memory is not limited: this system does not do it ({error})"
    return ""
