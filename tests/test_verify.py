"""Rewards: what is right, what only looks right, and that no response can hold the others up."""

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from decimal import Decimal
from fractions import Fraction

import pytest
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grader import RIGHT, WRONG

from verify import Grader, compare, extract_answer, grade

# fmt: off
# One gold answer, and ways to write it.
SAME = {
    "25": ["025", "25.0", "25.", "$25$", r"\text{25}", r"\mathbf{25}", "x=25", r"x_1 = 25", "+25",
           r"25\text{ cm}", r"25 \text{ m}^2", r"25\,\mathrm{kg}", "25 miles", r"25^\circ", "25°",
           r"25\%", "25 percent", r"\$25", r"25\\", "{25}", "10+15=25",
           r"25\text{ m/s}", r"25\ \mathrm{cm^2}", "25 km/h", "f(x)=25", r"\bm{25}"],
    "-0.75": ["-.75", r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4", r"-\frac34"],
    "1.5": [r"1\frac{1}{2}", r"1 \frac12", "1 1/2", "3/2", r"\dfrac{3}{2}"],
    "1234567": ["1,234,567", r"1\,234\,567", "1{,}234{,}567", r"1,\!234,\!567", "1.234567e6"],
    "4.5e33": [r"4.5\times 10^{33}", r"4.5 \cdot 10^{33}", "4.5*10^33", "45e32"],
    "1e-3": ["0.001", r"10^{-3}", "10^(-3)", r"\frac{1}{1000}"], "-1./3": [r"-\frac{1}{3}"],
    r"0.\overline{3}": [r"\frac{1}{3}", "1/3", r".\overline{33}"], "0.16": [r"0.15\overline{9}"],
    r"\frac{\sqrt{2}}{2}": [r"\frac{1}{\sqrt{2}}", "sqrt(2)/2", r"2^{-1/2}", r"\sqrt{0.5}"],
    r"\frac{\pi}{2}": ["pi/2", "π/2", r"\frac{1}{2}\pi", r"\frac\pi2"],
    r"12\pi": [r"12\pi\text{ cm}"], r"3\sqrt{13}": ["3√13", r"\sqrt{117}"],
    r"\infty": ["∞"], r"(5,\infty)": ["x>5", r"(5,+\infty)"],
    r"\frac{1}{m} t": [r"\frac{t}{m}"], "2x+3t": ["3t + 2x"], r"\frac{1}{x}": [r"\frac1x"],
    "(1,2)": ["(1, 2)", r"\left(1,2\right)", "1,2", "(x,y)=(1,2)"],
    r"\{1,2\}": [r"\{2, 1\}", "1,2"], "-1, 2, 10": ["10, -1, 2", "x=-1, x=2, x=10"],
    "100, 200, 300": ["300, 200, 100", "100,200,300", "100 , 200 , 300"],
    "6,8": [r"6 \text{ and } 8", "6 and 8", "8;6"], "E_{1},E_{2}": ["E_1, E_2"],
    "52_8": ["52_{8}", "(52)_8"], "2^{1000}": ["4^{500}"], r"x \in [-2,7]": ["[-2,7]"],
    "y=2x+3": ["2x-y+3=0"], "(x+1)^2": ["x^2+2x+1"], "[0.5,2]": [r"\left[\frac12, 2\right]"],
    "1+274i": ["1+274 i", "274i + 1"], r"-2+2 \sqrt{3} i": [r"-2+2i\sqrt{3}"],
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": [r"\begin{bmatrix} 1 & 2 \\[4pt] 3 & 4 \end{bmatrix}"],
    "C": ["(C)", r"\text{(C)}", r"\textbf{C}", "C.", "c", "C. Heat", r"\text{C) A warm wind}",
          r"\textbf{(C)}\ 5", "Option C"],
    r"\text{Even}": ["even", r"\text{ even }", "Even"], r"\textbf{(D)}\ 12": ["D", "(D)"],
    "{x^2}": ["x^2"], "(0,1)": ["y=1,x=0"], "(3,7)": ["3<x<7", "3<f(x)<7"], "3<x": ["x>3"],
    # What public issues found. Synonyms, sets and intervals,
    r"x\leqslant 2": [r"x\le 2", "x<=2", "x≤2", r"(-\infty,2]", r"\{x\mid x\leq2\}",
                      r"x\in(-\infty;2]"],
    "(1, 2)": ["(1;2)", "]1,2[", "（1，2）", r"\langle 1,2\rangle", "x=1, y=2", "1<t<2",
               r"\begin{pmatrix}1\\2\end{pmatrix}", r"\vec{v}=(1,2)"],
    r"(-\infty,1)\cup(2,\infty)": [r"x<1\text{ or }x>2", r"(2,+\infty)\cup(-infinity,1)"],
    r"\varnothing": [r"\emptyset", r"\{\}", "∅"], r"\mathbb{R}": [r"\text{all real numbers}", "ℝ"],
    # names of values, and what is said of them,
    "7": ["AB=7", "f(3)=7", "P(A)=7", r"\angle A=7^\circ", "[ABC]=7", r"\min=7", "=7", "3+4=7",
          r"7\text{ for all }x", r"\text{The answer is }7", r"\text{the year }7", "7th", "7**1=7"],
    "x=2,y=1": ["(x,y)=(2,1)", "y=1, x=2", "(2,1)"], "2=x": ["x=2"],
    "f(x)=2x": ["f(t)=2t", "2x", "y=2x"],
    "2k": [r"2k, k\in\mathbb{Z}", r"2k\ (k\in\mathbb{Z})"],
    r"n\equiv 1\pmod 6": [r"1 (\mod 6)"],
    # words, units, money, other digits.
    r"\text{The second player}": ["second player"], "No": [r"\text{no}.", "no"],
    "odd $n$": [r"\text{odd } n"], "1000000": [r"1\text{ million}"], "1500": ["1.5 × 10³"],
    "20": ["Rs. 20", "20 Rs", "¥20", r"20\text{ euros}", "20 sq. units", "２０", "|20|",
           r"\text{Total cost: }20"],
    "7,4": [r"7\text{ goats and } 4\text{ hens}", r"4^\circ, 7^\circ"],
    r"\frac{1}{3}": [r"0.\bar3", "0.333...", "0.(3)", r"0.\dot{3}"], "2:3": ["4:6", "2{:}3"],
    r"\frac35": [r"\sin A=\frac35", r"\cos\angle ABC=\frac35", "|AB|=0.6"],
    "3.5": [r"3.5\ \mathrm{m\,s^{-1}}"],
    r"\begin{cases}1,&x>0\\0,&x\le 0\end{cases}": [
        r"\begin{cases}1 & \text{if } x>0\\ 0 & \text{if } x\leq 0\end{cases}"],
    "2:5": [r"2\text{ to }5"], "9:45 a.m.": [r"9:45\text{ AM}"],
    r"\{x:x>1\}": ["x>1", r"(1,\infty)"],
    r"2\sqrt3": [r"2\sqrt3\approx3.46", r"\sqrt{12}≈3.5"], "10:45 a.m.": [r"10:45\text{ am}"],
    r"1-\frac1{\mathrm e}": ["1-e^{-1}"], "3+4i": [r"4\mathrm i+3"], "E_1+E_2": ["E_2+E_1"],
    r"\sin 30^\circ": [r"\frac12"], r"2\binom52": ["20"], "x(x-1)": ["x^2-x"],
    "204_5": ["204", r"204_{\text{five}}", r"204_{\text{base }5}"],
    r"m\frac{dv}{dt}+bv=f": [r"bv+m\frac{d v}{d t}=f"],
}
# One gold answer, and what is wrong though it, or some grader, could take it for right.
DIFFERENT = {
    "123456": ["123457", "123456.1", r"123456\text{ million}"], r"\frac{0}{1}": ["1e0."],
    r"\frac{1}{3}": ["0.3333333", "1/-3"], "0.1": ["0.1000001"], "(0.1,2)": ["(0.1000001,2)"],
    "0": ["10^{-50}", "0.0000001", "False", "e^{-200}", r"0.\overline{9}", r"\text{ cm}"],
    r"\frac{1}{2004!}": [r"\frac{1}{2006!}"], r"\frac{1}{2^{99}}": [r"\frac{1}{2^{98}}"],
    r"\sqrt{2}": ["1.4142135623730951"], r"\pi": ["3.14159265358979", r"\frac{355}{113}"],
    "(1,2)": [r"\{1,2\}", "(2,1)", "[1,2]", "2,1"], r"\{1,2\}": ["(1,2)", r"\{1,2,3\}"],
    "52_8": ["52_9", "42"], "42": ["52_8", "4\x002", r"\frac{42}{0}", r"\frac{0}{0}", "42, 43"],
    "2": ["1 or 2", r"1 \text{ or } 2", r"2\text{, }3", r"2\text{, 3}", "1,2", "x=2=3", "2 sin x",
          r"2\text{ or }x=3", "nan", r"\text{the answer}", "two million", "2x", "2 t", "2t", "1=2"],
    "25": ["2x=5", r"\not=25", "x^2=25", "x+y=25", "26=25=25", r"25\text{, or maybe not}", "25'",
           r"25\text{ (or thirty)}", r"25\text{ squared}", r"25\text{ lakh}", r"25\mathrm{k}",
           r"25\approx 30", r"25\mod 26", "25^T", "25...", r"24@\(25\)", "2 5", r"2\,5"],
    "3": ["1 2", r"3\text{ quarters}"], "7": [r"7\text{ minus one}", r"7\text{ }^2", "7~0"],
    "1/2": [r"\frac{1}{3}|\frac{1}{2}", r"\frac{1}{3},,\frac{1}{2}", r"\frac13?\frac12"],
    "1.5": [r"\frac{1}{2}"], "1234": ["12,34"], "2x+3": ["2x+3t", "2x + 3 m"], "x^2": ["x_2"],
    "58,500": ["500,58", "500, 58", r"\{58,500\}"], "1,2": ["1,1,2", "(2,1)"], "6": ["√16"],
    "m": ["M"],
    "A": ["A, B, C, D", "ABCD", "A or B", "A. or B.", "B", "(a) or (b)", "a)b)c)d)", "A. or b"],
    "2+3": [r"2+3\mathrm{i}"], r"a+2\mathbf{b}": ["a+2"], "x": [r"x\text{y}"], "N": ["n"],
    r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}": [r"\frac{2}{3}"], r"\text{listen}": ["silent"],
    r"\text{ellipse}": [r"\text{ellipse}\text{, hyperbola}"], "1+2i": ["1-2i"],
    "": ["", "42", "None"], "2^{1000}": ["2^{1000}+1"], "x+1": ["y+1", "x+1.0000001", "X+1"],
    # What public issues found.
    "16": [r"\binom52\binom42"], r"\frac{20}3": [r"6\left(\frac23\right)"], "-3,2": ["-3<x<2"],
    "5": ["(1)(4)", "5_a", r"5\text{ hundredths}", r"5\text{ tens}", "[5,5]", "5^2=5", "5, 5"],
    "(-3,2)": [r"-3\le x<2"], r"1,2,3,\ldots": ["1,2,3"], "A^T": ["A"], "f'(x)=2x": ["f(x)=2x"],
    r"\sin 1^\circ": [r"\sin 1"], "2^{200}": [r"2^{200}+\sqrt2"], "10:30": ["1:3"],
    "30:15": ["15:30"], "x=1,y=2": ["x=2,y=1"], "x>1": ["y>1", "(1,2)"], "5,12,130": ["512130"],
    r"2\sqrt{3}": [r"2\sqrt3\approx 5"], "x+2": ["x+1≈3", "x+2≈3"], r"\sqrt2": [r"\sqrt2|_{0}"],
    "No": ["On"], r"\frac{\sqrt3}2": [r"\sin 60^\circ"], "120": ["C_{10}^3", "5!", r"\frac{240}2"],
    "70": [r"\binom84", r"\binom{8}{4}"], "2.0": [r"\log_2 4", r"\gcd(4,6)", r"\frac42"],
    "204_5": ["204_6", "203", r"204_{\text{six}}"], "-37_8": ["-37_9"], "(52_8,1)": ["(52_9,1)"],
    r"\frac{dv}{dt}": ["0", r"\frac{dm}{dt}"], "1+1=2": ["2+2=4"], r"0.56 = 56\%": [r"0.26 = 56\%"],
    # Copied from the question: an inequality to be solved, 10 times a power of ten.
    r"(-\infty,-5)\cup(7,\infty)": ["x^2-2x>35"], "(-2,2)": ["x^2<4", "|x|<2"],
    "1000": [r"10\cdot10^2"], "100.0": [r"10\times10", "10^2"],
    # Times, names with an order, what is no unit and no label, letters with more than their text.
    "4:30": [r"\frac{2}{15}"], "(0,1)": ["y=0,x=1"], "29": [r"29\text{ bn}", r"28\frac{1}{1}"],
    "20.0": [r"20\text{ two}", r"20\text{ is wrong}", r"\sin=20", r"\sqrt=20"],
    "B": ["D=B", "(B)^2", "(B), 17", "(B)+C"],
    # Products of matrices, other functions, infinity, and words with a number.
    r"\begin{pmatrix}1&2\\0&1\end{pmatrix}": [r"\begin{pmatrix}1&1\\0&1\end{pmatrix}^2",
        r"\begin{pmatrix}1&1\\0&1\end{pmatrix}\begin{pmatrix}1&1\\0&1\end{pmatrix}"],
    r"3\sqrt2": [r"\Gamma(4)\frac{\sqrt2}2"], r"05\!:\!00": [r"\frac70"],
    "Friday the 13th": ["13th Friday the", "Fridya the 13th"], r"\text{June 20}": ["20 nuJe"],
    r"\text{all } n \text{ odd}": [r"\text{all } n \text{ even}"], r"n\text{ prime}": ["n"],
    r"3\text{ red}, 4\text{ blue}": [r"4\text{ red and }3\text{ blue}"],
    r"\Delta": [r"\delta"], r"1,4,9,\ldots": [r"4,1,9,\ldots"],
    r"0.\overline{1}": ["0", r"0.\overline{2}", r"0.\overline{12}"], "3, 5, 7": ["(7,5,3)"],
}
RESPONSES = [
    (r"first \boxed{1}, no: \boxed{2}", "2", 1), (r"<think>\boxed{1}</think>\boxed{2}", "2", 1),
    (r"\boxed{1} and then \boxed{unfinished", "1", 1), (r"\fbox{2}", "2", 1),
    (r"\boxed {2}", "2", 1), (r"\[\boxed{ \frac{1}{2} }\]<|im_end|>", "0.5", 1),
    ("the answer is 2", "2", 0), (r"<think>\boxed{2}</think> it is 2", "2", 0), ("", "2", 0),
    (r"<think>\boxed{2}", "2", 0), (r"\boxed{2", "2", 0), (r"\boxed{1} no, \boxed{2}", "1", 0),
    (r"\boxed{2}3", "23", 0), (r"\boxed{}", "2", 0),
]
# fmt: on


@pytest.mark.parametrize("answer", SAME)
def test_one_value_many_ways_to_write_it(answer):
    for way in [answer, *SAME[answer]]:
        assert grade(rf"so it is $\boxed{{{way}}}$.", answer) == 1.0, way


@pytest.mark.parametrize("answer", DIFFERENT)
def test_another_value_is_wrong(answer):
    for other in DIFFERENT[answer]:
        assert grade(rf"so it is $\boxed{{{other}}}$.", answer) == 0.0, other


def test_only_the_last_complete_box_after_the_thought_counts():
    for response, answer, reward in RESPONSES:
        assert grade(response, answer) == reward, response
    assert extract_answer(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert extract_answer(r"\boxed{a\boxed{b}}") == "b"
    assert extract_answer("no box") is None
    start = time.monotonic()
    assert extract_answer(r"\boxed{" * 100_000 + "2}" + "{" * 100_000) == "2"
    assert time.monotonic() - start < 5  # quadratic, it would be minutes


def test_lenient_is_the_official_reward():
    """math-verify on what is between the first two </think>; near-values, and e for Euler's."""
    for response, answer, reward in [
        ("the answer is $2$", "2", 1),
        ("<think>2</think> it is 2", "2", 1),
        ("<think> 2", "2", 0),
        (r"<think>\boxed{2}</think> I do not know", "2", 0),
        (r"\boxed{3}", "2", 0),
        (r"<think></think>\boxed{1}</think>\boxed{2}", "1", 1),
        (r"\boxed{0.333333}", "1/3", 1),
        (r"\boxed{4.5 \times 10^{33}}", "4.5e33", 0),
    ]:
        assert grade(response, answer, lenient=True) == reward, response


@pytest.mark.parametrize("left", [r"\text{m} ", r"\frac1", "1 ", r"1\text{ a}", "x=", "1,", "a/"])
def test_no_text_takes_long_in_the_trainers_own_process(left):
    """A pattern that backtracks would be exponential here, and hold up the rank for ever."""
    for right in ("", "!", " ", "^2", "{", "}", r"\,", "5", "a", "=", ",", "."):
        for start, end in (("", ""), ("5", "!"), ("(", ")"), (r"\text{", "}"), ("C.", "!")):
            text = (start + (left + right) * 1000)[:990] + end
            begin = time.process_time()
            compare(text, text + "1")
            compare(text[:300], "C")
            assert time.process_time() - begin < 2, text[:60]


# ------------------------------------------------------------------ properties
def renderings(value: Fraction) -> list[str]:
    sign, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    ways = [
        rf"\frac{{{value.numerator}}}{{{bottom}}}",
        rf"{sign}\dfrac{{{top}}}{{{bottom}}}",
        rf"\frac{{{2 * value.numerator}}}{{{2 * bottom}}}",
        f"{value.numerator}/{bottom}",
        rf"\frac{{{-value.numerator}}}{{{-bottom}}}",
    ]
    if top > bottom > 1:
        ways += [rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"]
    if bottom == 1:
        ways += [f"{sign}0{top}", f"{value.numerator}.0", f"{value.numerator:,}", f"{sign}{top}."]
        ways += [f"{value.numerator:,}".replace(",", r"\,"), rf"{sign}{top}e0"]
    if 10**12 % bottom == 0:  # it ends
        decimal = Decimal(value.numerator) / bottom
        ways += [f"{decimal:f}", f"{decimal:e}"]
    return [
        dressed
        for way in ways
        for dressed in (
            way,
            f"${way}$",
            f" {way} ",
            rf"{way}\text{{ cm}}",
            f"x={way}",
            rf"{way}^\circ",
            way.rstrip(".") + ".",
        )
    ]


values = st.fractions(-(10**6), 10**6, max_denominator=64)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(values, values)
def test_a_gold_equals_itself_in_every_rendering_and_no_other(value, other):
    gold, *ways = renderings(value)
    for way in ways:
        assert grade(rf"\boxed{{{way}}}", gold) == 1.0, (way, gold)
        assert grade(rf"\boxed{{{gold}}}", way) == 1.0, (gold, way)
    for way in renderings(other) if other != value else ():
        assert grade(rf"\boxed{{{way}}}", gold) == 0.0, (way, gold)


names = st.lists(st.sampled_from("abcdehkmnpqrtuvw"), min_size=3, max_size=5, unique=True)
numbers = st.lists(st.integers(2, 99), min_size=3, max_size=4, unique=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(names, numbers, st.data())
def test_another_order_is_another_word_ratio_or_tuple(letters, parts, data):
    for items, mark, around in ((letters, "", "{}"), (parts, ":", "{}"), (parts, ",", "({})")):
        gold = around.format(mark.join(map(str, items)))
        other = around.format(mark.join(map(str, data.draw(st.permutations(items)))))
        assert grade(rf"\boxed{{{other}}}", gold) == float(other == gold), (other, gold)
        assert grade(rf"\boxed{{{other}}}", gold.upper()) == float(other == gold)
    labelled = ",".join(f"{letter}={value}" for letter, value in zip(letters, parts))
    assert grade(rf"\boxed{{{labelled}}}", labelled.replace(",", ", ")) == 1.0
    swapped = ",".join(f"{letter}={value}" for letter, value in zip(letters, parts[1:]))
    assert grade(rf"\boxed{{{swapped}}}", labelled) == 0.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(-99, 98), st.integers(1, 9))
def test_brackets_are_part_of_an_interval(low, size):
    """Its end points, an interval of another kind, or none of its brackets: all wrong."""
    ends = f"{low},{low + size}"
    kinds = {f"{a}{ends}{b}": i for i, (a, b) in enumerate(["()", "(]", "[)", "[]"])}
    signs = {rf"{low}{a}x{b}{low + size}": i for i, (a, b) in enumerate(
        [("<", "<"), ("<", r"\le "), (r"\le ", "<"), (r"\le ", r"\le ")])}  # fmt: skip
    for way, kind in (kinds | signs).items():
        for gold, gold_kind in (kinds | signs).items():
            assert grade(rf"\boxed{{{way}}}", gold) == float(kind == gold_kind), (way, gold)
        if way != f"({ends})":  # a point may be written without them
            assert grade(rf"\boxed{{{ends}}}", way) == 0.0, way
        if way not in kinds:
            assert grade(rf"\boxed{{{way}}}", ends) == 0.0, way
    assert grade(rf"\boxed{{{low},\infty}}", rf"({low},\infty)") == 0.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 40))
def test_a_computation_is_no_answer(a, b):
    """It can be copied from the problem; a chain that ends in the value cannot."""
    computations = {
        f"{a}+{b}": a + b, rf"{a}\cdot {b}": a * b, f"({a})({b})": a * b, f"{a}-{b}": a - b,
        rf"\frac{{{a * b}}}{{{b}}}": a, f"{a}^2": a * a, rf"\sqrt{{{b * b}}}": b, f"|-{a}|": a,
        rf"\binom{{{a}}}{{2}}": a * (a - 1) // 2, rf"\gcd({a},{a * b})": a, "10^2": 100,
    }  # fmt: skip
    for computation, value in computations.items():
        assert grade(rf"\boxed{{{computation}}}", str(value)) == 0.0, computation
        assert grade(rf"\boxed{{({computation},{b})}}", f"({value},{b})") == 0.0, computation
    assert grade(rf"\boxed{{{a}+{b}={a + b}}}", str(a + b)) == 1.0
    assert grade(rf"\boxed{{{a}+{b + 1}={a + b}}}", str(a + b)) == 0.0
    for operation, value in {r"\sin\frac{\pi}{3}": r"\frac{\sqrt{3}}{2}", "i^{3}": "-i"}.items():
        assert grade(rf"\boxed{{{operation}+{a}}}", f"{a}+{value}") == 0.0
        assert grade(rf"\boxed{{{a}+{value}}}", f"{operation}+{a}") == 1.0


PIECES = st.sampled_from(
    [
        *"{}()[]\\^_$%,.+-*/=<>!&~ x2i",
        r"\frac",
        r"\sqrt",
        r"\boxed{",
        "e5",
        r"\text{",
        r"\left(",
        r"\pi",
        r"\begin{pmatrix}",
        "</think>",
        "<think>",
    ]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text() | st.lists(PIECES).map("".join), st.text(max_size=20))
def test_grading_is_total(text, answer):
    """NUL bytes, lone surrogates, half a formula: whatever it is, it is right or wrong."""
    assert extract_answer(text) is None or extract_answer(text) in text
    assert grade(text, answer) in (0.0, 1.0)
    assert grade(rf"\boxed{{{text}}}", "x+1") in (0.0, 1.0)


# ------------------------------------------------------------------ the command
def test_the_command_explains_itself():
    def explain(*args):
        return subprocess.run(
            [sys.executable, "verify.py", *args],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        ).stdout

    strict = explain(r"it is \boxed{\dfrac12}", "0.5")
    assert r"\dfrac12" in strict and r"\frac{1}{2}" in strict and "right, reward 1.0" in strict
    assert "compared as numbers" in strict and " ms" in strict
    assert "no complete box" in explain("it is 0.5", "0.5", "--strict")
    assert "right, reward 1.0" in explain("it is 0.5", "0.5", "--lenient")


# ------------------------------------------------------------------ public cases
def cases(name: str) -> list[tuple[str, str, str, bool | None]]:
    """(tier or category, response, gold answer, expected)"""
    if not (SHARED / name).exists():
        pytest.skip("needs the shared cases")
    found = []
    for case in map(json.loads, (SHARED / name).read_text().splitlines()):
        if "prediction_repeat" in case:
            prefix, unit, n, suffix = case["prediction_repeat"]
            close, m, end = case.get("prediction_repeat_close") or ("", 0, "")
            case["prediction"] = prefix + unit * n + suffix + close * m + end
        tier = "policy" if case.get("policy") else case.get("tier", "all")
        found.append((tier, case["prediction"], case["gold"], case["expected"]))
    return found


@pytest.mark.parametrize(
    "name, tier, accuracy, times",
    [
        ("verify_cases.jsonl", "core", 0.988, 1),
        ("verify_unfinished.jsonl", "all", 1.0, 1),
        # but for rows whose verdict is a choice
        pytest.param("verify_hunt.jsonl", "all", 1 - 32 / 736, 1, marks=pytest.mark.slow),
        # two of its labels take a computation (0.1+0.2 for 0.3) for an answer
        pytest.param("verify_adversarial.jsonl", "all", 1 - 2 / 242, 2, marks=pytest.mark.slow),
    ],
)
def test_public_cases(name, tier, accuracy, times, tmp_path, monkeypatch):
    """Accuracy, no false positive, no file made; right verdicts on normal answers in between."""
    monkeypatch.chdir(tmp_path)
    counts = defaultdict(Counter)
    listed = cases(name)
    with Grader(workers=3, timeout=5.0) as grader:
        for _ in range(times):
            rewards = grader([job for _, *job, _ in listed for job in (job, RIGHT, WRONG)])
            assert rewards[1::3] == [1.0] * len(listed) and rewards[2::3] == [0.0] * len(listed)
        for (of_tier, _, _, expected), reward in zip(listed, rewards[::3]):
            if expected is not None:
                counts[of_tier][bool(reward), expected] += 1
        assert "crash" not in grader.failures
    found = counts[tier]
    assert (found[True, True] + found[False, False]) / found.total() >= accuracy
    assert found[True, False] == 0
    assert not list(tmp_path.iterdir())
