"""Intervals of a handful of seeds, and what may be said because of them.

Intervals are 95 % intervals of a bootstrap that draws seeds and problems anew, of what has no
problems (lengths, entropies) seeds alone.
"""

import math
import re
from functools import cache

import numpy as np

NOT_RUN = "not run yet"
ENOUGH = 3  # seeds, for an interval and a verdict
DRAWS = 4000


@cache
def student(n: int, level: float) -> float:
    """The t that n - 1 degrees of freedom exceed in absolute value with chance 1 - level."""
    angle = np.linspace(0, np.pi / 2, 100_001)  # t = √(n-1) tan(angle) has density cos^(n-2)
    mass = np.cumsum(np.cos(angle) ** (n - 2))
    return math.sqrt(n - 1) * math.tan(np.interp(level, mass / mass[-1], angle))


@cache
def drawn(shape: tuple[int, int]) -> list[np.ndarray]:
    """How often each seed and each problem was drawn: (DRAWS, seeds), (DRAWS, problems)."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in shape]


def bootstrap(
    values: np.ndarray, low: float = -np.inf, high: float = np.inf, m: int = 1
) -> tuple[float, float, float]:
    """(seeds, problems) -> the mean and its 95 % interval, within [low, high]; NaN for one seed.

    A handful of seeds vary less among themselves than they should, and their quantiles are not
    normal: so each seed's distance from the mean is widened by sqrt(n / (n - 1)) and by Student's t
    over 1.96, which is 1.58 for five. m: of so many intervals all hold with 95 % (Bonferroni: each
    arm of the interval is longer by the ratio of Student's quantiles).
    """
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return mean, math.nan, math.nan
    factor = student(n, 0.95) / 1.96 * math.sqrt(n / (n - 1))
    wider = values + (factor - 1) * (values.mean(1, keepdims=True) - mean)
    seeds, problems = drawn(values.shape)
    means = np.einsum("dp,dp->d", seeds @ wider, problems) / values.size
    longer = student(n, 1 - 0.05 / m) / student(n, 0.95)
    ends = mean + longer * (np.percentile(means, (2.5, 97.5)) - mean)
    return mean, float(np.clip(ends[0], low, mean)), float(np.clip(ends[1], mean, high))


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
        _, low, high = bootstrap(values, m=m)
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
    value, *ends = bootstrap(values, *bounds)
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
