"""A command line: flags with their ranges, and a message in place of whatever else argparse does.

Without torch, which the verifier's program does not wait for.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

LARGEST = 1e9  # where nothing smaller limits a number: float32 holds it, and its square


class Parser(argparse.ArgumentParser):
    """Flags by their whole names. What is no text, and `--flag=--`, end it as any bad flag does."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> Any:
        flag = "a text"
        for argument in sys.argv[1:] if argv is None else argv:
            if argument.startswith("--"):
                flag, _, value = argument.partition("=")
                if value == "--":  # argparse takes it for no value at all
                    self.error(f"argument {flag}: expected a value, found '--'")
            if re.search("[\ud800-\udfff]", argument):  # it could not be written to any file
                self.error(f"argument {ascii(flag)[1:-1]}: {ascii(argument)} is not UTF-8 text")
        return super().parse_args(argv, namespace)


def outside(
    value: float, low: float = -LARGEST, high: float = LARGEST, above: float = -inf, below=inf
) -> str:
    """What a value must be, low <= value <= high and above < value < below; "" if it is."""
    if low <= value <= high and above < value < below:
        return ""
    least = f"at least {low:g}" if above < low else f"above {above:g}"
    most = f"at most {high:g}" if high < below else f"below {below:g}"
    return f"must be {least} and {most}"


def ranged(kind: type, *limits: float, **more: float) -> Callable[[str], Any]:
    """For add_argument: an int or a float of a range, as `outside` has it."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r:.60}: expected {wanted}") from None
        if words := outside(value, *limits, **more):
            raise argparse.ArgumentTypeError(f"{text:.60}: {words}")
        return value

    return parse


def filled(text: str) -> str:
    """For add_argument: a text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path(text: str) -> Path:
    """For add_argument. Path("") would be the directory that one is in."""
    found = Path(filled(text))
    if any(len(os.fsencode(name)) > 255 for name in found.parts) or len(text) > 1000:
        raise argparse.ArgumentTypeError(f"{text:.60}...: longer than a file's name can be")
    return found
