"""results/: the documents say what the data say, and the study does what they say of it."""

import asyncio
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import luffy
import toy

sys.path.insert(0, str(ROOT / "results/toy"))
import report  # noqa: E402
import study  # noqa: E402


def test_documents_are_what_the_data_make_of_them():
    """Whoever changes data, template or code has to run `study.py --report`."""
    for file, text in report.texts(report.Report()).items():
        assert file.read_text() == text, f"{file.name}: run python results/toy/study.py --report"


def test_no_score_is_typed_by_hand():
    template = (ROOT / "results/README.template.md").read_text()
    by_hand = re.sub(r"{{.+?}}|`[^`]*`|\(.*?\)", "", template)
    assert not re.findall(r"(?<![\w.])[01]?\.\d\d", by_hand)
    assert template.count("{{") > 50


def test_every_arm_has_five_seeds_on_both_kinds_of_bases():
    found = report.Report()
    for kind in study.KINDS:
        for arm in (*report.ARMS, *study.SWEEP):
            assert found._right(kind, arm).shape == (5, 600), (kind, arm)
    assert set(study.ARMS) | {"base"} == set(report.ARMS)
    assert sum(file.stat().st_size for file in (ROOT / "results").rglob("*")) < 5e6


def test_bootstrap_is_over_seeds_and_problems():
    rng = np.random.default_rng(0)
    by_seed = rng.normal(size=(400, 1)) + np.zeros((400, 3))
    by_problem = rng.normal(size=400) + np.zeros((3, 1))
    for values in (by_seed, by_problem):
        value, low, high = report.bootstrap(values)
        assert value == pytest.approx(values.mean())
        assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_a_switch_too_many_is_found(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"luffy_toy": true}')

    def config(arm, **tuned):
        return asdict(study.configure(tmp_path / arm, arm, base, 0, **tuned))

    luffys = config("luffy")
    for arm in (*study.ARMS, *study.SWEEP):
        tuned = {"lr": 1e-3} | ({"sft_coef": 0.3} if arm == "rl_sft" else {})
        differ = study.check_switches(arm, config(arm, **tuned), luffys, tuned)
        assert "lr" in differ
    assert set(study.check_switches("mixed_shaped", config("mixed_shaped"), luffys, {})) == {"clip"}
    with pytest.raises(RuntimeError, match="problems_per_step"):
        study.check_switches("mixed", config("mixed", problems_per_step=32), luffys, {})
    with pytest.raises(RuntimeError, match="shaping"):  # and one too few
        study.check_switches("mixed", config("mixed", shaping="luffy"), luffys, {})


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


@pytest.mark.parametrize("best, tried", [
    (3e-4, {1e-4, 3e-4, 1e-3}),
    (1e-3, {1e-4, 3e-4, 1e-3, 3e-3}),  # at the edge: the grid grows
    (3e-3, {1e-4, 3e-4, 1e-3, 3e-3}),
    (0.0, {3e-5, 1e-4, 3e-4, 1e-3}),
])
def test_learning_rates_are_tried_until_the_best_is_inside(best, tried):
    plan = Planned(lambda choice: -abs(choice["lr"] - best))
    choice = asyncio.run(as_task(plan.choice, "frequent", "luffy"))
    assert {cfg.lr for cfg in plan.trained} == tried
    assert choice["lr"] == max(3e-5, best)


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
    assert toy.RECIPE["lr"] in study.LRS and luffy.ALGORITHMS["rl_sft"]["sft_coef"] == 0.1
