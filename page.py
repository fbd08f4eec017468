"""report.html: a page to look into a run. One file that opens from disk, without a network.

    python eval.py report RUN_DIR [RUN_DIR ...] [--out FILE]

Curves of all runs; groups of trajectories, token by token, with what each token counts in the
gradient; and the same traces before, during and after training. The page is page.html with the
runs' data and plotly.js put in; all that a model wrote gets into it as JSON and out as text.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn import functional as F

from luffy import SHAPINGS, mixed_policy_objective, shape
from run import InputError, read_jsonl, write

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_TOKENS = 160_000  # in all groups of a page
SHOWN_HEAD, SHOWN_TAIL = 800, 200  # tokens of a longer response

TOY = """The toy: each value is the sum (or difference) of the two before it, modulo 7. From the two
that are given the policy has to go on until the letter that is asked for; the answer is the last
three values. The base model boxes after two steps, and hard problems take more. The teacher
sometimes writes "check" and a step again, or a wrong value, "wait" and the right one."""


def write_page(runs: list[Path], out: Path) -> None:
    """One page of one or several run directories. Raises InputError if one of them is none."""
    from plotly.offline import get_plotlyjs  # slow to import

    data = [describe(run, SHOWN_TOKENS // len(runs)) for run in runs]
    names = [run["name"] for run in data]
    for run, path in zip(data, runs):
        if names.count(run["name"]) > 1:
            run["name"] = str(path)
    before, rest = TEMPLATE.read_text().split("/*DATA*/")
    between, after = rest.split("/*PLOTLY*/")
    # "<" could end the element that the JSON stands in; nothing else could
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = before + text + between + get_plotlyjs() + after
    write(out, page)


def describe(run: Path, budget: int) -> dict:
    """What the page shows of a run directory. Raises InputError if it is none."""
    if not (run / "config.json").is_file() or not read_jsonl(run / "metrics.jsonl"):
        raise InputError(f"{run}: not the directory of a run with at least one step")
    cfg = json.loads((run / "config.json").read_text())
    rows = defaultdict(dict)
    for row in read_jsonl(run / "metrics.jsonl") + read_jsonl(run / "timing.jsonl"):
        rows[row.pop("step")] |= row
    for row in read_jsonl(run / "evals.jsonl"):
        rows[row["step"]] |= {f"eval/{name}": s["avg"] for name, s in row["scores"].items()}
    names = sorted({name for row in rows.values() for name in row})
    return {
        "name": run.resolve().name, "algo": cfg["algo"], "model": cfg["model"],
        "gamma": cfg["gamma"], "shaping": cfg["shaping"] if cfg["traces"] else None,
        "rules": rules(cfg), "steps": sorted(rows),
        "curves": {name: [short(rows[step].get(name)) for step in sorted(rows)] for name in names},
        "weights": of_trace(F.logsigmoid(torch.linspace(-11.5, 9, 101)), cfg),
        "groups": groups(run, cfg, budget), "watched": watched(run, cfg, budget // 5),
        "head": SHOWN_HEAD}


def rules(cfg: dict) -> dict:
    """What luffy.score and luffy.mixed_policy_objective make of the configuration, in words."""
    if not cfg["rollouts"]:
        advantage, rollout = f"{cfg['trace_advantage']:g} for every trace", ""
    else:
        rewards = {"group": "all rewards", "rollouts": "the rollouts' rewards"}[cfg["baseline"]]
        advantage = (f"reward − the mean of {rewards} of the group, "
                     f"{'' if cfg['normalize_std'] else 'not '}divided by their standard deviation")
        if cfg["traces"] and cfg["trace_advantage"] is not None:
            advantage += f"; a trace's is {cfg['trace_advantage']:g}"
        rollout = "On a rollout w is the importance ratio π/π_old"
        if cfg["shape_rollouts"]:
            rollout = "On a rollout w is f(π)/f(π_old) × γ/(π + γ), as the ratio is f(π)/f(π_old)"
        if cfg["clip"] is not None:
            rollout += f", or 0 where the clip at {cfg['clip']:g} holds the ratio"
        if cfg["tis_cap"] is not None:
            rollout += ", but for --tis_cap"
        if cfg["shaping"] == "log":
            rollout += "; traces have a normaliser of their own here, so compare within each"
        rollout += "."
    return {"advantage": advantage, "rollout": rollout,
            "ratio": "f(π)/f(π_old)" if cfg["shape_rollouts"] else "π/π_old",
            "weaker": "(So the traces' likely tokens also weigh less against the rollouts, which "
                      "are not shaped.)" if cfg["rollouts"] and not cfg["shape_rollouts"] else "",
            "first": "Shown first is the group in which the trace's unlikely tokens get the most "
                     "push." if cfg["traces"] else "",
            "watched": "" if cfg["traces"] else "This run does not train on traces.",
            "note": TOY if cfg["data"] == "toy" else ""}


def groups(run: Path, cfg: dict, budget: int) -> list[dict]:
    """[{step, problems: [...]}, ...]: of the steps and problems that were kept, what fits.

    First the first and the last of them, then those that halve the gaps. A step gets problems
    until they have a fifth of the budget (tokens), the page gets steps until four fifths are gone.
    """
    files = sorted((run / "samples").glob("step-*.jsonl"))
    shown, share = {}, budget // 5
    for i in by_halves(len(files)):
        rows = defaultdict(list)
        for row in read_jsonl(files[i]):
            if "logp" in row:  # earlier versions wrote the text alone
                rows[row["position"]].append(row)
        problems, used = {}, 0
        for n in by_halves(len(rows)):
            if used < share or not problems:
                group = list(rows.values())[n]
                problems[n] = {key: group[0][key] for key in ("source", "prompt", "answer")} | {
                    "trajectories": [trajectory(row, cfg) for row in group]}
                used += sum(len(t["tokens"]) for t in problems[n]["trajectories"])
        if problems:
            shown[i] = {"step": int(files[i].stem.split("-")[1]),
                        "problems": [problems[n] for n in sorted(problems)]}
        budget -= used
        if budget <= share and len(shown) > 1:
            break
    return [shown[i] for i in sorted(shown)]


def by_halves(n: int) -> list[int]:
    """0 and n - 1, then what lies halfway between, ...

    >>> by_halves(6)
    [0, 5, 2, 1, 3, 4]
    """
    order, gaps = [*dict.fromkeys([0, n - 1][:n])], [(0, n - 1)]
    for low, high in gaps:
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order


def trajectory(row: dict, cfg: dict) -> dict:
    logp = torch.tensor(row["logp"])
    shown = {"trace": row["off_policy"], "reward": row["reward"],
             "advantage": short(row["advantage"]), "length": len(logp),
             "tokens": cut(row["tokens"])}
    if row["off_policy"]:
        return shown | of_trace(logp, cfg)
    old = torch.tensor(row["logp_old"])
    weights = token_weights(logp, old, row["advantage"], False, cfg, cfg["shaping"])
    ratio = (logp - old).exp()
    if cfg["shape_rollouts"]:
        ratio = shape(logp.exp(), cfg["gamma"]) / shape(old.exp(), cfg["gamma"])
    return shown | probabilities(logp) | {"ratio": numbers(ratio), "weights": numbers(weights)}


def of_trace(logp: torch.Tensor, cfg: dict) -> dict:
    """π, f(π) and, for each shaping, the weight of trace tokens at advantage 1."""
    return probabilities(logp) | {"f": numbers(shape(logp.exp(), cfg["gamma"])), "weights": {
        name: numbers(token_weights(logp, torch.zeros_like(logp), 1.0, True, cfg, name))
        for name in SHAPINGS}}


def probabilities(logp: torch.Tensor) -> dict:
    """π and 1 - π, which is ∇log π at the token's own logit."""
    return {"p": numbers(logp.exp()), "rest": numbers(-torch.expm1(logp))}


def token_weights(logp: torch.Tensor, logp_behavior: torch.Tensor, advantage: float,
                  off_policy: bool, cfg: dict, shaping: str) -> torch.Tensor:
    """∂J/∂log π of each token, by the training code's own objective: (N,), (N,) -> (N,).

    Without 1/Z, which all tokens share in most arms, and without --tis_cap's factor.
    On a trace: A π without shaping, A γπ/(π+γ)² with it, A for "log". On a rollout: see rules().
    """
    logp = logp.clone().requires_grad_()
    objective = mixed_policy_objective(
        logp, logp_behavior, torch.full_like(logp, advantage),
        torch.full(logp.shape, off_policy), shaping=shaping, gamma=cfg["gamma"],
        clip=cfg["clip"], shape_rollouts=cfg["shape_rollouts"])
    return torch.autograd.grad(objective.sum(), logp)[0]


def watched(run: Path, cfg: dict, budget: int) -> list[dict]:
    """The traces that were looked at again and again: their tokens' π and weights, by step."""
    rows = read_jsonl(run / "watched.jsonl")
    if not rows:
        return []
    shown = [rows[i] for i in sorted(by_halves(len(rows))[:9])]
    count = min(len(row["traces"]) for row in rows)  # --sample_groups may change
    longest = max(len(cut(trace["tokens"])) for trace in rows[0]["traces"])
    count = min(count, 1 + budget // (longest * len(shown)))
    return [{key: trace[key] for key in ("source", "prompt", "answer")} | {
        "tokens": cut(trace["tokens"]), "length": len(trace["tokens"]),
        "at": [{"step": row["step"]} | of_trace(torch.tensor(row["traces"][i]["logp"]), cfg)
               for row in shown]} for i, trace in enumerate(rows[0]["traces"][:count])]


def cut(values: list) -> list:
    """A long one without its middle."""
    return values if len(values) <= SHOWN_HEAD + SHOWN_TAIL else (
        values[:SHOWN_HEAD] + values[-SHOWN_TAIL:])


def numbers(values: torch.Tensor) -> list[float]:
    return [short(value) for value in cut(values.tolist())]


def short(value: float | None) -> float | None:
    """Three digits; None for what JSON does not know."""
    return float(f"{value:.3g}") if value is not None and math.isfinite(value) else None


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="eval.py report", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help="[report.html in the first one]")
    args = parser.parse_args(arguments)
    out = args.out or args.runs[0] / "report.html"
    if args.out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"--out {out}: name a file in a directory that exists")
    write_page(args.runs, out)
    print(f"report      {out}")
