"""--reward FILE.py:function: a user's reward, called in workers that can be killed.

The file is loaded in a worker alone, with the modules beside it and this project's (`from verify
import grade`). What is wrong with it comes back as a text that names file and line.
"""

import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machinery.files import InputError, OwnInputError
from machinery.pool import Pool

LARGEST = 1e18  # rewards are float32 later, and their squares have to be


# ------------------------------------------------------------------ in a worker
class Broken(Exception):
    """The user's file or function cannot be used: where, and why."""


class Reward:
    """The function. A call -> (its number, or None; what is wrong, or None). It may not return.

    Called without arguments: what is wrong with the file, if anything.
    """

    def __init__(self, name: str):
        self.path = Path(name.rpartition(":")[0]).resolve()
        self.function: Callable | None = None
        try:
            self.function, self.broken = load(name, self.path), None
        except Broken as error:
            self.broken = str(error)

    def __call__(self, *job: str) -> tuple[float | None, str | None]:
        if self.function is None or not job:
            return None, self.broken
        try:
            found = self.function(*job)
            if isinstance(found, int | float) and abs(float(found)) <= LARGEST:
                return float(found), None
            got = f"expected a finite number, got {found!r:.80}; at most {LARGEST:g} in size"
        except MemoryError:  # a limit of ours, as time is
            raise
        except (Exception, SystemExit) as error:
            return None, where(error, self.path)
        return None, f"{place(self.function, self.path)}: {got}"


def load(name: str, path: Path) -> Callable:
    file, colon, function = name.rpartition(":")
    if not colon or path.suffix != ".py":
        raise Broken("expected FILE.py:function")
    if not os.path.isfile(path):  # Path's method raises of names that are too long
        raise Broken(f"{file}: no such file")
    sys.path.insert(0, str(path.parent))
    spec: Any = importlib.util.spec_from_file_location("reward_of_user", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit, too
        raise Broken(where(error, path)) from error
    found = getattr(module, function, None)
    if not callable(found):
        its = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise Broken(f"{file}: no function {function!r}; its functions: {', '.join(its) or 'none'}")
    try:
        inspect.signature(found).bind("response", "answer")
    except TypeError:
        takes = f"{function}{inspect.signature(found)}"
        raise Broken(f"{place(found, path)}: {takes} must take (response, answer)") from None
    except ValueError:  # a builtin without a signature
        pass
    return found


def place(function: Callable, path: Path) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else str(path)


def where(error: BaseException, path: Path) -> str:
    """FILE, line N: exception. The last line of this file or of those beside it."""
    found = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    found = [frame for frame in found if Path(frame[0]).parent == path.parent]
    file, line = found[-1] if found else (str(path), None)
    if isinstance(error, SyntaxError):  # of this file or of one that it imports
        file, line = error.filename or file, error.lineno
    at = f"{file}, line {line}" if line else file
    return f"{at}: {type(error).__name__}: {error}"[:1000]


# ------------------------------------------------------------------ in the trainer
class Rewards:
    """Rewards of many responses. Raises InputError if there is no such function, and in calls."""

    def __init__(self, program: list[str], workers: int, timeout: float, name: str):
        """program: what calls `serve` with a Reward, given --reward NAME TIMEOUT."""
        self.name = name
        self.pool = Pool([*program, "--reward", name, str(timeout)], workers, timeout)
        try:
            [(reply, failure)] = self.pool.map([()], key=len)
            broken = reply[1] if reply else failure
        except InputError as error:  # a file that ends its process, or takes minutes
            broken = str(error)
        if broken:
            self.pool.close()
            raise InputError(f"--reward {name}: {broken}")

    def __call__(self, jobs: list[tuple[str, str]]) -> tuple[list[float | None], Counter[str]]:
        """[(response, answer), ...] -> rewards, and failures by kind, whose reward is None."""
        rewards, failures = [], Counter[str]()
        # Each job has a key of its own: a program that hangs says nothing about the next one.
        for job, (reply, failure) in zip(jobs, self.pool.map(jobs, key=id)):
            reward, broken = reply or (None, None)
            if broken:
                raise OwnInputError(
                    f"--reward {self.name}: {broken}; of the response {job[0]!r:.80} and the "
                    f"answer {job[1]!r:.80}. Once it is mended, the same command goes on from the "
                    "last checkpoint"
                )
            rewards.append(reward)
            if failure:
                failures[f"reward_{failure}"] += 1
        return rewards, failures


def version(name: str) -> str:
    """Another one if the file's content is another."""
    return hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest() if name else ""
