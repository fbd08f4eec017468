"""docs/annotated.md shows the code as it is, and its tests catch its changes."""

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

from docs import annotate

PAGE = annotate.PAGE.read_text("utf-8")
NUMBERS = range(1, PAGE.count("\n## ") + 1)  # of the sections: one change each


def test_the_page_shows_the_code_as_it_is():
    assert annotate.fill(PAGE) == PAGE, "run python docs/annotate.py"


def test_each_section_has_a_change_and_a_test_that_exists():
    changes = annotate.changes(PAGE)
    assert len(changes) == PAGE.count("**If you change it**") == len(NUMBERS) >= 12
    for change in changes:
        file, _, name = change.test.partition("::")
        functions = ast.parse((ROOT / file).read_text("utf-8")).body
        assert name in {getattr(node, "name", "") for node in functions}, change.test


@pytest.mark.parametrize(
    "page, words",
    [
        ("<!-- code luffy.py shapes -->\n```python\n```", "shapes of luffy.py: there is no such"),
        ("<!-- code luffy.py shape: `x` to `gamma)` -->\n```python\n```", "2 lines with `x`, not"),
        ("<!-- code luffy.py shape: `def` to `def` -->\n```python\n```", "not whole statements"),
        ("## A\n[`test_a`](../tests/a.py)\n```diff\n-old\n```", "A: 0 places for the change"),
        ("## A\n```diff\n-old\n```", "A: no test is linked"),
    ],
    ids=["name", "anchor", "statements", "place", "test"],
)
def test_what_is_gone_from_the_code_is_named(page, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        annotate.changes(annotate.fill(page))


def test_markdown_leaves_the_equations_alone():
    r"""It would eat the backslash of `\,`, and take `}_` for emphasis, a line with + for a list."""
    equations = re.findall(r"(?<=\n\n)\$\$\n((?:.+\n)+)\$\$(?=\n\n)", PAGE)
    assert 2 * len(equations) == PAGE.count("$$") >= 20
    for text in equations:
        assert not re.search(r"\\[^a-zA-Z]|[^a-zA-Z0-9]_|[<>*`|]|^[-+=#]", text, re.M), text


# The libraries are slow to import: once for all cases, which are processes of their own.
RUNNER = textwrap.dedent("""
    import os, sys
    import pytest
    import luffy
    for name in list(sys.modules):
        if name.split(".")[0] in ("luffy", "data", "verify", "machinery"):
            del sys.modules[name]
    options = ["-o", "addopts=", "-xq", "--assert=plain"]
    for name in ("cacheprovider", "unraisableexception"):
        options += ["-p", f"no:{name}"]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for case in sys.argv[1:]:
        directory, *tests = case.split("\\n")
        if os.fork() == 0:
            os.chdir(directory)
            sys.path[0] = directory
            output = os.open("output", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1), os.dup2(output, 2)
            os._exit(pytest.main([*options, *tests]))
        os.wait()
""")


def printed(top: Path, cases: list[tuple[dict[str, str], list[str]]]) -> list[str]:
    """By pytest, of some tests on a copy of the tree with other sources of some files."""
    top.mkdir()
    arguments, ignored = [], shutil.ignore_patterns(".*", "__pycache__", "runs", "results")
    for i, (sources, tests) in enumerate(cases):
        shutil.copytree(ROOT, top / str(i), ignore=ignored)
        for file, source in sources.items():
            (top / str(i) / file).write_text(source, "utf-8")
        arguments.append("\n".join([str(top / str(i)), *tests]))
    subprocess.run([sys.executable, "-c", RUNNER, *arguments], cwd=ROOT, check=True)
    return [(top / str(i) / "output").read_text() for i in range(len(cases))]


@pytest.fixture(scope="module")
def caught(tmp_path_factory) -> list[str]:
    """What the test of each change prints, if what then fails passes without it."""
    top, changes = tmp_path_factory.mktemp("copies"), annotate.changes(PAGE)
    outputs = printed(top / "changed", [({c.file: c.source}, [c.test]) for c in changes])
    failed = set(re.findall(r"^FAILED (.+?)(?: - .*)?$", "\n".join(outputs), re.M))
    (output,) = printed(top / "as it is", [({}, sorted(failed))])
    assert re.search(rf"^{len(failed)} passed", output, re.M), output
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("section", NUMBERS)
def test_a_change_is_caught_by_the_test_that_the_page_names(caught, section):
    assert re.search(r"^1 failed", caught[section - 1], re.M), caught[section - 1]
