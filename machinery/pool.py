"""Worker processes for work that may hang, crash or take all memory: the parent kills those.

The other side is `serve`, in a program of its own. Jobs and replies are lines of JSON. Plain
subprocesses: forking after CUDA is up is an error, and multiprocessing's spawn imports the trainer.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from multiprocessing.connection import wait
from threading import Lock

STARTUP_SECONDS = 120  # for a worker to import what it needs, on a machine that starts many
START_ATTEMPTS = 3  # in a row


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
        """-> for each job, in order: (its reply, None), or (None, "timeout" or "crash").

        key: neighbours with the same key go to the same worker, which may remember things. Raises
        RuntimeError if workers do not start, or if the pool is closed.
        """
        while jobs and len(self.workers) < self.size + 1:
            self.add_worker()
        groups = self.threads.map(self.run, [list(group) for _, group in groupby(jobs, key)])
        return [result for group in groups for result in group]

    def run(self, jobs: list) -> list[tuple]:
        """In one of the threads."""
        results, worker = [], None
        try:
            for job in jobs:
                worker = worker or self.next_worker()
                results.append(worker.ask(job, self.timeout))
                if not worker.alive():
                    self.replace(worker)
                    worker = None
        finally:
            if worker:
                self.idle.append(worker)
        return results

    def next_worker(self) -> "Worker":
        """One that has started, and is alive."""
        for _ in range(START_ATTEMPTS + self.size):  # all of them may have died while idle
            worker = self.idle.pop()
            if worker.starts():
                return worker
            self.replace(worker)
        raise RuntimeError(f"workers do not start: {' '.join(self.command)}")

    def replace(self, worker: "Worker") -> None:
        worker.kill()
        self.workers.remove(worker)
        self.add_worker()

    def add_worker(self) -> None:
        with self.lock:
            if self.closed:
                raise RuntimeError("the pool is closed")
            worker = Worker(self.command)
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
        self.process = subprocess.Popen(  # own session: Ctrl-C is the trainer's business
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.ready = False

    def alive(self) -> bool:
        return self.process.poll() is None

    def starts(self) -> bool:
        """Is it there for a job? Waits, if it is new."""
        self.ready = self.alive() and (self.ready or bool(self.line(STARTUP_SECONDS)))
        return self.ready

    def ask(self, job, timeout: float) -> tuple:
        """As `Pool.map`, for one job. The process is dead if it did not reply."""
        with contextlib.suppress(BrokenPipeError):  # it is dead: there will be no reply
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
        return self.process.stdout.readline() if wait([self.process.stdout], seconds) else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in self.process.stdin, self.process.stdout:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve(function: Callable, timeout: float, memory_bytes: int) -> None:
    """A worker's life: a job a line in, a reply a line out, until there is no parent.

    function: called with a job's values. Import what it needs before: its time counts.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    with contextlib.suppress(BrokenPipeError):  # there is no parent any more
        print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.alarm(int(timeout) + 2)  # should the parent be killed, no hung worker outlives it
        reply = function(*json.loads(line))
        signal.alarm(0)
        print(json.dumps(reply), file=out, flush=True)
