"""results/toy/study.py: what is run, in which order, and what is not run again."""

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from tqdm import tqdm

import luffy
from machinery import toy
from machinery.files import read_jsonl

sys.path.insert(0, str(ROOT / "results/toy"))
import study  # noqa: E402

for name in set(study.FORKS.values()):  # they add their rows once, when they are imported first
    importlib.import_module(f"forks.{name}")
SOURCES = ("easy", "medium", "hard", "ood")


@pytest.fixture
def tables(monkeypatch):
    """The study and its forks add rows."""
    monkeypatch.setattr(luffy, "ALGORITHMS", dict(luffy.ALGORITHMS))
    monkeypatch.setattr(luffy, "SHAPINGS", dict(luffy.SHAPINGS))


def test_all_rows_and_forks_have_seven_candidates_each(tables):
    assert set(luffy.ALGORITHMS) | set(study.FORKS) | set(study.W) < set(study.ARMS)
    modules = {p.stem for p in (ROOT / "forks").glob("*.py")} - {"__init__", "second_model"}
    assert set(study.FORKS.values()) == modules
    for arm in study.ARMS:
        candidates = [{"lr": rate} for rate in study.RATES] + study.more(arm, 3e-4)
        flag = next(iter(study.more(arm, 3e-4)[0].keys() - {"lr"}), "lr")
        default = (vars(luffy.Config())["lr"] if flag == "lr" else None, toy.RECIPE.get(flag))
        known = study.row_of(arm).get(flag, default)
        values = {json.dumps(c) for c in candidates} | {json.dumps({"lr": 3e-4, flag: known})}
        assert len(values) == 8, arm  # none is another one, or the row itself
    named = " ".join(arms for arms, _ in study.OWN.values()).split()
    assert set(named) < set(study.ARMS) and len(named) == len(set(named))


def test_the_arms_of_w_differ_in_w_alone(tables):
    for arm, name in study.W.items():
        row = study.row_of(arm)
        assert row.items() - luffy.ALGORITHMS["luffy"].items() == {("shaping", arm)}
        shaping = luffy.SHAPINGS[arm]
        assert not shaping.is_sft and shaping.f is luffy.SHAPINGS[name].f
    both = luffy.ALGORITHMS["rl_plus"].items() ^ luffy.ALGORITHMS["luffy"].items()
    assert both == {("shaping", "rl_plus"), ("shaping", "luffy")}  # so it is one of them


class Fake(study.Study):
    """Its jobs write rows at once. Of a run's candidates the second learning rate is the best."""

    done: list[dict]
    best_rate = study.RATES[1]

    async def process(self, job: dict, log: Path) -> None:
        self.done.append(job)
        await asyncio.sleep(0)
        rate = job["choice"].get("lr", 1)
        right = {s: [8 / (1 + abs(rate - self.best_rate) * 1e3)] * 4 for s in SOURCES}
        steps = job["choice"].get("steps", 200)
        (Path(job["out"]) / f"checkpoint-{steps:06d}").mkdir(parents=True, exist_ok=True)
        score = dict(split="val", temperature=0.6, k=8, every=1, step=steps, right=right)
        runs = [] if job["arm"] == "base" else [dict(steps=steps, seconds={})]
        scores = [score | dict(split="test", step=50), score]
        Path(job["rows"]).write_text(json.dumps({"runs": runs, "scores": scores}))


def run(tmp_path: Path, arms: tuple, seeds: range, choices: dict | None = None) -> Fake:
    data = tmp_path / "data"
    data.mkdir(parents=True, exist_ok=True)
    fake = Fake(tmp_path / "runs", data, tqdm(total=0, disable=True), choices or {})
    fake.done = []
    asyncio.run(study.everything(fake, [(("base", *arms), seeds)]))
    return fake


def test_each_job_is_done_once_and_its_first_stage_before(tmp_path, tables):
    arms, kinds = ("sft_then_on_policy", "luffy"), len(study.KINDS)
    done = run(tmp_path, arms, range(2)).done
    names = [(job["kind"], job["arm"], job["seed"], json.dumps(job["choice"])) for job in done]
    assert len(names) == len(set(names))
    # seven candidates of each and the first stage, then the other kind and seed; two bases a kind
    assert Counter(arm for _, arm, *_ in names) == {
        **{arm: 7 + 3 for arm in (*arms, "sft")},
        "base": 2 * kinds,
    }
    for i, job in enumerate(done):
        if job["arm"] == "sft_then_on_policy":
            assert f"{job['kind']}/sft-lr0.0001-seed{job['seed']}/" in job["base"]
            assert job["base"].removesuffix("/checkpoint-000200") in [j["out"] for j in done[:i]]
        elif job["arm"] != "base":
            assert f"{job['kind']}/base-seed{job['seed']}" in job["base"]
    rows = read_jsonl(tmp_path / "data/runs.jsonl")
    assert len(rows) == len(done) - 2 * kinds
    assert {
        row["seed"] for row in rows if row["arm"] == "luffy" and row["choice"]["lr"] == 1e-4
    } == {0, 1}


def test_what_has_its_rows_is_not_run_again(tmp_path, tables):
    run(tmp_path, ("luffy",), range(2))
    assert not run(tmp_path, ("luffy",), range(2)).done
    # A killed study: one job's rows are not there, those of another have not been taken over.
    file = tmp_path / "data/runs.jsonl"
    rows = read_jsonl(file)
    lost = next(row for row in rows if row["seed"] == 1)
    for name in ("runs", "scores"):
        file = tmp_path / f"data/{name}.jsonl"
        kept = [
            r
            for r in read_jsonl(file)
            if (r["seed"], r["kind"], r["arm"]) != (1, lost["kind"], "luffy")
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    [job] = run(tmp_path, ("luffy",), range(2)).done
    assert (job["kind"], job["seed"]) == (lost["kind"], 1)
    assert sorted(map(str, read_jsonl(tmp_path / "data/runs.jsonl"))) == sorted(map(str, rows))


@pytest.mark.parametrize("kept", [1, None])
def test_a_study_that_was_killed_while_rows_were_taken_over(tmp_path, tables, monkeypatch, kept):
    """Its scores, or one of them, not its run, and half a row: nothing is lost, nor there twice."""
    whole = run(tmp_path / "a", ("luffy",), range(1))
    append = study.append

    def die(file: Path, *rows: dict) -> None:
        dies = rows and rows[0]["arm"] == "luffy" and file.name == "scores.jsonl"
        append(file, *rows[: kept if dies else None])
        if dies:
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "append", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", ("luffy",), range(1))
    monkeypatch.setattr(study, "append", append)
    with (tmp_path / "b/data/runs.jsonl").open("a") as file:
        file.write('{"kind": "fre')
    run(tmp_path / "b", ("luffy",), range(1))
    for name, known in (("runs", whole.runs), ("scores", whole.scores)):
        rows = read_jsonl(tmp_path / f"b/data/{name}.jsonl")
        assert sorted(map(str, rows)) == sorted(map(str, known)), name


def test_an_arm_whose_own_flag_is_the_rate_is_not_tuned_on_when_the_study_goes_on(tmp_path, tables):
    """The four rates decide where the other three are, and those do not start it again."""
    Fake.best_rate = 5.4e-4
    try:
        first = run(tmp_path, ("gspo",), range(1))
        assert len([job for job in first.done if job["arm"] == "gspo"]) == 7 + 1
        assert not run(tmp_path, ("gspo",), range(1)).done
    finally:
        Fake.best_rate = study.RATES[1]


def test_a_second_study_is_refused(tmp_path):
    hold = "import sys; from pathlib import Path; from machinery.files import lock; "
    hold += "lock(Path(sys.argv[1])); input()"
    data = tmp_path / "runs" / "quick"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'results/toy'}"}
    how = dict(env=env, cwd=ROOT, text=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    holder = subprocess.Popen([sys.executable, "-c", hold, data], **how)
    while not (data / ".lock").exists() or not (data / ".lock").read_text():
        assert holder.poll() is None
        time.sleep(0.05)
    second = [sys.executable, study.__file__, "--quick", "--runs", tmp_path / "runs"]
    found = subprocess.run(second, **how | dict(stdin=subprocess.DEVNULL))
    assert found.returncode == 1 and "is writing there" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr
    holder.communicate("")


def test_a_first_stage_that_is_gone_is_trained_anew_and_its_rows_stay_one(tmp_path, tables):
    run(tmp_path, ("sft",), range(1))
    shutil.rmtree(tmp_path / "runs")
    done = run(tmp_path, ("sft_then_on_policy",), range(1)).done
    again = [job for job in done if job["arm"] == "sft"]
    assert len(again) == len(study.KINDS)  # the chosen one of each kind
    rows = [r for r in read_jsonl(tmp_path / "data/runs.jsonl") if r["arm"] == "sft"]
    assert len(rows) == 7 + 1


def test_known_choices_are_not_tuned_again(tmp_path, tables):
    choices = {"luffy": {"lr": 5e-4}}
    done = run(tmp_path, ("luffy",), range(1), choices).done
    assert [job["choice"] for job in done if job["arm"] == "luffy"] == [{"lr": 5e-4}] * 2


def test_runs_in_data_differ_from_luffys_in_what_they_should(tables):
    """In the fields of its row, with their values, in what was tuned, and in nothing else."""
    default = vars(luffy.Config())
    rows = [row for row in read_jsonl(ROOT / "results/toy/data/runs.jsonl") if "differs" in row]
    if not rows:
        pytest.skip("the second edition was not begun")
    luffys = study.row_of("luffy")
    for row in rows:
        mine = study.row_of(row["arm"])
        switches = {k: mine.get(k, default[k]) for k in mine | luffys if k not in toy.RECIPE}
        expected = default | luffys | switches | toy.RECIPE | row["choice"]
        before = default | luffys | toy.RECIPE
        changed = {k: v for k, v in expected.items() if v != before.get(k)}
        assert row["differs"] == changed, row["arm"]
