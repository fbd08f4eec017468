"""Files that a killed program leaves whole, on a disk that may be full: logs, text, one writer."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCKS: dict[Path, IO] = {}  # files that this process holds until it ends


class InputError(ValueError):
    """The user's input cannot be used. The message names the flag, file or row, and the fix."""


class OwnInputError(InputError):
    """One that the other ranks may not meet: whoever does prints it."""


def read_jsonl(path: Path, **fields: Any) -> list[dict]:
    """The rows of a file; a killed run may have left half a row at its end.

    fields: what each row has, and of which type. Raises InputError for a row without, and for a
    line before the end that is none: something else has written there.
    """
    rows: list[dict] = []
    lines = read(path).split(b"\n") if path.exists() else []  # U+2028 is text
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError as error:
            if any(lines[number:]):
                raise InputError(
                    f"{path}, line {number}: not a row of JSON ({error}), and there are rows after "
                    "it. Mend it: a run needs all rows. An evaluation samples anew what is removed"
                ) from None
            break
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise InputError(
                    f"{path}, line {number}: {name} is {row.get(name)!r:.60}, which no program of "
                    "this project writes. Mend or remove that line"
                )
        rows.append(row)
    return rows


def read_json(path: Path) -> dict:
    data = read(path)
    try:
        found = json.loads(data.decode("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}). Mend or remove it") from None
    return found


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append(path: Path, *rows: dict) -> None:
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(to_jsonl(list(rows)))


def write(path: Path, text: str) -> None:
    """The whole file or the old one, also after a power cut."""
    half_written = path.with_name(f".{path.name}.tmp")
    with writing(path):
        half_written.write_text(text, "utf-8")
        sync(half_written)
        half_written.replace(path)  # rename refuses a file that exists, on Windows
        sync(path.parent)


@contextmanager
def writing(path: Path, *more: type[Exception]) -> Iterator[None]:
    """A disk's complaint, or one of `more` by a library, as an InputError that names the file."""
    try:
        yield
    except (OSError, *more) as error:
        fix = "Is the disk full, or a quota? When there is room, the same command goes on"
        if getattr(error, "errno", None) not in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "Name another place, or make it one that can be written to"
        raise OwnInputError(f"{path} cannot be written: {error}. {fix}") from error


def sync(path: Path) -> None:
    """What was written of a file, or the names in a directory, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock(directory: Path) -> None:
    """Make the directory, and this process the only one that writes there, until it ends.

    Raises InputError that names the other one. Windows, and file systems without locks, have none.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    path = (directory / ".lock").resolve()
    if fcntl is None or path in LOCKS:
        return
    with writing(path):
        file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a process: no child inherits it
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(
            f"--out {directory}: {file.read() or 'another process'} is writing there. Wait for its "
            "end or stop it, or name another directory"
        ) from None
    except OSError as error:
        print(f"lock        none in {directory}: {error}. Start nothing else there", flush=True)
    with writing(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    LOCKS[path] = file
