"""The start of a run: problems are read, tokenized, and their traces verified.

    python benchmarks/start.py --data FILE --model DIR    # CPU, ten minutes; prints a table

FILE holds some real traces in a schema of docs/data.md, and DIR a tokenizer. Of pieces
traces it makes --problems different ones of about 4,200 tokens. Before: one by one, all of them by
each rank. After: data.load_training_set. They take turns, and have to make the same problems.
"""

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from array import array
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
from tiny import PeakMemory, in_process, luffy, machine, spread
from tqdm import tqdm

import data
from machinery.model import load_tokenizer
from machinery.processes import all_reduce, gather, rank, world_size
from verify import Grader

CHARACTERS = 9_800  # of a trace: about 4,200 tokens
RUN = 46_000  # problems of the paper's run


def write_problems(source: str, number: int, file: Path) -> None:
    """Problems and traces that differ from each other, in OpenR1's schema."""
    seeds, rng = data.one_a_trace(data.load_problems(source)), random.Random(0)
    thoughts = "".join(p.trace.split("<think>")[-1].partition("</think>")[0] for p in seeds)
    rows = []
    for i in range(number):
        problem = seeds[i % len(seeds)]
        own, start = problem.trace.split("<think>")[-1], rng.randrange(len(thoughts) // 2)
        more = thoughts[start : start + max(0, CHARACTERS - len(own))]
        *first, asked = problem.prompt
        rows.append(
            {
                "prompt": [*first, asked | {"content": f"{asked['content']} ({i})"}],
                "target": [{"role": "assistant", "content": f"<think>\n{i}\n{more}{own}"}],
                "reward_model": {"ground_truth": problem.answer},
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def one_by_one(cfg: luffy.Config, tokenizer, grader: Grader, verdicts: Path) -> list[data.Problem]:
    """As it was: all by each rank, but for the verdicts."""
    problems = data.read_problems(cfg.data)[0]
    data.choose_template(problems, tokenizer)
    kept = []
    for p in data.one_a_trace(problems):
        text = data.render(p.prompt, tokenizer)
        prompt_ids = tokenizer.encode(text, add_special_tokens=False)
        trace = p.trace.removeprefix("<think>\n").removesuffix(tokenizer.eos_token)
        trace_ids = tokenizer.encode(trace, add_special_tokens=False) + [tokenizer.eos_token_id]
        ids = dict(prompt_ids=array("i", prompt_ids), trace_ids=array("i", trace_ids))
        if len(trace_ids) <= cfg.max_response_tokens and ids["trace_ids"].count(trace_ids[-1]) == 1:
            kept.append(replace(p, **ids, opened=data.THINK))
    jobs = [(p.opened + data.text_of(p.trace_ids, tokenizer), p.answer) for p in kept]
    key = hashlib.sha256(json.dumps([grader.rule, jobs]).encode()).hexdigest()
    scores = [(0.0, 0.0)] * len(jobs)
    for r, part in enumerate(gather(grader.right_and_reward(jobs[rank() :: world_size()]))):
        scores[r :: world_size()] = part
    if rank() == 0:
        verdicts.write_text(json.dumps({key: scores}))
    for i, (right, reward) in enumerate(scores):
        kept[i] = replace(kept[i], trace_right=right, trace_reward=reward)
    return data.one_a_problem([p for p in kept if p.trace_reward > 0])


VARIANTS = {"before": one_by_one, "after": data.load_training_set}


def clock_share() -> list[float]:
    """CPU seconds of each call of data.share in this process, from now on."""
    seconds: list[float] = []
    work = data.share

    def timed(*args):
        start = time.process_time()
        done = work(*args)
        seconds.append(time.process_time() - start)
        return done

    data.share = timed
    return seconds


def measure(variant: str, model: str, file: str) -> dict:
    """In this process or these processes: seconds until all are done, and of each on its cores."""
    luffy.init_processes()
    tokenizer, cfg = load_tokenizer(model), luffy.Config(data=file)
    with Grader() as grader, tempfile.TemporaryDirectory() as directory:
        grader([("\\boxed{x+1}", "1+x")])  # the workers' start is not what is measured,
        data.load_problems(file)  # nor are the imports that a parquet file needs
        shared = clock_share()
        with PeakMemory() as memory:
            start, cpu = time.perf_counter(), time.process_time()
            problems = VARIANTS[variant](cfg, tokenizer, grader, Path(directory, "verdicts.json"))
            cpu = time.process_time() - cpu
            all_reduce(0)
            seconds = time.perf_counter() - start
        tokens = sum(len(p.prompt_ids) + len(p.trace_ids) for p in problems)
        same = len(problems), hashlib.sha256(repr(problems).encode()).hexdigest()
        assert all(other == same for other in gather(same))
        values = {"cpu": cpu, "shared": sum(shared), "bytes": memory.bytes}
        found = {name: all_reduce(value) / world_size() for name, value in values.items()}
    return found | {"seconds": seconds, "tokens": tokens, "same": " ".join(map(str, same))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = measure(args.one, args.model, args.data)
        if rank() == 0:
            print("\n" + json.dumps(found))
        return
    rows: dict[tuple[int, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "problems.parquet")
        write_problems(args.data, args.problems, file)
        given = "--data", file, "--model", args.model
        for _ in tqdm(range(args.rounds), "rounds"):
            for key in [(ranks, variant) for ranks in (1, 2) for variant in VARIANTS]:
                row = in_process(__file__, "--one", key[1], *given, ranks=key[0])
                rows.setdefault(key, []).append(row)
    assert len({row["same"] for found in rows.values() for row in found}) == 1  # all alike
    n, tokens = int(row["same"].split()[0]), row["tokens"]
    print(f"{machine()}; {n} of {args.problems} problems are kept, of {tokens / n:,.0f} tokens\n")
    print("| ranks | | s | it / before | CPU s a rank | it / before | peak, MiB a rank |")
    print("|---" * 7 + "|")
    for (ranks, variant), found in rows.items():
        cells = []
        for name in ("seconds", "cpu"):
            values = [row[name] for row in found]
            before = [row[name] for row in rows[ranks, "before"]]
            ratios = [a / b for a, b in zip(values, before)]
            cells += [spread(values, ".1f"), spread(ratios)]
        size = spread([row["bytes"] / 2**20 for row in found], ",.0f")
        print(f"| {ranks} | {variant} | {' | '.join(cells)} | {size} |")
    before = statistics.median(row["cpu"] for row in rows[1, "before"])
    shared = statistics.median(row["shared"] for row in rows[1, "after"])
    own = statistics.median(row["cpu"] - row["shared"] for row in rows[1, "after"])
    before, shared, own = (RUN / args.problems * value for value in (before, shared, own))
    print(
        f"\n{RUN:,} problems, 8 ranks of a core each, computed from CPU seconds of one: "
        f"before {before:,.0f}, after {own:,.0f} + {shared:,.0f} / 8 = {own + shared / 8:,.0f}"
    )


if __name__ == "__main__":
    luffy.launch(main)
