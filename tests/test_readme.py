"""What the README says of the code is so."""

import re

import pytest
from conftest import ROOT

import plan
from luffy import ALGORITHMS, Config, but, parse_args

README = (ROOT / "README.md").read_text()
LINKS = sorted(set(re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)))


def test_there_are_links():
    assert len(LINKS) >= 12


@pytest.mark.parametrize("name, file, line", LINKS)
def test_every_link_points_at_the_line_it_names(name, file, line):
    lines = (ROOT / file).read_text().splitlines()
    found = [i for i, text in enumerate(lines, start=1)
             if re.match(rf"(def|class) {name}\b|{name}\b.* = ", text)]
    assert found == [int(line)], f"README.md: {name} is in line {found} of {file}"


def test_the_table_of_algorithms_is_the_one_in_the_code():
    section = README.split("## Algorithms")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M))
    assert list(rows) == list(ALGORITHMS)
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


@pytest.mark.parametrize("command", re.findall(r"^python luffy.py (.*--dry_run.*)$", README, re.M))
def test_the_plans_are_what_the_program_prints(capsys, command):
    cfg = parse_args(command.split())
    plan.show(cfg, but(cfg, Config()), is_toy=False)
    assert f"```\n{capsys.readouterr().out}```\n" in README


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in re.findall(r"^pip install -r requirements-cpu.txt && (.*)$", README, re.M):
        assert any(line.startswith(command) for line in ci), command
