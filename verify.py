"""Is this answer right? Rule-based rewards: 1.0 for a right final answer in \\boxed{}, else 0.0.

    python verify.py RESPONSE ANSWER        # what is extracted, how it is read, right or not, why

Strict, the default: the last complete box after the thought is the answer, and it must have the
value of the gold answer. Numbers are compared exactly, 0.333 is not 1/3, and irrational constants
to 40 digits. A computation (15+14 for 29) is no answer: it can be copied from the problem. A base
may be left out, not be wrong; of units nothing is asked.
Lenient: the official code's reward: math-verify reads from the first </think> to the second (its
version 3), or all if no thought is opened (version 4), a box or none, and rounds to 6 decimals.

What is graded was written by a model. Nothing here evaluates it as Python. Regular expressions
run here, on at most MAX_LENGTH characters, and none of them may backtrack for long; parsers run in
a worker of `Grader`: a process with little memory that is killed when it takes too long.
"""

import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from itertools import accumulate, permutations
from math import gcd
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from machinery.arguments import Parser, ranged
from machinery.notation import NAME, POWER, TRIG, form, normal_form, number, split, unlabelled
from machinery.pool import Pool, serve
from machinery.printing import print_what_can_be
from machinery.reward import Reward, Rewards, version

MAX_LENGTH, MAX_DEPTH = 1000, 8  # of an answer: characters, brackets in brackets
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


# ------------------------------------------------------------------ the same value?
# fmt: off
WORD = re.compile(r"[a-zA-Z]{2}[a-zA-Z ]*(?: [0-9]+[a-z]*)?")  # Friday the 13th
ARTICLE = re.compile(r"\b(?:the|an?|on|in|at) |(?<=[a-z]{3})s\b| ")
INNER = re.compile(r"\\text\{([^{}]*)\}")
WRAPPED = re.compile(r"(?:\{|\\\{(?!.*,))([^{}]*?)\\?\}|[(\[]([^()\[\],]*)[)\]]|\|([0-9.]+)\|")
BASE = re.compile(r"(?<=[0-9A-F])_\{?(?:\\text\{)?(?:base)?[ }]*(\w+)")  # 204_5, 204_{\text{five}}
LETTER = re.compile(r"([A-J])|\(([A-J])\)(?![-+*/^_,(]).*")  # C, or (C) and its text
CHOICE = re.compile(  # C, (C), or C. and its text, in which no letter stands alone but in "a word"
    r"(?:option |choice )?\(?([A-Z])(?:[).:-]+(?! ?[-+*/^_,(]|.*\b[A-J]\b(?! [a-z]{2})).*)?", re.I)
COUNTED = re.compile(r"([0-9]+)\s*\\(?:text|mathrm)\{([^{}]*)\}")  # 3 \text{ red}
APPROXIMATELY = re.compile(r"\\approx ?([0-9]*\.?([0-9]*))$")
OPERATIONS = [re.compile(rf"(?<![a-zA-Z])(?:{names})(?![a-zA-Z])") for names in [
    r"binom|choose|[CP](?=_\{?[0-9]|\([0-9]))|(?:!", TRIG, r"log|ln|lg", r"gcd|lcm",
    r"[lr]?(?:floor|ceil)", r"[bp]?mod", r"sum", r"prod", r"i*int", r"lim", r"det|vmatrix",
    r"max|min|sup|inf", r"i(?=\^)", r"Gamma", r"begin.*begin", r"end\{[a-z]*\}\^"]]
ADJACENT = re.compile(  # factors: the parser would add integers, or take them for a mixed number
    r"(?<=[0-9)])(?<![a-z]\^[0-9])(?=\()|(?<=\))(?=[0-9]|\\frac|\\binom)|"
    r"(?<=[0-9}])(?=\\binom)|(?<=(?<![a-zA-Z\\])[a-eij-oq-z])(?=\((?![a-z]\)))")
UNREAD = re.compile(r"'|\|_|\^\{?T|\\approx|\\p?mod|\\[lc]?dots|\.\.|[0-9] [0-9]")  # is ignored
NAMES = "two three four five six seven eight nine ten".split()  # of bases
TOO_BIG = re.compile(  # to be computed: x^12345, 12345!, 9!!, 9^9^x, a^b^c^d
    r"[0-9]{400}|[a-zA-Z]{40}|\^[{(]*[+-]?[0-9]{5}|[0-9]{5}!|!!|\^[{(]?[0-9]+\^|(?:\^[{(]*\w+){4}")
# fmt: on


def same_number_or_word(given: str, answer: str) -> bool | None:
    """Two values without a parser. Where the gold is a number, a computation is no answer."""
    while match := WRAPPED.fullmatch(given):
        given = match[match.lastindex or 0]
    gold = number(answer)
    if gold is not None:
        computed = "frac" in given and "frac" not in answer and gold.denominator == 1  # 50/2
        computed &= not given.endswith(("{1}", "{-1}"))  # but 5/1
        # 10^2, but 10^6 for a million; 10*10^2
        computed |= bool(POWER.fullmatch(given)) and "10^" not in answer and 1 <= gold < 10**4
        computed |= bool(re.match(r"10+(?:\\times|\\cdot|\*)", given))
        return number(given) == gold and not computed
    mine, gold_word = (INNER.sub(r"\1", text) for text in (given, answer))
    if WORD.fullmatch(gold_word) and (WORD.fullmatch(mine) or len(gold_word) > 3):
        return as_word(mine) == as_word(gold_word)
    return None


def as_word(text: str) -> str:
    """Case, articles and the s of a plural are no matter, but in a word of two letters, as AB."""
    return ARTICLE.sub("", text.casefold()) if len(text) > 2 or text in ("No", "NO") else text


def same_parts(given: str, answer: str, same: Callable[[str, str], bool | None]) -> bool | None:
    """Two answers of one form whose parts are the same; None if `same` leaves one of them open."""
    (kind, parts, name), (gold_kind, golds, gold_name) = form(given), form(answer)
    if len(parts) == len(golds) == 1:  # {5} is 5
        return same(parts[0], golds[0])
    if "" in (kind, gold_kind):
        listed = parts if kind else golds
        several = "," in (kind, gold_kind) and number(answer if gold_kind else given) is None
        several |= ":" in (kind, gold_kind) and (len(listed) > 2 or is_time(listed))
        return False if several else same(given, answer)
    kinds = {kind, gold_kind}
    if len(kinds) > 1:  # brackets may be left out, but not those of an interval
        is_interval = name or gold_name or any("infty" in part for part in parts + golds)
        if is_interval or "," not in kinds or not kinds <= {",", "()", "{}"}:
            return False
    if name and gold_name and name != gold_name or len(parts) != len(golds):
        return False
    ordered = re.search(r"dots|\.\.", answer) or number(given) is not number(answer)  # 1,234 is one
    if kinds <= {",", "{}", r"\cup"} and not ordered:
        return same_set(parts, golds, same)
    if kind == ":":
        return same_ratio(parts, golds, same)
    return all_same(list(zip(parts, golds)), same)


def all_same(pairs: list[tuple[str, str]], same: Callable) -> bool | None:
    """In this order."""
    found = [same_parts(part, gold, same) for part, gold in pairs]
    return False if False in found else None if None in found else True


def same_set(parts: list[str], golds: list[str], same: Callable) -> bool | None:
    """In any order."""
    left = list((Counter(parts) - Counter(golds)).elements())
    golds, is_open = list((Counter(golds) - Counter(parts)).elements()), False
    for gold in golds if len(golds) < 20 else ():  # in the trainer's own process
        verdicts = [same_parts(part, gold, same) for part in left]
        is_open |= None in verdicts
        if True in verdicts:
            del left[verdicts.index(True)]
    return True if not left else None if is_open else False


def is_time(parts: list[str]) -> bool:
    """10:30, for one: a ratio would have no common factor."""
    values = [n.numerator for part in parts if (n := number(part)) is not None]
    return len(values) == len(parts) and gcd(*values) > 1


def same_ratio(parts: list[str], golds: list[str], same: Callable) -> bool | None:
    """2:4 is 1:2, if that is the gold answer."""
    mine, gold = ([n for p in side if (n := number(p)) is not None] for side in (parts, golds))
    if len(gold) < len(golds):
        pairs = [(f"({a})*({golds[0]})", f"({parts[0]})*({b})") for a, b in zip(parts, golds)]
        return all_same(pairs, same)
    if len(mine) < len(gold) or 0 in mine + gold or is_time(golds):
        return mine == gold
    return len({a / b for a, b in zip(mine, gold)}) == 1


def same_number(given: str, answer: str) -> bool | None:
    return None if number(answer) is None else same_number_or_word(given, answer)


def same_choice(given: str, answer: str) -> bool | None:
    gold, mine = (p.fullmatch(INNER.sub(r"\1", t)) for p, t in ((LETTER, answer), (CHOICE, given)))
    return mine[1].upper() == (gold[1] or gold[2]) if mine and gold else None


def not_computed(given: str, answer: str) -> bool | None:
    """No operation that the gold answer does not hold, and no inequality for an interval."""
    found = any(o.search(given) and not o.search(answer) for o in OPERATIONS)
    sides = re.split(r"\\[lg]e\b ?|[<>]", given)
    solved = len(sides) < 2 or form(given).kind or any(re.fullmatch("-?" + NAME, s) for s in sides)
    return False if found or form(answer).kind and not solved else None


def same_unread(given: str, answer: str) -> bool | None:
    """What a parser would read over: it must be in both. A base may be left out, not be wrong."""
    mine, gold = (
        {str(NAMES.index(b) + 2) if b in NAMES else b for b in BASE.findall(text)}
        for text in (given, answer)
    )
    same = sorted(UNREAD.findall(given)) == sorted(UNREAD.findall(answer))
    return None if same and mine <= gold else False


def not_too_deep(given: str, answer: str) -> bool | None:
    depths = accumulate((c in "([{") - (c in ")]}") for c in f"{given} {answer}")
    return False if max(depths, default=0) > MAX_DEPTH else None


def not_too_big(given: str, answer: str) -> bool | None:
    return False if TOO_BIG.search(f"{given} {answer}") else None


# The first that knows decides. Cheap ones come first; numbers and letters have rules of their own,
# before that of all others. The last three only refuse: they keep an answer from the parser.
RULES: list[tuple[Callable[[str, str], bool | None], str]] = [
    (lambda given, answer: None if given and answer else False, "empty"),
    (lambda given, answer: given == answer or None, "same text"),
    (same_number, "compared as numbers; nothing is computed"),
    (same_choice, "compared as choices"),
    (not_too_deep, f"more than {MAX_DEPTH} brackets in brackets"),
    (partial(same_parts, same=same_number_or_word), "compared part by part: form, order, values"),
    (not_computed, "a computation, not an answer"),
    (same_unread, "not the same base, dots, primes or what else no parser reads"),
    (not_too_big, "too big to be parsed"),
]


def swapped(given: str, answer: str) -> bool:
    """3 red, 4 blue are not 4 red, 3 blue; units are dropped from the normal forms."""
    mine, gold = (
        {name.strip().removesuffix("and").strip(" ,"): int(n) for n, name in COUNTED.findall(text)}
        for text in (given, answer)
    )
    return len(gold) > 1 and mine.keys() == gold.keys() and mine != gold


def prepare(given: str, answer: str) -> tuple[str, list[str], str]:
    r"""The value given, what else must equal it, and the gold answer, all in normal form.

    >>> prepare("x=15+14=29", "29"), prepare(r"2\sqrt{3}\approx 3.46", r"y=\sqrt{12}")
    (('29', ['15+14'], '29'), ('2\\sqrt{3}', ['\\approx 3.46'], '\\sqrt{12}'))
    """
    given, answer = normal_form(given), normal_form(answer)
    if LETTER.fullmatch(answer):
        return given, [], answer
    given, answer = unlabelled(given, answer)
    answer, steps = APPROXIMATELY.sub("", answer), []
    if about := APPROXIMATELY.search(given):
        given, steps = given[: about.start()], [about[0]]
    if len(split(answer, "=")) == 1:
        *more, given = split(given, "=")
        steps += more
    return given, steps, answer


def compare(given: str, answer: str) -> Verdict | None:
    """What can be said of two answers without a parser, which is most; else None. Microseconds."""
    if max(len(given), len(answer)) > MAX_LENGTH:
        return Verdict(given.strip() == answer.strip(), "too long to be parsed")
    if swapped(given, answer):
        return Verdict(False, "other numbers of the same things")
    given, steps, answer = prepare(given, answer)
    for rule, reason in RULES:
        right = rule(given, answer)
        if right is False or right and not steps:
            return Verdict(right, reason)
    too_big = not_too_big(" ".join(steps), "") is False
    return Verdict(False, "too big to be parsed") if too_big else None


# ------------------------------------------------------------------ in a worker
@lru_cache(maxsize=4096)
def read(answer: str) -> Any:
    """A normal form as a sympy expression, its decimals as exact fractions; None if it is none.

    Not by math_verify.parse, which looks for anything in the text that can be read, takes letters
    at its end for units (2x + 3t is then 2x + 3) and X for x.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Derivative, Float, I, Rational, Symbol, nan, zoo
    from sympy.logic.boolalg import Boolean, BooleanAtom

    answer = re.sub(r"(?<![a-zA-Z\\])([Ee])(?=_)", r"\\grave{\1}", answer)  # E_1 is not Euler's
    answer = ADJACENT.sub(r"\\cdot ", answer)
    text = normalize_latex(answer, NormalizationConfig(malformed_operators=True, boxed="none"))
    try:
        symbols = ConversionConfig(lowercase_symbols=False)
        how: Any = dict(normalization_config=None, conversion_config=symbols)
        found = latex2sympy(text, is_real=True, convert_degrees=False, **how)
    except Exception:  # its parser has a dozen kinds
        return None
    exact = {x: Rational(str(x)) for x in found.atoms(Float)}
    if not isinstance(found, Boolean):  # 1<i<n has an index
        exact |= {x: I for x in found.free_symbols if x.name == "i"}
    # dv/dt of a symbol v would be 0, as dw/dt is
    exact |= {d: Symbol(str(d)) for d in found.atoms(Derivative) if d.expr.is_Symbol}
    found = found.xreplace(exact)
    return None if isinstance(found, BooleanAtom) or found.has(nan, zoo) else found  # 1=2, 5/0


def same_value(given: Any, answer: Any) -> bool:
    """Of two expressions: exactly, or to 40 digits where both are irrational constants."""
    from math_verify import verify
    from sympy import Eq, Expr, Ne, Symbol
    from sympy.logic.boolalg import Boolean

    if given == answer or isinstance(given, Symbol) and isinstance(answer, Symbol):
        return bool(given == answer)  # infinity, too; of names, math-verify ignores the case
    if isinstance(answer, Boolean) and not answer.free_symbols:  # nothing to be solved
        sides = list(zip(given.args, answer.args))
        return given.func == answer.func and all(same_value(*pair) for pair in sides)
    if isinstance(given, Ne) and isinstance(answer, Ne):  # math-verify does not know it
        given, answer = Eq(*given.args), Eq(*answer.args)
    if any(isinstance(a, Eq) and isinstance(b, Expr) for a, b in permutations((given, answer))):
        return False  # math-verify would take what stands on the right
    if all(isinstance(e, Expr) and e.is_number for e in (given, answer)):
        gap = (given - answer).doit()
        if gap.is_Rational:
            return gap == 0
        size, unit = abs(gap.evalf(50, maxn=1000)), abs(answer.evalf(5))
        return bool(size.is_real and (size == 0 or size < min(1, unit) * 10**-40))
    how: Any = dict(numeric_precision=40, allow_set_relation_comp=True)
    return verify(answer, given, timeout_seconds=None, raise_on_error=True, **how)


def same_read(given: str, answer: str) -> bool:
    r"""By a parser. A given "\approx 3.46" is the answer rounded, or cut off."""
    about, gold = APPROXIMATELY.fullmatch(given), read(answer)
    mine = read(about[1] if about else given)
    if mine is None or gold is None:
        return False
    if about:
        return bool(gold.is_number and abs(gold - mine).evalf(20) <= 10.0 ** -len(about[2]))
    return same_value(mine, gold)


def parse_and_compare(given: str, answer: str, lenient: bool) -> Verdict:
    """What `compare` leaves open. It may hang or take all memory: not in the trainer's process."""
    # math-verify would warn that it has no time limit: its own is SIGALRM, for main threads only
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        if lenient:
            from math_verify import parse, verify

            gold, mine = (parse(text, parsing_timeout=None) for text in (f"${answer}$", given))
            return Verdict(verify(gold, mine, timeout_seconds=None), "compared by math-verify")
        given, steps, answer = prepare(given, answer)
        if same_parts(given, answer, same_read):
            if all(same_read(step, given) for step in steps):
                return Verdict(True, "compared by math-verify")
            return Verdict(False, "an equation, not a value: its sides are not equal")
        for side, text in ("gold answer", answer), ("answer", given):
            if any(read(part) is None for part in form(text).parts):
                return Verdict(False, f"the {side} cannot be read as mathematics")
        return Verdict(False, "compared by math-verify")
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}"[:200], type(error).__name__)


def screen(response: str, answer: str, lenient: bool) -> tuple[str | None, Verdict | None]:
    """-> (the answer given, or all that may hold it if lenient; the verdict, if that is easy)."""
    if not lenient:
        if (given := extract_answer(response)) is None:
            return None, Verdict(False, "no complete box after the thought")
        return given, compare(given, answer)
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
class Grader(AbstractContextManager["Grader"]):
    """Grades in worker processes, so that no response can hold up or bring down the trainer.

    workers: processes; timeout: seconds for one response, after which its worker is killed and its
    reward is 0; lenient: as above. `failures` counts the responses whose grading failed, by kind:
    "timeout", "crash" (twice, for it is tried again), an exception's name, or "skipped": after two
    timeouts or crashes, the next jobs with this gold answer, up to one with another, are compared
    as text alone. Any thread may use it. A context manager; or call `close()`.

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
        return [right or 0.0 for right in self.judged(jobs, lenient)]

    def judged(self, jobs: list[tuple[str, str]], lenient: bool | None = None) -> list[Any]:
        """As a call, but None where the grading failed: that is no verdict."""
        found = self.verdicts(jobs, lenient)
        return [None if v.failure and not v.right else float(v.right) for v in found]

    def verdicts(self, jobs: list[tuple[str, str]], lenient: bool | None = None) -> list[Verdict]:
        lenient = self.lenient if lenient is None else lenient
        screened = [(*screen(response, answer, lenient), answer) for response, answer in jobs]
        left = ((given, answer, lenient) for given, easy, answer in screened if not easy)
        hard = list(dict.fromkeys(left))  # rollouts of a problem often agree
        parsed = {
            job: Verdict(*reply) if reply else unparsed(*job, failure)
            for job, (reply, failure) in zip(hard, self.pool.map(hard, key=itemgetter(1)))
        }
        verdicts = [easy or parsed[given, answer, lenient] for given, easy, answer in screened]
        self.failures.update(verdict.failure for verdict in verdicts if verdict.failure)
        return verdicts

    def right_and_reward(self, jobs: list[tuple[str, str]], failed: Any = 0.0) -> list[tuple]:
        """-> [(1.0 if right else 0.0, reward), ...], which are equal but for a reward function.

        Raises InputError if the function raises an exception or returns no finite number. `failed`
        stands where grading failed, or the function takes too long or its worker dies; `failures`
        then has "reward_timeout", ...
        """
        right = rewards = self.judged(jobs) if failed is None else self(jobs)
        if self.rewards:
            rewards, failures = self.rewards(jobs)
            self.failures.update(failures)
        return [tuple(failed if x is None else x for x in pair) for pair in zip(right, rewards)]

    def unread(self, golds: list[str]) -> list[bool | None]:
        """Which no parser reads? Beside their own text, only `compare`'s rules find one right.

        None for one that took too long, or whose worker died.
        """
        plain = [prepare("", gold)[2] if len(gold) <= MAX_LENGTH else None for gold in golds]
        hard = [t for t in plain if t and any(number(part) is None for part in form(t).parts)]
        bad = {t for t in hard if False in (not_too_big(t, ""), not_too_deep(t, ""))}
        hard = [text for text in hard if text not in bad]
        replies = self.pool.map([(text, text, False) for text in hard], key=itemgetter(0))
        bad |= {text for text, (reply, _) in zip(hard, replies) if reply and not reply[0]}
        failed = {text for text, (reply, _) in zip(hard, replies) if not reply}
        return [None if text in failed else text is None or text in bad for text in plain]

    def close(self) -> None:
        self.pool.close()
        if self.rewards:
            self.rewards.pool.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def unparsed(given: str | None, answer: str, lenient: bool, failure: str) -> Verdict:
    if failure != "skipped":
        return Verdict(False, f"no verdict: {failure}", failure)
    easy = lenient and screen(given or "", answer, False)[1]  # strict has done it
    reason = "compared as text alone, after two failures on this gold answer"
    return Verdict(bool(easy and easy.right), reason, failure)


def load_parser() -> Callable:
    parse_and_compare("x+1", "1+x", lenient=False)  # imports
    return parse_and_compare


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("response", help="what a model wrote")
    parser.add_argument("answer", help="the gold answer")
    parser.add_argument("--timeout", type=ranged(float, 0.01, 1e5), default=5.0, help="seconds [5]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--strict", action="store_true", help="only a box counts: the default")
    mode.add_argument("--lenient", action="store_true", help="as the reward of the official code")
    print_what_can_be()
    args = parser.parse_args()
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
