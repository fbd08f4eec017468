"""How good is a policy? avg@k and pass@k on benchmarks, with error bars; tables and pictures.

    python eval.py --model runs/toy-luffy-seed0/checkpoint-000200 --bench toy
    python eval.py --paper oat-zero --bench six --data_dir LUFFY/data    # a row of the paper
    python eval.py --model TEACHER --bench problems.jsonl --traces traces.parquet    # distil
    python eval.py compare DIR DIR ...                                   # what such runs wrote
    python eval.py report RUN_DIR ...                                    # pages to look into runs

An evaluation's directory (--out) holds its config.json, the graded responses as they come
(BENCHMARK-tTEMPERATURE-kK-rankN.jsonl) and scores.json. Started again, it goes on where it stopped,
with what is of the same weights, prompts and golds (machinery.responses).
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import verify
from data import Problem, choose_template, key_of, load_problems, to_evaluate, without_repeats
from luffy import VLLMSampler
from machinery import distill, notation, plan, responses
from machinery.arguments import Parser, filled, path, ranged
from machinery.files import write, writing
from machinery.kinds import PretrainedConfig, Tokenizer
from machinery.model import end_ids, find, from_pretrained, load_config, load_tokenizer
from machinery.processes import InputError, barrier, init_processes, launch, progress, rank, say
from machinery.processes import world_size
from machinery.published import BENCHMARKS, GROUPS, OUT_OF_DISTRIBUTION, SIX, SYSTEMS, TEMPLATES
from machinery.published import Benchmark
from machinery.responses import Responses, Rows, load_rows
from machinery.samplers import TORCH_ROWS, Sampler, TorchSampler, sampler_kind
from machinery.scores import by_k, by_problem, by_source, respond, standard_error, summarize
from machinery.scores import pass_at_k as pass_at_k
from machinery.server import Server
from verify import Grader

Scores = dict[tuple[str, float], dict]  # (benchmark, temperature) -> of `summarize`
Respond = Callable[..., Iterator[list[dict]]]  # of `one_by_one`, or of a Server
GRADERS = 8  # processes at most: math-verify takes 4 to 9 ms of a core for a response
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
            known = " or ".join(file.name for file in files)
            raise InputError(f"--data_dir {data_dir}: no {known} for --bench {name}")
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
    asked: Responses,
    respond: Respond,
    grader: Grader,
    rows_at_once: int,
    right_texts: bool,
    **options: Any,
) -> list[dict]:
    """The rows of all responses that are asked for: those on disk, and the missing ones.

    Texts stay on disk, but for those of right responses, if right_texts. Blocks of problems are
    dealt to the ranks, none larger than a rank's share. A block of which a killed run wrote only a
    part does not count, so that an evaluation that was interrupted ends as any other: on as many
    ranks, the same problems are sampled together.
    """
    asked.begin()
    done, numbers, k = asked.on_disk(failed=False), asked.numbers, asked.k
    barrier()  # all have read before any writes
    if asked.stale:
        asked.grade_anew(done, grader, rows_at_once)
        barrier()
        done = asked.on_disk()
        barrier()
    size, ranks = max(1, rows_at_once // k) * world_size(), range(world_size())
    rounds = [numbers[i : i + size] for i in range(0, len(numbers), size)]  # a block for each rank
    blocks = [some[r :: len(ranks)] for some in rounds for r in ranks]
    missing = list(filter(None, ([i for i in block if i not in done] for block in blocks)))
    with progress(asked.stem, k * len(numbers)) as bar:
        bar.update(k * len(done))
        rewards = [row["reward"] or 0.0 for rows in done.values() for row in rows]
        own, options = missing[rank() :: world_size()], options | dict(seeds=asked.seeds)
        for rows in respond(asked.problems, own, grader, samples=k, lenient=True, **options):
            asked.add(rows)
            rewards += [row["reward"] or 0.0 for row in rows]
            bar.update(len(rows) * world_size())
            bar.set_postfix(right=f"{mean(rewards):.1%}")
    barrier()
    found = asked.on_disk(right_texts)
    return [row for i in numbers for row in found[i]]


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
            error = mean_error([s["avg_se"] for s in these])
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
            here, error = mean(s["avg"] for s in six), mean_error([s["avg_se"] for s in six])
            lines.append(
                f"| mean of 6 | {t:g} | {percent(here, error)} "
                f"| {percent(mean(s['lenient'] for s in six))} "
                f"| {row.average:.1f} | {100 * here - row.average:+.1f} |"
            )
    head = [f"| {system} | T | here | lenient | published | difference |", "|---" * 6 + "|"]
    return "\n".join(head + lines) if lines else ""


def percent(value: float, error: float | None = None) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Of the mean of independent values with these standard errors, if all are known."""
    known = [e for e in errors if e is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


# ------------------------------------------------------------------ evaluations side by side
def compare(arguments: list[str]) -> None:
    """`eval.py compare`: a table of paired differences, and the picture."""
    parser = Parser(prog="eval.py compare")
    parser.add_argument("dirs", nargs="+", type=path, help="of evaluations; the first is the base")
    parser.add_argument("--out", type=path, default=Path("comparison.png"), help="the picture")
    args = parser.parse_args(arguments)
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {args.out}: expected a name that ends in .png, .pdf or .svg")
    from machinery.plots import draw_comparison

    dirs = list({out.resolve(): out for out in args.dirs}.values())
    names = [out.resolve().name for out in dirs]
    names = [str(out) if names.count(name) > 1 else name for out, name in zip(dirs, names)]
    models = {name: load_rows(out) for out, name in zip(dirs, names)}
    print(difference_table(models))
    shown = {
        name: {k: (summarize(rows), [row["tokens"] for row in rows]) for k, rows in found.items()}
        for name, found in models.items()
    }
    with writing(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_comparison(shown, args.out)
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
    add, some = parser.add_argument, ranged(int, 1)
    add("--model", type=filled, help="a directory or a hub name; with --url, as it is served")
    add("--url", type=filled, help="of an OpenAI-compatible server that samples, up to /v1")
    add("--paper", choices=SYSTEMS, help="a system of the paper: model and prompt")
    add("--template", type=filled, help=f"{', '.join(TEMPLATES)}, or a jinja file [own]")
    ours = f"A,B of {', '.join(BENCHMARKS)}; {' or '.join(GROUPS)} of them"
    add("--bench", type=filled, required=True, help=f"{ours}; or toy/SPLIT, files, hub names")
    add("--data_dir", type=path, help="a directory or a file, instead of the hub")
    add("--samples", type=ranged(int, 1, 1e4), help="k, responses to each problem [the paper's]")
    greedy = "A,B; 0 is greedy, and k = 1 [the paper's, 0.6]"
    add("--temperature", type=temperatures, default=[], help=greedy)
    add("--limit", type=some, help="problems of each benchmark, spread evenly")
    add("--max_prompt_tokens", type=some, default=1024)
    add("--max_response_tokens", type=some, help="[the paper's, 8192]")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--sampler", choices=["auto", "vllm", "torch"], default="auto")
    add("--seed", type=ranged(int, 0), default=0)
    add("--out", type=path, help="[runs/eval/MODEL]")
    add("--traces", type=path, help="write right responses to this file: distil")
    add("--traces_per_problem", type=some, default=1, help="at most [1]")
    add("--max_trace_tokens", type=some, help="the model's, with EOS [no limit]")
    add("--concurrency", type=ranged(int, 1, 256), default=16, help="requests to --url [16]")
    args = parser.parse_args()
    system = SYSTEMS.get(args.paper)
    args.model = args.model or (system.model if system else "")
    args.template = args.template or (system.template if system else "own")
    if args.template not in TEMPLATES and not os.path.isfile(args.template):
        expected = f"a file, or one of {', '.join(TEMPLATES)}"
        raise InputError(f"--template {args.template}: expected {expected}")
    if not args.model:
        lost = "no checkpoint of it was published, so --model DIR has to name one"
        missing = "--model or --paper has to say what"
        raise InputError(f"--paper {args.paper}: {lost}" if system else missing)
    if args.url and args.template != "own":
        raise InputError(f"--template {args.template}: a server has its own; leave it out")
    if args.traces:
        distill.check_file(args.traces, args.bench.split(","))
    if args.template not in TEMPLATES:
        args.template = os.path.abspath(args.template)
    here = Path(os.path.abspath(args.model) if os.path.isdir(args.model) else args.model)
    name = f"{here.parent.name}-{here.name}" if here.name.startswith("checkpoint-") else here.name
    args.out = args.out or Path("runs/eval", args.paper or name)
    return args


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
        stamps = responses.stamps(path)
        tokenizer, config = load_tokenizer(path), load_config(path)
        context = config.max_position_embeddings
    benchmarks, originals = ask(args, tokenizer, context)
    if args.traces:  # --data_dir may have named other files than --bench
        distill.check_file(args.traces, {where.rpartition(", ")[0] for where in originals})
    if args.url:
        args.template = "the server's"
        model = {"url": server.url, "model": args.model, "root": server.root}
    else:
        path, read = responses.snapshot(path), path
        model = responses.hashes(path)
    names = "model", "template", "seed", "max_response_tokens"
    responses.take(args.out, {name: getattr(args, name) for name in names} | {"of": model})
    lengths = [len(p.prompt_ids) for _, problems in benchmarks.values() for p in problems]
    limit = {n: args.max_response_tokens or b.max_tokens for n, (b, _) in benchmarks.items()}
    most = min(max(limit.values()), context - min(lengths))
    ends: list[str] = []  # a server's responses are without
    if tokenizer is None:
        respond: Respond = server.respond
        rows_at_once = 1
    else:
        ids = end_ids(path, tokenizer)
        ends = [str(tokenizer.decode([end])) for end in ids]
        kind, longest = sampler_kind(args.sampler), min(context, max(lengths) + max(limit.values()))
        sampler, rows_at_once = load_sampler(kind, path, config, ids, longest)
        if responses.stamps(read) != stamps:
            raise InputError(f"--model {path}: its files changed while they were read; start again")
        respond = partial(one_by_one, sampler, tokenizer)
    distils = bool(args.traces) and rank() == 0
    answered: list[tuple[Problem, Problem, dict]] = []
    scores: Scores = {}
    how: dict[str, Any] = dict(seed=args.seed, model=model, verifier=verifier())
    workers = max(2, min(GRADERS, (os.cpu_count() or 2) // world_size()))
    with Grader(workers) as grader:
        for name, (bench, problems) in benchmarks.items():
            n = min(args.limit or len(problems), len(problems))
            numbers = [i * len(problems) // n for i in range(n)]
            questions = responses.numbered(key_of(originals[p.where]) for p in problems)
            how["room"] = [min(limit[name], context - len(p.prompt_ids)) for p in problems]
            for t in args.temperature or [bench.temperature]:
                rows: list[dict] = []
                samples = 1 if t == 0 else args.samples
                for k, some in by_k(problems, numbers, samples, bench.k).items():
                    what = args.out, name, problems, some, questions
                    asked = Responses(*what, k=k, temperature=t, **how)
                    more = dict(temperature=t, max_tokens=limit[name])
                    rows += collect(asked, respond, grader, rows_at_once, distils, **more)
                found = by_source(rows)
                for source, score in found.items():
                    scores[f"{name}/{source}" if len(found) > 1 else name, t] = score
                for row in rows if distils else ():
                    problem = problems[row["problem"]]
                    answered.append((originals[problem.where], problem, row))
    if rank() == 0:
        rows = [{"benchmark": name, "temperature": t} | s for (name, t), s in scores.items()]
        write(args.out / "scores.json", json.dumps(rows, allow_nan=False))
    if distils:
        distill.finish(args, answered, ends, partial(show, args, scores, most))
    else:
        show(args, scores, most)


def verifier() -> list[str]:
    """What verdicts depend on but the response and the gold."""
    files = [Path(str(module.__file__)) for module in (verify, notation)]
    return [*map(responses.sha256, files), version("math-verify")]


Benchmarks = dict[str, tuple[Benchmark, list[Problem]]]
Originals = dict[str, Problem]  # where a problem stands -> as it stands there


def ask(
    args: argparse.Namespace, tokenizer: Tokenizer | None, context: int
) -> tuple[Benchmarks, Originals]:
    """--bench -> name -> the benchmark, and its problems as the model is to see them."""
    benchmarks: Benchmarks = {}
    originals: Originals = {}
    names = sum((list(GROUPS.get(n, [n])) for n in args.bench.split(",")), [])
    for name in {responses.file_name(n): n for n in names}.values():  # once, however it is spelt
        bench, problems = load_benchmark(name, args.data_dir)
        asked = problems
        if args.template in TEMPLATES:
            asked = [to_prompt(p, args.template) for p in problems]
        elif tokenizer is not None:  # a server has its own
            choose_template(problems, tokenizer, args.template)
        originals |= {p.where: p for p in problems}
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
    """Print the scores, of responses of at most so many tokens."""
    say(f"{args.model}, template {args.template}, at most {most} tokens\n\n{score_table(scores)}")
    if failed := sum(score.get("no_verdict", 0) for score in scores.values()):
        say(f"\nno verdict  on {failed} responses: the grader failed. They count as not right, and")
        say("            the same command grades them again")
    system = args.paper or next((n for n, s in SYSTEMS.items() if s.model == args.model), None)
    if system and (published := published_table(scores, system)):
        say(f"\n{published}")
    say(f"\nresponses   {args.out}")


if __name__ == "__main__":
    launch(main)
