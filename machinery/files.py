"""Files that a killed program leaves whole: .jsonl logs, and text that is written or not."""

import io
import json
import sys
from pathlib import Path


def read_jsonl(path: Path) -> list[dict]:
    """The complete rows of a file; a killed run may have left half a row at its end."""
    rows = []
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:  # U+2028 is text
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append(path: Path, *rows: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(to_jsonl(list(rows)))


def write(path: Path, text: str) -> None:
    """The whole file or the old one."""
    half_written = path.with_name(f".{path.name}.tmp")
    half_written.write_text(text, "utf-8")
    half_written.replace(path)  # rename refuses a file that exists, on Windows


def print_what_can_be() -> None:
    """An ASCII locale, or a pipe on Windows, has no π: then print a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
