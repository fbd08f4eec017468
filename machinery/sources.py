"""Sources of problems: the rows of a file, of the toy or of a data set on the hub.

What a row means is said by the readers of data.py. Here it is read, and its cells are checked.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import pyarrow.parquet

from machinery import toy
from machinery.processes import InputError, say

OTHER_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zip|zst|xz|bz2)$", re.IGNORECASE)
HUB_NAME = re.compile(r"\w[\w.-]{0,95}", re.ASCII).fullmatch


def read_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for each row of the toy, a file or a hub data set."""
    path, suffix = Path(name), Path(name).suffix.lower()
    is_file = os.path.isfile(name)  # Path's method raises of names that are too long
    if not name.strip():
        raise InputError("--data, --eval_data or --bench: the name of a source is empty")
    if path.parts[:1] == ("toy",) and not is_file:
        rows: Iterable[dict] = toy.rows("/".join(path.parts[1:]) or "train")
    elif is_file and suffix == ".jsonl":
        yield from read_lines(path, name)
        return
    elif is_file and suffix == ".parquet":
        rows = read_parquet(path, name)
    elif is_file:
        raise InputError(
            f"{name}: neither .jsonl (one JSON object a line) nor .parquet. Unpack it, or convert "
            "it: pandas.read_json or read_csv(...).to_json('NAME.jsonl', orient='records', "
            "lines=True)"
        )
    elif os.path.isdir(name):
        raise InputError(f"{name}: a directory; name a .jsonl or .parquet file in it")
    else:
        rows = read_hub(name, split)
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def read_lines(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: U+2028 is text
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{name}, line {number}", parse_line(line, f"{name}, line {number}")


def parse_line(line: bytes, where: str) -> dict:
    try:
        text = line.decode("utf-8-sig")  # Windows' editors put a mark first
        row = json.loads(text)
        if r"\ud" in text.lower():  # half a surrogate pair is no text: it could not be written
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # not JSON, or a number or nesting without end
        raise InputError(
            f"{where}: not JSON in UTF-8 ({error}); expected one object a line"
        ) from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def read_parquet(path: Path, name: str) -> list[dict]:
    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:  # pyarrow has a dozen kinds
        raise InputError(f"{name}: not a parquet file that can be read ({error})") from error
    try:
        return table.to_pylist()
    except Exception as error:
        check_cells(table, name)
        raise InputError(f"{name}: its rows cannot be read ({error})") from error


def check_cells(table: Any, name: str) -> None:
    """Raise InputError at the cell that Python cannot have: text that is none, the year 10000."""
    for column in table.column_names:
        for number, cell in enumerate(table[column]):
            try:
                cell.as_py()
            except Exception as error:
                where = f"{name}, row {number}, column {column}"
                raise InputError(f"{where}: cannot be read ({error})") from error


def read_hub(name: str, split: str) -> Iterator[dict]:
    """ORGANISATION/NAME, perhaps /CONFIG, perhaps :SPLIT."""
    repository, _, named = name.partition(":")
    parts = repository.split("/", 2)
    name_on_hub, is_one = "/".join(parts[:2]), all(map(HUB_NAME, parts[:2]))
    # In a directory of that name datasets would look at all that there is.
    if OTHER_FILE.search(name) or not is_one or os.path.exists(name_on_hub):
        raise InputError(f"{name}: no such file, and no name on the hub")
    import datasets  # slow to import, and only the hub needs it

    try:
        yield from datasets.load_dataset(name_on_hub, *parts[2:], split=named or split)
    except Exception as error:  # a dozen kinds, and all mean that there is no data
        raise InputError(
            f"{name}: not a .jsonl or .parquet file, and no data set with a split "
            f"{named or split!r} that this machine reaches on the hub ({error})"
        ) from error


class Row:
    """A row of a source: its columns, where it stands, and the columns that were looked at."""

    def __init__(self, columns: dict[str, Any], where: str):
        self.columns, self.where = columns, where
        self.read: set[str] = set()

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return self.columns.get(column)

    def text(self, column: str) -> str:
        value = self[column]
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(column, "a non-empty string", value)
        return value

    def wrong(self, column: str, expected: str, found: Any) -> InputError:
        found = f"{brief(found)} ({type(found).__name__})"
        return InputError(f"{self.where}, column {column}: expected {expected}, found {found}")


def is_logp(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value <= 1e-6  # may be rounded


def final(value: Any, column: str, row: Row) -> str:
    """A final answer: text, a number, or a list of one of them."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if type(value) is float and math.isfinite(value):  # a column of 25 and null is one of floats
        value = int(value) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise row.wrong(column, "a final answer (a string or a number)", value)
    return value


def source_of(row: Row) -> str:
    given = (name for name in ("data_source", "benchmark") if row[name] not in (None, ""))
    if (column := next(given, None)) is None:
        return ""
    if not isinstance(row[column], str):
        raise row.wrong(column, "a string", row[column])
    return row[column]


def strings(value: Any) -> list[str]:
    """The list, if it is one of strings alone, else an empty one."""
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else []


def messages(value: Any, column: str, row: Row) -> list[dict[str, str]]:
    if not (isinstance(value, list) and value) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    ):
        raise row.wrong(column, "a string, or a list of {role, content} messages", value)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def say_ignored(name: str, ignored: list[str]) -> None:
    """What stands in a source and has no effect, once."""
    if ignored:
        hint = "; trace_logps takes a teacher's log-probs" if "target_probs" in ignored else ""
        columns = f"column{'s' * (len(ignored) > 1)} {', '.join(ignored)}"
        say(f"{name}: ignores the {columns} (docs/data.md has those that are read){hint}")
