"""Look before you train: what a source of problems comes to, with a model's tokenizer.

What data.py and verify.py do is given as arguments. Each function prints its part.
"""

import argparse
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from machinery.arguments import Parser, filled, path, ranged
from machinery.kinds import Tokenizer
from machinery.model import recipe
from machinery.processes import InputError, say, share
from machinery.run_directory import token_texts

Problem = Any  # data.Problem: an import would be a circle
Lengths = dict[str, list[int]]  # "prompt" and "trace" -> numbers of tokens
EXAMPLES = 3  # of each kind of trouble
JOBS = 256  # answers graded between two moves of the bar
# luffy.py's defaults
LIMITS = {"max_prompt_tokens": 1024, "max_response_tokens": 8192, "max_trace_tokens": 0}


def parse_args() -> tuple[argparse.Namespace, dict[str, int]]:
    """-> flags, and data.encode's limits: given, or the model's own, or luffy.py's."""
    parser = Parser(description="Look before you train.")
    source = "or another source, as luffy.py's --data"
    parser.add_argument("data", type=filled, metavar="FILE", help=source)
    parser.add_argument("--model", type=filled, default="toy", help="a directory or hub name [toy]")
    for name, default in LIMITS.items():
        least = ranged(int, min(default, 1))
        parser.add_argument(f"--{name}", type=least, help="[luffy.py's for this model]")
    parser.add_argument("--template", default="auto", help="auto, own or a jinja file [auto]")
    parser.add_argument("--out", type=path, help="the picture of lengths [runs/data/NAME.png]")
    args = parser.parse_args()
    name = re.sub(r"[^\w.-]+", "-", Path(args.data).name)
    args.out = args.out or Path(f"runs/data/{name}.png")
    given = {name: getattr(args, name) for name in LIMITS}
    own = LIMITS | {name: n for name, n in recipe(args.model).items() if type(n) is int}
    limits = {name: own[name] if n is None else n for name, n in given.items()}
    longest = limits["max_trace_tokens"] or limits["max_response_tokens"]
    return args, {"max_prompt_tokens": limits["max_prompt_tokens"], "max_trace_tokens": longest}


def with_others(problem: Problem) -> list[Problem]:
    """A problem, and the same with each of its other traces."""
    return [problem, *problem.others]


def beginning(problem: Problem) -> str:
    text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    return repr(text if len(text) <= 60 else text[:57] + "...")


def show_rows(problems: list[Problem], broken: list[str]) -> None:
    traces = [sum(p.trace is not None for p in with_others(problem)) for problem in problems]
    several = f", up to {max(traces)} a problem" if max(traces, default=0) > 1 else ""
    say(f"rows        {len(problems)} problems, {sum(traces)} traces{several}")
    if traces.count(0) and sum(traces):
        say(f"            {traces.count(0)} problems have no trace")
    if broken:
        say(f"malformed   {len(broken)} rows, and training does not start with such a row:")
        show_some(broken)
    found = defaultdict(list)
    for problem in problems:
        found[json.dumps(problem.prompt)].append((problem.where, problem.answer))
    again = [rows for rows in found.values() if len(rows) > 1]
    say(f"duplicates  {sum(map(len, again)) - len(again)} rows have the prompt of an earlier row")
    at_odds = [rows for rows in again if len({answer for _, answer in rows}) > 1]
    if at_odds:
        say(f"            {len(at_odds)} prompts have more than one gold answer:")
        show_some(", ".join(f"{place}: {gold!r}" for place, gold in rows[:3]) for rows in at_odds)


def show_some(lines: Iterable[str]) -> None:
    lines = list(lines)
    for line in lines[:EXAMPLES]:
        say(f"            - {line}")
    if len(lines) > EXAMPLES:
        say(f"            - and {len(lines) - EXAMPLES} more")


def encode_each(
    problems: list[Problem], encode: Callable, limits: dict[str, int]
) -> tuple[list[Problem], Problem | None, Lengths]:
    """-> the problems that are kept, one to show, lengths of all.

    encode: data.tokenize.
    """
    kept, some, lengths = [], None, {"prompt": [], "trace": []}
    dropped, example = Counter(), {}
    for problem, reason in encode(problems, **limits):
        some = some or problem
        lengths["prompt"].append(len(problem.prompt_ids))  # what is too long has a length, too
        lengths["trace"] += [len(problem.trace_ids)] if problem.trace_ids else []
        if reason:
            dropped[reason] += 1
            example.setdefault(reason, f"{problem.where}: {beginning(problem)}")
        else:
            kept.append(problem)
    say(f"dropped     {sum(dropped.values())}")
    for reason, n in dropped.most_common():
        say(f"            {n}: {reason}, such as {example[reason]}")
    return kept, kept[0] if kept else some, lengths


def show_lengths(lengths: Lengths, limits: dict[str, int]) -> None:
    """Quantiles, in tokens; a trace's EOS is one."""
    say("\n| tokens | least | 25 % | median | 75 % | 95 % | most | limit | beyond it |")
    say("|---" * 9 + "|")
    for name, values in lengths.items():
        if values:
            limit = limits[name]
            at = np.quantile(values, [0, 0.25, 0.5, 0.75, 0.95, 1])
            cells = [*(f"{x:.0f}" for x in at), limit, sum(n > limit for n in values)]
            say(f"| {name}s | {' | '.join(map(str, cells))} |")
    say()


def draw_lengths(name: str, lengths: Lengths, limits: dict[str, int], file: Path) -> None:
    """Histograms of prompts and traces, with the limits."""
    shown = [(kind, values, limits[kind]) for kind, values in lengths.items() if values]
    if not shown:
        return
    from machinery.plots import plt  # slow to import

    n = len(shown)
    figure, axes = plt.subplots(1, n, figsize=(5.5 * n, 3.6), layout="constrained", squeeze=False)
    for axis, (kind, values, limit) in zip(axes[0], shown):
        axis.hist(values, bins=np.linspace(0, max(values), 50), alpha=0.8)
        if limit <= 3 * max(values):
            axis.axvline(limit, color="C3", linestyle="--")
        else:  # the line would stand far away
            axis.annotate(f"limit {limit:,} →", (0.98, 0.92), xycoords="axes fraction", ha="right")
        beyond = sum(n > limit for n in values) / len(values)
        axis.set_title(f"{len(values):,} {kind}s: {beyond:.1%} beyond {limit:,} tokens", loc="left")
        axis.set_xlabel("tokens")
    figure.suptitle(name, fontsize=11)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {file}: not a picture that can be written ({error})") from error
    plt.close(figure)
    say(f"picture     {file}")


def show_golds(golds: dict[str, str], verdicts: Callable) -> None:
    """golds: gold answer -> where it stands first."""
    boxed = share("golds", verdicts, [(f"\\boxed{{{gold}}}", gold) for gold in golds], JOBS)
    wrong = [(gold, v.reason) for gold, v in zip(golds, boxed) if not v.right]
    say(f"golds       {len(golds)} different answers; {len(wrong)} are not right in a box")
    show_some(f"{golds[gold]}: {gold!r:.80} ({reason})" for gold, reason in wrong)


def show_traces(
    kept: list[Problem], traces: list[tuple[Problem, str]], verdicts: Callable, extract: Callable
) -> None:
    """What the verifier says of traces that fit (their texts), and what is left to train on."""
    found = share("traces", verdicts, [(text, p.answer) for p, text in traces], JOBS)
    right = [p for (p, _), v in zip(traces, found) if v.right]
    if traces:
        part = len(right) / len(traces)
        say(f"traces      {len(right)} of {len(traces)} that fit are right ({part:.1%})")
    show_some(
        f"{p.where}: gold {p.answer!r:.40}, given {extract(text)!r:.40} ({v.reason})"
        for (p, text), v in zip(traces, found)
        if not v.right
    )
    good = {p.where for p in right}
    columns = kept, [p for p, _ in traces], right, [p for p in kept if p.where in good]
    counts = [Counter(p.source for p in some) for some in columns]
    say("\n| source | problems that fit | traces that fit | right | problems with a right one |")
    say("|---" * 5 + "|")
    for source, _ in counts[0].most_common(20):
        say(f"| {source or '-'} | {' | '.join(str(count[source]) for count in counts)} |")
    if len(counts[0]) > 20:
        say(f"| and {len(counts[0]) - 20} more | | | | |")
    untraced = len(kept) - len({p.where for p, _ in traces})
    say(f"\nto train on {len(good)} problems with a right trace; {untraced} more have no trace")


def show_prompt(problem: Problem, text: str, tokenizer: Tokenizer) -> None:
    """The first problem as the model sees it: its prompt, and tokens around the trace's ends."""
    say(f"\nprompt      the first problem's, {len(problem.prompt_ids)} tokens:\n{text}")
    if "boxed" not in text + str(tokenizer.chat_template):
        say("\nno box      the reward needs \\boxed{}, and nothing in this prompt asks for it")

    def shown(ids: Any) -> str:
        return " ".join(map(repr, token_texts(list(ids), tokenizer)))

    ids = problem.trace_ids
    begins = shown(ids[:8]) if ids else "(no trace)"
    say(f"\nseam        {shown(problem.prompt_ids[-8:])} | {begins}")
    if ids:
        say(f"end         {shown(ids[-3:])}")


def show_unknown(problems: list[Problem], tokenizer: Tokenizer) -> None:
    """Characters that the tokenizer loses: a model can neither read nor write them."""

    def lost_of(text: str) -> set[str]:
        text = unicodedata.normalize("NFKC", text)  # as some tokenizers do
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = unicodedata.normalize("NFKC", tokenizer.decode(ids))
        return set(Counter(text) - Counter(back))

    texts = [text for p in problems for text in texts_of(p)]
    odd = {char for char in set().union(*texts) if lost_of(f"a{char}a")}
    # such a character may still be part of a longer token
    found = [lost_of(text) for text in texts if not odd.isdisjoint(text)]
    lost = Counter(char for chars in found for char in chars)
    if lost:
        share = sum(map(bool, found)) / len(texts)
        some = " ".join(repr(char) for char, _ in lost.most_common(12))
        more = f" and {len(lost) - 12} more" if len(lost) > 12 else ""
        say(f"lost        the tokenizer loses characters of {share:.0%} of messages and traces:")
        say(f"            {some}{more}")


def texts_of(problem: Problem) -> list[str]:
    prompt = problem.prompt
    if isinstance(prompt, str):
        texts = [prompt]
    else:  # a system message may be ours, and then not be used
        texts = [m["content"] for m in prompt if m["role"] != "system"]
    return texts + [p.trace for p in with_others(problem) if p.trace is not None]
