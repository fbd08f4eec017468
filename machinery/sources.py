"""Sources of problems: the rows of a file, of the toy or of a data set on the hub.

What a row means is said by the readers of data.py. Here it is read, and its cells are checked.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import pyarrow.parquet
import pyarrow.types

from machinery import toy
from machinery.processes import InputError, say

OTHER_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zip|zst|xz|bz2)$", re.IGNORECASE)
# What str() or a table's export makes of a list or an object; no gold, question or trace.
DUMP = re.compile(r"""\s*[\[{]\s*\{?\s*['"]""")
# Numbers that a float may not hold: 18 digits; far from 1
NO_FLOAT = re.compile(r"[1-9][0-9.]{18}|[.]0{300}|[0-9]e[+-]?[0-9]{3}", re.IGNORECASE)
MOST_DIGITS = 4300  # as Python's limit for whole numbers
BATCH = 1024  # rows that are Python objects at a time: all of them take seconds, and memory
HUB_NAME = re.compile(r"\w[\w.-]{0,95}", re.ASCII).fullmatch


def read_rows(name: str, split: str) -> Iterator[tuple[str, dict | bytes]]:
    """(where it stands, row) for each row of the toy, a file or a hub data set; JSON as it is."""
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
    elif os.path.exists(name):
        raise InputError(f"{name}: a directory, or a pipe; name a .jsonl or .parquet file")
    else:
        rows = read_hub(name, split)
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def read_lines(path: Path, name: str) -> Iterator[tuple[str, bytes]]:
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: U+2028 is text
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{name}, line {number}", line


def parse_line(line: bytes, where: str) -> dict:
    try:
        text = line.decode("utf-8-sig")  # Windows' editors put a mark first
        row = json.loads(text, parse_float=exact_number, object_pairs_hook=without_doubles)
        if rb"\ud" in line.lower():  # half a surrogate pair is no text: it could not be written
            json.dumps(row, ensure_ascii=False).encode()
    # not JSON, or a number or nesting without end
    except (ValueError, ArithmeticError, RecursionError) as error:
        words = f"not JSON in UTF-8 ({error}); expected one object a line"
        raise InputError(f"{where}: {words}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def without_doubles(pairs: list[tuple[str, Any]]) -> dict:
    """json would take the last of two columns of a name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r:.60} stands twice in one object")
    return found


def exact_number(text: str) -> float | Decimal:
    if not NO_FLOAT.search(text):
        return float(text)
    number = Decimal(text)
    if abs(number.adjusted()) > MOST_DIGITS:
        raise ValueError(f"the number {text:.60} has more than {MOST_DIGITS} digits")
    return float(text) if Decimal(repr(float(text))) == number else number


def read_parquet(path: Path, name: str) -> Iterator[dict]:
    try:
        table = pyarrow.parquet.read_table(path)
        for i, column in enumerate(table.column_names):
            if chunks := table[i].chunks:
                found = pyarrow.chunked_array([by_decimals(chunk) for chunk in chunks])
                table = table.set_column(i, column, found)
    except Exception as error:  # pyarrow has a dozen kinds
        words = " ".join(str(error).split())
        raise InputError(f"{name}: not a parquet file that can be read ({words})") from error
    try:
        for batch in table.to_batches(BATCH):
            yield from batch.to_pylist()
    except Exception as error:
        check_cells(table, name)
        raise InputError(f"{name}: its rows cannot be read ({error})") from error


def by_decimals(column: Any) -> Any:
    """Short floats, in an object too, by what they print: 0.1, not 0.10000000149011612."""
    kind = column.type
    if pyarrow.types.is_float16(kind):
        column = pyarrow.array([str(x) for x in column.to_numpy(zero_copy_only=False)])
    if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
        return column.cast("string").cast("double")
    if not pyarrow.types.is_struct(kind) or not kind.num_fields:
        return column
    parts = [by_decimals(column.field(i)) for i in range(kind.num_fields)]
    names = [kind.field(i).name for i in range(kind.num_fields)]
    return pyarrow.StructArray.from_arrays(parts, names, mask=column.is_null())


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
    """A row of a source: its columns, and where it stands. `read` gets those that are looked at."""

    def __init__(self, given: dict[str, Any] | bytes, where: str, read: set[str]):
        self.columns = parse_line(given, where) if isinstance(given, bytes) else given
        self.where, self.read = where, read

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
    return type(value) in (int, float, Decimal) and -1e30 < value <= 1e-6  # may be rounded


def final(value: Any, column: str, row: Row) -> str:
    """A final answer: text, a number, or a list of one of them.

    Raises InputError for anything else: what str() makes of it would be graded without a word.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if type(value) is float and math.isfinite(value):  # a column of 25 and null is one of floats
        value = int(value) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if type(value) is Decimal and value.is_finite():
        value = f"{value:f}"
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value.strip() or DUMP.match(value) or "####" in value:
        expected = "a final answer (a number, or text without #### that is no list's or object's)"
        raise row.wrong(column, expected, value)
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
        expected = "a string, or a list of {role, content} messages that is not written as text"
        raise row.wrong(column, expected, value)
    more = {key for m in value for key in m if m[key]} - {"role", "content"}
    row.columns |= {f"{column}.{key}": None for key in sorted(map(str, more))}  # ignored, too
    return [{"role": m["role"], "content": m["content"]} for m in value]


def say_ignored(name: str, ignored: list[str]) -> None:
    """What stands in a source and has no effect, once."""
    if ignored:
        hint = "; trace_logps takes a teacher's log-probs" if "target_probs" in ignored else ""
        columns = f"column{'s' * (len(ignored) > 1)} {', '.join(ignored)}"
        say(f"{name}: ignores the {columns} (docs/data.md has those that are read){hint}")
