"""What the README and the documents say of the code is so."""

import ast
import re
from functools import partial

import pytest
from conftest import ROOT

import luffy
from luffy import ALGORITHMS, Config, parse_args
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


def test_the_table_of_algorithms_is_the_one_in_the_code():
    """For the rows that the README has; a fork's own row need not be there."""
    section = README.split("## Algorithms")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M))
    assert len(rows) >= 9
    for name, row in rows.items():
        cfg = Config(**ALGORITHMS[name])
        shaping = {"luffy": "x/(x+γ)", "none": "x", "log": "log x"}[cfg.shaping]
        advantage = "group" if cfg.trace_advantage is None else f"{cfg.trace_advantage:g}"
        assert row.split(" | ")[1:6] == [
            f"{cfg.rollouts}+{cfg.traces}",
            shaping if cfg.traces else "-",
            "none" if cfg.clip is None else f"{cfg.clip:g}",
            advantage if cfg.traces else "-",
            cfg.baseline,
        ], name


PLANS = [
    (document, command.strip())
    for document in DOCUMENTS
    for command in re.findall(r"^python luffy.py (.*--dry_run [^#\n]*)", document.read_text(), re.M)
]
counted = {}  # activations: the slow part of a plan, and the same in several


@pytest.mark.parametrize("document, command", PLANS, ids=lambda x: getattr(x, "name", x))
def test_the_plans_are_what_the_program_prints(capsys, monkeypatch, document, command):
    def activation_bytes(config, *args, original=plan.activation_bytes):
        key = config.hidden_size, str(args)
        counted[key] = counted.get(key) or original(config, *args)
        return counted[key]

    monkeypatch.setattr(plan, "activation_bytes", activation_bytes)
    cfg = parse_args(command.split())
    plan.show(cfg, partial(luffy.check, cfg), differences(cfg, Config()))
    printed = capsys.readouterr().out
    if "1x24" in command:
        assert "DOES NOT FIT" in printed  # as the text says
    else:
        assert f"```\n{printed}```\n" in document.read_text()


def test_the_core_that_is_quoted_is_the_one_in_the_code():
    """README's excerpt of token_loss: its lines are lines of it, in that order."""
    source = (ROOT / "luffy.py").read_text().split("def token_loss")[1].split("\ndef ")[0]
    quoted = re.search(r"```python\n# token_loss.*?\n(.*?)```", README, re.S)[1].splitlines()
    position = 0
    for line in filter(str.strip, quoted):
        assert line.strip() in source[position:], line
        position = source.index(line.strip(), position)


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^pip install -r (requirements-\w+.txt) && (.*)$", README, re.M)
    assert len(commands) == 2
    for file, command in commands:
        assert f"-r {file}" in ci
        assert any(line.startswith(command) for line in ci.splitlines()), command
