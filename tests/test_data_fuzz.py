"""Thousands of broken files: each is read as what it says, or refused with its file and row."""

import copy
import gzip
import json
import random
import re
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from data import ASK_FOR_A_BOX, Problem, choose_template, encode, load_problems
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
    *("so #### 5", "#### Step 1\nis 5", "1 #### 2 #### 3", "['1', '2']", '["1"]', "{'a': 1}"),
    *("[{'role': 'user', 'content': 'a'}]", 0.1 + 0.2, 1e22, 2**53 + 1, -0.0, "\u200b", "\t5\r"),
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
    *('{"problem": "a", "answer": 1e-400}', '{"problem": "a", "answer": 3.14159265358979323846}'),
    *('{"problem": "a", "answer": "1", "answer": "2"}', '{"problem": "a", "answer": 1e9999999999}'),
    *('{"prompt": "a", "reward_model": {"ground_truth": "1", "ground_truth": "2"}}', "{'a': 1}"),
    *('{"problem": "a", "answer": 1E+400}', '{"problem": "a", "answer": NaN}', "\ufeff"),
    *('{"problem": "a", "answer": -Infinity}', '{"problem": "a", "answer": "1"} {}'),
]
SUFFIXES = ["", ".json", ".JSON", ".csv", ".txt", ".gz", ".jsonl.gz", ".jsonl ", ".arrow"]
NAMES = ["", " ", "/", "..", "toy/", "toy/x", "toy/val/x", "no/such", "no/such/file", "a/b/c:d"]
NAMES += ["x" * 300, "a\0b", "http://x/y.jsonl", "~/x", "a b/c", ":", "x/" * 2000, "/no/such"]
NAMES += ["no/such.jsonl.GZ", "é/é", "docs:train", "docs/x", "tests/results:x", "docs/data.md"]


OTHERS = "trace_logps", "data_source", "benchmark", "trace", "solution", "choices", "options"
ENCODINGS = "utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1", "gbk"
FILES = [
    "f.jsonl",
    "f.JSONL",
    "[f] $x$.jsonl",
    "é.jsonl",
    "a:train.jsonl",
    "#1 a,b.jsonl",
    "~.jsonl",
]


class Made(NamedTuple):
    name: str
    at: int | None = None  # the broken row, from 0, if a row is broken
    row: dict | None = None  # what it says


def broken_row(rng: random.Random, cells: list) -> dict:
    """A row of the document with one other cell, at any depth, or without one, or one more."""
    row: Any = copy.deepcopy(rng.choice(ROWS))
    place, key = row, rng.choice([*row, *OTHERS])
    while isinstance(inner := place[key] if key in row or place is not row else None, dict | list):
        if not inner or rng.random() < 0.5:
            break
        place, key = (
            inner,
            rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner))),
        )
    place[key] = rng.choice(cells)
    if rng.random() < 0.1:
        del place[key]
    return row


def made(rng: random.Random, directory: Path) -> Made:
    good = [rng.choice(ROWS) for _ in range(rng.randrange(3))]
    at, kind = len(good), rng.random()
    file = directory / rng.choice(FILES)
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in good]
    if kind < 0.45:
        row = broken_row(rng, CELLS)
        text = "\n".join([*lines, json.dumps(row), *lines])
        encoding = rng.choice(["utf-8", "utf-8-sig"])
        file.write_text(text.replace("\n", rng.choice(["\n", "\r\n"])), encoding, newline="")
        return Made(str(file), at, row)
    if kind < 0.6:
        line = rng.choice(LINES)
        file.write_text("\n".join([*lines, line, *lines]), "utf-8", "surrogatepass")
        return Made(str(file), at, what_it_says(line)) if line.strip("\ufeff") else Made(str(file))
    if kind < 0.8:
        return made_parquet(rng, directory / rng.choice(["f.parquet", "f.PARQUET"]), at)
    if kind < 0.9:
        content = bytearray("\n".join(lines + [json.dumps(rng.choice(ROWS))]).encode())
        for _ in range(rng.choice([1, 3])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
    elif kind < 0.95:
        file = directory / f"f{rng.choice(SUFFIXES)}"
        content = "\n".join([*lines, "π"]).encode(rng.choice(ENCODINGS), "replace")
        file.write_bytes(rng.choice([content, gzip.compress(content)]))
    elif kind < 0.96:
        file.mkdir()
    else:
        return Made(rng.choice(NAMES))
    return Made(str(file))


def made_parquet(rng: random.Random, file: Path, at: int) -> Made:
    row = broken_row(rng, CELLS + 4 * ONLY_PARQUET)
    try:
        table = pyarrow.Table.from_pylist([row] * rng.choice([1, 3]))
        pyarrow.parquet.write_table(table, file)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
        pyarrow.parquet.write_table(not_utf8(at), file)
        return Made(str(file), at)
    if rng.random() < 0.7:
        return Made(str(file), 0, row)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 20])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    file.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
    return Made(str(file))


def what_it_says(line: str) -> dict | None:
    try:
        row = json.loads(line, parse_float=Decimal)
    except (ValueError, RecursionError, ArithmeticError):
        return None
    return row if isinstance(row, dict) else None


def not_utf8(rows: int) -> pyarrow.Table:
    """Text that is none in the last row: pyarrow says so when the cell is read."""
    columns = {"problem": [b"1+1?"] * rows + [b"\xff"], "answer": [b"2"] * (rows + 1)}
    return pyarrow.table(
        {
            name: pyarrow.array(cells, pyarrow.binary()).view("string")
            for name, cells in columns.items()
        }
    )


# ------------------------------------------------------------------ what was taken
def leaves(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return sum(map(leaves, value.values() if isinstance(value, dict) else value), [])
    return [value] if isinstance(value, str) else []


def same_gold(cell: Any, answer: str) -> bool:
    """Is it what the cell says, and nothing that Python made of it?"""
    if isinstance(cell, list):
        return len(cell) == 1 and not isinstance(cell[0], list) and same_gold(cell[0], answer)
    if isinstance(cell, str):
        last = cell.split("####")[-1].strip().replace(",", "")
        return answer == (cell if "####" not in cell else last) and not re.match(r"\[['\"]", cell)
    if isinstance(cell, bool) or not isinstance(cell, int | float | Decimal):
        return False
    number = Decimal(str(cell))
    return number.is_finite() and Decimal(answer) == number


def right_choice(row: dict) -> str | None:
    """The text of the right one; None: not multiple choice."""
    if "reward_model" in row and "prompt" in row:
        return None
    if "answerKey" in row and "choices" in row:
        return row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    if {"question", "options", "answer"} <= row.keys():
        return row["options"]["ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(row["answer"])]
    return row.get("Correct Answer")


def gold_of(row: dict) -> Any:
    """The cell."""
    if "reward_model" in row and "prompt" in row:
        whole = row["reward_model"]
        return whole.get("ground_truth") if isinstance(whole, dict) else whole
    return row.get("answer")


def assert_faithful(problem: Problem, row: dict) -> None:
    texts = leaves(row)
    if (right := right_choice(row)) is not None:
        (asked,) = [m["content"] for m in problem.prompt if m["role"] == "user"]
        assert f"\n{problem.answer}) {right.strip()}\n" in asked, asked
        return
    if gold_of(row) is None:
        assert f"boxed{{{problem.answer}}}" in row["solution"]
    else:
        assert same_gold(gold_of(row), problem.answer), (gold_of(row), problem.answer)
    for m in problem.prompt:
        assert m == ASK_FOR_A_BOX or m["content"] in texts, m
    for p in (problem, *problem.others):
        assert p.trace is None or p.trace in texts or "####" in row["answer"], p.trace
    assert problem.source in [*texts, "", "gsm8k"]


def look_at(name: str) -> list[Problem]:
    """As a run's start does."""
    problems = load_problems(name)
    tokenizer = toy.make_tokenizer()
    choose_template(problems, tokenizer)
    encode(problems, tokenizer, max_prompt_tokens=64, max_trace_tokens=64)
    return problems


def assert_read_or_refused(name: str, at: int | None, row: dict | None) -> bool:
    try:
        problems = look_at(name)
    except InputError as error:
        said = str(error)
        assert name in said, said
        if at is not None:
            assert re.search(f", (line {at + 1}|row {at})\\b", said), said
        return True
    for p in (p for problem in problems for p in (problem, *problem.others)):
        texts = p.answer, p.source, p.trace or "", *(t for m in p.prompt for t in m.values())
        assert p.answer.strip() and all(isinstance(text.encode(), bytes) for text in texts)
    if at is not None:
        assert_faithful(problems[at], row)
    return False


def fuzz(tmp_path: Path, seeds: range) -> None:
    refused = 0
    for seed in seeds:
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            refused += assert_read_or_refused(*made(random.Random(seed), directory))
        except BaseException as error:
            error.add_note(f"seed {seed}: {[str(f) for f in directory.iterdir()]}")
            raise
    assert 0.3 < refused / len(seeds) < 0.9  # else the files are all alike


def test_broken_files(tmp_path):
    fuzz(tmp_path, range(200))


@pytest.mark.slow
def test_three_thousand_broken_files(tmp_path):
    fuzz(tmp_path, range(3000))
