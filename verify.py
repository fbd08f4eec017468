"""Is this answer right? Rule-based rewards: 1.0 for a right final answer in \\boxed{}, else 0.0.

    python verify.py RESPONSE ANSWER        # prints the extracted answer and the verdict

The text graded here was written by a model, so the `Grader` never parses it in the trainer's
process: workers do, and a worker that takes too long is killed.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from multiprocessing.connection import wait
from pathlib import Path

BOXED = "\\boxed{"
INTEGER = re.compile(r"[+-]?\d{1,4000}")
STARTUP_SECONDS = 120  # for a worker to import sympy, on a machine busy with other ranks' workers


# ------------------------------------------------------------------ one answer
def extract_answer(response: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` of the final answer, or None.

    What stands inside a thought is no answer: only text after the last `</think>` counts, if there
    is one; a response that opens a thought and never closes one has no answer.

    >>> extract_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> extract_answer(r"<think> \boxed{1} </think> It is \boxed{2}.")
    '2'
    >>> extract_answer(r"<think> I am still thinking, maybe \boxed{1}") is None
    True
    """
    thought, closed, answer = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return None
    start = answer.rfind(BOXED)
    while start >= 0:  # from the last box to the first, until one is complete
        content = balanced(answer, start + len(BOXED))
        if content is not None:
            return content.strip()
        start = answer.rfind(BOXED, 0, start)
    return None


def balanced(text: str, start: int) -> str | None:
    r"""text[start:] up to the brace that closes the one just before it; None if none does."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # \{ and \} are characters, not groups
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start:i]
        i += 1
    return None


def grade(response: str, answer: str) -> float:
    r"""1.0 if the boxed answer of `response` equals `answer` as mathematics, else 0.0.

    Runs in this process, without a time limit: use `Grader` on text that a model wrote.

    >>> grade(r"It is \boxed{0.5}.", r"\frac{1}{2}"), grade(r"It is \boxed{0.5}.", "2")
    (1.0, 0.0)
    """
    given = extract_answer(response)
    if given is None:
        return 0.0
    return float(equivalent(given, answer.strip()))


def equivalent(given: str, answer: str) -> bool:
    """Do two final answers denote the same value? Cheap exact paths first, then math-verify."""
    if given == answer:
        return True
    if INTEGER.fullmatch(given) and INTEGER.fullmatch(answer):
        return int(given) == int(answer)  # "025" is 25
    from math_verify import parse, verify  # a second of imports, needed by the workers only

    # No timeouts here: math-verify's are SIGALRM, which only the main thread may set. It warns.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str) -> list:
        return parse(f"{BOXED}{text}}}", parsing_timeout=None)

    return bool(verify(read(answer), read(given), timeout_seconds=None))


# ------------------------------------------------------------------ many answers, safely
class Grader:
    """A pool of worker processes that cannot be hung: a job that overruns costs itself only.

    workers: processes; timeout: seconds for one job, after which its worker is killed (reward 0)
    and replaced. `timeouts` and `crashes` count such jobs since the start. Use it as a context
    manager, or call `close()`.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0):
        self.timeout, self.timeouts, self.crashes = timeout, 0, 0
        self.workers = [Worker(timeout) for _ in range(workers)]

    def __call__(self, jobs: list[tuple[str, str]]) -> list[float]:
        """[(response, answer), ...] -> [reward, ...] in the same order."""
        rewards, todo = [0.0] * len(jobs), deque(enumerate(jobs))
        while todo or any(w.job is not None for w in self.workers):
            for i, worker in enumerate(self.workers):
                if todo and worker.ready and worker.job is None:
                    if worker.start(*todo[0]):
                        todo.popleft()
                    else:  # it died while idle
                        self.crashes += 1
                        self.workers[i] = Worker(self.timeout)
            waiting = [w for w in self.workers if w.job is not None or not w.ready]
            patience = max(0.0, min(w.deadline for w in waiting) - time.monotonic())
            wait([w.process.stdout for w in waiting], timeout=patience)
            for i, worker in enumerate(self.workers):
                if worker not in waiting or (reply := worker.poll()) is None:
                    continue
                job = worker.finish()
                if isinstance(reply, float):
                    if job is not None:  # None: it was the hello of a new worker
                        rewards[job] = reply
                    continue
                if job is None:
                    raise RuntimeError(f"a grading worker {reply} before its first job; "
                                       "does `python verify.py 1 1` run?")
                self.timeouts += reply == "timed out"
                self.crashes += reply == "crashed"
                self.workers[i] = Worker(self.timeout)
        return rewards

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Worker:
    """One grading process. A plain subprocess: multiprocessing's spawn would import the trainer."""

    def __init__(self, timeout: float):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(timeout)]
        self.process = subprocess.Popen(  # own session: Ctrl-C is the trainer's business
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.timeout, self.ready, self.job = timeout, False, None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    def start(self, job: int, work: tuple[str, str]) -> bool:
        """Give it a job; False if the process is dead."""
        try:
            self.process.stdin.write(json.dumps(work).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.kill()
            return False
        self.job, self.deadline = job, time.monotonic() + self.timeout
        return True

    def poll(self) -> float | str | None:
        """The reward, or what went wrong (the process is dead then), or None: still at work."""
        if wait([self.process.stdout], timeout=0):
            line = self.process.stdout.readline()
            if line:
                return float(line)
            self.kill()
            return "crashed"
        if time.monotonic() >= self.deadline:
            self.kill()
            return "timed out"
        return None

    def finish(self) -> int | None:
        job, self.job, self.ready = self.job, None, True
        return job

    def kill(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()  # closes the pipes and reaps the process


def work(timeout: float) -> None:
    """A worker's life: one JSON job a line in, one reward a line out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reward
    import math_verify  # noqa: F401  (before the hello: the clock of a job must not pay for it)

    print(0.0, file=out, flush=True)  # hello
    for line in sys.stdin:
        signal.alarm(int(timeout) + 2)  # should the parent be killed, no hung worker outlives it
        try:
            reward = grade(*json.loads(line))
        except Exception:  # a text that the parser cannot digest is a wrong answer
            reward = 0.0
        signal.alarm(0)
        print(reward, file=out, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python verify.py RESPONSE ANSWER")
    if sys.argv[1] == "--worker":
        work(float(sys.argv[2]))
    else:
        print(f"extracted: {extract_answer(sys.argv[1])}\nreward: {grade(*sys.argv[1:])}")
