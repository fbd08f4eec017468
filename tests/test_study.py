"""results/: the documents say what the data say, and the study does what they say of it."""

import asyncio
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import luffy
from machinery import toy

sys.path.insert(0, str(ROOT / "results/toy"))
import report  # noqa: E402
import study  # noqa: E402


def test_documents_are_what_the_data_make_of_them():
    """Whoever changes data, template or code has to run `study.py --report`."""
    for file, text in report.texts(report.Report()).items():
        assert file.read_text() == text, f"{file.name}: run python results/toy/study.py --report"


def test_no_score_is_typed_by_hand():
    template = (ROOT / "results/README.template.md").read_text()
    # scores are written .12, settings 0.12
    by_hand = re.sub(r"{{.+?}}|`[^`]*`|\]\(.*?\)", "", template)
    assert not re.findall(r"(?<![\w.])\.\d|1\.00|TEXT|SUMMARY|CLAIMS", by_hand)
    assert template.count("{{") > 50


def test_every_arm_has_five_seeds_on_both_kinds_of_bases():
    found = report.Report()
    for kind in report.KINDS:
        for arm in report.ARMS:
            assert found._right(kind, arm).shape == (5, 200), (kind, arm)
    for kind in study.SWEPT:
        for arm in study.SWEEP:
            assert found._right(kind, arm).shape == (5, 200), (kind, arm)
    assert set(study.ARMS) | {"base"} == set(report.ARMS)
    assert sum(file.stat().st_size for file in (ROOT / "results").rglob("*")) < 5e6


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Five seeds that differ by about what they do here, 200 problems, 8 responses."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        seeds, problems = rng.normal(0, 0.06, (5, 1)), rng.normal(0, 0.2, 200)
        rates = rng.binomial(8, np.clip(0.6 + seeds + problems, 0, 1)) / 8
        _, low, high = report.bootstrap(rates)
        inside += low <= 0.6 <= high
    assert 0.90 <= inside / 200 <= 0.99
    assert report.bootstrap(np.ones((5, 200))) == (1.0, 1.0, 1.0)
    assert report.bootstrap(np.array([[0.9], [1.0]]), 0, 1)[2] == 1.0


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"luffy_recipe": toy.RECIPE}))
    return tmp_path / "base"


def test_a_switch_too_many_or_too_few_is_found(base):
    def config(arm, base=base, **tuned):
        return asdict(study.configure(base.parent / arm, arm, base, 0, **tuned))

    for arm in (*study.ARMS, *study.SWEEP):
        tuned = {"lr": 1e-3} | ({"sft_coef": 0.3} if arm == "rl_sft" else {})
        assert "lr" in study.check_switches(arm, config(arm, **tuned), str(base), tuned)
    assert study.check_switches("mixed_shaped", config("mixed_shaped"), str(base), {}) == {
        "clip": 0.2
    }
    for arm, cfg, tuned, field in (
        ("mixed", config("mixed", problems_per_step=32), {}, "problems_per_step"),
        ("mixed", config("mixed", shaping="luffy"), {}, "shaping"),
        ("mixed", config("mixed", clip=0.3), {}, "clip"),
        ("mixed", config("mixed_shaped"), {}, "algo"),
        ("luffy", config("luffy", lr=1e-3), {"lr": 1e-4}, "lr"),
        ("luffy", config("luffy"), {"lr": 1e-4}, "lr"),
    ):
        with pytest.raises(RuntimeError, match=f"{field} is "):
            study.check_switches(arm, cfg, str(base), tuned)
    with pytest.raises(RuntimeError, match="model is "):
        study.check_switches("luffy", config("luffy"), str(base) + "2", {})


def test_what_is_kept_of_a_run(base):
    """By hand: tokens, seconds and curves, up to the checkpoint that counts."""
    out = base.parent / "frequent" / "mixed-lr0.001-seed3"
    out.mkdir(parents=True)
    cfg = asdict(study.configure(out, "mixed", base, 3, lr=1e-3, steps=100))
    cfg["steps"] = 200
    (out / "config.json").write_text(json.dumps(cfg))
    rows = [
        {
            "step": n,
            "length": 10.0 if n <= 50 else 20.0,
            "trace_length": 40.0,
            "reward/hard": n / 100,
        }
        for n in range(1, 101)
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "timing.jsonl").write_text(
        "".join(
            json.dumps({"step": n, "sample": 0.5, "score": 0.0, "update": 0.25, "sync": 0.25})
            + "\n"
            for n in range(1, 101)
        )
    )
    (out / "traces.json").write_text('{"share_unlikely": 0.1}')
    for n in (50, 73, 100):  # 73: where an interrupted run was stopped
        (out / f"checkpoint-{n:06d}").mkdir()
    assert [path.name[-3:] for path in study.checkpoints(out)] == ["050", "100"]
    plan = study.Study(None, base.parent, None, {})
    plan.runs[out] = "frequent", "mixed", 3, {"lr": 1e-3}, base
    plan.finals[out] = 100
    study.collect(plan, base.parent / "data")
    [row] = map(json.loads, (base.parent / "data" / "runs.jsonl").read_text().splitlines())
    groups = 16
    assert row["sampled"]["50"] == 50 * 7 * groups * 10
    assert row["sampled"]["100"] == row["sampled"]["50"] + 50 * 7 * groups * 20
    assert row["updated"]["50"] == row["sampled"]["50"] + 50 * groups * 40
    assert row["seconds"]["50"] == 50 and row["final"] == 100
    assert row["curves"]["reward/hard"][:2] == [0.03, 0.08]  # means of 5 steps
    assert row["differs"] == {"shaping": "none", "clip": 0.2, "lr": 1e-3}


class Planned(study.Study):
    """A study whose jobs only tell that they would be run, with made-up values on val."""

    def __init__(self, value):
        super().__init__(None, Path("runs"), None, {})
        self.made_up, self.trained = value, []

    async def job(self, function, *arguments):
        if function is study.train:
            self.trained.append(arguments[0])
            return Path(arguments[0].out) / "checkpoint-000400"
        return Path("base")

    async def value(self, kind, arm, choice):
        await self.run(kind, arm, 0, choice)
        return self.made_up(choice)


@pytest.mark.parametrize(
    "best, tried",
    [
        (3e-4, {1e-4, 3e-4, 1e-3}),
        (1e-3, {1e-4, 3e-4, 1e-3, 3e-3}),  # at the edge: the grid grows
        (3e-3, {1e-4, 3e-4, 1e-3, 3e-3}),
        (0.0, {1e-5, 3e-5, 1e-4, 3e-4, 1e-3}),
        (3e-5, {1e-5, 3e-5, 1e-4, 3e-4, 1e-3}),
    ],
)
def test_learning_rates_are_tried_until_the_best_is_inside(best, tried):
    plan = Planned(lambda choice: -abs(choice["lr"] - best) * 1e6)
    choice = asyncio.run(as_task(plan.choice, "frequent", "luffy"))
    assert {cfg.lr for cfg in plan.trained} == tried
    assert choice["lr"] == max(1e-5, best)


def test_sft_then_rl_starts_from_the_checkpoint_that_val_chose():
    plan = Planned(lambda choice: choice.get("steps") == 100 and choice["lr"] == 3e-4)
    asyncio.run(as_task(plan.run, "rare", "sft_then_on_policy", 3, {"lr": 1e-4}))
    start = plan.trained[-1].model
    assert start == "runs/rare/sft-lr0.0003-seed3/checkpoint-000100"
    assert plan.trained[-1].algo == "on_policy" and plan.trained[-1].seed == 3


async def as_task(function, *arguments):
    return await function(*arguments)


def test_rl_sft_has_its_coefficient_chosen_too():
    plan = Planned(lambda choice: (choice["lr"] == 3e-4) + (choice.get("sft_coef") == 0.3))
    choice = asyncio.run(as_task(plan.choice, "frequent", "rl_sft"))
    assert choice == {"lr": 3e-4, "sft_coef": 0.3}
    assert {cfg.sft_coef for cfg in plan.trained} == {0.03, 0.1, 0.3, 1.0}  # 0.3 was at the edge
    assert toy.RECIPE["lr"] in study.LRS and luffy.ALGORITHMS["rl_sft"]["sft_coef"] == 0.1


def test_a_tie_goes_to_what_is_nearest_to_the_defaults():
    """One response of 1,024 is no reason, and a tie at the edge none to go on."""
    plan = Planned(lambda choice: {1e-4: 0.501, 3e-4: 0.5}.get(choice["lr"], 0))
    assert asyncio.run(as_task(plan.choice, "rare", "on_policy")) == {"lr": 3e-4}
    assert {cfg.lr for cfg in plan.trained} == {1e-4, 3e-4, 1e-3}
    plan = Planned(lambda choice: choice["lr"] <= 1e-4)
    assert asyncio.run(as_task(plan.choice, "rare", "on_policy")) == {"lr": 1e-4}
