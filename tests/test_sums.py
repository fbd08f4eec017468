"""results/sums: sums are right and new, the text says what the data say, no row is run twice.

And of results/gsm8k, whose study needs a GPU, its text.
"""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
from conftest import ROOT

HERE = ROOT / "results/sums"
sys.path.insert(0, str(HERE))
import sums_report  # noqa: E402


def load_study(name: str):
    """Of one of results' directories: each has a study.py."""
    file = ROOT / "results" / name / "study.py"
    spec = importlib.util.spec_from_file_location(f"{name}_study", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study = load_study("sums")


@pytest.fixture(scope="module")
def data():
    return study.make_data()


def test_traces_add_up_and_box_the_answer(data):
    for row in sum(data.values(), []):
        question, trace = row["prompt"][0]["content"], row["trace"]
        numbers = list(map(int, re.findall(r"\d+", question)))
        total = numbers[0]
        for x, step in zip(numbers[1:], trace.split(". "), strict=False):
            assert step == f"{total} + {x} = {total + x}"
            total += x
        assert trace.endswith(f"The answer is \\boxed{{{total}}}.") and row["answer"] == str(total)
        assert study.adds_up(question, trace)


def test_held_out_sums_are_not_trained_on(data):
    questions = {name: {str(row["prompt"]) for row in rows} for name, rows in data.items()}
    assert {name: len(found) for name, found in questions.items()} == {
        "base": 448,
        "test": 320,
        "train": 1800,
    }
    assert len(set.union(*questions.values())) == 448 + 320 + 1800
    assert {row["data_source"] for row in data["train"]} == set(study.TRAINED)
    assert {row["data_source"] for row in data["test"]} == set(study.KINDS)
    assert study.make_data() == data


def test_a_right_answer_by_two_errors_is_not_what_was_meant():
    question = "What is 94 + 39 + 61?"
    assert study.adds_up(question, "94 + 39 = 133. 133 + 61 = 194. The answer is \\boxed{194}.")
    assert not study.adds_up(question, "94 + 39 = 123. 123 + 61 = 194. It is \\boxed{194}.")
    assert not study.adds_up(question, "94 + 39 = 133. The answer is \\boxed{194}.")
    assert not study.adds_up(question, "It is \\boxed{194}.")


def test_a_row_that_is_there_is_not_run_again(tmp_path, monkeypatch):
    """Nor are arms that nobody asked for; what an arm needs is trained first."""
    trained, asked = [], []

    def train(program, flags, out):
        trained.append((out.name, flags["model"], flags.get("teacher")))
        return out / "checkpoint"

    def evaluate(checkpoint, *_):
        asked.append(checkpoint.parent.name)
        return {"scores": []}, [{"response": "1"}]

    for name, function in (("train", train), ("evaluate", evaluate), ("curves", lambda *_: {})):
        monkeypatch.setattr(study, name, function)
    row = {"arm": "luffy", "seed": 0, "steps": 20}
    (tmp_path / "runs.jsonl").write_text(json.dumps(row) + "\n")
    jobs = [("base", 0), ("luffy", 0), ("opd", 0), ("sft_then_on_policy", 0)]
    runs = tmp_path / "runs"
    study.study("model", runs, tmp_path, jobs, 20)
    assert asked == ["base-seed0", "opd-seed0", "sft_then_on_policy-seed0"]
    base, sft = (runs / f"{name}-seed0" / "checkpoint" for name in ("base", "sft"))
    assert ("opd-seed0", base, sft) in trained
    assert ("sft_then_on_policy-seed0", sft, None) in trained
    study.study("model", runs, tmp_path, jobs, 20)
    assert len(asked) == 3 and len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="luffy of 20 steps"):
        study.study("model", runs, tmp_path, [("luffy", 0)], 30)


def test_intervals_are_of_problems_and_paired():
    rng = np.random.default_rng(0)
    values = rng.binomial(2, 0.5, (3, 64)) / 2
    mean, low, high = sums_report.bootstrap(values)
    error = np.sqrt((values.var(axis=1) / 64).sum()) / 3
    assert mean == values.mean() and abs((high - low) / 2 - 1.96 * error) < 0.1 * error
    assert sums_report.bootstrap(values - values) == (0, 0, 0)


def test_the_text_is_what_the_data_make_of_it():
    """Whoever changes data, template or code has to run `study.py --report`."""
    template = (HERE / "README.template.md").read_text()
    found = sums_report.render(template, sums_report.Report())
    assert (HERE / "README.md").read_text() == found, "run python results/sums/study.py --report"
    assert len(found.splitlines()) <= 90
    by_hand = re.sub(r"{{.+?}}|`[^`]*`|\]\(.*?\)", "", template)
    assert not re.findall(r"(?<![\w.])\.\d", by_hand)  # scores are written .12, settings 0.12
    size = sum(file.stat().st_size for file in HERE.rglob("*") if "__pycache__" not in str(file))
    assert size < 2e6


def test_the_page_of_gsm8k_is_of_its_data(tmp_path, monkeypatch):
    gsm8k = load_study("gsm8k")
    page = gsm8k.HERE / "README.md"
    emptied = re.sub(
        f"{gsm8k.START}.*{gsm8k.END}", gsm8k.START + gsm8k.END, page.read_text(), flags=re.S
    )
    (tmp_path / "README.md").write_text(emptied)
    monkeypatch.setattr(gsm8k, "HERE", tmp_path)
    gsm8k.report()
    assert (tmp_path / "README.md").read_text() == page.read_text()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    rows = {"a": {"T=0": {"right": "1" * 9 + "0" * 91}}, "b": {"T=0": {"right": "0" * 100}}}
    assert "1 of 1" in gsm8k.differences(rows) and "-.090" in gsm8k.differences(rows)


def test_the_study_of_gsm8k_refuses_what_does_not_belong_together(tmp_path, monkeypatch):
    gsm8k = load_study("gsm8k")
    monkeypatch.setattr(gsm8k, "DATA", tmp_path)
    monkeypatch.setattr(gsm8k.Study, "run", lambda *_: None)  # stopped before its last checkpoint

    def make(limit: int):
        return gsm8k.Study(tmp_path, tmp_path, tmp_path / "runs", 16, limit)

    with pytest.raises(RuntimeError, match="base was stopped"):
        make(64).do(["base", "luffy"])
    row = {"arm": "base", "steps": 16, "T=0": {"responses": 64}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="of 16 steps and 64 test problems"):
        gsm8k.check(make(512), ["luffy"])
    with pytest.raises(SystemExit, match="has no weights of it"):
        gsm8k.check(make(64), ["luffy"])
    make(64).last("base").mkdir(parents=True)
    gsm8k.check(make(64), ["luffy"])
