"""How good is a policy? avg@k and pass@k by source of the problems, tables and curves.

    python eval.py --model runs/toy-luffy-seed0/checkpoint-000160 --bench toy
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean as mean

from data import Problem, load_benchmarks
from model import find, load_config, load_tokenizer
from run import InputError, checkpoints, gather, init_processes, launch, rank, read_jsonl, say
from run import seed_of, world_size
from sampler import TorchSampler
from verify import Grader


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for pass@k (arXiv:2107.03374, Eq. 1). ValueError unless 0 <= c <= n, 1 <= k <= n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 2, 2)
    (0.25, 1.0, 0.8333333333333334)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(sampler, problems: list[Problem], grader: Grader, tokenizer, *, samples: int,
             temperature: float, max_tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """`samples` responses to each encoded problem -> source -> scores, sharded over the ranks.

    The scores: number of problems, k (= samples), avg@k and pass@k of the rewards, mean length in
    tokens, share of truncated responses. They depend on the number of ranks by rounding only.
    """
    mine = range(rank(), len(problems), world_size())
    groups = sampler.generate(
        [problems[i].prompt_ids for i in mine], samples, temperature=temperature,
        seeds=[seed_of("evaluation", seed, i) for i in mine], max_tokens=max_tokens)
    rewards = iter(grader([
        (problems[i].opened + tokenizer.decode(sample.tokens), problems[i].answer)
        for i, group in zip(mine, groups) for sample in group]))
    records = [(problems[i].source, next(rewards), len(sample.tokens),
                sample.tokens[-1] != tokenizer.eos_token_id)
               for i, group in zip(mine, groups) for sample in group]
    by_source = defaultdict(list)
    for record in sum(gather(records), []):
        by_source[record[0]].append(record[1:])
    return {source: summarize(by_source[source], samples) for source in sorted(by_source)}


def summarize(records: list[tuple], k: int) -> dict[str, float]:
    """(reward, length, truncated) of each response, k in a row for each problem -> scores."""
    rewards, lengths, truncated = zip(*records)
    passed = [pass_at_k(k, int(sum(rewards[i:i + k])), k) for i in range(0, len(rewards), k)]
    return {"problems": len(passed), "k": k, "avg": mean(rewards), "pass": mean(passed),
            "length": mean(lengths), "truncated": mean(truncated)}


def table(columns: dict[str, dict[str, dict]]) -> str:
    """{name of a policy: scores by source} -> a markdown table, a line for each source."""
    names = list(columns)
    lines = ["| problems | score | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for source, first in columns[names[0]].items():
        for key, label, form in (("avg", f"avg@{first['k']}", ".3f"),
                                 ("pass", f"pass@{first['k']}", ".3f"),
                                 ("length", "tokens", ".1f"), ("truncated", "truncated", ".1%")):
            cells = [format(scores[source][key], form) for scores in columns.values()]
            lines.append(f"| {source} ({first['problems']}) | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(run: Path) -> None:
    """What a run directory came to: curves.png, the first and the last evaluation side by side."""
    draw_curves(run)
    evaluations = read_jsonl(run / "evals.jsonl")
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        print("\n" + table({f"step {e['step']}": e["scores"] for e in (first, last)}))
    print(f"\ncheckpoint  {(checkpoints(run) or ['none yet'])[-1]}"
          f"\ncurves      {run / 'curves.png'}")


def draw_curves(run: Path) -> None:
    """curves.png of a run directory, from its metrics.jsonl. Nothing if there is no step yet."""
    rows = read_jsonl(run / "metrics.jsonl")
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    sources = sorted({k for row in rows for k in row if k.startswith("reward/")})
    panels = {
        "reward of the rollouts": [(s, s.split("/")[1]) for s in sources],
        "groups (rollouts only)": [("groups/none", "none right"), ("groups/mixed", "some right"),
                                   ("groups/all", "all right")],
        "probability and entropy": [("trace_prob", "mean π of a trace token"),
                                    ("trace_weight", "mean f(π) of a trace token"),
                                    ("entropy", "entropy of rollout tokens (nats)")],
        "response length (tokens)": [("length", "rollouts"), ("trace_length", "traces")],
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for key, label in curves:
            found = [(row["step"], row[key]) for row in rows if key in row]
            if found:
                line, = axis.plot(*zip(*found), alpha=0.25, linewidth=1)
                axis.plot(steps, smooth([row.get(key) for row in rows]), label=label,
                          color=line.get_color(), linewidth=2)
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 1].set_ylim(-0.03, 1.03)
    config = json.loads((run / "config.json").read_text())
    figure.suptitle(f"{config['algo']} on {Path(config['model']).name}, seed {config['seed']} "
                    "(thick: mean of 10 steps)", fontsize=11)
    figure.savefig(run / "curves.png", dpi=130)
    plt.close(figure)


def smooth(values: list, window: int = 10) -> list[float]:
    """The mean of the last `window` values; NaN where there are none."""
    means = []
    for i in range(len(values)):
        last = [v for v in values[max(0, i + 1 - window):i + 1] if v is not None]
        means.append(sum(last) / len(last) if last else math.nan)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description="avg@k and pass@k of a model.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a directory or a hub name")
    parser.add_argument("--bench", required=True, help="A,B: toy (test split), files, hub names")
    parser.add_argument("--samples", type=int, default=8, help="k, responses to each problem (8)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (0.6)")
    parser.add_argument("--max_prompt_tokens", type=int, default=1024)
    parser.add_argument("--max_response_tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    init_processes()
    try:
        path = find(args.model)
        tokenizer, config = load_tokenizer(path), load_config(path)
        context = config.max_position_embeddings
        problems = load_benchmarks(
            ("toy/test" if name == "toy" else name for name in args.bench.split(",")), tokenizer,
            max_prompt_tokens=min(args.max_prompt_tokens, context - 1))
        longest = max((len(p.prompt_ids) for p in problems), default=0)
        sampler = TorchSampler(path, config, tokenizer.eos_token_id)
        with Grader() as grader:
            scores = evaluate(sampler, problems, grader, tokenizer, samples=args.samples,
                              temperature=args.temperature, seed=args.seed,
                              max_tokens=min(args.max_response_tokens, context - longest))
    except InputError as error:
        sys.exit(f"eval.py: {error}" if rank() == 0 else 1)
    say(table({Path(args.model).name: scores}))


if __name__ == "__main__":
    launch(main)
