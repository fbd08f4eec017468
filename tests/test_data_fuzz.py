"""Thousands of broken files: each is read as what it says, or refused with its file and row."""

import json
import random
import re
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from data import Problem, choose_template, encode, load_problems
from machinery import toy
from machinery.processes import InputError

DOCUMENT = (ROOT / "docs" / "data.md").read_text("utf-8")
ROWS = [json.loads(row) for row in re.findall(r"^(\{.*\})$", DOCUMENT, re.M)]
ROWS = [row for row in ROWS if "trace_logps" not in row]  # of a tokenizer that has whole words
MESSAGE = {"role": "user", "content": "b2?"}
CELLS = [
    *(None, True, False, 0, -1, 7, 0.5, 1e300, float("nan"), float("inf"), 10**30, -(10**400)),
    *("", " ", "\n", "\0", "x", "π", "\u2028", "\ud800", "a\udfffb", "None", "nan", "\\N{x}"),
    *("{{ x }}", "{% if %}", "'\"", "####", "1 #### 2", "#### 1,000", "<" * 50_000, "\\boxed{"),
    *("\\boxed{" * 3000, "\\boxed{2}", "</think>", "<eos>", "9" * 6000, "a" * 10_000),
    *([], {}, [None], [[]], [[[]]], ["1"], ["1", "2"], [1], ["a", 5], {"a": 1}, [{"a": 1}]),
    *([MESSAGE], [MESSAGE, {"role": "assistant", "content": "2"}], [MESSAGE | {"role": "martian"}]),
    *([MESSAGE | {"role": 5}], [MESSAGE | {"content": None}], [MESSAGE | {"role": ""}], MESSAGE),
    *([MESSAGE | {"role": "system"}], [MESSAGE | {"role": "assistant"}], [{"role": "user"}]),
    *({"ground_truth": None}, {"ground_truth": ["2"]}, {"ground_truth": {}}, {"label": ["A"]}),
    *({"label": ["A", "A"], "text": ["1", "2"]}, ["x"] * 30, ["1"] * 26, [""], "A", "Z", "AB"),
]
ONLY_PARQUET = [b"\xff", date(1, 1, 1), Decimal("1.5"), [date(9999, 12, 31)], {"b": b"\x80"}]
LINES = [
    *("", "{", "}", "[]", "1", "null", '"', "{not json", '{"a": 1,}', "{}", "\ufeff{}", "NaN"),
    *('{"problem": "a", "answer": ' + "1" * 5000 + "}", "[" * 100_000, '{"a":' * 100_000),
    *('{"problem": "\\ud800", "answer": "1"}', '{"problem": "a", "answer": 1e999}'),
    *('{"problem": "a", "answer": "1", "x": "\\uDFFF"}', '{"\\ud800": 1}', "\0", "\x1a", "--"),
    *('{"problem": "a", "answer": -Infinity}', '{"problem": "a", "answer": "1"} {}'),
]
SUFFIXES = ["", ".json", ".JSON", ".csv", ".txt", ".gz", ".jsonl.gz", ".jsonl ", ".arrow"]
NAMES = ["", " ", "/", "..", "toy/", "toy/x", "toy/val/x", "no/such", "no/such/file", "a/b/c:d"]
NAMES += ["x" * 300, "a\0b", "http://x/y.jsonl", "~/x", "a b/c", ":", "x/" * 2000, "/no/such"]
NAMES += ["no/such.jsonl.GZ", "é/é", "docs:train", "docs/x", "tests/results:x", "docs/data.md"]


def broken_cell(rng: random.Random, cells: list) -> tuple[dict, str]:
    """-> a row of the document with one other cell, or without one; the column."""
    row = dict(rng.choice(ROWS))
    column = rng.choice([*row, "trace_logps", "data_source", "benchmark", "trace", "solution"])
    row[column] = rng.choice(cells)
    if rng.random() < 0.1:
        del row[column]
    return row, column


def made(rng: random.Random, directory: Path) -> tuple[str, int | None]:
    """A broken file -> its name, and the row (from 0) that is the broken one, if one is."""
    good = [rng.choice(ROWS) for _ in range(rng.randrange(3))]
    at, kind = len(good), rng.random()
    file = directory / rng.choice(["f.jsonl", "f.JSONL", "[f] $x$.jsonl", "é.jsonl"])
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in good]
    if kind < 0.45:
        row, _ = broken_cell(rng, CELLS)
        text = "\n".join([*lines, json.dumps(row), *lines])
        encoding = rng.choice(["utf-8", "utf-8-sig"])
        file.write_text(text.replace("\n", rng.choice(["\n", "\r\n"])), encoding, newline="")
        return str(file), at
    if kind < 0.6:
        line = rng.choice(LINES)
        file.write_text("\n".join([*lines, line, *lines]), "utf-8", "surrogatepass")
        return str(file), at if line else None
    if kind < 0.8:
        file = directory / rng.choice(["f.parquet", "f.PARQUET"])
        row, _ = broken_cell(rng, CELLS + 4 * ONLY_PARQUET)
        try:
            table = pyarrow.Table.from_pylist([row] * rng.choice([1, 3]))
            pyarrow.parquet.write_table(table, file)
        except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
            pyarrow.parquet.write_table(not_utf8(at), file)
            return str(file), at
        if rng.random() < 0.7:
            return str(file), 0
        content = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 20])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        return str(file), None
    if kind < 0.9:
        content = bytearray("\n".join(lines + [json.dumps(rng.choice(ROWS))]).encode())
        for _ in range(rng.choice([1, 3])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
        return str(file), None
    if kind < 0.95:
        file = directory / f"f{rng.choice(SUFFIXES)}"
        file.write_text("\n".join(lines), rng.choice(["utf-8", "utf-16"]))
        return str(file), None
    return rng.choice(NAMES), None


def not_utf8(rows: int) -> pyarrow.Table:
    """Text that is none in the last row: pyarrow says so when the cell is read."""
    columns = {"problem": [b"1+1?"] * rows + [b"\xff"], "answer": [b"2"] * (rows + 1)}
    return pyarrow.table(
        {
            name: pyarrow.array(cells, pyarrow.binary()).view("string")
            for name, cells in columns.items()
        }
    )


def texts_of(problem: Problem) -> list[str]:
    prompt = problem.prompt
    found = [prompt] if isinstance(prompt, str) else [t for m in prompt for t in m.values()]
    return [*found, problem.answer, problem.source, *[problem.trace] * (problem.trace is not None)]


def look_at(name: str) -> list[Problem]:
    """As a run's start does."""
    problems = load_problems(name)
    tokenizer = toy.make_tokenizer()
    choose_template(problems, tokenizer)
    encode(problems, tokenizer, max_prompt_tokens=64, max_trace_tokens=64)
    return problems


def assert_read_or_refused(name: str, row: int | None) -> str:
    try:
        problems = look_at(name)
    except InputError as error:
        said = str(error)
        assert name in said, said
        if row is not None:
            assert re.search(f", (line {row + 1}|row {row})\\b", said), said
        return said
    for p in (p for problem in problems for p in (problem, *problem.others)):
        assert p.answer.strip() and not re.match(r"[\[{]'|\[\]|\{\}|True|False|-?inf", p.answer)
        for text in texts_of(p):
            assert isinstance(text, str) and text.encode() is not None
    return ""


def fuzz(tmp_path: Path, seeds: range) -> None:
    refused = 0
    for seed in seeds:
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            refused += bool(assert_read_or_refused(*made(random.Random(seed), directory)))
        except BaseException as error:
            error.add_note(f"seed {seed}: {[str(f) for f in directory.iterdir()]}")
            raise
    assert 0.3 < refused / len(seeds) < 0.9  # else the files are all alike


def test_broken_files(tmp_path):
    fuzz(tmp_path, range(200))


@pytest.mark.slow
def test_three_thousand_broken_files(tmp_path):
    fuzz(tmp_path, range(3000))
