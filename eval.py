"""How good is a policy? avg@k and pass@k on benchmarks, with error bars; tables and pictures.

    python eval.py --model runs/toy-luffy-seed0/checkpoint-000200 --bench toy
    python eval.py --paper oat-zero --bench six --data_dir LUFFY/data    # a row of the paper
    python eval.py compare DIR DIR ...                                   # what such runs wrote
    python eval.py report RUN_DIR ...                                    # pages to look into runs

An evaluation's directory (--out) holds its config.json, the graded responses as they come
(BENCHMARK-tTEMPERATURE-kK-rankN.jsonl) and scores.json. Started again, it goes on where it stopped.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import torch

from data import SYSTEM, Problem, load_problems, render, to_evaluate
from model import find, from_pretrained, load_config, load_tokenizer
from paper import BENCHMARKS, GROUPS, OUT_OF_DISTRIBUTION, SIX, SYSTEMS, TEMPLATES, Benchmark
from plan import ENGINE, GIB, RESERVE, parameter_sizes
from run import InputError, barrier, checkpoints, gather, init_processes, launch, progress, rank
from run import read_jsonl, say, seed_of, world_size, write
from sampler import TORCH_ROWS, TorchSampler, VLLMSampler
from verify import Grader

VLLM_ROWS = 4096  # responses asked for together, and lost together if the run is killed


# ------------------------------------------------------------------ scores
def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for pass@k (arXiv:2107.03374, Eq. 1). ValueError unless 0 <= c <= n, 1 <= k <= n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 2, 2)
    (0.25, 1.0, 0.8333333333333334)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def standard_error(means: list[float]) -> float:
    """Of the mean of `means`, one for each problem: samples of a problem are not independent."""
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def by_problem(rows: list[dict]) -> dict[int, list[float]]:
    """The rewards of each problem's responses."""
    found = defaultdict(list)
    for row in rows:
        found[row["problem"]].append(row["reward"])
    return found


def summarize(rows: list[dict]) -> dict:
    """Rows of `respond`, the same number k for each problem -> scores.

    avg: avg@k with its standard error avg_se; pass_at: unbiased pass@1 ... pass@k; lenient: avg@k
    under the official grading, where it was asked for; mean length in tokens; share of truncated
    responses.
    """
    rewards = list(by_problem(rows).values())
    k, means = len(rewards[0]), [mean(r) for r in rewards]
    right = [int(sum(r)) for r in rewards]
    lenient = {"lenient": mean(row["lenient"] for row in rows)} if "lenient" in rows[0] else {}
    return {"problems": len(rewards), "k": k, "avg": mean(means), "avg_se": standard_error(means),
            **lenient,
            "pass_at": [mean(pass_at_k(k, c, i) for c in right) for i in range(1, k + 1)],
            "length": mean(row["tokens"] for row in rows),
            "truncated": mean(row["truncated"] for row in rows)}


def respond(sampler, problems: list[Problem], numbers, grader: Grader, tokenizer, *, samples: int,
            temperature: float, max_tokens: int, seed: int, lenient: bool = False) -> list[dict]:
    """Graded responses to problems[i], i in numbers: a row for each, in order.

    reward: as the grader was created to judge, strict in this program; lenient: also the official
    grading.
    """
    groups = sampler.generate(
        [problems[i].prompt_ids for i in numbers], samples, temperature=temperature,
        seeds=[seed_of("evaluation", seed, i) for i in numbers], max_tokens=max_tokens)
    rows = [{"problem": i, "sample": j, "source": problems[i].source, "answer": problems[i].answer,
             "tokens": len(sample.tokens), "response": tokenizer.decode(sample.tokens),
             "truncated": sample.tokens[-1] != tokenizer.eos_token_id}
            for i, group in zip(numbers, groups) for j, sample in enumerate(group)]
    jobs = [(problems[row["problem"]].opened + row["response"], row["answer"]) for row in rows]
    gradings = {"reward": grader(jobs)}
    if lenient:
        gradings["lenient"] = grader(jobs, lenient=True)
    return [row | {name: rewards[n] for name, rewards in gradings.items()}
            for n, row in enumerate(rows)]


def evaluate(sampler, problems: list[Problem], grader: Grader, tokenizer,
             **options) -> dict[str, dict]:
    """A training run's own evaluation: source -> scores, sharded over the ranks.

    options: as of `respond`. The scores depend on the number of ranks by rounding only.
    """
    mine = range(rank(), len(problems), world_size())
    rows = respond(sampler, problems, mine, grader, tokenizer, **options)
    return by_source(sum(gather([{**row, "response": ""} for row in rows]), []))


def by_source(rows: list[dict]) -> dict[str, dict]:
    sources = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["problem"], row["sample"])):
        sources[row["source"]].append(row)
    return {source: summarize(sources[source]) for source in sorted(sources)}


# ------------------------------------------------------------------ what to evaluate on
def load_benchmark(name: str, data_dir: str = "") -> tuple[Benchmark, list[Problem]]:
    """A row of BENCHMARKS, or else a source of load_problems, and its problems.

    data_dir: a directory or a file to read instead of the hub. Rows that a file repeats, as the
    official one does for avg@32, become k. Raises InputError if there is nothing to read.
    """
    bench = BENCHMARKS.get(name, Benchmark(name, 8))
    where = bench.hub
    if data_dir and name in BENCHMARKS and not bench.hub.startswith("toy"):
        files = [Path(data_dir)] if Path(data_dir).is_file() else [
            Path(data_dir) / file for file in (f"{name}.jsonl", f"{name}.parquet", *bench.files)]
        where = next((str(file) for file in files if file.is_file()), None)
        if where is None:
            raise InputError(f"--data_dir {data_dir}: no {' or '.join(f.name for f in files)} "
                             f"for --bench {name}")
    problems = load_problems(where, split="test")
    if len({p.source for p in problems}) > 1 and bench.source:
        problems = [p for p in problems if p.source == bench.source]
    repeats = Counter((json.dumps(p.prompt), p.answer) for p in problems)
    if len(problems) > len(repeats) and len(set(repeats.values())) == 1:
        bench = replace(bench, k=len(problems) // len(repeats))
        problems = list({(json.dumps(p.prompt), p.answer): p for p in problems}.values())
    if not problems:
        raise InputError(f"--bench {name}: {where} has no row with data_source {bench.source!r}")
    if bench.letters and (bad := [p for p in problems if not re.fullmatch("[A-J1-5]", p.answer)]):
        raise InputError(f"--bench {name}: {where} has the answer {bad[0].answer!r}, which is not "
                         "the letter of a choice")
    if bench.problems not in (0, len(problems)):
        say(f"{name}: {where} has {len(problems)} problems, the paper's has {bench.problems}")
    return bench, problems


def to_prompt(problem: Problem, template: str, tokenizer) -> Problem:
    """With the prompt of a row of TEMPLATES. Raises InputError for a prompt that is plain text.

    Under `own`, where neither the data nor the chat template says that the answer has to be boxed,
    a system message does.
    """
    if isinstance(problem.prompt, str):
        if template == "own":
            return problem
        raise InputError(f"--template {template}: the prompts of {problem.source} are plain text, "
                         "not messages; they can only be used as they are (--template own)")
    ours = {"role": "system", "content": SYSTEM}
    if template == "own":
        messages = [m for m in problem.prompt if m != ours]
        said = "boxed" in render(messages, tokenizer)
        return replace(problem, prompt=messages if said else [ours, *messages])
    messages = [m for m in problem.prompt if m["role"] != "system"]
    if template == "own_no_system":
        return replace(problem, prompt=messages)
    text = TEMPLATES[template].replace("{problem}", messages[-1]["content"])
    return replace(problem, prompt=text)


# ------------------------------------------------------------------ a run that can be killed
def collect(out: Path, name: str, problems: list[Problem], numbers: list[int], k: int, sampler,
            grader: Grader, tokenizer, rows_at_once: int, **options) -> list[dict]:
    """The rows of all responses to problems[i], i in numbers: those on disk, and the missing ones.

    Blocks of problems are dealt to the ranks. A block of which a killed run wrote only a part does
    not count, so that an evaluation that was interrupted ends as any other: the same problems are
    sampled together.
    """
    def on_disk() -> dict[int, list[dict]]:
        done = defaultdict(list)
        for file in out.glob(f"{name}-rank*.jsonl"):
            for row in whole_blocks(file):
                done[row["problem"]].append(row)
        return done

    done = on_disk()
    barrier()  # all have read before any writes
    mine = out / f"{name}-rank{rank()}.jsonl"
    write(mine, "".join(json.dumps(row) + "\n" for row in whole_blocks(mine)))
    block = max(1, rows_at_once // k)
    blocks = [numbers[i:i + block] for i in range(0, len(numbers), block)]
    with progress(name, k * len(numbers)) as bar:
        bar.update(k * sum(i in done for i in numbers))
        rewards = [row["reward"] for rows in done.values() for row in rows]
        for some in blocks[rank()::world_size()]:
            some = [i for i in some if i not in done]
            if not some:
                continue
            rows = respond(sampler, problems, some, grader, tokenizer, samples=k, lenient=True,
                           **options)
            with mine.open("a") as file:
                file.write("".join(json.dumps(row | {"block": some[0], "of": len(rows)}) + "\n"
                                   for row in rows))
            rewards += [row["reward"] for row in rows]
            bar.update(len(rows) * world_size())
            bar.set_postfix(avg=f"{mean(rewards):.3f}")
    barrier()
    rows = on_disk()
    return [row for i in numbers for row in sorted(rows[i], key=lambda row: row["sample"])]


def whole_blocks(file: Path) -> list[dict]:
    """The rows of a rank's file, without the part of a block that a killed run left at its end."""
    blocks = defaultdict(list)
    for row in read_jsonl(file):
        blocks[row["block"]].append(row)
    return [row for rows in blocks.values() if len(rows) == rows[0]["of"] for row in rows]


def make_sampler(kind: str, path: str, config, eos: int, max_tokens: int):
    """-> (sampler with the model's weights, responses to ask for at once)"""
    on_gpu = torch.cuda.is_available()
    if kind == "torch" or kind == "auto" and not on_gpu:
        return TorchSampler(path, config, eos), TORCH_ROWS
    if find_spec("vllm") is None:
        raise InputError(f"--sampler {kind} takes vLLM here, which is not installed: "
                         "pip install -r requirements.txt, or --sampler torch")
    room = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    weights = 2 * 2 * sum(parameter_sizes(config))  # in bfloat16, vLLM's and the ones it gets
    sampler = VLLMSampler(path, config, eos, max_tokens=max_tokens,
                          cache_bytes=room - weights - RESERVE - ENGINE if on_gpu else GIB // 4)
    sampler.load_weights(from_pretrained(path, config=config).named_parameters())
    return sampler, VLLM_ROWS


# ------------------------------------------------------------------ tables
def table(columns: dict[str, dict[str, dict]]) -> str:
    """{name of a policy: scores by source} -> a markdown table, a line for each source."""
    names = list(columns)
    lines = ["| problems | score | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for source, first in columns[names[0]].items():
        k = first["k"]
        for label, value, form in ((f"avg@{k}", lambda s: s["avg"], ".3f"),
                                   (f"pass@{k}", lambda s: s["pass_at"][-1], ".3f"),
                                   ("tokens", lambda s: s["length"], ".1f"),
                                   ("truncated", lambda s: s["truncated"], ".1%")):
            cells = [format(value(scores[source]), form) for scores in columns.values()]
            lines.append(f"| {source} ({first['problems']}) | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def score_table(scores: dict[tuple[str, float], dict]) -> str:
    """(benchmark, temperature) -> scores -> a markdown table, in percent.

    The means at a temperature are unweighted: over each group of the paper that is complete, or
    else over all. Their errors take benchmarks as independent.
    """
    lines = ["| benchmark | T | problems | avg@k | lenient | pass@k | tokens | truncated |",
             "|---|---|---|---|---|---|---|---|"]
    for (name, t), s in scores.items():
        lines.append(f"| {name} | {t:g} | {s['problems']} "
                     f"| {percent(s['avg'], s['avg_se'])} @{s['k']} "
                     f"| {percent(s['lenient'])} | {percent(s['pass_at'][-1])} @{s['k']} "
                     f"| {s['length']:.0f} | {s['truncated']:.1%} |")
    for t in dict.fromkeys(t for _, t in scores):
        here = {name: s for (name, other), s in scores.items() if other == t}
        groups = [names for names in GROUPS.values() if here.keys() >= set(names)] or [here]
        for these in ([here[name] for name in names] for names in groups if len(names) > 1):
            error = math.sqrt(sum(s["avg_se"] ** 2 for s in these)) / len(these)
            lines.append(f"| mean of {len(these)} | {t:g} | "
                         f"| {percent(mean(s['avg'] for s in these), error)} "
                         f"| {percent(mean(s['lenient'] for s in these))} | "
                         f"| {mean(s['length'] for s in these):.0f} "
                         f"| {mean(s['truncated'] for s in these):.1%} |")
    return "\n".join(lines)


def published_table(scores: dict[tuple[str, float], dict], system: str) -> str:
    """The same beside the paper's numbers, for a row of SYSTEMS; empty if it has none of these."""
    row = SYSTEMS[system]
    paper = dict(zip(SIX, row.six)) | dict(zip(OUT_OF_DISTRIBUTION, row.ood))
    lines = [f"| {name} | {t:g} | {percent(s['avg'], s['avg_se'])} | {percent(s['lenient'])} | "
             f"{paper[name]:.1f} | {100 * s['avg'] - paper[name]:+.1f} |"
             for (name, t), s in scores.items() if name in paper]
    return "\n".join([f"| {system} | T | here | lenient | published | difference |",
                      "|---|---|---|---|---|---|", *lines]) if lines else ""


def percent(value: float, error: float = math.nan) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error == error else "")


def report(run: Path) -> None:
    """What a run directory came to: curves.png, report.html, the first evaluation and the last."""
    from page import write_page  # which needs luffy.py, and that this file
    from plots import draw_curves  # matplotlib is slow to import

    draw_curves(run)
    evaluations = read_jsonl(run / "evals.jsonl")
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        print("\n" + table({f"step {e['step']}": e["scores"] for e in (first, last)}))
    print(f"\ncheckpoint  {(checkpoints(run) or ['none yet'])[-1]}"
          f"\ncurves      {run / 'curves.png'}")
    write_page([run], run / "report.html")
    print(f"look inside {run / 'report.html'}")


# ------------------------------------------------------------------ evaluations side by side
def load_rows(out: Path) -> dict[tuple[str, float, int], list[dict]]:
    """An evaluation's directory -> (benchmark, temperature, k) -> its rows."""
    found = defaultdict(lambda: defaultdict(list))
    for file in sorted(out.glob("*-rank*.jsonl")):
        name, t, k = re.fullmatch(r"(.+)-t([0-9.]+)-k([0-9]+)-rank[0-9]+", file.stem).groups()
        for row in whole_blocks(file):
            found[name, float(t), int(k)][row["source"]].append(row)
    if not found:
        raise InputError(f"{out}: not the directory of an evaluation (no *-rank*.jsonl in it)")
    return {(f"{name}/{source}" if len(sources) > 1 else name, t, k): rows
            for (name, t, k), sources in sorted(found.items())
            for source, rows in sorted(sources.items())}


def compare(arguments: list[str]) -> None:
    """`eval.py compare`: a table of paired differences, and the picture."""
    parser = argparse.ArgumentParser(prog="eval.py compare", allow_abbrev=False)
    parser.add_argument("dirs", nargs="+", type=Path, help="of evaluations; the first is the base")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="the picture")
    args = parser.parse_args(arguments)
    from plots import draw_comparison

    models = {out.name: load_rows(out) for out in args.dirs}
    if len(models) < len(args.dirs):
        raise InputError("compare: two directories have the same name; rename one")
    print(difference_table(models))
    draw_comparison({name: {key: (summarize(rows), [row["tokens"] for row in rows])
                            for key, rows in found.items()} for name, found in models.items()},
                    args.out)
    print(f"\npicture     {args.out}")


def difference_table(models: dict[str, dict]) -> str:
    """Scores of the first model, and paired differences of the others to it: both from the
    problems that both were asked, with the standard error over these."""
    first, *others = models
    lines = ["| benchmark | T | k | " + " | ".join([first, *(f"{n} - {first}" for n in others)])
             + " |", "|---" * (3 + len(models)) + "|"]
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
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="a directory or a hub name")
    parser.add_argument("--paper", choices=SYSTEMS, help="a system of the paper: model and prompt")
    parser.add_argument("--template", choices=TEMPLATES, help="of the prompt [own]")
    parser.add_argument("--bench", required=True,
                        help=f"A,B of {', '.join(BENCHMARKS)}; {' or '.join(GROUPS)} of them; or "
                             "toy/SPLIT, files, hub names")
    parser.add_argument("--data_dir", default="", help="a directory or a file, instead of the hub")
    parser.add_argument("--samples", type=int, help="k, responses to each problem [the paper's]")
    parser.add_argument("--temperature", help="A,B; 0 is greedy, and k = 1 [the paper's, 0.6]")
    parser.add_argument("--limit", type=int, help="problems of each benchmark, spread evenly")
    parser.add_argument("--max_prompt_tokens", type=int, default=1024)
    parser.add_argument("--max_response_tokens", type=int, help="[the paper's, 8192]")
    parser.add_argument("--sampler", choices=["auto", "vllm", "torch"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="[runs/eval/MODEL]")
    args = parser.parse_args()
    system = SYSTEMS.get(args.paper)
    args.model = args.model or (system.model if system else "")
    args.template = args.template or (system.template if system else "own")
    if not args.model:
        raise InputError(f"--paper {args.paper}: no checkpoint of it was published, so --model DIR "
                         "has to name one" if system else "--model or --paper has to say what")
    try:
        args.temperatures = [float(t) for t in (args.temperature or "").split(",") if t]
    except ValueError:
        raise InputError(f"--temperature {args.temperature}: expected A or A,B,...") from None
    for flag in ("samples", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: expected 1 or more")
    path = Path(args.model)
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
    args.out = args.out or Path("runs/eval", args.paper or name)
    return args


def prepare_directory(args) -> None:
    """By all ranks. Refuses the directory of another evaluation."""
    config = {"model": args.model, "template": args.template, "seed": args.seed,
              "max_response_tokens": args.max_response_tokens}
    file = args.out / "config.json"
    if file.exists() and (old := json.loads(file.read_text())) != config:
        differ = [f"{k} was {old.get(k)!r}, now {v!r}"
                  for k, v in config.items() if v != old.get(k)]
        raise InputError(f"--out {args.out} holds another evaluation: {'; '.join(differ)}")
    barrier()
    if rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(config, indent=1))
    barrier()


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    if sys.argv[1:2] == ["report"]:
        from page import main as report_main

        return report_main(sys.argv[2:])
    args = parse_args()
    init_processes()
    names = [n for name in args.bench.split(",") for n in GROUPS.get(name, [name])]
    path = find(args.model)
    tokenizer, config = load_tokenizer(path), load_config(path)
    context = config.max_position_embeddings
    benchmarks = {}
    for name in names:
        bench, problems = load_benchmark(name, args.data_dir)
        if args.template != "own" or not bench.hub.startswith("toy"):  # its models know its prompts
            problems = [to_prompt(p, args.template, tokenizer) for p in problems]
        benchmarks[name] = bench, to_evaluate(
            problems, tokenizer, max_prompt_tokens=min(args.max_prompt_tokens, context - 1))
        if not benchmarks[name][1]:
            raise InputError(f"--bench {name}: no problem has a prompt of --max_prompt_tokens "
                             f"{args.max_prompt_tokens} or less")
    prepare_directory(args)
    longest = max(len(p.prompt_ids) for _, problems in benchmarks.values() for p in problems)
    room = {name: min(args.max_response_tokens or bench.max_tokens, context - longest)
            for name, (bench, _) in benchmarks.items()}
    sampler, rows_at_once = make_sampler(args.sampler, path, config, tokenizer.eos_token_id,
                                         longest + max(room.values()))
    scores = {}
    with Grader() as grader:
        for name, (bench, problems) in benchmarks.items():
            n = min(args.limit or len(problems), len(problems))
            numbers = [i * len(problems) // n for i in range(n)]
            for t in args.temperatures or [bench.temperature]:
                k = 1 if t == 0 else args.samples or bench.k
                rows = collect(args.out, f"{name.replace('/', '.')}-t{t:g}-k{k}", problems,
                               numbers, k, sampler, grader, tokenizer, rows_at_once, temperature=t,
                               max_tokens=room[name], seed=args.seed)
                sources = by_source(rows)
                for source, score in sources.items():
                    scores[f"{name}/{source}" if len(sources) > 1 else name, t] = score
    if rank() == 0:
        write(args.out / "scores.json", json.dumps(
            [{"benchmark": name, "temperature": t} | score for (name, t), score in scores.items()]))
    say(f"{args.model}, template {args.template}, at most {max(room.values())} tokens\n\n"
        f"{score_table(scores)}")
    system = args.paper or next((n for n, s in SYSTEMS.items() if s.model == args.model), None)
    if system and (published := published_table(scores, system)):
        say(f"\n{published}")
    say(f"\nresponses   {args.out}")


def main_or_complaint() -> None:
    try:
        main()
    except InputError as error:
        sys.exit(f"eval.py: {error}" if rank() == 0 else 1)


if __name__ == "__main__":
    launch(main_or_complaint)
