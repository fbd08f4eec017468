r"""Does the verifier take different gold answers for equal, or refuse one as its own answer?

    python benchmarks/golds.py FILE ...        # 14 minutes for 27,000 pairs; prints tables

FILE is anything that data.py reads. All different gold answers are sorted in several ways, so that
those stand side by side that are easily confused, and each is graded against the next ones, and
against itself with one character changed, or two swapped. Both ways: each is the answer once.
Some pairs are truly equal (0.5 and \frac12), so those that are found equal are printed, by the
verifier's reason, for the reader to judge.
"""

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import read_problems
from machinery.processes import launch, progress
from verify import Grader, Verdict

ORDERS: dict[str, Callable] = {
    "text": str,
    "text from its end": lambda gold: gold[::-1],
    "letters and digits": lambda gold: re.sub(r"\\[a-zA-Z]+|[^a-zA-Z0-9]", "", gold),
    "characters, sorted": sorted,
}
ALIKE = re.compile(r"[\s$]|\\[,;!]|(?<=\\)[dt](?=frac)")  # golds that differ in these are the same
CHANGES = ["0123456789", "+-", "([", ")]", "<>"]  # a character for another of its kind
CHANGED = re.compile(r"[0-9]|(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])|[-+<>()\[\]]")


def change(gold: str, rng: random.Random) -> str:
    """One character is another of its kind, but for \\commands."""
    spots = [match.start() for match in CHANGED.finditer(gold)]
    if not spots:
        return gold
    spot = rng.choice(spots)
    kind = next((kind for kind in CHANGES if gold[spot] in kind), "abcxyz")
    return gold[:spot] + rng.choice(kind.replace(gold[spot], "")) + gold[spot + 1 :]


def swap(gold: str, rng: random.Random) -> str:
    """Two digits or two letters, next to each other or not."""
    spots = [match.start() for match in CHANGED.finditer(gold) if match[0].isalnum()]
    two = [
        (a, b)
        for n, a in enumerate(spots)
        for b in spots[n + 1 :]
        if gold[a] != gold[b] and gold[a].isdigit() == gold[b].isdigit()
    ]
    if not two:
        return gold
    a, b = rng.choice(two)
    return gold[:a] + gold[b] + gold[a + 1 : b] + gold[a] + gold[b + 1 :]


def make_pairs(golds: list[str], seed: int) -> dict[tuple[str, str], str]:
    """{(gold, another text): how they were paired}; of two integers there is nothing to ask"""
    rng, pairs = random.Random(seed), {}

    def add(kind: str, a: str, b: str) -> None:
        if a != b and (b, a) not in pairs and not (a + b).isdecimal():
            pairs.setdefault((a, b), kind)

    for name, key in ORDERS.items():
        ordered = sorted(golds, key=lambda gold: (key(gold), gold))  # noqa: B023
        for a, b in zip(ordered, ordered[1:]):
            add(f"next by {name}", a, b)
    for kind, made in ("a character changed", change), ("two characters swapped", swap):
        for gold in golds:
            add(kind, gold, made(gold, rng))
    for gold in golds:
        add("at random", gold, rng.choice(golds))
    return pairs


def grade(pairs: set[tuple[str, str]], grader: Grader) -> dict[tuple[str, str], Verdict]:
    """Of each (gold answer, answer given)."""
    jobs, verdicts = sorted(pairs), []  # those of one gold after each other: it is parsed once
    with progress("graded", len(jobs)) as bar:
        for start in range(0, len(jobs), 500):
            some = jobs[start : start + 500]
            verdicts += grader.verdicts([(rf"\boxed{{{given}}}", gold) for gold, given in some])
            bar.update(len(some))
    return dict(zip(jobs, verdicts))


def show(title: str, rows: list[tuple[str, ...]]) -> None:
    """rows: (reason, text, ...)"""
    print(f"\n{title}: {len(rows)}")
    for reason, number in Counter(reason for reason, *_ in rows).most_common():
        print(f"\n  {reason}: {number}")
        for _, *texts in sorted(row for row in rows if row[0] == reason):
            print("    " + "   |   ".join(" ".join(text.split()) for text in texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="with gold answers, in a schema of docs/data.md")
    parser.add_argument("--seed", type=int, default=0, help="of the changes, and what is random")
    args = parser.parse_args()
    golds = sorted({p.answer for file in args.files for p in read_problems(file, broken=[])[0]})
    pairs = make_pairs(list({ALIKE.sub("", gold): gold for gold in golds}.values()), args.seed)
    print(f"{len(golds):,} different golds, {len(pairs):,} pairs", flush=True)
    with Grader() as grader:
        both = {*pairs, *((b, a) for a, b in pairs), *((gold, gold) for gold in golds)}
        verdicts = grade(both, grader)
    own = [(verdicts[gold, gold], gold) for gold in golds]
    refused = [(found.reason, gold) for found, gold in own if not found.right]
    show("refused as its own answer", refused)
    print("\n| pairs | n | found equal | one way only |\n|---|---|---|---|")
    equal, counts = [], {kind: Counter() for kind in pairs.values()}
    for (a, b), kind in pairs.items():
        right = [found for found in (verdicts[a, b], verdicts[b, a]) if found.right]
        counts[kind].update(n=1, both=len(right) == 2, one=len(right) == 1)
        if right:
            equal.append((right[0].reason + ", one way only" * (len(right) == 1), a, b))
    for kind, count in counts.items():
        print(f"| {kind} | {count['n']:,} | {count['both']} | {count['one']} |")
    show("found equal", equal)
    print(f"\nfailures: {dict(grader.failures) or 'none'}")


if __name__ == "__main__":
    launch(main)
