"""Is this answer right? Rule-based rewards: 1.0 for a right final answer in \\boxed{}, else 0.0.

    python verify.py RESPONSE ANSWER        # what is extracted, how it is read, right or not, why

Strict, the default: the last complete box after the thought is the answer, and it must have the
value of the gold answer. There is no tolerance: 0.333 is not 1/3, (1,2) is not {1,2}.
Lenient: the reward of the official code (math-verify reads all of the text after the thought, a box
or none, and rounds to 6 decimals), so that results can be reported under both.

What is graded was written by a model. Nothing here evaluates it as Python, and whatever parses it
runs in a worker of `Grader`: a process with little memory that is killed when it takes too long.
"""

import argparse
import logging
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, permutations
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from pool import Pool, serve

MAX_LENGTH, MAX_DEPTH = 1000, 25  # of an answer: characters, brackets in brackets
WORKER_BYTES = 2**30  # of memory


class Verdict(NamedTuple):
    right: bool
    reason: str
    failure: str | None = None  # what ended the grading: "timeout", "crash" or an exception's name


# ------------------------------------------------------------------ what the answer is
BOX = r"\\?\\(?:boxed|fbox)\s*\{"
BOX_OR_BRACE = re.compile(BOX + r"|\\.|[{}]", re.DOTALL)  # \{ is neither


def extract_answer(response: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` (or `\fbox`) after the thought, or None.

    What stands inside a thought is no answer: only text after the last `</think>` counts, if there
    is one; a response that opens a thought and never closes one has no answer. Where the prompt
    itself ends in `<think>`, put that before the response.

    >>> extract_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> extract_answer(r"<think> \boxed{1} </think> It is \boxed{2}.")
    '2'
    >>> extract_answer(r"<think> I am still thinking, maybe \boxed{1}") is None
    True
    """
    thought, closed, text = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return None
    first_box = re.search(BOX, text)
    last, opened = None, []  # (start, end) of the box that begins last; where each `{` began
    for token in BOX_OR_BRACE.finditer(text, first_box.start()) if first_box else ():
        if token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, token.start()
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append((token.end(), token[0] != "{"))
    return text[slice(*last)].strip() if last else None


# ------------------------------------------------------------------ one way to write it
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)\s*"
WORDS = (r"percent(?:age)?|pct|degrees?|dollars?|cents?|units?|inch(?:es)?|feet|miles?|yards?|"
         r"(?:kilo|centi|milli)?met(?:er|re)s?|(?:kilo)?grams?|lit(?:er|re)s?|mph|hours?|minutes?|"
         r"seconds?|days?|weeks?|months?|years?|square|cubic|per")
NO_UNITS = "and|or|[mbtr]+illion|thousand|hundred|dozen|e|i"
SYMBOLS = str.maketrans({"π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "−": "-",
                         "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "√": r"\sqrt ", "°": "",
                         "½": r"\frac{1}{2}", "²": "^2", "³": "^3", "\u200b": "", "\ufeff": ""})
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\?\$", ""),  # $...$, and \$5
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
    (r"(?<=[0-9])(?:,\\!|\\[,! ]|\{,\})\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}234 and 1\,234
    (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"(?:\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z]))(?:\s*[CF]\b)?", ""),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z_0-9.])([0-9]*\.?[0-9]+)[eE]([+-]?[0-9]+)(?!\.?[0-9]|[a-zA-Z])",
     r"\1\\times 10^{\2}"),  # 4.5e33
    (r"(?<=[0-9])\.(?![0-9])", ""),  # 3. and -1./3
    (r"(?:\\\\|[\s.])+$", ""),
    (r"\s*\\?%$", ""),  # 28\%
    (rf"(?<=[0-9a-zA-Z)}}])(?:\s*\\(?:text|textrm|mathrm|mbox)\s*\{{(?!\s*(?:{NO_UNITS})\b)"
     r"[^{}0-9]*\}\s*(?:\^\s*\{?-?[0-9]\}?)?)+$", ""),  # 3 \text{ m}^2, but not 3 \text{ million}
    (rf"(?<=[0-9])(?:\s*(?:{WORDS})\b| [kcm]m\b| ft\b| kg\b)+(?:\^\{{?[0-9]\}}?)?$", ""),  # 5 cm
    (rf"^\s*{TEXT}\{{([^{{}}]*)\}}$", r"\1"),  # \text{east}
    (r"\\frac\s*([0-9])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),  # \frac12
    (r"^([+-]?(?:[0-9]+\s+)?)([0-9]+)\s*/\s*([0-9]+)$", r"\1\\frac{\2}{\3}"),  # 1/2, 1 1/2
    (r"_([0-9A-Za-z])(?![0-9A-Za-z])", r"_{\1}"),  # a_1
    (r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", ""), (r"\s+", " ")]]


@lru_cache(maxsize=4096)  # the rollouts of a problem have one gold answer
def normal_form(answer: str) -> str:
    r"""An answer (of at most MAX_LENGTH characters) without what does not change its value.

    >>> normal_form(r"\dfrac12 \text{ cm}."), normal_form("$4.5e33$"), normal_form(r"90^\circ")
    ('\\frac{1}{2}', '4.5\\times 10^{33}', '90')
    """
    answer = answer.translate(SYMBOLS).strip()
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer


# ------------------------------------------------------------------ the same value?
ASSIGNMENT = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?=(?=[^=<>]+$)")
DECIMAL = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?<=[0-9])"
                     r"(?:(?:\\times|\\cdot|\*) ?10\^\{?([+-]?[0-9]{1,3})\}?)?")
FRACTION = re.compile(r"([+-]?)([0-9]*) ?\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}")
BASED = re.compile(r"([0-9][0-9A-F]*)_\{?([0-9]+)\}?")  # 204_5
CHOICE = re.compile(r"\(?([A-Za-z])(?:[).:]+(?!.*\b[A-Z]\b).*)?")  # C, (C), or C. and some text
TUPLE, SET = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]"), re.compile(r"\\\{.*,.*\\\}")
TOO_BIG = re.compile(r"[0-9]{400}|\^[{(]?[+-]?[0-9]{5}|[0-9]{5}!|\^[{(]?[0-9]+\^")  # to be computed


def number(text: str) -> Fraction | None:
    """The exact value of a decimal, a fraction or a mixed number in normal form."""
    if match := DECIMAL.fullmatch(text):
        return Fraction(match[1].replace(",", "")) * Fraction(10) ** int(match[2] or 0)
    match = FRACTION.fullmatch(text)
    if not match or int(match[4]) == 0 or match[2] and "-" in match[3] + match[4]:
        return None
    value = int(match[2] or 0) + Fraction(int(match[3]), int(match[4]))
    return -value if match[1] == "-" else value


def numbers(text: str) -> tuple[str, list[Fraction]]:
    """The brackets, if any, around a list of numbers, and the numbers; none if it is not one."""
    match = re.fullmatch(r"([(\[]?)([^()\[\]]*)([)\]]?)", text)
    values = [number(part) for part in match[2].split(",")] if match else [None]
    return (match[1] + match[3], values) if None not in values else ("", [])


def compare(given: str, answer: str) -> Verdict | None:
    """What can be said of two answers without a parser, which is most; else None. Microseconds."""
    if max(len(given), len(answer)) > MAX_LENGTH:
        return Verdict(given.strip() == answer.strip(), "too long to be parsed")
    in_words = re.search(TEXT, given + answer)
    given, answer = normal_form(given), normal_form(answer)
    if ("=" in given) != ("=" in answer):  # x = 5
        given, answer = ASSIGNMENT.sub("", given), ASSIGNMENT.sub("", answer)
    if not given or not answer:
        return Verdict(False, "empty")
    if given == answer:
        return Verdict(True, "same text")
    if in_words and re.fullmatch(r"[A-Za-z]{2}[A-Za-z ]*", answer):
        return Verdict(given.casefold() == answer.casefold(), "compared as words")
    (brackets, mine), (gold_brackets, gold) = numbers(given), numbers(answer)
    if mine and gold and not brackets + gold_brackets and sorted(mine) == sorted(gold):
        return Verdict(True, "the same numbers")
    if mine and gold and brackets and gold_brackets and len(gold) > 1:
        return Verdict((brackets, mine) == (gold_brackets, gold), "compared number by number")
    values = number(given), number(answer)  # 1,234 is one
    if None not in values:
        return Verdict(values[0] == values[1], "compared as numbers")
    mine, gold = BASED.fullmatch(given), BASED.fullmatch(answer)
    if mine and (gold or values[1] is not None):
        return Verdict(bool(gold) and mine.groups() == gold.groups(), "compared in their base")
    if re.fullmatch(r"\(?[A-Z]\)?", answer) and (choice := CHOICE.fullmatch(given)):
        return Verdict(choice[1].upper() == answer.strip("()"), "compared as choices")
    if any(TUPLE.fullmatch(a) and SET.fullmatch(b) for a, b in permutations((given, answer))):
        return Verdict(False, "a tuple is not a set")
    depths = accumulate((c in "([{") - (c in ")]}") for c in given + answer)
    if TOO_BIG.search(given) or TOO_BIG.search(answer) or max(depths) > MAX_DEPTH:
        return Verdict(False, "too big to be parsed")
    return None


@lru_cache(maxsize=4096)
def read(answer: str) -> list:
    """A normal form as sympy expressions, their decimals as exact fractions; or as a string."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Float, Rational

    # Not its units: they are letters, and `2x + 3t` would be `2x + 3`.
    config = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="last")
    found = parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig(normalization_config=config)],
                  parsing_timeout=None)
    return [e if isinstance(e, str) else e.xreplace({x: Rational(str(x)) for x in e.atoms(Float)})
            for e in found]


def same_value(given, answer) -> bool:
    """Of two expressions: exactly, or to 40 digits where both are irrational constants."""
    from math_verify import verify
    from sympy import Expr

    if all(isinstance(e, Expr) and e.is_number for e in (given, answer)):
        gap = (given - answer).doit()
        if gap.is_Rational:
            return gap == 0
        size = abs(gap.evalf(50))
        return bool(size.is_real and size < (1 + abs(answer)).evalf(5) * 10**-40)
    return verify(answer, given, numeric_precision=40, timeout_seconds=None, raise_on_error=True)


def parse_and_compare(given: str, answer: str, lenient: bool) -> Verdict:
    """What `compare` leaves open. It may hang or take all memory: not in the trainer's process."""
    # math-verify would warn that it has no time limit: its own is SIGALRM, for main threads only
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        if lenient:
            from math_verify import parse, verify

            right = verify(parse(f"${answer}$", parsing_timeout=None),
                           parse(given, parsing_timeout=None), timeout_seconds=None)
        else:
            right = any(same_value(a, b) for a in read(normal_form(given))
                        for b in read(normal_form(answer)))
        return Verdict(right, "compared by math-verify")
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}"[:200], type(error).__name__)


def screen(response: str, answer: str, lenient: bool) -> tuple[str | None, Verdict | None]:
    """-> (the answer given, or all that may hold it if lenient; the verdict, if that is easy)."""
    if not lenient:
        given = extract_answer(response)
        return given, (Verdict(False, "no complete box in the final answer") if given is None
                       else compare(given, answer))
    thought, *final = response.split("</think>")
    if not final and "<think>" in thought:
        return None, Verdict(False, "the thought has no end")
    return final[0] if final else response, None


def grade(response: str, answer: str, lenient: bool = False) -> float:
    r"""1.0 if the final answer of `response` is right, else 0.0. Never raises, but may not return.

    Runs in this process, without a limit: use `Grader` on text that a model wrote.

    >>> grade(r"It is \boxed{0.5}.", r"\frac{1}{2}"), grade(r"It is \boxed{0.5}.", "2")
    (1.0, 0.0)
    >>> grade("It is $0.5$.", r"\frac{1}{2}"), grade("It is $0.5$.", r"\frac{1}{2}", lenient=True)
    (0.0, 1.0)
    """
    given, verdict = screen(response, answer, lenient)
    return float((verdict or parse_and_compare(given, answer, lenient)).right)


# ------------------------------------------------------------------ many answers, safely
class Grader:
    """Grades in worker processes, so that no response can hold up or bring down the trainer.

    workers: processes; timeout: seconds for one response, after which its worker is killed and its
    reward is 0; lenient: as above. `failures` counts the responses whose grading failed, by kind:
    "timeout", "crash", or an exception's name. Any thread may use it. A context manager; or call
    `close()`.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0, lenient: bool = False):
        self.timeout, self.lenient, self.failures = timeout, lenient, Counter()
        self.pool = Pool([sys.executable, str(Path(__file__).resolve()), "--worker", str(timeout)],
                         workers, timeout)

    def __call__(self, jobs: list[tuple[str, str]]) -> list[float]:
        """[(response, answer), ...] -> [reward, ...] in the same order."""
        return [float(verdict.right) for verdict in self.verdicts(jobs)]

    def verdicts(self, jobs: list[tuple[str, str]]) -> list[Verdict]:
        screened = [(*screen(response, answer, self.lenient), answer) for response, answer in jobs]
        hard = list(dict.fromkeys(  # rollouts of a problem often agree
            (given, answer, self.lenient) for given, easy, answer in screened if not easy))
        parsed = {job: Verdict(*reply) if reply else Verdict(False, f"none: {failure}", failure)
                  for job, (reply, failure) in zip(hard, self.pool.map(hard, key=itemgetter(1)))}
        verdicts = [easy or parsed[given, answer, self.lenient] for given, easy, answer in screened]
        self.failures.update(verdict.failure for verdict in verdicts if verdict.failure)
        return verdicts

    @property
    def timeouts(self) -> int:
        return self.failures["timeout"]

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("response", help="what a model wrote")
    parser.add_argument("answer", help="the gold answer")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds [5]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--strict", action="store_true", help="only a box counts: the default")
    mode.add_argument("--lenient", action="store_true", help="as the reward of the official code")
    args = parser.parse_args()
    with Grader(1, args.timeout, args.lenient) as grader:
        grader.verdicts([(r"\boxed{x+1}", "1+x")])  # the worker's start is not what is timed
        start = time.perf_counter()
        [verdict] = grader.verdicts([(args.response, args.answer)])
        seconds = time.perf_counter() - start
    given, _ = screen(args.response, args.answer, args.lenient)
    for name, value in {
        "extracted": given, "read as": given and normal_form(given[:MAX_LENGTH]),
        "gold answer": args.answer, "gold read as": normal_form(args.answer[:MAX_LENGTH]),
        "verdict": f"{'right' if verdict.right else 'wrong'}, reward {float(verdict.right)}",
        "reason": verdict.reason, "time": f"{1000 * seconds:.3f} ms",
    }.items():
        if not (args.lenient and "read" in name):  # by math-verify, then
            print(f"{name:13} {value}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        parse_and_compare("x+1", "1+x", lenient=False)  # imports
        serve(parse_and_compare, float(sys.argv[2]), WORKER_BYTES)
    else:
        main()
