"""The excerpts of docs/annotated.md, from names in the source; and its changes, each with a test.

    python docs/annotate.py

The page is written by hand, but for the code blocks that follow one of

    <!-- code luffy.py shape -->                                a function, a class or a constant
    <!-- code luffy.py train: `for step in` to `due = ` -->     some lines of it

A function comes without its docstring. An anchor is a string that one line of it holds, and no
other. A `diff` block is a change of lines in its section's excerpts; the test that is linked before
it then fails: tests/test_annotated.py makes each change and runs its test.
"""

import ast
import re
import sys
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from machinery.printing import print_what_can_be  # noqa: E402

PAGE = ROOT / "docs" / "annotated.md"
CODE = re.compile(
    r"^<!-- code (\S+) ([\w.]+)(?:: `(.+)` to `(.+)`)? -->\n```python\n(?:.*\n)*?```$", re.M
)
DIFF = re.compile(r"^```diff\n((?:.*\n)*?)```$", re.M)
TEST = re.compile(r"\[`(test_\w+)`\]\(\.\./(tests/\w+\.py)\)")


class Excerpt(NamedTuple):
    file: str
    title: str
    numbers: list[int]  # of its lines in the file, from 0
    text: str  # dedented


class Change(NamedTuple):
    file: str
    source: str  # of the whole file, changed
    test: str  # file::name
    diff: str


def excerpt(file: str, name: str, first: str | None = None, last: str | None = None) -> Excerpt:
    """Of a name in a file; from the line with `first` to the line with `last`, if they are given.

    Raises ValueError if the name is not there, an anchor is not in exactly one line of it, or the
    lines are not whole statements.
    """
    source = (ROOT / file).read_text("utf-8")
    lines, where = source.splitlines(), f"{PAGE.name}: {name} of {file}"
    node: Any = ast.parse(source)
    for part in name.split("."):
        found = [child for child in ast.walk(node) if part in names_of(child)]
        if not found:
            raise ValueError(f"{where}: there is no such name")
        node = found[0]
    numbers = list(range(node.lineno - 1, node.end_lineno))
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
        said = range(node.body[0].lineno - 1, node.body[0].end_lineno)
        numbers = [i for i in numbers if i not in said]
    if first and last:
        ends = []
        for anchor in (first, last):
            held = [i for i in numbers if anchor in lines[i]]
            if len(held) != 1:
                raise ValueError(f"{where}: {len(held)} lines with `{anchor}`, not one")
            ends += held
        numbers = [i for i in numbers if ends[0] <= i <= ends[1]]
    text = dedent("\n".join(lines[i] for i in numbers))
    try:
        ast.parse(text)
    except SyntaxError:
        raise ValueError(f"{where}: `{first}` to `{last}` are not whole statements") from None
    title = f"{name} in {file}" + " (excerpt)" * bool(first)
    return Excerpt(file, title, numbers, text)


def names_of(node: ast.AST) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", []) or [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def fill(page: str) -> str:
    """The page with its excerpts as the code is now."""

    def block(match: re.Match) -> str:
        made = excerpt(*match.groups())
        head = match[0].partition("\n")[0]
        return f"{head}\n```python\n# {made.title}\n{made.text}\n```"

    return CODE.sub(block, page)


def changes(page: str) -> list[Change]:
    """The diff blocks. ValueError if one has no test or does not fit its section's excerpts."""
    found = []
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        title = section.partition("\n")[0]
        excerpts = [excerpt(*match.groups()) for match in CODE.finditer(section)]
        for match in DIFF.finditer(section):
            tests = TEST.findall(section[: match.start()])
            if not tests:
                raise ValueError(f"{PAGE.name}, {title}: no test is linked before the change")
            file, source = apply(match[1], excerpts, title)
            test, of = tests[-1]
            found.append(Change(file, source, f"{of}::{test}", match[1]))
    return found


def apply(diff: str, excerpts: list[Excerpt], title: str) -> tuple[str, str]:
    """-> file, its source after the change. The old lines stand in one place of the excerpts."""
    old, new = ([d[1:] for d in diff.splitlines() if d[:1] in f"{sign} "] for sign in "-+")
    places = []
    for made in excerpts:
        lines = made.text.splitlines()
        starts = range(len(lines) - len(old) + 1)
        places += [(made, i) for i in starts if lines[i : i + len(old)] == old]
    if len(places) != 1:
        raise ValueError(f"{PAGE.name}, {title}: {len(places)} places for the change\n{diff}")
    made, i = places[0]
    lines = (ROOT / made.file).read_text("utf-8").splitlines()
    start, end = made.numbers[i], made.numbers[i + len(old) - 1]
    margin = lines[start].removesuffix(old[0])
    lines[start : end + 1] = [indent(line, margin) for line in new]
    return made.file, "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_what_can_be()
    before = PAGE.read_text("utf-8")
    after, number = fill(before), len(changes(before))
    PAGE.write_text(after, "utf-8")
    state = "as before" if after == before else "made anew"
    print(f"{PAGE.name}: {number} changes, excerpts {state}")
