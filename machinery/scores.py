"""How good is a policy on held-out problems: avg@k, pass@k; and what a run came to."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev
from typing import Any

from machinery.checkpoints import checkpoints
from machinery.files import read_jsonl, writing
from machinery.flags import Config
from machinery.kinds import Tokenizer
from machinery.processes import gather, progress, rank, seed_of, world_size
from machinery.samplers import Sampler

Grader = Any  # verify.Grader: the machinery imports none of the files on top
Problem = Any  # data.Problem
JOBS = 512  # graded at a time: math-verify takes seconds for as many


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for pass@k (arXiv:2107.03374, Eq. 1). ValueError unless 0 <= c <= n, 1 <= k <= n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 2, 2)
    (0.25, 1.0, 0.8333333333333334)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def standard_error(means: list[float]) -> float | None:
    """Of the mean of `means`, one for each problem: samples of a problem are not independent.

    One problem tells none.
    """
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def by_problem(rows: list[dict]) -> dict[Any, list[float]]:
    """The rewards of each problem's responses."""
    found = defaultdict(list)
    for row in rows:
        found[row["problem"]].append(row["reward"] or 0.0)
    return found


def has_verdict(row: dict) -> bool:
    """False where the grader failed: its reward is None then, and counts as 0."""
    return None not in (row["reward"], row.get("lenient", 0.0))


def summarize(rows: list[dict]) -> dict:
    """Rows of `respond`, the same number k for each problem -> scores.

    avg: avg@k with its standard error avg_se; pass_at: unbiased pass@1 ... pass@k; lenient: avg@k
    by the official code's reward, where asked for; mean length in tokens; share of truncated
    responses; no_verdict: how many the grader failed on, if any, which count as not right.
    """
    rewards = list(by_problem(rows).values())
    k, means = len(rewards[0]), [mean(r) for r in rewards]
    right = [int(sum(r)) for r in rewards]
    lenient = [row["lenient"] or 0.0 for row in rows if "lenient" in row]
    failed = sum(not has_verdict(row) for row in rows)
    return {
        "problems": len(rewards),
        "k": k,
        "avg": mean(means),
        "avg_se": standard_error(means),
        **({"lenient": mean(lenient)} if lenient else {}),
        "pass_at": [mean(pass_at_k(k, c, i) for c in right) for i in range(1, k + 1)],
        "length": mean(row["tokens"] for row in rows),
        "truncated": mean(row["truncated"] for row in rows),
        **({"no_verdict": failed} if failed else {}),
    }


def respond(
    sampler: Sampler,
    problems: list[Problem],
    numbers: Sequence[int],
    grader: Grader,
    tokenizer: Tokenizer,
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    seeds: Sequence[int],
    lenient: bool = False,
) -> list[dict]:
    """Graded responses to problems[i], i in numbers: a row for each, in order.

    seeds: one for each of the problems. reward: by the grader's own setting (in training,
    --lenient); lenient: also by the official code's reward.
    """
    prompts = [problems[i].prompt_ids for i in numbers]
    theirs = [seeds[i] for i in numbers]
    groups = sampler.generate(
        prompts, samples, seeds=theirs, temperature=temperature, max_tokens=max_tokens
    )
    rows: list[dict[str, Any]] = [
        {
            "problem": i,
            "sample": j,
            "source": problems[i].source,
            "answer": problems[i].answer,
            "tokens": len(sample.tokens),
            "response": tokenizer.decode(sample.tokens),
            "truncated": sample.truncated,
        }
        for i, group in zip(numbers, groups)
        for j, sample in enumerate(group)
    ]
    return graded(rows, problems, grader, lenient)


def graded(rows: list[dict], problems: list[Problem], grader: Grader, lenient: bool) -> list[dict]:
    """With the fields that `respond` says; None where the grader failed."""
    jobs = [(problems[row["problem"]].opened + row["response"], row["answer"]) for row in rows]
    rules = {"reward": None, "lenient": True} if lenient else {"reward": None}
    with progress("grade", len(rows)) as bar:
        for i in range(0, len(rows), JOBS):
            for name, rule in rules.items():
                found = grader.judged(jobs[i : i + JOBS], lenient=rule)
                for row, reward in zip(rows[i:], found):
                    row[name] = reward
            bar.update(len(found))
    return rows


def evaluate(
    sampler: Sampler, problems: list[Problem], grader: Grader, tokenizer: Tokenizer, cfg: Config
) -> dict[str, dict]:
    """A training run's own evaluation, problems shared out among the ranks: -> source -> scores.

    The scores depend on the number of ranks by rounding only.
    """
    seeds = [seed_of("evaluation", cfg.seed, i) for i in range(len(problems))]
    how: Any = dict(max_tokens=cfg.max_response_tokens, seeds=seeds, temperature=0.6)
    rows: list[dict] = []
    for k, some in by_k(problems, range(len(problems)), cfg.eval_samples, 8).items():
        mine = some[rank() :: world_size()]  # perhaps none: the ranks of an engine ask together
        rows += respond(sampler, problems, mine, grader, tokenizer, samples=k, **how)
    return by_source(sum(gather([{**row, "response": ""} for row in rows]), []))


def by_k(
    problems: list[Problem], numbers: Sequence[int], samples: int | None, default: int
) -> dict[int, list[int]]:
    """k -> those of the numbers to answer k times: `samples` if given, or as their file says."""
    found = defaultdict(list)
    for i in numbers:
        found[samples or problems[i].k or default].append(i)
    return dict(sorted(found.items()))


def by_source(rows: list[dict]) -> dict[str, dict]:
    """Source -> scores; of a source whose problems differ in k, those of each k apart."""
    k = {problem: len(rewards) for problem, rewards in by_problem(rows).items()}
    found: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row["problem"], row["sample"])):
        found[row["source"]][k[row["problem"]]].append(row)
    return {
        source + f" (k = {n})" * (len(parts) > 1): summarize(part)
        for source, parts in sorted(found.items())
        for n, part in sorted(parts.items())
    }


def table(columns: dict[str, dict[str, dict]]) -> str:
    """{name of a policy: scores by source} -> a markdown table, a line for each source."""
    names = list(columns)
    lines = ["| problems | score | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for source, first in columns[names[0]].items():
        k, scores = first["k"], [found[source] for found in columns.values()]
        for label, cells in {
            f"avg@{k}": [f"{s['avg']:.3f}" for s in scores],
            f"pass@{k}": [f"{s['pass_at'][-1]:.3f}" for s in scores],
            "tokens": [f"{s['length']:.1f}" for s in scores],
            "truncated": [f"{s['truncated']:.1%}" for s in scores],
        }.items():
            lines.append(f"| {source} ({first['problems']}) | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(directory: Path) -> None:
    """curves.png and report.html of a run, as far as it has come."""
    from machinery.page import write_page
    from machinery.plots import draw_curves  # matplotlib is slow to import

    with writing(directory / "curves.png"):
        draw_curves(directory)
    write_page([directory], directory / "report.html")


def report(directory: Path) -> None:
    """What a run came to: curves.png, report.html, the first evaluation and the last. By rank 0."""
    if rank() != 0:
        return
    draw(directory)
    evaluations = read_jsonl(directory / "evals.jsonl")
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        print("\n" + table({f"step {e['step']}": e["scores"] for e in (first, last)}))
    print(f"\ncheckpoint  {(checkpoints(directory) or ['none yet'])[-1]}")
    print(f"curves      {directory / 'curves.png'}")
    print(f"look inside {directory / 'report.html'}")
