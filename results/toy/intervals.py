"""Intervals of a handful of seeds, and what may be said because of them.

A 95 % interval is Student's over seeds. Where problems were drawn, too, their part is added in
squares, so that it is about other seeds and other problems.
"""

import math
import re
from functools import cache
from statistics import NormalDist

import numpy as np

NOT_RUN = "not run yet"
ENOUGH = 3  # seeds, for an interval and a verdict


@cache
def student(n: int, level: float) -> float:
    """The t that n - 1 degrees of freedom exceed in absolute value with chance 1 - level."""
    angle = np.linspace(0, np.pi / 2, 100_001)  # t = √(n-1) tan(angle) has density cos^(n-2)
    mass = np.cumsum(np.cos(angle) ** (n - 2))
    return math.sqrt(n - 1) * math.tan(np.interp(level, mass / mass[-1], angle))


def estimate(
    values: np.ndarray, low: float = -np.inf, high: float = np.inf, m: int = 1
) -> tuple[float, float, float]:
    """(seeds, problems) -> the mean and its 95 % interval, within [low, high]; NaN for one seed.

    m: of so many intervals all hold with 95 % (Bonferroni).
    """
    mean, (n, problems), level = float(values.mean()), values.shape, 1 - 0.05 / m
    if n == 1:
        return mean, math.nan, math.nan
    half = student(n, level) * values.mean(1).std(ddof=1) / math.sqrt(n)
    if problems > 1:  # the seeds' noise on a problem is in both parts: a little too long
        z = NormalDist().inv_cdf((1 + level) / 2)
        half = math.hypot(half, z * values.mean(0).std(ddof=1) / math.sqrt(problems))
    return mean, float(np.clip(mean - half, low, mean)), float(np.clip(mean + half, mean, high))


def verdict(
    values: np.ndarray | None,
    margin: float = 0.0,
    m: int = 1,
    words: tuple[str, str] = ("reproduced", "the opposite"),
) -> str:
    """Of a claim that a difference is above 0 or, with a margin, that it is within ± margin.

    Bold where it holds for m claims together, too.
    """
    if values is None:
        return NOT_RUN
    if len(values) < ENOUGH:
        return f"undecided: {seeds_in_words(len(values))}"

    def decide(m: int) -> str:
        _, low, high = estimate(values, m=m)
        yes = -margin < low and high < margin if margin else low > 0
        no = low > margin or high < -margin if margin else high < 0
        return words[0] if yes else words[1] if no else "undecided"

    once = decide(1)
    return f"**{once}**" if once != "undecided" and decide(m) == once else once


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """0.5 -> .50"""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.strip("+-")
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def interval(
    values: np.ndarray | None, digits: int = 2, sign: bool = False, bounds: tuple = ()
) -> str:
    if values is None:
        return NOT_RUN
    value, *ends = estimate(values, *bounds)
    text = ", ".join(number(x, digits, sign) for x in ends)
    text = text if len(values) >= ENOUGH else seeds_in_words(len(values))
    return f"{number(value, digits, sign)} [{text}]"


def seeds_in_words(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def align(*arrays: np.ndarray) -> list[np.ndarray]:
    """Every n-th problem, where another evaluation has only those."""
    fewest = min(map(len, arrays))
    return [array[:: len(array) // fewest] for array in arrays]


def stack(found: dict[int, np.ndarray]) -> np.ndarray | None:
    """Seed -> problems: (seeds, problems)"""
    return np.stack([found[seed] for seed in sorted(found)]) if found else None
