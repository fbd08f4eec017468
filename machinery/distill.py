"""A teacher's traces, from the rows of an evaluation: the right ones, as the teacher wrote them."""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from machinery.files import to_jsonl, write, writing
from machinery.processes import InputError, say
from machinery.scores import Problem

# A problem as its file has it, the same as the teacher was asked, and a row of scores.respond.
Answered = list[tuple[Problem, Problem, dict]]


def check_file(file: Path, sources: Iterable[str]) -> None:
    """Can traces be written there? Before anything is sampled. sources: files that are read."""
    if file.suffix not in (".parquet", ".jsonl"):
        raise InputError(f"--traces {file}: expected a name that ends in .parquet or .jsonl")
    if file.is_dir() or any(Path(source).resolve() == file.resolve() for source in sources):
        raise InputError(f"--traces {file}: a directory, or read for --bench; name another file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--traces {file}: its directory cannot be made ({error})") from None


def finish(
    args: argparse.Namespace, answered: Answered, ends: list[str], show: Callable[[], None]
) -> None:
    """Write --traces, show the scores, and say what came of it. By rank 0.

    In this order: where nobody reads what is printed, the program ends there.
    """
    found = choose(answered, ends, args.traces_per_problem, args.max_trace_tokens)
    rows = [row for traces in found.values() for row in traces.values()]
    limit = f", of at most {args.max_trace_tokens} tokens" if args.max_trace_tokens else ""
    if rows:
        save(args.traces, rows)
    show()
    if not rows:
        raise InputError(f"--traces {args.traces}: no response is right and complete{limit}")
    have = sum(map(bool, found.values()))
    say(
        f"\ntraces      {len(rows)}, of {have} of {len(found)} problems ({have / len(found):.1%}), "
        f"in {args.traces}; without a right and complete one{limit}: {len(found) - have} problems"
    )
    say(f"next        python luffy.py --data {args.traces} --model STUDENT")


def choose(
    answered: Answered, ends: list[str], per_problem: int, max_tokens: int | None
) -> dict[str, dict[str, dict]]:
    """-> problem -> trace -> its row of a data set, in the schema that keeps system messages.

    Of a problem's right traces these are the first different ones that were sampled: to take the
    shortest would teach haste. ends: texts of the tokens that end a response; no trace has them. A
    thought that the teacher's prompt had opened is opened in the trace: a student's may not.
    """
    found: dict[str, dict[str, dict]] = defaultdict(dict)
    for problem, asked, row in answered:
        traces = found[json.dumps([problem.prompt, problem.answer])]
        fits = max_tokens is None or row["tokens"] <= max_tokens
        if row["reward"] != 1 or row["truncated"] or not fits or len(traces) == per_problem:
            continue
        end = next((end for end in ends if row["response"].endswith(end)), "")
        trace = asked.opened + row["response"].removesuffix(end)
        traces[trace] = {
            "data_source": problem.source,
            "prompt": problem.prompt,
            "target": [{"role": "assistant", "content": trace}],
            "reward_model": {"ground_truth": problem.answer},
        }
    return found


def save(file: Path, rows: list[dict]) -> None:
    """The whole file or the old one."""
    if file.suffix == ".jsonl":
        return write(file, to_jsonl(rows))
    half_written = file.with_name(f".{file.name}.tmp")
    with writing(file):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), half_written)
        half_written.replace(file)  # rename refuses a file that exists, on Windows
