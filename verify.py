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

import argparse
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from machinery.files import print_what_can_be
from machinery.pool import Pool, serve
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


# ------------------------------------------------------------------ one way to write it
# fmt: off
TEXT = (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|boldsymbol|bm|operatorname|mbox|"
        r"emph|underline)\s*")
WORDS = (r"percent(?:age)?|pct|degrees?|dollars?|cents?|yuan|rs|units?|inch(?:es)?|feet|miles?|"
         r"yards?|(?:kilo|centi|milli)?met(?:er|re)s?|(?:kilo)?grams?|lit(?:er|re)s?|mph|hours?|"
         r"minutes?|seconds?|days?|weeks?|months?|years?|sq(?:uare)?\.?|cubic|per")
NO_UNITS = (r"and|or|not|nor|to|half|halves|(?:quarter|third|squared|(?!mon|wid|dep|leng)[a-z]*th|"
            r"dozen|score|gross|pair|couple|hundred|thousand|lakh|crore|[mbtr]+illion)s?|cubed|plus|"
            r"minus|times|over|under|below|above|less|more|off|negative|point|base|factorial|roots?|pi")
UNIT = r"(?:[a-zA-Z]{2,}|[msghLNJWVAKCF])(?:\^-?[0-9])?"
SYMBOLS = str.maketrans({
    **{chr(code + 0xFEE0): chr(code) for code in range(33, 127)},  # full width
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "−": "-", "–": "-", "、": ",",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ", "½": r"\frac{1}{2}", "²": "^2",
    "³": "^3", "∀": r"\forall ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "∪": r"\cup ",
    "∅": r"\emptyset ", "\u200b": "", "\u2060": "", "\ufeff": "", "¥": "", "€": "", "£": ""})
SYNONYMS = {  # commands
    **dict.fromkeys(["left", "right", "displaystyle", "limits", "large", "therefore", "big", "Big",
                     "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "middle"], ""),
    **dict.fromkeys(["leqslant", "leq", "leqq"], r"\le "), "lt": "<", "gt": ">", "neq": r"\ne ",
    **dict.fromkeys(["geqslant", "geq", "geqq"], r"\ge "), "land": r"\wedge ", "iff": "",
    **dict.fromkeys(["mid", "vert", "lvert", "rvert"], "|"), "varnothing": r"\emptyset ",
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], r"\frac"), "degree": r"^\circ ",
    **dict.fromkeys(["dbinom", "tbinom"], r"\binom"), "textcirc": r"\circ ", "langle": "(",
    "rangle": ")", "lbrace": r"\{", "rbrace": r"\}", "quad": " ", "qquad": " ", "prime": "'"}
TRIG = r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?"
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\?\$", ""),  # $...$, and \$5
    (r"^\s*(?:\*\*(.*)\*\*|\\\[(.*)\\\]|\\\((.*)\\\))\s*$", r"\1\2\3"),
    (r"\\(?:text)?color\{[a-z]*\}", ""),
    (rf"^\s*{TEXT}\{{([^{{}}]*)\}}$", r"\1"),  # \text{east}
    (r"^\s*\\text\{\s*(?:[Tt]he )?(?:final )?(?:[Aa]nswer|result|value|year)(?: is)?[\s:=]*\}", ""),
    (r"^(?:[Aa]ll )?real(?: number)?s$", r"\\mathbb{R}"), (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\+?(?<![\\a-zA-Z])inf(?:ini)?ty(?![a-zA-Z])|\+\s*\\infty(?![a-zA-Z])", r"\\infty "),
    (r"\s*(?:\\text\{)?\s*\b([ap])\.?\s*m\b\.?\s*\}?$", r" \1m"),  # of a time
    (r"(\.[0-9]*?)([0-9])\2\2+(?:\.\.\.|\\[lc]?dots)$", r"\1\\overline{\2}"),
    (r"\\math(?:rm|bf|it)\s*\{\s*([ei])\s*\}", r"\1"), (r"\^\{\s*'\s*\}|\^'", "'"),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"\{:\}", ":"), (r"\*\*", "^"),
    (r"\^\(([^()]*)\)", r"^{\1}"),
    (r"(?<![\\a-zA-Z])(sin|cos|tan|ln|log)(?=\()", r"\\\1"),
    (r"√\s*([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"), (r"√", r"\\sqrt "),
    (r"\\\\\[[^\]]*\]", r"\\\\"),  # the next row of a matrix, after some space
    (r"(?<=[0-9])(?:,\\!|\\[,! ]|\{,\})\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}234 and 1\,234
    (r"(?<!\\)\\[,;:! ]|~", " "),
    (rf"(\\{TRIG}(?:\^\{{?-?[0-9]\}}?)?\s*[({{]?\s*)([0-9]+(?:\.[0-9]+)?)\s*\^\s*\{{?\s*\\circ"
     r"(?![a-zA-Z])\s*\}?", r"\1{\\frac{\2\\pi}{180}}"),  # elsewhere degrees are a unit
    (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})(?:\s*[CF]\b)?(\s*,)?\s*", r"\1 "),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"np\.(?=[a-z])", r"\\"), (r"^\s*\\approx", ""),  # np.arcsin: a gold answer of Minerva
    (r"(?<![\\a-zA-Z_0-9.])([0-9]*\.?[0-9]+)[eE]([+-]?[0-9]+)(?!\.?[0-9]|[a-zA-Z])",
     r"\1\\times 10^{\2}"),  # 4.5e33
    (r"(\.[0-9]*)(?:\\(?:bar|dot)\s*\{?([0-9]+)\}?|\(([0-9]+)\))", r"\1\\overline{\2\3}"),
    (r"(?<=[0-9])\.(?=$|[\s/,)}]|\\text|\\mathrm)", ""),  # 3. and -1./3
    (r"(?:\\\\|\s|(?<!\.)\.)+$", ""),
    (r"\s*\\?%$", ""),  # 28\%
    (r"(?<=[0-9])\s*(?:\\text\{)?\s*thousand\}?$", r"\\times 10^{3}"),
    (r"(?<=[0-9])\s*(?:\\text\{)?\s*million\}?$", r"\\times 10^{6}"),
    (r"(?<=[0-9])\s*(?:\\text\{)?\s*billion\}?$", r"\\times 10^{9}"),
    (rf"^([0-9]+)\s*(?:\^\s*)?\{{?(?:{TEXT})?\{{?(?:st|nd|rd|th)\b\}}*(?: [a-zA-Z]+)?$", r"\1"),
    (rf"(?<=[0-9a-zA-Z)}}])(?:\s*(?:\\cdot\s*)?\\(?:text|textrm|mathrm|mbox)\{{\s*"
     rf"(?![^{{}}]*\b(?:{NO_UNITS})\b){UNIT}(?:[\s./]+{UNIT})*[\s.]*\}}(?:\^\{{?-?[0-9]\}}?)?)+$",
     ""),  # 3 \text{ m}^2
    (rf"(?<=[0-9])(?:\s*(?:{WORDS})\b| (?:[kcm]m|ft|kg|k?m/[hs]|[kMG]?Hz)\b)+"
     r"(?:\^\{?[0-9]\}?)?$", ""),  # 3 cm, 3 percent
    (r"(?<=[0-9])\s*(?:sq\. *units?|Rs)$|^Rs\.?\s*(?=[0-9])", ""),
    (r"([<>]|\\[lg]e\b)(.*?)\s*(?:\\text\{,?\s*or\s*\}|(?<![\\a-zA-Z])or(?![a-zA-Z]))(?=.*(?:[<>]|"
     r"\\[lg]e\b))", r"\1\2\\cup "),  # x<1 or x>2
    (r",?\s*(?:\\text\{,?\s*(?:and|or)\s*\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]))", ","),
    (r"\(?\\[pb]?mod\s*\{?([0-9a-z]+)\}?\)?", r"\\pmod{\1}"),
    (rf"(?<=[0-9])(?: (?!(?:{NO_UNITS}|{TRIG}|ln|log)\b)[a-z]{{3,}}){{1,2}}$", ""),  # 20 apples
    (r"\\binom\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\binom{\1}{\2}"),
    (r"\\frac\s*([0-9a-zA-Z]|\\(?!frac)[a-zA-Z]+)", r"\\frac{\1}"),  # \frac12, \frac\pi6
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z]|\\(?!frac)[a-zA-Z]+)", r"\1{\2}"),
    (r"((?:^|[(\[,=])\s*[+-]?(?:[0-9]+\s+)?)([0-9]+)\s*/\s*([0-9]+)(?=\s*(?:$|[,)\]]))",
     r"\1\\frac{\2}{\3}"),  # 1/2, 1 1/2
    (r"_([0-9A-Za-z])(?![0-9A-Za-z])", r"_{\1}"),  # a_1
    (r"^\](.*[,;].*)\[$", r"(\1)"), (r"^\](.*[,;].*)\]$", r"(\1]"),  # ]1,2[
    (r"^\[(.*[,;].*)\[$", r"[\1)"),
    (r"\s+", " "),
    (r"(?<![0-9A-Za-z]) (?!(?<=[0-9], )[0-9]{3}(?![0-9]))| (?![0-9A-Za-z])", ""),  # not 100, 200
]]
COMMAND = re.compile(r"\\([a-zA-Z]+)")
# fmt: on


@lru_cache(maxsize=4096)  # the rollouts of a problem have one gold answer
def normal_form(answer: str) -> str:
    r"""An answer (of at most MAX_LENGTH characters) without what does not change its value.

    >>> normal_form(r"\dfrac12 \text{ cm}."), normal_form("$4.5e33$"), normal_form(r"90^\circ")
    ('\\frac{1}{2}', '4.5\\times 10^{33}', '90')
    """
    if re.fullmatch("[0-9]+", answer):
        return answer
    answer = answer.translate(SYMBOLS).strip()
    answer = COMMAND.sub(lambda command: SYNONYMS.get(command[1], command[0]), answer)
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer.strip()


# ------------------------------------------------------------------ the same value?
# fmt: off
INNER = re.compile(TEXT + r"\{([^{}]*)\}")
NAME = r"(?:[a-zA-Z]|\\(?!not)[a-zA-Z]+)(?:_\{[^{}]*\})?'*(?:\([a-z]\))?"  # x, \theta, x_{1}, f(x)
LABEL = re.compile(  # before "=": a name or names, f(3), P(A), AB, [ABC], |z|, \angle A, the least
    rf"(\(?{NAME}(?:,{NAME})*\)?|(?![xyz])[a-zA-Z]'*\((?:-?[0-9]+|[A-Z]+)\)|P\([^()=]*\)|[A-Z]{{2,4}}|"
    r"\[[A-Z]{3,}\]|\|[a-zA-Z]\||\\(?:angle|triangle) ?[A-Z]{1,3}|\([^()=]*\)_\{\\?m(?:in|ax)\}|"
    rf"{NAME}(?::{NAME})+|\\frac\{{[A-Z]{{2}}\}}\{{[A-Z]{{2}}\}}|"
    r"\\text\{(?![^{}]*\bnot\b)[^{}]*\}|)=(?!=)")
APPROXIMATELY = re.compile(r"(?<=.)\\approx ?([0-9]*\.?([0-9]*))$")
FUNCTION = re.compile(r"([a-zA-Z])\(([a-z])\)")
QUALIFIER = re.compile(  # for all x, k \in \mathbb Z
    r"[,;]?\(?(?:\\text\{,? ?)?(?:for (?:all|any|every|some)|for(?=\}[a-z])|where)\b"
    r"(?!.*\b(?:for|if|when|otherwise|else)\b)[^,;]*$|"
    r"[,;]?\(?[a-z]\\in ?\\mathbb ?\{?[A-Z]\}?\)?$")
DECIMAL = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?<=[0-9])"
                     r"(?:(?:\\times|\\cdot|\*) ?10\^\{?([+-]?[0-9]{1,3})\}?)?")
POWER = re.compile(r"10\^\{?([+-]?[0-9]{1,3})\}?")
REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
FRACTION = re.compile(r"([+-]?)([0-9]*) ?\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}")
BASED = re.compile(r"\(?([0-9][0-9A-F]*)\)?_\{?([0-9]+)\}?")  # 204_5
CHOICE = re.compile(  # C, (C), or C. and its text, in which no letter stands alone but in "a word"
    r"(?:option |choice )?\(?([A-Z])(?:[).:-]+(?!.*\b[A-J]\b(?! [a-z]{2})).*)?", re.IGNORECASE)
ARTICLE = re.compile(r"\b(?:the|an?|on|in|at) |(?<=[a-z]{3})s\b", re.IGNORECASE)
WORD = re.compile(r"[a-zA-Z]{2}[a-zA-Z ]*")
BETWEEN = re.compile(r"([^<>=,]+?)(<|\\le ?)([a-zA-Z])(<|\\le ?)([^<>=,]+)")
BEYOND = re.compile(r"([a-zA-Z])(<|>|\\[lg]e ?)([^<>=,]+)")
BRACKETS = re.compile(r"[(\[][)\]]|(\\?)\{\1\}")
WRAPPED = re.compile(r"\\?\{([^{}]*?)\\?\}|[(\[]([^()\[\],]*)[)\]]")
BUILDER = re.compile(r"\\?\{[a-zA-Z]\|(.*?)\\?\}|[a-zA-Z]\\in(?! ?\\mathbb) ?(.*)")
COLUMN = re.compile(r"\\begin\{[pb]matrix\}([^&]*)\\end\{[pb]matrix\}")
OPERATIONS = [re.compile(rf"(?<![a-zA-Z])(?:{names})(?![a-zA-Z])") for names in [
    r"binom|choose|[CP](?=_\{?[0-9]|\([0-9]))|(?:!", TRIG, r"log|ln|lg", r"gcd|lcm",
    r"[lr]?(?:floor|ceil)", r"[bp]?mod", r"sum", r"prod", r"i*int", r"lim", r"det|vmatrix",
    r"max|min|sup|inf", r"i(?=\^)"]]
ADJACENT = re.compile(  # factors: the parser would add integers, or take them for a mixed number
    r"(?<=[0-9)])(?<![a-z]\^[0-9])(?=\()|(?<=\))(?=[0-9]|\\frac|\\binom)|"
    r"(?<=[0-9}])(?=\\binom)|(?<=(?<![a-zA-Z\\])[a-eij-oq-z])(?=\((?![a-z]\)))")
UNREAD = re.compile(r"'|\^\{?T|\\approx|\\p?mod|\\[lc]?dots|\.\.|[0-9] [0-9]")  # is ignored
TOO_BIG = re.compile(  # to be computed
    r"[0-9]{400}|\^[{(]*[+-]?[0-9]{5}|[0-9]{5}!|!!|\^[{(]?[0-9]+\^")
# fmt: on


def number(text: str) -> Fraction | None:
    """The exact value of a decimal, a fraction or a mixed number in normal form."""
    if match := DECIMAL.fullmatch(text):
        return Fraction(match[1].replace(",", "")) * Fraction(10) ** int(match[2] or 0)
    if match := POWER.fullmatch(text):
        return Fraction(10) ** int(match[1])
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


def split(text: str, mark: str = ",") -> list[str]:
    """At the marks that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "\\":
            depth += text.startswith(r"\begin", i) - text.startswith(r"\end", i)
        if depth == 0 and text.startswith(mark, i):
            parts.append(text[start:i].strip())
            start = i + len(mark)
    return [*parts, text[start:].strip()]


def both_signs(parts: list[str]) -> list[str]:
    return [re.sub(r"\\pm ?", s, p) for p in parts for s in "+-"[: 1 + (r"\pm" in p)]]


def form(text: str) -> tuple[str, list[str]]:
    r"""How an answer is put together, and its parts: in brackets, or with ",", ":", \cup between.

    >>> form("(1,2]"), form("x>1"), form(r"3\pm1"), form("1+2")
    (('(]', ['1', '2']), ('()x', ['1', '\\infty']), (',', ['3+1', '3-1']), ('', ['1+2']))
    """
    while match := BUILDER.fullmatch(text):
        text = match[1] or match[2] or ""
    if match := BETWEEN.fullmatch(text):
        low, left, name, right, high = match.groups()
        return ("(" if left == "<" else "[") + (")" if right == "<" else "]") + name, [low, high]
    if match := BEYOND.fullmatch(text):
        name, sign, end = match.groups()
        if sign[0] == "<" or sign[1:2] == "l":
            return ("()" if sign == "<" else "(]") + name, [r"-\infty", end]
        return ("()" if sign == ">" else "[)") + name, [end, r"\infty"]
    if match := COLUMN.fullmatch(text):
        return "()", match[1].split(r"\\")
    for mark in (r"\cup", ",", ":"):
        if len(parts := split(text, mark)) > 1:
            parts = both_signs(parts) if mark == "," else parts
            return mark, list(dict.fromkeys(parts)) if parts[0][:1] == "(" else parts
    start, end = (2, -2) if text[:2] == r"\{" and text[-2:] == r"\}" else (1, -1)
    inner = text[start:end]
    depths = accumulate((c in "([{") - (c in ")]}") for c in inner)
    if BRACKETS.fullmatch(text[:start] + text[end:]) and min(depths, default=0) >= 0:
        parts = split(inner, ";" if ";" in inner else ",")
        if start == 2 or len(parts) > 1:
            return text[start - 1] + text[-1], both_signs(parts) if text[-1] == "}" else parts
    return (",", both_signs([text])) if text.count(r"\pm") == 1 else ("", [text])


def same_parts(given: str, answer: str, same: Callable[[str, str], bool | None]) -> bool | None:
    """Two answers of one form whose parts are the same; None if that is open for one of them."""
    (mine, parts), (kind, golds) = form(given), form(answer)
    if "" in (mine, kind):
        if len(parts) == len(golds) == 1:  # {5} is 5
            return same(parts[0], golds[0])
        listed = answer if kind else given
        if number(listed) is None and (
            mine + kind == "," or mine + kind == ":" and form(listed)[1][2:]
        ):
            return False
        return same(given, answer)
    kinds = {mine[:2], kind[:2]}
    if len(kinds) > 1:  # brackets may be left out, but not those of an interval
        is_interval = (mine + kind)[3:] or any("infty" in part for part in parts + golds)
        if is_interval or "," not in kinds or not kinds <= {",", "()", "{}"}:
            return False
    if mine[2:] != kind[2:] and mine[2:] and kind[2:] or len(parts) != len(golds):
        return False
    if mine == ":" and not any(re.match("0[0-9]", part) for part in parts + golds):  # no time
        values = [number(part) or Fraction(0) for part in parts + golds]
        if all(values[len(parts) :]):
            return len({a / b for a, b in zip(values, values[len(parts) :])}) == 1 and all(values)
        pairs = [(f"({a})*({golds[0]})", f"({parts[0]})*({b})") for a, b in zip(parts, golds)]
    elif (
        kinds <= {",", "{}", r"\c"} and number(given) is number(answer) is None
    ):  # 1,234 may be a number
        return same_set(parts, golds, same)
    else:
        pairs = list(zip(parts, golds))
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


def same_plain(given: str, answer: str) -> bool | None:
    """Two values without a parser. Where the gold is a number, a computation is no answer."""
    answer = re.sub(r"^\{([^{}]*)\}$", r"\1", answer)
    while match := WRAPPED.fullmatch(given):
        given = match[1] or match[2] or ""
    if (gold := number(answer)) is not None:
        is_fraction = "frac" in given and not given.endswith(("{1}", "{-1}"))
        reduced = is_fraction and "frac" not in answer and gold.denominator == 1
        power = POWER.fullmatch(given) and "10^" not in answer and 1 <= gold < 10**4  # 10^2
        return number(given) == gold and not reduced and not power
    if WORD.fullmatch(answer) and (WORD.fullmatch(given) or len(answer) > 3):
        fold = str.casefold if len(answer) > 2 or answer.casefold() == "no" else str
        return fold(given) == fold(answer)
    return None


def labels(text: str) -> tuple[list[str], list[str]]:
    """The names before "=" and what stands behind them; nothing if a part has no name."""
    match = LABEL.match(text)
    if match and match[1].startswith("(") and "," in match[1]:  # (x,y)=(1,2)
        names, (_, values) = split(match[1][1:-1]), form(text[match.end() :])
        return (names, values) if len(names) == len(values) else ([], [])
    one = match and number(text[match.end() :]) is not None  # x=1,000
    parts = [text] if one else split(text)
    found = [label for part in parts if (label := LABEL.match(part))]
    if match and len(found) == 1:  # x=1,2
        return [match[1]] * len(parts), [parts[0][match.end() :], *parts[1:]]
    if len(found) < len(parts):
        return [], []
    return [label[1] for label in found], [label.string[label.end() :] for label in found]


def unlabelled(given: str, answer: str) -> tuple[str, str]:
    """Both without names before "=", in one order, and without what only one of them adds."""
    cut = [QUALIFIER.sub("", text) or text for text in (given, answer)]
    mine, gold = (full[len(a) :].strip(",;() ") for a, full in zip(cut, (given, answer)))
    if mine == gold or not mine or not gold:
        given, answer = cut
    answer = APPROXIMATELY.sub("", answer)
    (names, values), (gold_names, golds) = labels(given), labels(answer)
    if names and gold_names:
        f, g = FUNCTION.fullmatch(names[0]), FUNCTION.fullmatch(gold_names[0])
        if len(names) == len(golds) == 1 and f and g and f[1] == g[1] and g[2] not in values[0]:
            values = [re.sub(rf"(?<![\\a-zA-Z]){f[2]}(?![a-zA-Z])", g[2], values[0])]
            names = gold_names
        values = [value for _, value in sorted(zip(names, values))]
        golds = [gold for _, gold in sorted(zip(gold_names, golds))]
    if (
        sorted(names) != sorted(gold_names)
        if names and gold_names
        else (names and len(split(answer, "=")) > 1 or gold_names and len(split(given, "=")) > 1)
    ):
        return given, answer
    around = "({})" if len(set(gold_names)) > 1 else "{}"  # x=1, y=2 has an order
    return (
        around.format(",".join(values)) if names else given,
        around.format(",".join(golds)) if gold_names else answer,
    )


def compare(given: str, answer: str) -> Verdict | None:
    """What can be said of two answers without a parser, which is most; else None. Microseconds."""
    if max(len(given), len(answer)) > MAX_LENGTH:
        return Verdict(given.strip() == answer.strip(), "too long to be parsed")
    written = given + answer
    given, answer = normal_form(given), normal_form(answer)
    if not given or not answer:
        return Verdict(False, "empty")
    if given == answer:
        return Verdict(True, "same text")
    if number(given) is not None and number(answer) is not None:
        return Verdict(bool(same_plain(given, answer)), "compared as numbers")
    given, answer = unlabelled(given, answer)
    if given == answer:
        return Verdict(True, "same text")
    words = [INNER.sub(r"\1", text).replace("  ", " ") for text in (given, answer)]
    if re.search(TEXT, written) and WORD.fullmatch(words[1]):
        mine, gold = (ARTICLE.sub("", text.casefold()) for text in words)
        return Verdict(mine == gold, "compared as words")
    if based := BASED.fullmatch(given):
        if (gold_based := BASED.fullmatch(answer)) or number(answer) is not None:
            same = gold_based is not None and based.groups() == gold_based.groups()
            return Verdict(same, "compared in their base")
    if re.fullmatch(r"\(?[A-J]\)?", answer):
        if choice := CHOICE.fullmatch(words[0]):
            return Verdict(choice[1].upper() == answer.strip("()"), "compared as choices")
    if (about := APPROXIMATELY.search(given)) and r"\approx" not in answer:
        given = given[: about.start()]
    steps, golds = split(given, "="), split(answer, "=")
    if len(steps) > len(golds) == 1:
        if same_parts(steps[-1], answer, same_plain) is False:
            return Verdict(False, "an equation, not a value")
    elif (right := same_parts(given, answer, same_plain)) is not None and not (right and about):
        return Verdict(
            right, "compared part by part" if right else "another value, or a computation"
        )
    for operation in OPERATIONS:
        if (found := operation.search(steps[-1])) and not operation.search(answer):
            return Verdict(False, f"a computation, not an answer: {found[0]}")
    if sorted(UNREAD.findall(given)) != sorted(UNREAD.findall(answer)):
        return Verdict(False, "what cannot be read is not the same")
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
    from sympy import Float, I, Rational

    answer = ADJACENT.sub(r"\\cdot ", answer)
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
    exact = {x: Rational(str(x)) for x in found.atoms(Float)}
    return found.xreplace(exact | {x: I for x in found.free_symbols if x.name == "i"})


def same_value(given: Any, answer: Any) -> bool:
    """Of two expressions: exactly, or to 40 digits where both are irrational constants."""
    from math_verify import verify
    from sympy import Expr

    if given == answer:  # infinity, too
        return True
    if all(isinstance(e, Expr) and e.is_number for e in (given, answer)):
        gap = (given - answer).doit()
        if gap.is_Rational:
            return gap == 0
        size, unit = abs(gap.evalf(50, maxn=1000)), abs(answer.evalf(5))
        return bool(size.is_real and (size == 0 or size < min(1, unit) * 10**-40))
    return verify(
        answer,
        given,
        numeric_precision=40,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def close(given: str, about: re.Match) -> bool:
    """Is the decimal after \\approx the value before it, rounded or cut off?"""
    value = read(given)
    gap = abs(value - Fraction(about[1] or 0)) if value is not None and value.is_number else None
    return gap is not None and bool(gap.evalf(20) <= 10.0 ** -len(about[2]))


def same_read(given: str, answer: str) -> bool:
    from sympy import Eq, Expr

    mine, gold = read(given), read(answer)
    if mine is None or gold is None:
        return False
    if any(isinstance(a, Eq) and isinstance(b, Expr) for a, b in ((mine, gold), (gold, mine))):
        return False  # math-verify would take what stands on the right
    return same_value(mine, gold)


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
            given, answer = unlabelled(normal_form(given), normal_form(answer))
            about = APPROXIMATELY.search(given)
            given = given[: about.start()] if about else given
            *steps, given = split(given, "=") if len(split(answer, "=")) == 1 else [given]
            right = bool(
                all(same_read(step, answer) for step in steps)  # of a chain 1+1=2
                and same_parts(given, answer, same_read)
                and (not about or close(given, about))
            )
            for side, text in ("gold answer", answer), ("answer", given):
                if not right and any(read(part) is None for part in form(text)[1]):
                    return Verdict(False, f"the {side} cannot be read as mathematics")
        return Verdict(bool(right), "compared by math-verify")
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
    "timeout", "crash", an exception's name, or "skipped": after two timeouts or crashes, the next
    jobs with this gold answer, up to one with another, are compared as text alone. Any thread may
    use it. A context manager; or call `close()`.

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
            job: Verdict(*reply) if reply else unparsed(*job, failure)
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
        plain = [unlabelled("", normal_form(gold[:MAX_LENGTH]))[1] for gold in golds]
        hard = [
            text
            for text in plain
            if not BASED.fullmatch(text) and any(number(part) is None for part in form(text)[1])
        ]
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


def unparsed(given: str | None, answer: str, lenient: bool, failure: str) -> Verdict:
    if failure != "skipped":
        return Verdict(False, f"none: {failure}", failure)
    easy = lenient and screen(given or "", answer, False)[1]  # strict has done it
    reason = "compared as text alone, after two failures on this gold answer"
    return Verdict(bool(easy and easy.right), reason, failure)


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
