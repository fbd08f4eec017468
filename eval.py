"""How good is a policy? avg@k and pass@k on benchmarks, with error bars; tables and pictures.

    python eval.py --model runs/toy-luffy-seed0/checkpoint-000200 --bench toy
    python eval.py --paper oat-zero --bench six --data_dir LUFFY/data    # a row of the paper
    python eval.py --model TEACHER --bench problems.jsonl --traces traces.parquet    # distil
    python eval.py compare DIR DIR ...                                   # what such runs wrote
    python eval.py report RUN_DIR ...                                    # pages to look into runs

An evaluation's directory (--out) holds its config.json, the graded responses as they come
(BENCHMARK-tTEMPERATURE-kK-rankN.jsonl) and scores.json. Started again, it goes on where it stopped.
"""

import argparse
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from data import Problem, choose_template, key_of, load_problems, to_evaluate, without_repeats
from luffy import VLLMSampler
from machinery import distill, plan
from machinery.arguments import Parser, filled, path, ranged
from machinery.files import append, lock, read_json, read_jsonl, to_jsonl, write, writing
from machinery.model import end_ids, find, from_pretrained, load_config, load_tokenizer
from machinery.processes import InputError, barrier, by_rank_0, init_processes, launch, progress
from machinery.processes import rank, say, world_size
from machinery.published import BENCHMARKS, GROUPS, OUT_OF_DISTRIBUTION, SIX, SYSTEMS, TEMPLATES
from machinery.published import Benchmark
from machinery.samplers import TORCH_ROWS, Sampler, TorchSampler, sampler_kind
from machinery.scores import by_k, by_problem, by_source, respond, standard_error, summarize
from machinery.scores import pass_at_k as pass_at_k
from machinery.server import Server
from verify import Grader

Scores = dict[tuple[str, float], dict]  # (benchmark, temperature) -> of `summarize`
Rows = dict[tuple[str, float, int], list[dict]]  # (benchmark, temperature, k) -> of `respond`
Respond = Callable[..., Iterator[list[dict]]]  # of `one_by_one`, or of a Server
VLLM_ROWS = 4096  # responses asked for together, and lost together if the run is killed


# ------------------------------------------------------------------ what to evaluate on
def load_benchmark(name: str, data_dir: str | Path = "") -> tuple[Benchmark, list[Problem]]:
    """A row of BENCHMARKS, or else a source of load_problems, and its problems.

    data_dir: a directory or a file to read instead of the hub. Raises InputError if there is
    nothing to read.
    """
    bench = BENCHMARKS.get(name, Benchmark(name, 8))
    parent = BENCHMARKS.get(name.split("/")[0])
    if parent and parent.built_in and name not in BENCHMARKS:  # another split of it
        bench = replace(parent, hub=name)
    where = bench.hub
    if data_dir and name in BENCHMARKS and not bench.built_in:
        files = [Path(data_dir)]
        if not files[0].is_file():
            names = f"{name}.jsonl", f"{name}.parquet", *bench.files
            files = [Path(data_dir, file) for file in names]
        where = next((str(file) for file in files if file.is_file()), "")
        if not where:
            raise InputError(
                f"--data_dir {data_dir}: no {' or '.join(f.name for f in files)} for --bench {name}"
            )
    problems = load_problems(where, split="test")
    if len({p.source for p in problems}) > 1 and bench.source:
        problems = [p for p in problems if p.source == bench.source]
    problems = without_repeats(problems)
    if not problems:
        raise InputError(f"--bench {name}: {where} has no row with data_source {bench.source!r}")
    if bench.letters and (bad := [p for p in problems if not re.fullmatch("[A-J1-5]", p.answer)]):
        raise InputError(
            f"--bench {name}: {where} has the answer {bad[0].answer!r}, which is not the letter of "
            "a choice"
        )
    if bench.problems not in (0, len(problems)):
        say(f"{name}: {where} has {len(problems)} problems, the paper's has {bench.problems}")
    return bench, problems


def to_prompt(problem: Problem, template: str) -> Problem:
    """With the prompt of a row of TEMPLATES. Raises InputError for a prompt that is plain text."""
    if template == "own":
        return problem
    if isinstance(problem.prompt, str):
        raise InputError(
            f"--template {template}: the prompts of {problem.source} are plain text, "
            "not messages; they can only be used as they are (--template own)"
        )
    messages = [m for m in problem.prompt if m["role"] != "system"]
    if template == "own_no_system":
        return replace(problem, prompt=messages)
    text = (TEMPLATES[template] or "{problem}").replace("{problem}", messages[-1]["content"])
    return replace(problem, prompt=text)


# ------------------------------------------------------------------ a run that can be killed
def collect(
    out: Path,
    name: str,
    problems: list[Problem],
    numbers: Sequence[int],
    k: int,
    respond: Respond,
    grader: Grader,
    rows_at_once: int,
    right_texts: bool,
    **options: Any,
) -> list[dict]:
    """The rows of all responses to problems[i], i in numbers: those on disk, and the missing ones.

    Texts stay on disk, but for those of right responses, if right_texts. Blocks of problems are
    dealt to the ranks, none larger than a rank's share. A block of which a killed run wrote only a
    part does not count, so that an evaluation that was interrupted ends as any other: on as many
    ranks, the same problems are sampled together.
    """

    def on_disk() -> dict[int, list[dict]]:
        done = defaultdict(list)
        for file in out.glob(f"{name}-rank*.jsonl"):
            for row in whole_blocks(file):
                if not (right_texts and row["reward"]):
                    row["response"] = ""  # all of a large teacher's would not fit into memory
                done[row["problem"]].append(row)
        return done

    done = on_disk()
    barrier()  # all have read before any writes
    mine = out / f"{name}-rank{rank()}.jsonl"
    write(mine, to_jsonl(whole_blocks(mine)))
    size, ranks = max(1, rows_at_once // k) * world_size(), range(world_size())
    rounds = [numbers[i : i + size] for i in range(0, len(numbers), size)]  # a block for each rank
    blocks = [some[r :: len(ranks)] for some in rounds for r in ranks]
    missing = list(filter(None, ([i for i in block if i not in done] for block in blocks)))
    with progress(name, k * len(numbers)) as bar:
        bar.update(k * sum(i in done for i in numbers))
        rewards = [row["reward"] for rows in done.values() for row in rows]
        own = missing[rank() :: world_size()]
        for rows in respond(problems, own, grader, samples=k, lenient=True, **options):
            append(mine, *(row | {"block": rows[0]["problem"], "of": len(rows)} for row in rows))
            rewards += [row["reward"] for row in rows]
            bar.update(len(rows) * world_size())
            bar.set_postfix(right=f"{mean(rewards):.1%}")
    barrier()
    found = on_disk()
    return [row for i in numbers for row in sorted(found[i], key=lambda row: row["sample"])]


def one_by_one(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
    blocks: list[list[int]],
    grader: Grader,
    **options: Any,
) -> Iterator[list[dict]]:
    """The rows of `respond`, a block at a time."""
    for block in blocks:
        yield respond(sampler, problems, block, grader, tokenizer, **options)


def whole_blocks(file: Path) -> list[dict]:
    """The rows of a rank's file, without the part of a block that a killed run left at its end."""
    blocks = defaultdict(list)
    for row in read_jsonl(file):
        blocks[row["block"]].append(row)
    return [row for rows in blocks.values() if len(rows) == rows[0]["of"] for row in rows]


# ------------------------------------------------------------------ tables
def score_table(scores: Scores) -> str:
    """(benchmark, temperature) -> scores -> a markdown table, in percent.

    The means at a temperature are unweighted: over each group of the paper that is complete, or
    else over all. Their errors take benchmarks as independent.
    """
    lines = [
        "| benchmark | T | problems | avg@k | lenient | pass@k | tokens | truncated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, t), s in scores.items():
        lines.append(
            f"| {name} | {t:g} | {s['problems']} "
            f"| {percent(s['avg'], s['avg_se'])} @{s['k']} "
            f"| {percent(s['lenient'])} | {percent(s['pass_at'][-1])} @{s['k']} "
            f"| {s['length']:.0f} | {s['truncated']:.1%} |"
        )
    for t in dict.fromkeys(t for _, t in scores):
        here = {name: s for (name, other), s in scores.items() if other == t}
        whole = [names for names in GROUPS.values() if here.keys() >= set(names)]
        groups = whole or [tuple(here)]
        for these in ([here[name] for name in names] for names in groups if len(names) > 1):
            error = math.sqrt(sum(s["avg_se"] ** 2 for s in these)) / len(these)
            lines.append(
                f"| mean of {len(these)} | {t:g} | "
                f"| {percent(mean(s['avg'] for s in these), error)} "
                f"| {percent(mean(s['lenient'] for s in these))} | "
                f"| {mean(s['length'] for s in these):.0f} "
                f"| {mean(s['truncated'] for s in these):.1%} |"
            )
    return "\n".join(lines)


def published_table(scores: Scores, system: str) -> str:
    """The same beside the paper's numbers, for a row of SYSTEMS; empty if it has none of these."""
    row = SYSTEMS[system]
    paper = dict(zip(SIX, row.six)) | dict(zip(OUT_OF_DISTRIBUTION, row.ood))
    lines = [
        f"| {name} | {t:g} | {percent(s['avg'], s['avg_se'])} | {percent(s['lenient'])} | "
        f"{paper[name]:.1f} | {100 * s['avg'] - paper[name]:+.1f} |"
        for (name, t), s in scores.items()
        if name in paper
    ]
    for t in dict.fromkeys(t for _, t in scores):
        if {(name, t) for name in SIX} <= scores.keys():
            six = [scores[name, t] for name in SIX]
            here, error = mean(s["avg"] for s in six), math.hypot(*(s["avg_se"] for s in six)) / 6
            lines.append(
                f"| mean of 6 | {t:g} | {percent(here, error)} "
                f"| {percent(mean(s['lenient'] for s in six))} "
                f"| {row.average:.1f} | {100 * here - row.average:+.1f} |"
            )
    head = [f"| {system} | T | here | lenient | published | difference |", "|---" * 6 + "|"]
    return "\n".join(head + lines) if lines else ""


def percent(value: float, error: float = math.nan) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error == error else "")


# ------------------------------------------------------------------ evaluations side by side
def load_rows(out: Path) -> Rows:
    """An evaluation's directory -> (benchmark, temperature, k) -> its rows."""
    found: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    sources_of: dict[tuple, set[str]] = defaultdict(set)  # a file's may differ in k
    for file in sorted(out.glob("*-rank*.jsonl")):
        match = re.fullmatch(r"(.+)-t([0-9.]+)-k([0-9]+)-rank[0-9]+", file.stem)
        if match is not None:
            key = match[1], float(match[2]), int(match[3])
            for row in whole_blocks(file):
                found[key][row["source"]].append(row)
                sources_of[key[:2]].add(row["source"])
    if not found:
        raise InputError(f"{out}: not the directory of an evaluation (no *-rank*.jsonl in it)")
    return {
        (f"{name}/{source}" if len(sources_of[name, t]) > 1 else name, t, k): rows
        for (name, t, k), sources in sorted(found.items())
        for source, rows in sorted(sources.items())
    }


def compare(arguments: list[str]) -> None:
    """`eval.py compare`: a table of paired differences, and the picture."""
    parser = Parser(prog="eval.py compare")
    parser.add_argument("dirs", nargs="+", type=path, help="of evaluations; the first is the base")
    parser.add_argument("--out", type=path, default=Path("comparison.png"), help="the picture")
    args = parser.parse_args(arguments)
    from machinery.plots import draw_comparison

    models = {out.name: load_rows(out) for out in args.dirs}
    if len(models) < len(args.dirs):
        raise InputError("compare: two directories have the same name; rename one")
    print(difference_table(models))
    draw_comparison(
        {
            name: {
                key: (summarize(rows), [row["tokens"] for row in rows])
                for key, rows in found.items()
            }
            for name, found in models.items()
        },
        args.out,
    )
    print(f"\npicture     {args.out}")


def difference_table(models: dict[str, Rows]) -> str:
    """Scores of the first model, and paired differences of the others to it: both from the
    problems that both were asked, with the standard error over these."""
    first, *others = models
    lines = [
        "| benchmark | T | k | " + " | ".join([first, *(f"{n} - {first}" for n in others)]) + " |",
        "|---" * (3 + len(models)) + "|",
    ]
    for key, rows in models[first].items():
        base = {i: mean(r) for i, r in by_problem(rows).items()}
        cells = [percent(mean(base.values()), standard_error(list(base.values())))]
        for name in others:
            theirs = {i: mean(r) for i, r in by_problem(models[name].get(key, [])).items()}
            gaps = [theirs[i] - base[i] for i in base if i in theirs]
            cells.append(percent(mean(gaps), standard_error(gaps)) if gaps else "-")
        lines.append(f"| {key[0]} | {key[1]:g} | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------ the command line
def temperatures(text: str) -> list[float]:
    """A,B -> them: 0, or what no softmax overflows with."""
    above_0 = ranged(float, 0.01, 100)
    return [0.0 if re.fullmatch(r"0+(\.0*)?", t) else above_0(t) for t in text.split(",")]


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    model = "a directory or a hub name; with --url, as it is served"
    parser.add_argument("--model", type=filled, help=model)
    url = "of an OpenAI-compatible server that samples, up to /v1"
    parser.add_argument("--url", type=filled, help=url)
    parser.add_argument("--paper", choices=SYSTEMS, help="a system of the paper: model and prompt")
    template = f"{', '.join(TEMPLATES)}, or a jinja file [own]"
    parser.add_argument("--template", type=filled, help=template)
    parser.add_argument(
        "--bench",
        type=filled,
        required=True,
        help=f"A,B of {', '.join(BENCHMARKS)}; {' or '.join(GROUPS)} of them; or "
        "toy/SPLIT, files, hub names",
    )
    place = "a directory or a file, instead of the hub"
    parser.add_argument("--data_dir", type=path, help=place)
    some = ranged(int, 1)
    k = "k, responses to each problem [the paper's]"
    parser.add_argument("--samples", type=ranged(int, 1, 1e4), help=k)
    greedy = "A,B; 0 is greedy, and k = 1 [the paper's, 0.6]"
    parser.add_argument("--temperature", type=temperatures, default=[], help=greedy)
    parser.add_argument("--limit", type=some, help="problems of each benchmark, spread evenly")
    parser.add_argument("--max_prompt_tokens", type=some, default=1024)
    parser.add_argument("--max_response_tokens", type=some, help="[the paper's, 8192]")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--sampler", choices=["auto", "vllm", "torch"], default="auto")
    parser.add_argument("--seed", type=ranged(int, 0), default=0)
    parser.add_argument("--out", type=path, help="[runs/eval/MODEL]")
    parser.add_argument("--traces", type=path, help="write right responses to this file: distil")
    parser.add_argument("--traces_per_problem", type=some, default=1, help="at most [1]")
    parser.add_argument("--max_trace_tokens", type=some, help="the model's, with EOS [no limit]")
    requests = "requests to --url [16]"
    parser.add_argument("--concurrency", type=ranged(int, 1, 256), default=16, help=requests)
    args = parser.parse_args()
    system = SYSTEMS.get(args.paper)
    args.model = args.model or (system.model if system else "")
    args.template = args.template or (system.template if system else "own")
    if args.template not in TEMPLATES and not os.path.isfile(args.template):
        raise InputError(
            f"--template {args.template}: expected a file, or one of {', '.join(TEMPLATES)}"
        )
    if not args.model:
        raise InputError(
            f"--paper {args.paper}: no checkpoint of it was published, so --model DIR "
            "has to name one"
            if system
            else "--model or --paper has to say what"
        )
    if args.url and args.template != "own":
        raise InputError(f"--template {args.template}: a server has its own; leave it out")
    if args.traces:
        distill.check_file(args.traces, args.bench.split(","))
    here = Path(args.model)
    name = f"{here.parent.name}-{here.name}" if here.name.startswith("checkpoint-") else here.name
    args.out = args.out or Path("runs/eval", args.paper or name)
    return args


def prepare_directory(args: argparse.Namespace) -> None:
    """By all ranks. Refuses the directory of another evaluation."""
    names = "model", "template", "seed", "max_response_tokens"
    config = {name: getattr(args, name) for name in names}
    file = args.out / "config.json"
    if file.exists() and (old := read_json(file)) != config:
        differ = [
            f"{k} was {old.get(k)!r}, now {v!r}" for k, v in config.items() if v != old.get(k)
        ]
        raise InputError(f"--out {args.out} holds another evaluation: {'; '.join(differ)}")

    def take() -> None:
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        lock(args.out)
        write(file, json.dumps(config, indent=1))

    barrier()  # all have read it
    by_rank_0(take)


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    if sys.argv[1:2] == ["report"]:
        from machinery.page import main as report

        return report(sys.argv[2:])
    args = parse_args()
    init_processes("cpu" if args.url else args.device)
    tokenizer, context = None, sys.maxsize  # a server has them
    if args.url:
        if world_size() > 1:
            raise InputError("--url: one process asks, --concurrency N requests at a time")
        server = Server(args.url, args.model, args.concurrency)
    else:
        path = find(args.model, args.device)
        tokenizer, config = load_tokenizer(path), load_config(path)
        context = config.max_position_embeddings
    benchmarks, originals = ask(args, tokenizer, context)
    args.template = "the server's" if args.url else args.template
    prepare_directory(args)
    longest = max(len(p.prompt_ids) for _, problems in benchmarks.values() for p in problems)
    room = {
        name: min(args.max_response_tokens or b.max_tokens, context - longest)
        for name, (b, _) in benchmarks.items()
    }
    most = max(room.values())
    ends: list[str] = []  # a server's responses are without
    if tokenizer is None:
        respond: Respond = server.respond
        rows_at_once = 1
    else:
        ids = end_ids(path, tokenizer)
        ends = [str(tokenizer.decode([end])) for end in ids]
        kind = sampler_kind(args.sampler)
        sampler, rows_at_once = load_sampler(kind, path, config, ids, longest + most)
        respond = partial(one_by_one, sampler, tokenizer)
    distils = bool(args.traces) and rank() == 0
    answered: list[tuple[Problem, Problem, dict]] = []
    scores: Scores = {}
    with Grader() as grader:
        for name, (bench, problems) in benchmarks.items():
            n = min(args.limit or len(problems), len(problems))
            numbers = [i * len(problems) // n for i in range(n)]
            for t in args.temperature or [bench.temperature]:
                rows: list[dict] = []
                how = dict(temperature=t, max_tokens=room[name], seed=args.seed)
                samples = 1 if t == 0 else args.samples
                for k, some in by_k(problems, numbers, samples, bench.k).items():
                    what = args.out, f"{name.replace('/', '.')}-t{t:g}-k{k}", problems, some, k
                    rows += collect(*what, respond, grader, rows_at_once, distils, **how)
                found = by_source(rows)
                for source, score in found.items():
                    scores[f"{name}/{source}" if len(found) > 1 else name, t] = score
                for row in rows if distils else ():
                    asked = problems[row["problem"]]
                    answered.append((originals[key_of(asked)], asked, row))
    show(args, scores, most)
    if distils:
        distill.finish(args, answered, ends)


Benchmarks = dict[str, tuple[Benchmark, list[Problem]]]
Originals = dict[tuple[str, str], Problem]  # data.key_of a problem as it is asked -> as in its file


def ask(
    args: argparse.Namespace, tokenizer: Tokenizer | None, context: int
) -> tuple[Benchmarks, Originals]:
    """--bench -> name -> the benchmark, and its problems as the model is to see them."""
    benchmarks: Benchmarks = {}
    originals: Originals = {}
    for name in sum((list(GROUPS.get(n, [n])) for n in args.bench.split(",")), []):
        bench, problems = load_benchmark(name, args.data_dir)
        asked = problems
        if args.template in TEMPLATES:
            asked = [to_prompt(p, args.template) for p in problems]
        elif tokenizer is not None:  # a server has its own
            choose_template(problems, tokenizer, args.template)
        originals |= {key_of(p): problem for p, problem in zip(asked, problems)}
        room = min(args.max_prompt_tokens, context - 1)
        if tokenizer is not None:
            asked = to_evaluate(asked, tokenizer, max_prompt_tokens=room)
        if not asked:
            raise InputError(
                f"--bench {name}: no problem has a prompt of --max_prompt_tokens "
                f"{args.max_prompt_tokens} or less"
            )
        benchmarks[name] = bench, asked
    return benchmarks, originals


def load_sampler(
    kind: str, path: str, config: PretrainedConfig, ends: list[int], longest: int
) -> tuple[Sampler, int]:
    """-> a sampler with the model's weights, responses to ask for at once."""
    if kind == "torch":
        return TorchSampler(path, config, ends), TORCH_ROWS
    sampler = VLLMSampler(path, config, ends, longest, plan.evaluation_cache_bytes(config))
    sampler.push(from_pretrained(path, config=config).named_parameters())
    return sampler, VLLM_ROWS


def show(args: argparse.Namespace, scores: Scores, most: int) -> None:
    """Write and print the scores, of responses of at most so many tokens."""
    if rank() == 0:
        rows = [{"benchmark": name, "temperature": t} | s for (name, t), s in scores.items()]
        write(args.out / "scores.json", json.dumps(rows))
    say(f"{args.model}, template {args.template}, at most {most} tokens\n\n{score_table(scores)}")
    system = args.paper or next((n for n, s in SYSTEMS.items() if s.model == args.model), None)
    if system and (published := published_table(scores, system)):
        say(f"\n{published}")
    say(f"\nresponses   {args.out}")


if __name__ == "__main__":
    launch(main)
