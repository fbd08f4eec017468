r"""How a final answer is written: one way for each thing that can be written in several.

`normal_form` rewrites a text, `form` takes it apart (a list, an interval, a ratio, ...), `number`
reads it exactly. Nothing here knows what is right. It runs in the trainer's process on what a model
wrote: no pattern may backtrack for long.
"""

import re
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

# ------------------------------------------------------------------ tables
# fmt: off
SYMBOLS = str.maketrans({
    **{chr(code + 0xFEE0): chr(code) for code in range(33, 127)},  # full width
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "−": "-", "–": "-", "、": ",",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "°": r"^\circ ",
    "½": r"\frac{1}{2}", **{c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{c: f"_{i}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    "∀": r"\forall ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "∪": r"\cup ", "√": r"\sqrt ",
    "∅": r"\emptyset ", "¥": "", "€": "", "£": "", "\u200b": "", "\u2060": "", "\ufeff": ""})
COMMANDS = {name: one for one, names in {  # synonyms
    "": "left right middle displaystyle limits large therefore iff "
        "big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr",
    r"\text": "textbf textit textrm textsf texttt textnormal mathbf mathit mathrm mathsf mbox emph "
              "underline boldsymbol bm operatorname",
    r"\le ": "leqslant leq leqq", r"\ge ": "geqslant geq geqq", r"\ne ": "neq", "<": "lt",
    ">": "gt", "|": "mid vert lvert rvert", r"\frac": "dfrac tfrac cfrac",
    r"\binom": "dbinom tbinom", r"\emptyset ": "varnothing", r"\wedge ": "land",
    r"^\circ ": "degree", r"\circ ": "textcirc", "(": "langle", ")": "rangle",
    r"\{": "lbrace", r"\}": "rbrace", "'": "prime", " ": "quad qquad",
}.items() for name in names.split()}
COMMAND = re.compile(r"\\([a-zA-Z]+)")
TRIG = r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?"
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    # Each row sees what the rows above left. What is around the answer, or only changes its looks
    (r"(?<!\\)[\s~]+", " "), (r"\\?\$", ""),  # many spaces take long; $...$, and \$5
    (r"^\s*(?:\*\*(.*)\*\*|\\\[(.*)\\\]|\\\((.*)\\\))\s*$", r"\1\2\3"),  # **7**, \[7\]
    (r"^\s*(?:\\text\s*\{\s*)+([^{}]*)\}+$", r"\1"),  # \text{east}
    (r"^\s*\{((?:[^{}|,:]|\{[^{}]*\})*)\}\s*$", r"\1"),  # {7}
    (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"\\(?:text)?color\s*\{[a-z]*\}", ""),
    (r"^\s*\\text\s*\{(?![^{}]*\bnot\b)(?:[^{}]*[:=]|\s*(?:[Tt]he )?(?:answer|result|value|year)"
     r"(?: is)?)\s*\}", ""),  # \text{Cost: }
    (r"\\text\s*(?:\{\s*([ei])\s*\}|([ei])(?![a-zA-Z]))", r"\1\2"),  # \text{e}: else a unit
    # ASCII for LaTeX
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"\*\*", "^"), (r"\^\(([^()]*)\)", r"^{\1}"),
    (r"\+?(?<![\\a-zA-Z])inf(?:ini)?ty(?![a-zA-Z])|\+\s*\\infty(?![a-zA-Z])", r"\\infty "),
    (r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|ln|log)\s*(?=\()", r"\\\1"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"\\sqrt\s*(?:\(([^()]*)\)|([0-9]+|[a-zA-Z](?![a-zA-Z])))", r"\\sqrt{\1\2}"),
    (r"np\.(?=[a-z])", r"\\"), (r"^\s*\\approx", ""),  # np.arcsin: a gold answer of Minerva
    # Spaces that mean nothing, but for those between the thousands of a number, which go first
    (r"[,;]?\s*&\s*(?:\\text\s*\{\s*(?:if|for|when|where)\s*\})?", "&"),  # of cases
    (r"\\\\\[[^\]]*\]", r"\\\\"),  # the next row of a matrix, after some space
    (r"(?<=[0-9])(?:,\\!|\\[,! ]|\{,\})\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}234 and 1\,234
    (r"(?<!\\)\\[,;:! ]|~", " "), (r"\^\{\s*'\s*\}|\^'", "'"),
    (r"\{:\}|(?<=[0-9])\s*\\text\s*\{\s*to\s*\}\s*(?=[0-9])", ":"),  # 2{:}3, 2 to 3
    # Degrees: in a function they are a number, elsewhere a unit
    (rf"(\\{TRIG}(?:\^\{{?-?[0-9]\}}?)?\s*[({{]?\s*)([0-9]+(?:\.[0-9]+)?)\s*\^\s*\{{?\s*\\circ"
     r"(?![a-zA-Z])\s*\}?", r"\1{\\frac{\2\\pi}{180}}"),
    (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})(?:\s*[CF]\b)?", " "),
    # Numbers
    (r"(?<![\\a-zA-Z_0-9.])([0-9]*\.?[0-9]+)[eE]([+-]?[0-9]+)(?!\.?[0-9]|[a-zA-Z])",
     r"\1\\times 10^{\2}"),  # 4.5e33
    (r"(\.[0-9]*)(?:\\(?:bar|dot)\s*\{?([0-9]+)\}?|\(([0-9]+)\))", r"\1\\overline{\2\3}"),  # 0.(3)
    (r"(\.[0-9]*?)([0-9])\2\2+(?:\.\.\.|\\[lc]?dots)$", r"\1\\overline{\2}"),  # 0.333...
    (r"(?<=[0-9])\.(?=$|[\s/,)}]|\\text)", ""),  # 3. and -1./3
    # "and" and "or" between inequalities are a union, elsewhere a comma
    (r"([<>]|\\[lg]e\b)(.*?)\s*(?:\\text\s*\{,?\s*or\s*\}|(?<![\\a-zA-Z])or(?![a-zA-Z]))"
     r"(?=.*(?:[<>]|\\[lg]e\b))", r"\1\2\\cup "),  # x<1 or x>2
    (r"\\text\s*\{([^{}]*?\b),?\s+(?:and|or)\s*\}", r"\\text{\1},"),  # 7 \text{ goats and } 4
    (r",?\s*(?:\\text\s*\{,?\s*(?:and|or)\s*\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]))", ","),
    # Arguments get braces, the first before the second
    (r"\\(frac|binom)\s*([0-9a-zA-Z]|\\(?!frac)[a-zA-Z]+)", r"\\\1{\2}"),  # \frac12, \frac\pi6
    (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([0-9a-zA-Z]|\\(?!frac)[a-zA-Z]+)", r"\1{\2}"),
    (r"((?:^|[(\[,=])\s*[+-]?(?:[0-9]+\s+)?)([0-9]+)\s*/\s*([0-9]+)(?=\s*(?:$|[,)\]]|\\text))",
     r"\1\\frac{\2}{\3}"),  # 1/2, 1 1/2
    (r"_([0-9A-Za-z])(?![0-9A-Za-z])", r"_{\1}"), (r"\(([0-9A-F]+)\)_", r"\1_"),  # a_1, (52)_8
    (r"\(?\\[pb]?mod\s*\{?([0-9a-z]+)\}?\)?", r"\\pmod{\1}"),  # (\mod 6)
    # Other notations for a set
    (r"^(?:\\text\s*\{\s*)?(?:[Aa]ll )?[Rr]eal(?: number)?s\s*\}?$", r"\\mathbb{R}"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"^\](.*[,;].*)\[$", r"(\1)"), (r"^\](.*[,;].*)\]$", r"(\1]"),  # ]1,2[
    (r"^\[(.*[,;].*)\[$", r"[\1)"),
    # What is at the end
    (r"(?:\\\\|\s|(?<!\.)\.)+$", ""),
    (r"\s+(?=,)", ""), (r"\s+", " "),  # before the next: 100 , 200 is not 100,200
    (r"(?<![0-9A-Za-z]) (?!(?<=[0-9], )[0-9]{3}(?![0-9]))| (?![0-9A-Za-z])", ""),  # not 100, 200
]]
WORDS = (r"percent(?:age)?|pct|degrees?|dollars?|cents?|yuan|euros?|units?|inch(?:es)?|feet|miles?|"
         r"yards?|(?:kilo|centi|milli)?met(?:er|re)s?|(?:kilo)?grams?|lit(?:er|re)s?|mph|hours?|"
         r"minutes?|seconds?|days?|weeks?|months?|years?|square|sq|cubic|per|[Rr]s")
# \text{...} after a number is a unit, or what is counted; but for these. A month, a width are.
NO_UNITS = (r"and|or|not|nor|to|is|are|if|half|halves|(?!mon|wid|dep|leng)[a-z]*ths?|even|odd|one|"
            r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|"
            r"eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|(?:quarter|third|ten|dozen|score|"
            r"gross|pair|couple|hundred|thousand|lakh|crore|[mbtr]+illion|factorial|root)s?|[bm]n|mil|"
            r"squared|cubed|doubled|tripled|plus|minus|times|over|under|below|above|less|more|off|prime|"
            r"negative|point|base|pi|sqrt|wrong|maybe|n?either")
UNIT = r"(?:[a-zA-Z]{2,}|[msghLNJWVAKCF])(?:\^\{?-?[0-9]\}?)?"
ENDS = [(re.compile(pattern), replacement) for pattern, replacement in [  # of each part
    (r"(?<=[0-9])\s*(?:\\text\s*\{)?\s*([aApP])\.?\s*[mM]\b\.?\s*\}?$",
     lambda time: f" {time[1].lower()}m"),
    (r"^\\text\s*\{([^{}]*)\}$", r"\1"),  # \text{east}
    (r"\\?%$", ""),  # 28\%
    *((rf"(?<=[0-9])\s*(?:\\text\s*\{{\s*)?{name}\s*\}}?$", rf"\\times 10^{{{power}}}")
      for name, power in {"thousand": 3, "million": 6, "billion": 9}.items()),
    (r"^([0-9]+)\s*(?:\^\s*)?\{?(?:\\text\s*)?\{?\s*(?:st|nd|rd|th)\b\s*\}*(?: [a-zA-Z]+)?$",
     r"\1"),  # 12th
    (rf"(?:(?<=[0-9)}}])|(?<=\\pi)|(?<=[a-zA-Z])(?=\s*\\text\s*\{{\s*(?:{WORDS}|[kcm]?m)\b))"
     rf"(?:\s*(?:\\cdot\s*)?\\text\s*\{{\s*(?![^{{}}]*\b(?:{NO_UNITS})\b){UNIT}"
     rf"(?:(?:[\s./]|\\cdot)+{UNIT})*[\s.]*\}}(?:\^\{{?-?[0-9]\}}?)?)+$", ""),  # 3 \text{ m}^2
    (rf"(?<=[0-9])(?:\s*(?:(?:{WORDS})(?![a-zA-Z])|sq\.)| (?:[kcm]m|ft|kg|k?m/[hs]|[kMG]?Hz)\b)+"
     r"(?:\^\{?[0-9]\}?)?$", ""),  # 3 cm, 3 percent
    (r"^[Rr]s\.?\s*(?=[0-9])", ""),
]]
# x, \theta, x_{1}, f(x), \vec{v}
NAME = (rf"(?:[a-zA-Z]|\\(?!not|sqrt|log|ln|{TRIG})[a-zA-Z]+(?:\{{[a-zA-Z]\}})?)"
        r"(?:_\{[^{}]*\})?'*(?:\([a-z]\))?")
LABEL = re.compile(  # before "=": a name or names, f(3), P(A), AB, [ABC], |z|, \angle A, the least
    rf"(\(?{NAME}(?:,{NAME})*\)?|(?![xyz])[a-zA-Z]'*\((?:-?[0-9]+|[A-Z]+)\)|P\([^()=]*\)|[A-Z]{{2,4}}|"
    r"\[[A-Z]{3,}\]|\|[a-zA-Z][A-Z]?\||(?:\\(?:angle|triangle|sin|cos|tan) ?)+[A-Z]{1,3}|"
    rf"{NAME}(?::{NAME})+|\\frac\{{[A-Z]{{2}}\}}\{{[A-Z]{{2}}\}}|"
    r"\([^()=]*\)_\{\\?m(?:in|ax)\}|\\text\{(?![^{}]*\bnot\b)[^{}]*\}|)(?:=(?!=)|\\equiv ?)")
QUALIFIER = re.compile(  # for all x, k \in \mathbb Z
    r"[,;]?\(?(?:\\text\{,? ?)?(?:for (?:all|any|every|some)|for(?=\}[a-z])|where)\b"
    r"(?!.*\b(?:for|if|when|otherwise|else)\b)[^,;]*$|"
    r"[,;]?\(?[a-z]\\in ?\\mathbb ?\{?[A-Z]\}?\)?$")
DECIMAL = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?<=[0-9])"
                     r"(?:(?:\\times|\\cdot|\*) ?10\^\{?([+-]?[0-9]{1,3})\}?)?")
POWER = re.compile(r"10\^\{?([+-]?[0-9]{1,3})\}?")
REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
FRACTION = re.compile(r"([+-]?)([0-9]*) ?\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}")
RANGE = re.compile(r"(?:([^<>=≤≥,]+)([<>≤≥]))?([a-zA-Z])([<>≤≥])([^<>=≤≥,]+)")  # 1<x≤2, x>1
BUILDER = re.compile(r"\\?\{[a-zA-Z] ?[|:](.*?)\\?\}|[a-zA-Z]\\in(?! ?\\mathbb) ?(.*)")  # \{x|x>1\}
COLUMN = re.compile(r"\\begin\{[pb]matrix\}([^&]*)\\end\{[pb]matrix\}")
BRACKETS = re.compile(r"[(\[][)\]]|(\\?)\{\1\}")
ARGUMENT = re.compile(r"([a-zA-Z])\(([a-z])\)")
# fmt: on


@lru_cache(maxsize=4096)  # the rollouts of a problem have one gold answer
def normal_form(answer: str) -> str:
    r"""An answer without what does not change its value.

    >>> normal_form(r"\dfrac12 \text{ cm}."), normal_form("$4.5e33$"), normal_form(r"90^\circ")
    ('\\frac{1}{2}', '4.5\\times 10^{33}', '90')
    """
    if answer.isdecimal() and answer.isascii():
        return answer
    answer = COMMAND.sub(lambda c: COMMANDS.get(c[1], c[0]), answer.translate(SYMBOLS).strip())
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    return bare(answer.strip())


def bare(part: str) -> str:
    """Without a unit."""
    for pattern, replacement in ENDS:
        part = pattern.sub(replacement, part)
    return part.strip()


# ------------------------------------------------------------------ what it holds
@lru_cache(maxsize=4096)
def number(text: str) -> Fraction | None:
    """The exact value of a decimal, a fraction or a mixed number in normal form."""
    if match := DECIMAL.fullmatch(text):
        return Fraction(match[1].replace(",", "")) * Fraction(10) ** int(match[2] or 0)
    if match := POWER.fullmatch(text):
        return Fraction(10) ** int(match[1])
    if match := REPEATING.fullmatch(text):
        sign, whole, start, cycle = match.groups()
        nines = 10 ** len(start) * (10 ** len(cycle) - 1)
        value = Fraction(int(whole + start + cycle) - int(whole + start or 0), nines)
    elif match := FRACTION.fullmatch(text):
        sign, whole, top, bottom = match.groups()
        if int(bottom) == 0 or whole and not 0 <= int(top) < int(bottom):
            return None
        value = int(whole or 0) + Fraction(int(top), int(bottom))
    else:
        return None
    return -value if sign == "-" else value


def split(text: str, mark: str = ",") -> list[str]:
    """At the marks that stand in no brackets."""
    if mark not in text:
        return [text]
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "\\":
            depth += text.startswith(r"\begin", i) - text.startswith(r"\end", i)
        if depth == 0 and text.startswith(mark, i):
            parts.append(text[start:i])
            start = i + len(mark)
    return [part.strip() for part in [*parts, text[start:]]]


def both_signs(parts: list[str]) -> list[str]:
    return [re.sub(r"\\pm ?", s, p) for p in parts for s in "+-"[: 1 + (r"\pm" in p)]]


class Form(NamedTuple):
    kind: str  # the brackets around the parts, or what is between them: "," ":" \cup; "" of one
    parts: list[str]
    name: str = ""  # x of x>1


def form(text: str) -> Form:
    r"""How an answer is put together.

    >>> form("(1,2]"), form("1+2")
    (Form(kind='(]', parts=['1', '2'], name=''), Form(kind='', parts=['1+2'], name=''))
    >>> form("x>1"), form(r"3\pm1").parts
    (Form(kind='()', parts=['1', '\\infty'], name='x'), ['3+1', '3-1'])
    """
    while match := BUILDER.fullmatch(text):
        text = match[1] or match[2] or ""
    text = text if "," in text else text.replace(";", ",")
    if match := RANGE.fullmatch(re.sub(r"\\([lg])e ?", lambda m: "≤≥"[m[1] == "g"], text)):
        near, first, name, second, far = match.groups()
        low, high = ((near, first), (far, second))[:: 1 if second in "<≤" else -1]
        if first is None or (first in "<≤") == (second in "<≤"):
            kind = "(["[low[1] in ("≤", "≥")] + ")]"[high[1] in ("≤", "≥")]
            return Form(kind, [low[0] or r"-\infty", high[0] or r"\infty"], name)
    if match := COLUMN.fullmatch(text):
        return Form("()", match[1].split(r"\\"))
    for mark in (r"\cup", ",", ":"):
        if len(parts := split(text, mark)) > 1:
            parts = [bare(part) for part in parts]
            parts = both_signs(parts) if mark == "," else parts
            points = parts[0][:1] == "("  # none is named twice
            return Form(mark, list(dict.fromkeys(parts)) if points else parts)
    start, end = (2, -2) if text[:2] == r"\{" and text[-2:] == r"\}" else (1, -1)
    inner = text[start:end]
    depths = accumulate((c in "([{") - (c in ")]}") for c in inner)
    if BRACKETS.fullmatch(text[:start] + text[end:]) and min(depths, default=0) >= 0:
        parts = [bare(part) for part in split(inner)]
        if start == 2 or len(parts) > 1:
            return Form(text[start - 1] + text[-1], both_signs(parts) if text[-1] == "}" else parts)
    return Form(",", both_signs([text])) if text.count(r"\pm") == 1 else Form("", [text])


# ------------------------------------------------------------------ what only one of two says
def labels(text: str) -> list[tuple[str, str]]:
    """The names before "=", each with what stands behind it; empty if a part has no name."""
    if "=" not in text and r"\equiv" not in text:
        return []
    match = LABEL.match(text)
    if match and match[1].startswith("(") and "," in match[1]:  # (x,y)=(1,2)
        names, values = split(match[1][1:-1]), form(text[match.end() :]).parts
        return list(zip(names, values)) if len(names) == len(values) else []
    one = match and number(text[match.end() :]) is not None  # x=1,000
    parts = [text] if one else split(text)
    found = [LABEL.match(part) for part in parts]
    if match and not any(found[1:]):  # x=1,2
        return [(match[1], part[match.end() * (part is parts[0]) :]) for part in parts]
    return [(label[1], label.string[label.end() :]) for label in found if label] * all(found)


def unlabelled(given: str, answer: str) -> tuple[str, str]:
    """Both without names before "=", in one order, and without what only one of them adds.

    >>> unlabelled("y=2,x=1", "(x,y)=(1,2)"), unlabelled("f(z)=z^2", "f(x)=x^2")
    (('(1,2)', '(1,2)'), ('x^2', 'x^2'))
    """
    cut = [QUALIFIER.sub("", text) or text for text in (given, answer)]
    mine, gold = (full[len(a) :].strip(",;() ") for a, full in zip(cut, (given, answer)))
    if mine == gold or not mine or not gold:
        given, answer = cut
    named, gold_named = labels(given), labels(answer)
    if named and gold_named or {name for name, _ in named + gold_named} <= set("xyz"):
        named.sort()
        gold_named.sort()
    if len(named) == len(gold_named) == 1:  # the name of an argument is free
        (name, value), [(gold_name, _)] = named[0], gold_named
        f, g = ARGUMENT.fullmatch(name), ARGUMENT.fullmatch(gold_name)
        if {name, gold_name} == {"y", "f(x)"}:
            named = [(gold_name, value)]
        elif f and g and f[1] == g[1] and g[2] not in value:
            value = re.sub(rf"(?<![\\a-zA-Z]){f[2]}(?![a-zA-Z])", g[2], value)
            named = [(gold_name, value)]
    if named and gold_named and [n for n, _ in named] != [n for n, _ in gold_named]:
        return given, answer
    if bool(named) != bool(gold_named) and len(split(answer if named else given, "=")) > 1:
        return given, answer
    around = "({})" if len({name for name, _ in gold_named}) > 1 else "{}"  # x=1, y=2 has an order
    mine, gold = (around.format(",".join(v for _, v in pairs)) for pairs in (named, gold_named))
    return mine if named else given, gold if gold_named else answer
