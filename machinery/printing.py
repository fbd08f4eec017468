"""What a program prints: on terminals without UTF-8, into pipes that close, onto full disks.

A tool ends there as any other of its system does. A run goes on, for its logs are files, and prints
into one of its directory.
"""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = {1: "stdout", 2: "stderr"}
LOST: dict[int, str] = {}  # those that nothing can be written to any more, and why


class Output(io.FileIO):
    """One of NAMES."""

    instead: Path | None = None  # where a run goes on to print; None: of a tool

    def write(self, data: Any) -> int:
        number = self.fileno()
        if number in LOST and bytes(data[:1]) == b"\r":  # a bar, for a terminal
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            again = number in LOST  # the file that came in its place fails, too
            LOST[number] = str(error)
            redirect(number, None if again else Output.instead)
            if number == 1 and Output.instead is None:
                raise end_of_tool(error) from None
            return len(data) if again else self.write(data)


def end_of_tool(error: OSError) -> SystemExit:
    """Nobody reads on (| head): it ends in silence, as if by SIGPIPE. Else it says why."""
    if isinstance(error, BrokenPipeError):
        return SystemExit(128 + 13)
    return SystemExit(f"{os.path.basename(sys.argv[0])}: stdout: {error}")


def redirect(number: int, file: Path | None) -> None:
    """What is printed from now on, by libraries and children as well. None: nowhere."""
    try:
        new = os.open(file or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if file:
            words = f"{NAMES[number]}: {LOST[number]}. The run goes on, and prints here\n"
            os.write(new, words.encode())
    except OSError:
        new = os.open(os.devnull, os.O_WRONLY)
    os.dup2(new, number)
    os.close(new)


def print_what_can_be() -> None:
    """An ASCII locale, or a pipe on Windows, has no π: then print a question mark."""
    for number, errors in (1, "replace"), (2, "backslashreplace"):
        stream: Any = getattr(sys, NAMES[number])
        if stream is None:  # closed by who started it
            setattr(sys, NAMES[number], open(os.devnull, "w", encoding="utf-8"))
            continue
        raw: Any = getattr(stream, "buffer", None)
        raw = getattr(raw, "raw", raw)  # unless PYTHONUNBUFFERED is set
        if type(raw) is not io.FileIO:
            with suppress(AttributeError):  # a console of Windows
                stream.reconfigure(errors=errors)
        elif raw.fileno() == number:
            stream.flush()
            raw = io.BufferedWriter(Output(number, "w", closefd=False))
            new = io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=True)
            setattr(sys, NAMES[number], new)


def go_on(file: Path = Path(os.devnull)) -> None:
    """From now on nothing ends where it cannot be printed, but stands in this file."""
    Output.instead = file
    for number in LOST:
        redirect(number, file)
