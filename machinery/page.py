"""report.html: a page to look into runs. One file that opens from disk, without a network.

    python eval.py report RUN_DIR [RUN_DIR ...] [--out FILE]

Curves of all runs; groups of trajectories, token by token, with what each token counts in the
gradient; and the same traces before, during and after training. What is shown of a token is what
the trainer recorded. The page is page.html with the runs' data and plotly.js put in; all that a
model wrote gets into it as JSON and out as text.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from machinery.arguments import Parser, path
from machinery.files import read_json, read_jsonl, write
from machinery.metrics import evaluation_metrics, smooth
from machinery.processes import InputError

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_TOKENS = 160_000  # in all groups of a page
SHOWN_HEAD, SHOWN_TAIL = 800, 200  # tokens of a longer response


def write_page(directories: list[Path], out: Path) -> None:
    """One page of one or several run directories. Raises InputError if one of them is none."""
    from plotly.offline import get_plotlyjs  # slow to import

    data = [describe(d, SHOWN_TOKENS // len(directories)) for d in directories]
    names = [run["name"] for run in data]
    for run, directory in zip(data, directories):
        if names.count(run["name"]) > 1:
            run["name"] = str(directory)
    before, rest = TEMPLATE.read_text("utf-8").split("/*DATA*/")
    between, after = rest.split("/*PLOTLY*/")
    # "<" could end the element that the JSON stands in; nothing else could
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    write(out, before + text + between + get_plotlyjs() + after)


def describe(directory: Path, budget: int) -> dict:
    """What the page shows of a run directory. Raises InputError if it is none."""
    config, metrics = directory / "config.json", read_jsonl(directory / "metrics.jsonl", step=int)
    if not config.is_file() or not metrics:
        raise InputError(f"{directory}: not the directory of a run with at least one step")
    rows: dict[int, dict] = defaultdict(dict)
    for row in metrics + read_jsonl(directory / "timing.jsonl", step=int):
        rows[row.pop("step")] |= row
    for row in read_jsonl(directory / "evals.jsonl", step=int, scores=dict):
        scores = evaluation_metrics(row["scores"])
        rows[row["step"]] |= scores | {"eval": mean(scores.values())}
    names, steps = sorted({name for row in rows.values() for name in row}), sorted(rows)
    curves = {name: [rows[step].get(name) for step in steps] for name in names}
    return {
        "name": directory.resolve().name,
        "config": read_json(config),
        "steps": steps,
        "curves": {name: list(map(short, values)) for name, values in curves.items()},
        "smoothed": {
            name: list(map(short, smooth(values)))
            for name, values in curves.items()
            if not name.startswith("eval")  # they are far apart
        },
        "groups": groups(directory, budget),
        "watched": watched(directory, budget // 5),
        "head": SHOWN_HEAD,
    }


def groups(directory: Path, budget: int) -> list[dict]:
    """[{step, problems: [...]}, ...]: of the steps and problems that were kept, what fits.

    First the first and the last of them, then those that halve the gaps. A step gets problems
    until they have a fifth of the budget (tokens), the page gets steps until four fifths are gone.
    """
    files = sorted((directory / "samples").glob("step-*.jsonl"))
    shown, share = {}, budget // 5
    for i in by_halves(len(files)):
        rows: dict[int, list[dict]] = defaultdict(list)
        for row in read_jsonl(files[i]):
            if "slope" in row:  # earlier versions did not record it
                rows[row["position"]].append(row)
        problems, used = {}, 0
        for n in by_halves(len(rows)):
            if used < share or not problems:
                group = list(rows.values())[n]
                problems[n] = {key: group[0][key] for key in ("source", "prompt", "answer")}
                problems[n]["trajectories"] = [trajectory(row) for row in group]
                used += sum(len(t["tokens"]) for t in problems[n]["trajectories"])
        if problems:
            step = int(files[i].stem.split("-")[1])
            shown[i] = {"step": step, "problems": [problems[n] for n in sorted(problems)]}
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


def trajectory(row: dict) -> dict:
    """A row of samples/."""
    inv_z = row["inv_z"]  # one a token, where a prefix has its own: then the last one's
    inv_z = inv_z[-1] if isinstance(inv_z, list) else inv_z
    learns = row["learns"] and inv_z != 0
    shown = {"off_policy": row["off_policy"], "learns": learns, "prefix": row.get("prefix", 0)}
    shown |= {"right": short(row["right"]), "reward": short(row["reward"])}
    advantage = row["advantage"]
    if isinstance(advantage, list):  # one a token: their mean, and each of them
        shown["advantages"] = numbers(advantage)
        advantage = sum(advantage) / len(advantage)
    shown |= {"advantage": short(advantage), "inv_z": short(inv_z)}
    return shown | {"tokens": cut(row["tokens"]), "length": len(row["tokens"])} | of_tokens(row)


def of_tokens(row: dict) -> dict[str, list]:
    """π; 1 - π, which is ∇log π at the token's own logit; x or f(x); ∂ objective / ∂ log π."""
    return {
        "p": numbers(map(math.exp, row["logp"])),
        "rest": numbers(-math.expm1(logp) for logp in row["logp"]),
        "factor": numbers(row["factor"]),
        "slope": numbers(row["slope"]),
    }


def watched(directory: Path, budget: int) -> list[dict]:
    """The traces that were looked at again and again: what was recorded of their tokens."""
    rows = read_jsonl(directory / "watched.jsonl", traces=list)
    texts = rows[0]["traces"] if rows else []
    rows = [row for row in rows if "slope" in row["traces"][0]]  # earlier versions had none
    if not rows:
        return []
    shown = [rows[i] for i in sorted(by_halves(len(rows))[:9])]
    longest = max(len(cut(trace["tokens"])) for trace in texts)
    count = min(len(row["traces"]) for row in rows)  # --sample_groups may change
    count = min(count, len(texts), 1 + budget // (longest * len(shown)))
    return [
        {key: trace[key] for key in ("source", "prompt", "answer")}
        | {"tokens": cut(trace["tokens"]), "length": len(trace["tokens"])}
        | {"at": [{"step": row["step"]} | of_tokens(row["traces"][i]) for row in shown]}
        for i, trace in enumerate(texts[:count])
    ]


def cut(values: list) -> list:
    """A long one without its middle."""
    if len(values) <= SHOWN_HEAD + SHOWN_TAIL:
        return values
    return values[:SHOWN_HEAD] + values[-SHOWN_TAIL:]


def numbers(values: Iterable[float]) -> list[float | None]:
    return [short(value) for value in cut(list(values))]


def short(value: Any) -> float | None:
    """Three digits; None for what JSON does not know."""
    return float(f"{value:.3g}") if value is not None and math.isfinite(value) else None


def main(arguments: list[str]) -> None:
    parser = Parser(prog="eval.py report")
    parser.add_argument("runs", nargs="+", type=path, help="run directories")
    parser.add_argument("--out", type=path, help="[report.html in the first one]")
    args = parser.parse_args(arguments)
    out = args.out or args.runs[0] / "report.html"
    if args.out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"--out {out}: name a file in a directory that exists")
    write_page(args.runs, out)
    print(f"report      {out}")
