"""What the README and the documents say of the code is so."""

import ast
import re
from functools import partial

import pytest
import torch
from conftest import ALL_ROWS, ROOT

import luffy
from luffy import Config, parse_args
from machinery import plan
from machinery.flags import differences

README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "results" / "README.md",
        ROOT / "LOG.md",
        ROOT / "benchmarks" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
# [`name`](file.py): a function, a class, a method or a constant of that file
NAMES = sorted(
    {
        (name, document.parent / file, document.name)
        for document in DOCUMENTS
        for name, file in re.findall(
            r"\[`(\w+(?:\.\w+)?)`\]\(([\w./]+\.py)\)", document.read_text()
        )
    }
)


def test_there_are_links():
    assert len([name for name, _, document in NAMES if document == "README.md"]) >= 12


@pytest.mark.parametrize("name, file, document", NAMES, ids=lambda x: getattr(x, "name", x))
def test_every_name_is_in_the_file_that_it_links_to(name, file, document):
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{part.name}"
                for part in node.body
                if isinstance(part, ast.FunctionDef)
            }
    assert name in found, f"{document}: {name} is not in {file.name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, f"{document.name}: {link}"


def test_the_table_of_methods_is_the_one_that_the_code_gives():
    from results import methods

    assert methods.table() in README and methods.fill(README) == README
    assert set(methods.NAMES) <= set(ALL_ROWS)  # a fork's own row need not be there


def test_the_formulas_of_w_are_the_slopes_of_the_objective():
    from results.methods import W, w_of

    pi = torch.tensor([1e-3, 0.05, 0.1, 0.3, 0.9], dtype=torch.float64)
    assert set(W) == {luffy.Config(**luffy.ALGORITHMS[row]).shaping for row in ALL_ROWS}
    for shaping, (_, formula) in W.items():
        for gamma in (0.1, 0.3):
            torch.testing.assert_close(w_of(shaping, pi, gamma), formula(pi, gamma))


PLANS = [
    pytest.param(document, command.strip(), marks=[] if "8x80" in command else pytest.mark.slow)
    for document in DOCUMENTS
    if document.name != "README.md"  # it has the sum alone
    for command in re.findall(r"^python luffy.py (.*--dry_run [^#\n]*)", document.read_text(), re.M)
]


@pytest.mark.parametrize("document, command", PLANS, ids=lambda x: getattr(x, "name", x))
def test_the_plans_are_what_the_program_prints(capsys, document, command):
    cfg = parse_args(command.split())
    plan.show(cfg, partial(luffy.check, cfg), differences(cfg, Config()))
    printed = capsys.readouterr().out
    verdict = printed.splitlines()[-1]
    shown = f"{verdict}\n" if "DOES NOT FIT" in verdict else printed
    assert f"```\n{shown}```\n" in document.read_text()
    if "8x80" in command:
        needed = re.search(r"updating +([\d.]+)\n *in all", printed)[1]
        assert f"{needed} of {verdict.split()[-2]} GiB" in README
        count, weights, state = re.search(
            r"(\d+) checkp.* of ([\d.]+) GiB, and ([\d.]+)", printed
        ).groups()
        disk = int(count) * float(weights) + 2 * float(state)
        assert f"{disk:.0f} GiB of disk, {8 * float(weights):.0f} of host memory" in README


def test_the_defaults_that_are_quoted_are_those_of_the_code():
    text = (ROOT / "docs" / "differences.md").read_text()
    quoted = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, re.M)
    assert len(quoted) >= 8
    for field, value in quoted:
        assert repr(getattr(Config(), field)) == value, field


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^pip install -r (requirements-\w+.txt) && (.*)$", README, re.M)
    assert len(commands) == 2
    for file, command in commands:
        assert f"-r {file}" in ci
        assert any(line.startswith(command) for line in ci.splitlines()), command
