"""The house: arrows point one way, each module is loaded once, and small stays small."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT, run

import machinery

ON_TOP = ("verify", "data", "luffy", "eval")  # each may import those before it
MACHINERY = sorted(file.stem for file in (ROOT / "machinery").glob("*.py") if "__" not in file.stem)


def imported(file) -> set[str]:
    """Modules of the project that a file imports, anywhere in it: luffy, machinery.plan, ..."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "machinery" else {node.module}
    ours = {*ON_TOP, *(f"machinery.{name}" for name in MACHINERY)}
    return {name for name in found if name in ours}


def test_only_the_four_files_stand_on_top():
    assert {file.stem for file in ROOT.glob("*.py")} == set(ON_TOP)


def test_arrows_point_one_way():
    for n, name in enumerate(ON_TOP):
        above = imported(ROOT / f"{name}.py") & set(ON_TOP[n:])
        assert not above, f"{name}.py imports {above}"
    graph = {f"machinery.{m}": imported(ROOT / "machinery" / f"{m}.py") for m in MACHINERY}
    for name, found in graph.items():
        assert not found & set(ON_TOP), f"{name} imports {found & set(ON_TOP)}"
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_forks_are_short_and_stand_above():
    """Nothing else imports them; each says in its head how it is run and what differs."""
    for file in [*ROOT.glob("*.py"), *(ROOT / "machinery").glob("*.py")]:
        assert not re.search(r"^\s*(from|import) forks", file.read_text(), re.M), file
    forks = {file.stem: file.read_text() for file in (ROOT / "forks").glob("[a-z]*.py")}
    assert len(forks) >= 8
    for name, text in forks.items():
        assert len(text.splitlines()) <= 150, name
        if "second model" not in name.replace("_", " "):
            assert f"python -m forks.{name}" in ast.get_docstring(ast.parse(text)), name


def test_the_machinerys_docstring_names_each_file():
    named = re.findall(r"^([a-z_, ]+?)   ", machinery.__doc__, re.M)
    assert sorted(name for line in named for name in line.split(", ")) == MACHINERY


@pytest.mark.slow  # its quicker relative: nothing below luffy.py imports it
def test_the_script_loads_each_module_once(tiny_model, tmp_path):
    result = run(
        "-X",
        "importtime",
        "luffy.py",
        "--model",
        tiny_model,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--problems_per_step",
        2,
        "--eval_samples",
        1,
    )
    assert (tmp_path / "run" / "report.html").exists()
    loaded = re.findall(r"\| +([\w.]+)$", result.stderr, re.M)
    ours = [name for name in loaded if name in ON_TOP or name.startswith("machinery")]
    assert "machinery.page" in ours and "luffy" not in ours  # it is __main__
    assert len(ours) == len(set(ours))
    assert not {"tensorboard", "trackio", "wandb"} & set(loaded)  # unless --track asks for it


@pytest.mark.parametrize(
    "program",
    ["luffy.py", pytest.param("data.py", marks=pytest.mark.slow)],  # luffy.py imports it
)
def test_help_comes_before_what_is_slow_to_import(program):
    loaded = run("-X", "importtime", program, "--help").stderr
    slow = {"datasets", "matplotlib", "plotly", "sympy", "torch._dynamo", "transformers"}
    assert "machinery.model" in loaded
    assert not slow & set(re.findall(r"\| +([\w.]+)$", loaded, re.M))


def test_small_stays_small():
    luffy = (ROOT / "luffy.py").read_text().splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(luffy) <= 640 and len(readme) <= 200  # a fork may need some lines
    assert max(map(len, luffy)) <= 100
    assert max(len(line) for line in readme if not line.startswith("|")) <= 120
    for node in ast.walk(ast.parse("\n".join(luffy))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


def test_running_needs_what_running_needs_alone():
    """The requirements of testing are apart from those of running."""
    running = (ROOT / "requirements-cpu.txt").read_text()
    assert not re.search(r"^(pytest|hypothesis|selenium|ruff|mypy)", running, re.M)
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert "-r requirements-cpu.txt" in (ROOT / name).read_text()
