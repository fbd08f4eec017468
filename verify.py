"""Is this answer right? Rule-based rewards: 1.0 for a right final answer in \\boxed{}, else 0.0.

    python verify.py RESPONSE ANSWER        # what is extracted, how it is read, right or not, why

Strict, the default: the last complete box after the thought is the answer, and it must have the
value of the gold answer. Numbers are compared exactly, 0.333 is not 1/3, and irrational constants
to 40 digits. A base may be left out, not be wrong; of units nothing is asked.
Lenient: the official code's reward: math-verify reads from the first </think> to the second (its
version 3), or all if no thought is opened (version 4), a box or none, and rounds to 6 decimals.

What is graded was written by a model. Nothing here evaluates it as Python. Regular expressions
run here, on at most MAX_LENGTH characters, and none of them may backtrack for long; parsers run in
a worker of `Grader`: a process with little memory that is killed when it takes too long.
"""

import argparse
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate, permutations
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from machinery.files import print_what_can_be
from machinery.pool import Pool, serve
from machinery.reward import Reward, Rewards, version

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
    last: tuple[int, int] | None = None  # (start, end) of the box that begins last
    opened: list[tuple[int, bool]] = []  # where each `{` began, and is it of a box?
    for token in BOX_OR_BRACE.finditer(text, first_box.start()) if first_box else ():
        # one pass: a search for each box's end would be quadratic, in the trainer's process
        if token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, token.start()
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append((token.end(), token[0] != "{"))
    return text[slice(*last)].strip() if last else None


# ------------------------------------------------------------------ one way to write it
# fmt: off
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|boldsymbol|bm|operatorname|mbox)\s*"
WORDS = (r"percent(?:age)?|pct|degrees?|dollars?|cents?|units?|inch(?:es)?|feet|miles?|yards?|"
         r"(?:kilo|centi|milli)?met(?:er|re)s?|(?:kilo)?grams?|lit(?:er|re)s?|mph|hours?|minutes?|"
         r"seconds?|days?|weeks?|months?|years?|square|cubic|per")
NO_UNITS = (r"and|or|not|nor|to|half|halves|thirds?|fourths?|quarters?|fifths?|squared|cubed|plus|"
            r"minus|times|over|point|dozen|hundred|thousand|lakh|crore|[mbtr]+illion")
UNIT = r"(?:[a-zA-Z]{2,}|[msghLNJWVAKCF])(?:\^-?[0-9])?"
SYMBOLS = str.maketrans({"π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "−": "-",
                         "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": "", "½": r"\frac{1}{2}",
                         "²": "^2", "³": "^3", "\u200b": "", "\ufeff": ""})
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\?\$", ""),  # $...$, and \$5
    (r"√\s*([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"), (r"√", r"\\sqrt "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
    (r"\\\\\[[^\]]*\]", r"\\\\"),  # the next row of a matrix, after some space
    (r"(?<=[0-9])(?:,\\!|\\[,! ]|\{,\})\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}234 and 1\,234
    (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"(?:\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z]))(?:\s*[CF]\b)?", ""),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"np\.(?=[a-z])", r"\\"), (r"^\s*\\approx", ""),  # np.arcsin: a gold answer of Minerva
    (r"(?<![\\a-zA-Z_0-9.])([0-9]*\.?[0-9]+)[eE]([+-]?[0-9]+)(?!\.?[0-9]|[a-zA-Z])",
     r"\1\\times 10^{\2}"),  # 4.5e33
    (r"(?<=[0-9])\.(?=$|[\s/,)}]|\\text|\\mathrm)", ""),  # 3. and -1./3
    (r"(?:\\\\|\s|(?<!\.)\.)+$", ""),
    (r"\s*\\?%$", ""),  # 28\%
    (rf"(?<=[0-9a-zA-Z)}}])(?:\s*\\(?:text|textrm|mathrm|mbox)\{{\s*(?![^{{}}]*\b(?:{NO_UNITS})\b)"
     rf"{UNIT}(?:[\s./]+{UNIT})*[\s.]*\}}(?:\^\{{?-?[0-9]\}}?)?)+$", ""),  # 3 \text{ m}^2
    (rf"(?<=[0-9])(?:\s*(?:{WORDS})\b| (?:[kcm]m|ft|kg|k?m/[hs]|[kMG]?Hz)\b)+"
     r"(?:\^\{?[0-9]\}?)?$", ""),  # 3 cm, 3 percent
    (r",?\s*(?:\\text\{,?\s*(?:and|or)\s*\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]))", ","),
    (rf"^\s*{TEXT}\{{([^{{}}]*)\}}$", r"\1"),  # \text{east}
    (r"\\frac\s*([0-9a-zA-Z]|\\(?!frac)[a-zA-Z]+)", r"\\frac{\1}"),  # \frac12, \frac\pi6
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z]|\\(?!frac)[a-zA-Z]+)", r"\1{\2}"),
    (r"^([+-]?(?:[0-9]+\s+)?)([0-9]+)\s*/\s*([0-9]+)$", r"\1\\frac{\2}{\3}"),  # 1/2, 1 1/2
    (r"_([0-9A-Za-z])(?![0-9A-Za-z])", r"_{\1}"),  # a_1
    (r"\s+", " "),
    (r"(?<![0-9A-Za-z]) (?!(?<=[0-9], )[0-9]{3}(?![0-9]))| (?![0-9A-Za-z])", ""),  # not 100, 200
]]
# fmt: on


@lru_cache(maxsize=4096)  # the rollouts of a problem have one gold answer
def normal_form(answer: str) -> str:
    r"""An answer (of at most MAX_LENGTH characters) without what does not change its value.

    >>> normal_form(r"\dfrac12 \text{ cm}."), normal_form("$4.5e33$"), normal_form(r"90^\circ")
    ('\\frac{1}{2}', '4.5\\times 10^{33}', '90')
    """
    answer = answer.translate(SYMBOLS).strip()
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer.strip()


# ------------------------------------------------------------------ the same value?
# fmt: off
NAME = r"(?:[a-zA-Z]|\\(?!not)[a-zA-Z]+)(?:_\{[^{}]*\})?(?:\([a-z]\))?"  # x, \theta, x_{1}, f(x)
ASSIGNMENT = re.compile(rf"(?:^|(?<=,))\(?{NAME}(?:,{NAME})*\)?=(?!=)")
DECIMAL = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?<=[0-9])"
                     r"(?:(?:\\times|\\cdot|\*) ?10\^\{?([+-]?[0-9]{1,3})\}?)?")
REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
FRACTION = re.compile(r"([+-]?)([0-9]*) ?\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}")
SEQUENCE = re.compile(r"([(\[]?)([^()\[\]]*)([)\]]?)")
BASED = re.compile(r"\(?([0-9][0-9A-F]*)\)?_\{?([0-9]+)\}?")  # 204_5
CHOICE = re.compile(  # C, (C), or C. and its text, in which no letter stands alone but in "a word"
    r"(?:option |choice )?\(?([A-Z])(?:[).:-]+(?!.*\b[A-Z]\b(?! [a-z]{2})).*)?", re.IGNORECASE)
TUPLE, SET = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]"), re.compile(r"\\\{.*,.*\\\}")
UNREAD = re.compile(r"'|\^\{?T|\\approx|\\p?mod|\\[lc]?dots|\.\.|[0-9] [0-9]")  # is ignored
TOO_BIG = re.compile(r"[0-9]{400}|\^[{(]?[+-]?[0-9]{5}|[0-9]{5}!|\^[{(]?[0-9]+\^")  # to be computed
# fmt: on


def number(text: str) -> Fraction | None:
    """The exact value of a decimal, a fraction or a mixed number in normal form."""
    if match := DECIMAL.fullmatch(text):
        return Fraction(match[1].replace(",", "")) * Fraction(10) ** int(match[2] or 0)
    if match := REPEATING.fullmatch(text):
        sign, whole, start, cycle = match.groups()
        value = Fraction(
            int(whole + start + cycle) - int(whole + start or 0),
            10 ** len(start) * (10 ** len(cycle) - 1),
        )
    elif match := FRACTION.fullmatch(text):
        sign, whole, top, bottom = match.groups()
        if int(bottom) == 0 or whole and "-" in top + bottom:
            return None
        value = int(whole or 0) + Fraction(int(top), int(bottom))
    else:
        return None
    return -value if sign == "-" else value


def sequence(text: str) -> tuple[str, list[Fraction]] | None:
    """The brackets, if any, around two or more numbers with commas between; and the numbers."""
    if match := SEQUENCE.fullmatch(text):
        parts = [number(part.strip()) for part in match[2].split(",")]
        values = [value for value in parts if value is not None]
        if len(values) == len(parts) > 1 and bool(match[1]) == bool(match[3]):
            return match[1] + match[3], values
    return None


def compare(given: str, answer: str) -> Verdict | None:
    """What can be said of two answers without a parser, which is most; else None. Microseconds."""
    if max(len(given), len(answer)) > MAX_LENGTH:
        return Verdict(given.strip() == answer.strip(), "too long to be parsed")
    in_words = re.search(TEXT, given + answer)
    given, answer = normal_form(given), normal_form(answer)
    if not given or not answer:
        return Verdict(False, "empty")
    if given == answer:
        return Verdict(True, "same text")
    if "=" in given and "=" not in answer:  # x = 5
        given = ASSIGNMENT.sub("", given)
        if "=" in given:
            return Verdict(False, "an equation, not a value")
    elif "=" in answer and "=" not in given:
        answer = ASSIGNMENT.sub("", answer)
    if in_words and re.fullmatch(r"[A-Za-z]{2}[A-Za-z ]*", answer):
        return Verdict(given.casefold() == answer.casefold(), "compared as words")
    mine, gold = number(given), number(answer)
    if mine is not None and gold is not None:
        return Verdict(mine == gold, "compared as numbers")
    if (listed := sequence(given)) and (expected := sequence(answer)):
        (brackets, numbers), (gold_brackets, gold_numbers) = listed, expected
        if not brackets + gold_brackets and mine is gold is None:  # 1,234 may be one number
            return Verdict(sorted(numbers) == sorted(gold_numbers), "compared as sets of numbers")
        same_kind = brackets == gold_brackets or not brackets or not gold_brackets
        return Verdict(same_kind and numbers == gold_numbers, "compared number by number")
    if based := BASED.fullmatch(given):
        if (gold_based := BASED.fullmatch(answer)) or gold is not None:
            same = gold_based is not None and based.groups() == gold_based.groups()
            return Verdict(same, "compared in their base")
    if re.fullmatch(r"\(?[A-J]\)?", answer):
        if choice := CHOICE.fullmatch(re.sub(TEXT + r"\{([^{}]*)\}", r"\1", given)):
            return Verdict(choice[1].upper() == answer.strip("()"), "compared as choices")
    if any(TUPLE.fullmatch(a) and SET.fullmatch(b) for a, b in permutations((given, answer))):
        return Verdict(False, "a tuple is not a set")
    if (found := UNREAD.search(given)) and found[0] not in answer:
        return Verdict(False, f"cannot be read: {found[0]}")
    depths = accumulate((c in "([{") - (c in ")]}") for c in given + answer)
    if TOO_BIG.search(given) or TOO_BIG.search(answer) or max(depths) > MAX_DEPTH:
        return Verdict(False, "too big to be parsed")
    return None


@lru_cache(maxsize=4096)
def read(answer: str) -> Any:
    """A normal form as a sympy expression, its decimals as exact fractions; None if it is none.

    Not by math_verify.parse, which looks for anything in the text that can be read, takes letters
    at its end for units (2x + 3t is then 2x + 3) and X for x.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Float, Rational

    text = normalize_latex(answer, NormalizationConfig(malformed_operators=True, boxed="none"))
    try:
        found = latex2sympy(
            text,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # its parser has a dozen kinds
        return None
    return found.xreplace({x: Rational(str(x)) for x in found.atoms(Float)})


def same_value(given: Any, answer: Any) -> bool:
    """Of two expressions: exactly, or to 40 digits where both are irrational constants."""
    from math_verify import verify
    from sympy import Expr

    if all(isinstance(e, Expr) and e.is_number for e in (given, answer)):
        gap = (given - answer).doit()
        if gap.is_Rational:
            return gap == 0
        size = abs(gap.evalf(50))
        return bool(size.is_real and (size == 0 or size < abs(answer).evalf(5) * 10**-40))
    return verify(
        answer,
        given,
        numeric_precision=40,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def parse_and_compare(given: str, answer: str, lenient: bool) -> Verdict:
    """What `compare` leaves open. It may hang or take all memory: not in the trainer's process."""
    # math-verify would warn that it has no time limit: its own is SIGALRM, for main threads only
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        if lenient:
            from math_verify import parse, verify

            right = verify(
                parse(f"${answer}$", parsing_timeout=None),
                parse(given, parsing_timeout=None),
                timeout_seconds=None,
            )
        else:
            mine, gold = read(normal_form(given)), read(normal_form(answer))
            if mine is None or gold is None:
                return Verdict(False, "cannot be read as mathematics")
            right = same_value(mine, gold)
        return Verdict(right, "compared by math-verify")
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}"[:200], type(error).__name__)


def screen(response: str, answer: str, lenient: bool) -> tuple[str | None, Verdict | None]:
    """-> (the answer given, or all that may hold it if lenient; the verdict, if that is easy)."""
    if not lenient:
        given = extract_answer(response)
        return given, (
            Verdict(False, "no complete box in the final answer")
            if given is None
            else compare(given, answer)
        )
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
    return float((verdict or parse_and_compare(given or "", answer, lenient)).right)


# ------------------------------------------------------------------ many answers, safely
class Grader:
    """Grades in worker processes, so that no response can hold up or bring down the trainer.

    workers: processes; timeout: seconds for one response, after which its worker is killed and its
    reward is 0; lenient: as above. `failures` counts the responses whose grading failed, by kind:
    "timeout", "crash", or an exception's name. Any thread may use it. A context manager; or call
    `close()`.

    reward: FILE.py:function, from (response, answer) to a number, for `right_and_reward`; it has
    workers of its own under the same rules. Raises InputError if there is no such function.
    """

    def __init__(
        self, workers: int = 2, timeout: float = 5.0, lenient: bool = False, reward: str = ""
    ):
        self.lenient = lenient
        self.failures: Counter[str] = Counter()
        program = [sys.executable, str(Path(__file__).resolve())]
        self.pool = Pool([*program, "--worker", str(timeout)], workers, timeout)
        self.rewards = Rewards(program, workers, timeout, reward) if reward else None
        self.rule = [lenient, reward, version(reward)]  # other rewards come of another one

    def __call__(self, jobs: list[tuple[str, str]], lenient: bool | None = None) -> list[float]:
        """[(response, answer), ...] -> [reward, ...] in the same order. lenient: or as created."""
        return [float(verdict.right) for verdict in self.verdicts(jobs, lenient)]

    def verdicts(self, jobs: list[tuple[str, str]], lenient: bool | None = None) -> list[Verdict]:
        lenient = self.lenient if lenient is None else lenient
        screened = [(*screen(response, answer, lenient), answer) for response, answer in jobs]
        hard = list(
            dict.fromkeys(  # rollouts of a problem often agree
                (given, answer, lenient) for given, easy, answer in screened if not easy
            )
        )
        parsed = {
            job: Verdict(*reply) if reply else Verdict(False, f"none: {failure}", failure)
            for job, (reply, failure) in zip(hard, self.pool.map(hard, key=itemgetter(1)))
        }
        verdicts = [easy or parsed[given, answer, lenient] for given, easy, answer in screened]
        self.failures.update(verdict.failure for verdict in verdicts if verdict.failure)
        return verdicts

    def right_and_reward(self, jobs: list[tuple[str, str]]) -> list[tuple[float, float]]:
        """-> [(1.0 if right else 0.0, reward), ...], which are equal but for a reward function.

        Raises InputError if the function raises an exception or returns no finite number. Where it
        takes too long or its worker dies, the reward is 0; `failures` has "reward_timeout", ...
        """
        right = self(jobs)
        if not self.rewards:
            return list(zip(right, right))
        rewards, failures = self.rewards(jobs)
        self.failures.update(failures)
        return list(zip(right, rewards))

    def unread(self, golds: list[str]) -> list[bool]:
        """Which no parser reads? Beside their own text, only `compare`'s rules find one right."""
        plain = [ASSIGNMENT.sub("", normal_form(gold[:MAX_LENGTH])) for gold in golds]
        rules = number, sequence, BASED.fullmatch
        hard = [text for text in plain if all(rule(text) is None for rule in rules)]
        replies = self.pool.map([(text, text, False) for text in hard], key=itemgetter(0))
        bad = {text for text, (reply, _) in zip(hard, replies) if not (reply and reply[0])}
        return [text in bad for text in plain]

    def close(self) -> None:
        self.pool.close()
        if self.rewards:
            self.rewards.pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_parser() -> Callable:
    parse_and_compare("x+1", "1+x", lenient=False)  # imports
    return parse_and_compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("response", help="what a model wrote")
    parser.add_argument("answer", help="the gold answer")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds [5]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--strict", action="store_true", help="only a box counts: the default")
    mode.add_argument("--lenient", action="store_true", help="as the reward of the official code")
    args = parser.parse_args()
    print_what_can_be()
    with Grader(1, args.timeout, args.lenient) as grader:
        grader.verdicts([(r"\boxed{x+1}", "1+x")])  # the worker's start is not what is timed
        start = time.perf_counter()
        [verdict] = grader.verdicts([(args.response, args.answer)])
        seconds = time.perf_counter() - start
    given, _ = screen(args.response, args.answer, args.lenient)
    for name, value in {
        "extracted": given,
        "read as": given and normal_form(given[:MAX_LENGTH]),
        "gold answer": args.answer,
        "gold read as": normal_form(args.answer[:MAX_LENGTH]),
        "verdict": f"{'right' if verdict.right else 'wrong'}, reward {float(verdict.right)}",
        "reason": verdict.reason,
        "time": f"{1000 * seconds:.3f} ms",
    }.items():
        if not (args.lenient and "read" in name):  # by math-verify, then
            print(f"{name:13} {value}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(load_parser, float(sys.argv[2]), WORKER_BYTES)
    elif sys.argv[1:2] == ["--reward"]:
        serve(partial(Reward, sys.argv[2]), float(sys.argv[3]), WORKER_BYTES)
    else:
        main()
