r"""The verifier against math-verify alone: time on realistic responses, accuracy on labelled cases.

    python benchmarks/grading.py                       # time, four minutes
    python benchmarks/grading.py CASES.jsonl ...       # accuracy, one table
    python benchmarks/grading.py CASES.jsonl --list    # and each case that one of them misjudges

Time: 1,024 responses of 2,000 tokens on average to 128 problems; a quarter is right, a quarter
boxes a wrong answer, a quarter has its answer in the text, a quarter is cut off. They come plain,
and with all but the last 300 tokens in a thought. math-verify is called as the official reward
does, on what follows the thought, one response after the other.

Cases are JSON lines with `gold`, `prediction`, `expected` (true, false, or null for "any verdict,
but quickly"); the table has rows for each `tier`, and for cases marked `policy` (a matter of
choice).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from machinery.printing import print_what_can_be
from verify import Grader, Verdict

TIMEOUT, PATIENCE = 2.0, 12.0  # seconds: of our workers; what counts as hung in math-verify


# ------------------------------------------------------------------ math-verify alone
class Alone:
    """math-verify with its own time limits, in the main thread of a process, watched from here."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--alone"],
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.process.stdout.readline()  # imported

    def verdict(self, text: str, gold: str) -> Verdict:
        self.process.stdin.write(json.dumps([text, gold]) + "\n")
        if wait([self.process.stdout], PATIENCE) and (line := self.process.stdout.readline()):
            return Verdict(json.loads(line), "math-verify")
        self.process.kill()
        self.start()
        return Verdict(False, "hung, or died", "hang")


def alone() -> None:
    import logging

    from math_verify import parse, verify

    logging.disable()
    verify(parse("$x$"), parse("$x+1$"))
    print("ready", flush=True)
    for line in sys.stdin:
        text, gold = json.loads(line)
        try:
            right = verify(parse(f"${gold}$"), parse(text))
        except Exception:
            right = False
        print(json.dumps(bool(right)), flush=True)


def after_thought(response: str) -> str:
    return response.partition("</think>")[2] if "<think>" in response else response


# ------------------------------------------------------------------ time
def answers(rng: random.Random) -> tuple[str, str, str]:
    """(gold answer, another way to write it, a wrong one)"""
    a, b, c = rng.randint(2, 40), rng.randint(2, 40), rng.choice([2, 3, 5, 7])
    kinds = [(str(a * b), f"{a * b}", f"{a * b + 1}")] * 10
    kinds += [
        (
            rf"\frac{{{a}}}{{{a + c}}}",
            rf"\dfrac{{{2 * a}}}{{{2 * a + 2 * c}}}",
            rf"\frac{{{a + 1}}}{{{a + c}}}",
        )
    ] * 4
    kinds += [
        (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c}}}", rf"{a}\sqrt{{{c + 1}}}"),
        (rf"\frac{{{a}\pi}}{{{c}}}", rf"\frac{{{a}}}{{{c}}}\pi", rf"\frac{{{b}\pi}}{{41}}"),
        (f"x^2+{a}x+{b}", f"{b} + {a}x + x^2", f"x^2+{a}x-{b}"),
        (f"({a},{b})", f"({a}, {b})", f"({b + 41},{a})"),
        (f"[{-a},{b})", rf"\left[-{a}, {b}\right)", f"[{-a},{b}]"),
        (f"{a}, {b + 41}", f"{b + 41},{a}", f"{a}, {b + 42}"),
    ]
    return rng.choice(kinds)


def reasoning(rng: random.Random, tokens: int) -> str:
    """Sentences of the kind that models write; 4 characters a token."""
    lines, length = [], 0
    while length < 4 * tokens:
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        sentences = [
            rf"Let $x = {a}$ and $y = \frac{{{b}}}{{{c}}}$, so $xy = \frac{{{a * b}}}{{{c}}}$.",
            f"First, we note that {a} + {b} = {a + b}, which is more than {c}.",
            rf"\[\sum_{{k=1}}^{{{a}}} (k^2 + {b}k) = {c} + \sqrt{{{a}}} \cdot {b}.\]",
            "Wait, let me check that again, because the sign in the second equation looks wrong.",
            f"Substituting gives ${a}x^2 - {b}x + {c} = 0$, and then by the quadratic formula "
            rf"$x = \frac{{{b} \pm \sqrt{{{b * b}-{4 * a * c}}}}}{{{2 * a}}}$.",
            f"So the answer might be {a}, but the condition says it is at most {b}.",
            rf"Therefore \(f({a}) = {b}\), and the ratio is ${a}:{b}$, or about {a / b:.3f}.",
        ]
        lines.append(rng.choice(sentences))
        length += len(lines[-1]) + 1
    return "\n".join(lines)


def responses(with_thought: bool, problems: int = 128, seed: int = 0) -> list[tuple[str, str]]:
    rng, jobs = random.Random(seed), []
    for _ in range(problems):
        gold, same, wrong = answers(rng)
        for i in range(8):
            text = reasoning(rng, rng.randint(500, 3500) - 300 * with_thought)
            close = reasoning(rng, 300) if with_thought else ""
            end = [
                "",
                f"So the answer is ${same}$.",
                f"The answer is $\\boxed{{{wrong}}}$.",
                f"The answer is $\\boxed{{{same}}}$.",
            ][i % 4]
            if with_thought:
                text = f"<think>\n{text}" + (f"\n</think>\n\n{close}" if i % 4 else "")
            jobs.append((f"{text}\n\n{end}", gold))
    return jobs


def measure_time(pairs: int) -> None:
    print(
        "| 1,024 responses | math-verify, s | verify.py with 2 workers, s | ratio | range | "
        "right: math-verify, verify.py |\n|---|---|---|---|---|---|"
    )
    for with_thought in (False, True):
        peer, times = Alone(), []
        with Grader(workers=2, timeout=TIMEOUT) as grader:
            for pair in range(pairs + 1):  # the first, to warm both up, is not timed
                jobs = responses(with_thought, seed=pair)
                start = time.perf_counter()
                theirs = [
                    peer.verdict(after_thought(text), gold).right
                    for text, gold in tqdm(jobs, leave=False)
                ]
                middle = time.perf_counter()
                ours = grader(jobs)
                times.append((middle - start, time.perf_counter() - middle))
            del times[0]
        peer.process.kill()
        ratios = sorted(b / a for a, b in times)
        slow, fast = (statistics.median(column) for column in zip(*times))
        print(
            f"| {'with a thought' if with_thought else 'plain'} | {slow:.1f} | {fast:.2f} | "
            f"{statistics.median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} | "
            f"{sum(theirs)}, {sum(ours):.0f} |",
            flush=True,
        )
    integers = [(rf"so it is $\boxed{{{i}}}$", str(i % 7)) for i in range(2000)]
    with Grader(workers=2) as grader:
        seconds = []
        for job in integers:
            start = time.perf_counter()
            grader([job])
            seconds.append(time.perf_counter() - start)
    print(f"\nan integer answer: median {1e6 * statistics.median(seconds):.0f} µs")


# ------------------------------------------------------------------ accuracy
def load(path: Path) -> list[dict]:
    """Cases; a prediction may be given as [prefix, unit, repetitions, suffix]."""
    cases = [json.loads(line) for line in path.open(encoding="utf-8")]
    for case in cases:
        for key in ("prediction_repeat", "prediction_repeat_close"):
            *prefix, unit, n, suffix = case.get(key) or ("", 0, "")
            case["prediction"] = case.get("prediction", "") + "".join(prefix) + unit * n + suffix
        tier = case.get("tier", "policy" if case.get("policy") else "")
        case["tier"] = f"{path.stem} {tier}".strip()
    return cases


def grade_all(cases: list[dict], name: str, verdict: Callable) -> list[tuple[Verdict, float]]:
    """Verdicts and milliseconds, one case after the other."""
    graded = []
    for case in tqdm(cases, desc=name, leave=False):
        start = time.perf_counter()
        found = verdict(case["prediction"], case["gold"])
        graded.append((found, 1000 * (time.perf_counter() - start)))
    return graded


def measure_accuracy(paths: list[Path], listed: bool) -> None:
    cases, peer = [case for path in paths for case in load(path)], Alone()
    graded = {"math-verify": grade_all(cases, "math-verify", peer.verdict)}
    peer.process.kill()
    for name, lenient in {"verify.py": False, "verify.py --lenient": True}.items():
        with Grader(workers=1, timeout=TIMEOUT, lenient=lenient) as grader:
            grader([(rf"\boxed{{x+{i}}}", "1+x") for i in range(8)])  # all workers have started
            one = partial(lambda grader, *job: grader.verdicts([job])[0], grader)
            graded[name] = grade_all(cases, name, one)
    print(
        "| cases | grader | n | accuracy | false pos. / neg. | mean / p99 / max ms | > 5 s | "
        "failures |\n|---|---|---|---|---|---|---|---|"
    )
    for tier in dict.fromkeys(case["tier"] for case in cases):
        for name, results in graded.items():
            here = [
                (case["expected"], *result)
                for case, result in zip(cases, results)
                if case["tier"] == tier
            ]
            wrong = Counter(found.right for label, found, _ in here if label is (not found.right))
            n = sum(label is not None for label, _, _ in here)
            ms = sorted(time for _, _, time in here)
            failures = Counter(found.failure for _, found, _ in here if found.failure)
            print(
                f"| {tier} | {name} | {n} | {f'{1 - wrong.total() / n:.3f}' if n else '-'} "
                f"| {wrong[True]} / {wrong[False]} "
                f"| {statistics.mean(ms):.1f} / {ms[int(0.99 * len(ms))]:.0f} / {ms[-1]:.0f} "
                f"| {sum(t > 5000 for t in ms)} "
                f"| {', '.join(f'{count} {kind}' for kind, count in failures.items())} |"
            )
    if listed:
        list_misjudged(cases, graded["math-verify"], graded["verify.py"])


def list_misjudged(cases: list[dict], theirs: list, ours: list) -> None:
    print(
        "\n| cases | kind | gold | prediction | expected | math-verify | verify.py | its reason |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for case, (their, _), (our, _) in zip(cases, theirs, ours):
        if case["expected"] in {not their.right, not our.right}:
            gold, prediction, reason = (
                " ".join(text.split()).replace("|", r"\|")
                for text in (case["gold"][:60], case["prediction"][-80:], our.reason)
            )
            kind = case.get("kind", case.get("category", case.get("source")))
            print(
                f"| {case['tier']} | {kind} | `{gold}` | `{prediction}` | {case['expected']} "
                f"| {their.right} | {our.right} | {reason} |"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", type=Path, help="files of labelled cases")
    parser.add_argument("--pairs", type=int, default=3, help="of timed runs [3]")
    parser.add_argument("--list", action="store_true", help="the cases that one misjudges, too")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    print_what_can_be()  # an answer may hold half a character
    args = parser.parse_args()
    if args.alone:
        alone()
    elif args.cases:
        measure_accuracy(args.cases, args.list)
    else:
        measure_time(args.pairs)
