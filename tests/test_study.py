"""results/: the documents say what the data say, of a study that is done, begun, or not there."""

import json
import re
import sys

import numpy as np
import pytest
from conftest import ALL_ROWS, ROOT

sys.path.insert(0, str(ROOT / "results/toy"))
import intervals  # noqa: E402
from machinery.files import read_jsonl  # noqa: E402

import report  # noqa: E402

TEMPLATE = (ROOT / "results/README.template.md").read_text()


@pytest.mark.skipif(not report.has_enough(), reason="too few runs of the study, yet")
def test_documents_are_what_the_data_make_of_them():
    """Whoever changes data, template or code has to run `study.py --report`."""
    for file, text in report.texts(report.Report()).items():
        assert file.read_text() == text, f"{file.name}: run python results/toy/study.py --report"


def test_no_score_and_no_verdict_is_typed_by_hand():
    by_hand = re.sub(r"{{.+?}}|`[^`]*`|\]\(.*?\)", "", TEMPLATE)
    # scores are written .12, settings 0.12
    assert not re.findall(r"(?<![\w.])\.\d|1\.00|TEXT|SUMMARY|CLAIMS", by_hand)
    claims = [line for line in TEMPLATE.splitlines() if "{{claim(" in line]
    assert len(claims) >= 30
    for line in claims:  # the last two cells are the script's
        assert re.fullmatch(r"\| [^|]*[^| ] \| {{claim\([^|{}]*\)}} \|", line), line


def test_every_row_and_fork_is_an_arm():
    forks = {file.stem for file in (ROOT / "forks").glob("[a-z]*.py")} - {"dapo", "second_model"}
    assert set(ALL_ROWS) | forks <= set(report.ARMS)
    assert len(set(report.ARMS)) == len(report.ARMS) and set(report.MAJOR) < set(report.ARMS)
    assert set(report.SHORT) | set(report.FIRST.values()) | set(report.STYLES) < set(report.ARMS)
    assert sum(file.stat().st_size for file in (ROOT / "results").rglob("*")) < 20e6  # about 10


# ------------------------------------------------------------------ made-up data
def score_row(what: dict, rng, level: float, split: str, step: int, **how) -> dict:
    how = dict(temperature=0.6, k=8, every=1) | how
    n = (64 if split == "val" else 200) // how["every"]
    levels = {s: level - 0.1 * i for i, s in enumerate(report.SOURCES)}
    right = {s: rng.binomial(how["k"], np.clip(p, 0, 1), n).tolist() for s, p in levels.items()}
    length = {s: 20.0 + 5 * i for i, s in enumerate(report.SOURCES)}
    return what | dict(step=step, split=split, right=right, length=length, truncated=0.0) | how


def make_up(directory, arms=report.ARMS, seeds=(0, 1, 2, 3, 4), kinds=tuple(report.KINDS)):
    """runs.jsonl and scores.jsonl as study.py would write them. The n-th arm is at .5 + n/100."""
    rng, runs, scores = np.random.default_rng(0), [], []
    explored = ("base", "sft", "on_policy", "luffy", "sft_then_on_policy")
    for kind in kinds:
        for n, arm in enumerate(arms):
            level = 0.5 + n / 100
            minor = arm not in (*report.MAJOR, "base")
            for seed in seeds[: 3 if minor else 5]:
                what = dict(kind=kind, arm=arm, seed=seed)
                for worse, choice in enumerate(({"lr": 3e-4}, {"lr": 1e-3, "clip": 0.4})):
                    if arm == "base" or (worse and seed):
                        continue
                    row = what | {"choice": choice}
                    marks = [str(step) for step in (50, 100, 150, 200)]
                    speed = 0.1 if arm.startswith("sft") and "then" not in arm else 1.0
                    spent = {mark: speed * int(mark) + n for mark in marks}
                    curve = [None, *(level * i / 40 for i in range(1, 40))]
                    curves = {m: curve for m in ("reward/easy", "reward/medium", "reward/hard")}
                    curves |= {m: curve for m in ("entropy", "length", "trace_unlikely")}
                    differs = dict(differs={"lr": choice["lr"], "shaping": "none"}, curves=curves)
                    tokens = {mark: 1e6 for mark in marks}
                    tokens = dict(seconds=spent, sampled=tokens, updated=tokens)
                    runs.append(row | dict(steps=200) | differs | tokens)
                    for step in (50, 100, 150):
                        part = level * step / 200
                        scores.append(score_row(row, rng, part, "test", step, every=2, k=4))
                    shift = rng.normal(0, 0.02) - 0.2 * worse
                    scores.append(score_row(row, rng, level + shift, "test", 200))
                    if seed == 0:
                        scores.append(score_row(row, rng, level - 0.2 * worse, "val", 200))
                for rate in report.RATES[1:] if arm != "base" and seed == 0 else ():
                    row = what | {"choice": {"lr": rate}}
                    runs.append(row | dict(steps=200) | differs | tokens)
                    scores += [score_row(row, rng, level - 0.3, s, 200) for s in ("val", "test")]
                row, step = what | {"choice": {"lr": 3e-4} if arm != "base" else {}}, 200
                if arm == "base":
                    step = 0
                    scores.append(score_row(row, rng, level, "test", 0))
                for t, k in ((0.2, 8), (1.0, 16), (1.4, 8)) if arm in explored else ():
                    how = dict(temperature=t, k=k, every=4)
                    scores.append(score_row(row, rng, level, "test", step, **how))
    runs.append(dict(kind=kinds[0], arm="luffy", seed=0, choice={"lr": 0.01}, failed="NaN"))
    directory.mkdir(exist_ok=True)
    for name, rows in (("runs", runs), ("scores", scores)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (directory / "teacher.json").write_text('{"tokens": 56.5, "plain": 45.4}')
    return report.Report(directory)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_up(tmp_path_factory.mktemp("full"))


def check_documents(found, tmp_path) -> tuple[str, str]:
    results, arms, readme = report.texts(found).values()
    for text in (results, arms, readme):
        assert "{{" not in text and "nan" not in text.lower().replace("finan", "")
    assert len(results.splitlines()) <= 255
    assert max(len(x) for x in (results + arms).splitlines() if x[:1] != "|") <= 118
    section = re.search(r"^## Results on the toy\n.*?(?=^## )", readme, re.M | re.S)[0]
    assert max(len(line) for line in section.splitlines() if line[:1] != "|") <= 120
    assert len(section.splitlines()) <= 25 and len(readme.splitlines()) <= 200
    found._draw_all(tmp_path)
    assert len(list(tmp_path.glob("?.png"))) == 5
    return results, section


def test_documents_of_a_whole_study(full, tmp_path):
    results, section = check_documents(full, tmp_path)
    assert intervals.NOT_RUN not in (results + section).lower()
    assert "(3 seeds)" in results and "**reproduced**" in results
    tables = re.findall(r"^\|.*\n\| ---.*\n(?:\|.*\n)+", results, re.M)
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1, table[:200]


@pytest.mark.parametrize(
    "arms, seeds, kinds",
    [
        ((), (0,), ("frequent",)),
        (("base", "luffy"), (0,), ("rare",)),
        (("base", "on_policy", "luffy", "mixed", "rl_2604"), (0, 1), ("frequent",)),
        (report.ARMS[:12], (0, 2, 3), ("frequent", "rare")),
    ],
)
def test_documents_of_a_study_that_has_begun(arms, seeds, kinds, tmp_path):
    found = make_up(tmp_path / "data", arms, seeds, kinds)
    results, _ = check_documents(found, tmp_path)
    assert intervals.NOT_RUN in results and "**Not run yet" in results
    if len(seeds) < 3:
        assert "reproduced |" not in results and "**" + "reproduced" not in results


def test_a_candidate_that_failed_is_not_the_result_that_is_missing(tmp_path):
    make_up(tmp_path)
    assert report.has_enough(tmp_path)
    lost = dict(kind="rare", arm="rl_sft", seed=0)
    for file in (tmp_path / "runs.jsonl", tmp_path / "scores.jsonl"):
        kept = [row for row in read_jsonl(file) if not lost.items() <= row.items()]
        failed = [lost | dict(choice={"lr": 0.01}, failed="NaN")] * file.name.startswith("runs")
        file.write_text("".join(json.dumps(row) + "\n" for row in kept + failed))
    assert not report.has_enough(tmp_path)


def test_a_checkpoint_is_not_a_run_that_came_to_its_end(tmp_path):
    make_up(tmp_path)
    scores = read_jsonl(tmp_path / "scores.jsonl")
    end = dict(kind="rare", arm="rl_sft", seed=1, step=200)
    kept = [row for row in scores if not end.items() <= row.items()]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert not report.has_enough(tmp_path)


# ------------------------------------------------------------------ numbers
def test_choices_are_by_three_kinds_on_val_and_ties_go_to_the_earliest():
    def row(lr, right, **other):
        right = {s: [right] * 64 for s in ("easy", "medium", "hard")} | {"ood": [8 * (lr > 1)] * 64}
        what = dict(kind="frequent", arm="luffy", seed=0, split="val", k=8, choice={"lr": lr})
        return what | dict(right=right) | other

    a, b = {"lr": 1e-4}, {"lr": 3e-4}
    assert report.chosen([row(1e-4, 4), row(3e-4, 5)]) == {"luffy": b}
    assert report.chosen([row(1e-4, 5), row(3e-4, 5)]) == {"luffy": a}
    nearly = row(3e-4, 5)
    nearly["right"]["hard"][0] += 1  # one response more
    assert report.chosen([row(1e-4, 5), nearly]) == {"luffy": a}
    nearly["right"]["hard"][1] += 2
    assert report.chosen([row(1e-4, 5), nearly]) == {"luffy": b}
    ignored = [row(2.0, 5), row(1e-4, 8, seed=1), row(1e-4, 8, split="test")]
    ignored.append(row(1e-4, 8, kind="rare"))
    assert report.chosen([row(3e-4, 5), *ignored]) == {"luffy": b}


def test_quantities_by_hand(full, monkeypatch):
    assert set(full._values("rare", "luffy", "mean")) == {0, 1, 2, 3, 4}
    row = full._scores["rare", "luffy", 200, 0.6][3]
    hard = np.array(row["right"]["hard"]) / 8
    np.testing.assert_allclose(full._values("rare", "luffy", "hard")[3], hard)
    of_three = np.mean([np.array(row["right"][s]) / 8 for s in report.MEAN], 0)
    np.testing.assert_allclose(full._values("rare", "luffy", "mean")[3], of_three)
    other = full._values("frequent", "luffy", "hard")[3]
    np.testing.assert_allclose(full._values("both", "luffy", "hard")[3], (hard + other) / 2)
    assert len(full._values("rare", "luffy", "hard T1.4")[3]) == 50
    assert full._values("rare", "luffy", "hard").keys() == {0, 1, 2, 3, 4}
    other = full.other_seeds()  # its choices are those of the seed that it lacks
    assert other._values("rare", "luffy", "hard").keys() == {1, 2, 3, 4}
    assert other._choice == full._choice
    hot = np.array(full._scores["rare", "luffy", 200, 1.4][3]["right"]["hard"]) / 8
    change = full._values("rare", "luffy", "hard T1.4 - hard")[3]
    np.testing.assert_allclose(change, hot - hard[::4])  # the same problems
    n = report.ARMS.index("luffy")
    window = full._values("rare", "luffy", "reward/medium@1-50")[0]  # points 2 to 10 of 40
    np.testing.assert_allclose(window, (0.5 + n / 100) * 5 / 40)
    assert full._values("rare", "luffy", "seconds")[0] == 200 + n
    both = report.ARMS.index("sft") + report.ARMS.index("sft_then_on_policy")
    assert full._values("rare", "sft_then_on_policy", "seconds")[0] == 220 + both
    assert full._values("rare", "sft_then_on_policy", "sampled")[0] == 2
    assert full.equal_step("rare", "luffy") == full.equal_step("rare", "on_policy") == 200
    assert full.equal_step("rare", "sft_then_on_policy") == 150  # a step takes as long
    at = full._gaps("rare", "sft_then_on_policy", "luffy", "mean@equal")
    rows = [
        full._scores["rare", a, s, 0.6][0] for a, s in (("sft_then_on_policy", 150), ("luffy", 200))
    ]
    ours, luffys = (np.mean([r["right"][s] for s in report.MEAN], 0) / r["k"] for r in rows)
    np.testing.assert_allclose(at[0], ours - luffys[::2])
    rows = full._runs["rare", "opd"].items()
    late = {seed: row | {"seconds": dict.fromkeys(row["seconds"], 9e9)} for seed, row in rows}
    monkeypatch.setitem(full._runs, ("rare", "opd"), late)
    assert full.claim("rare", "opd", "luffy", "mean@equal") == f"{report.TOO_LONG} | undecided"
    gaps = full._gaps("both", "uft", "luffy", "mean@equal")  # 3 seeds and 5
    assert gaps.shape[0] == 3 and gaps.shape[1] in (100, 200)


def test_choices_at_an_end_of_their_grid_are_named(full, monkeypatch):
    assert full.edges().endswith("an end of their grid: none.")
    monkeypatch.setitem(full._choice, "mixed", {"lr": 1e-3, "clip": 0.4})
    assert full.edges().endswith("an end of their grid: `mixed` (lr 0.001).")


def test_verdicts_are_read_off_intervals():
    def values(mean, spread=0.01, n=5):
        return mean + spread * np.linspace(-1, 1, n)[:, None] + np.zeros((n, 40))

    assert intervals.verdict(values(0.1)) == "**reproduced**"
    assert intervals.verdict(values(-0.1)) == "**the opposite**"
    assert intervals.verdict(values(0.0)) == intervals.verdict(values(0.005)) == "undecided"
    assert intervals.verdict(values(0.02), m=30) == "reproduced"  # alone, not with 29 others
    assert intervals.verdict(values(0.0), margin=0.05, m=9) == "**reproduced**"
    assert intervals.verdict(values(0.05), margin=0.05) == "undecided"
    assert intervals.verdict(values(0.1), margin=0.05) == "**the opposite**"
    assert intervals.verdict(None) == intervals.NOT_RUN
    assert intervals.verdict(values(0.9, n=1)) == "undecided: 1 seed"
    assert intervals.verdict(values(0.9, n=2)) == "undecided: 2 seeds"


def test_a_best_is_named_only_above_each_other(tmp_path, full):
    found = make_up(tmp_path, ("base", "luffy", "w_none"), (0, 1, 2, 3, 4))
    for row in found._scores["rare", "w_none", 200, 0.6].values():
        row["right"] = found._scores["rare", "luffy", 200, 0.6][row["seed"]]["right"]
    alike = "below it, corrected for 1 comparisons: none; not told apart from it: the other 1"
    assert alike in found.best("rare", "luffy", "w_none")
    for row in found._scores["rare", "w_none", 200, 0.6].values():
        row["right"] = {s: [8] * 200 for s in report.SOURCES}
    assert "above each of the 1 others" in found.best("rare", "luffy", "w_none")
    assert full.best("both", "luffy", "nobody") == intervals.NOT_RUN
    for seed in (3, 4):  # seeds that are easy, and that the other arm lacks, say nothing about it
        row = found._scores["rare", "luffy", 200, 0.6][seed]
        row["right"] = {s: [8] * 200 for s in report.SOURCES}
        del found._scores["rare", "w_none", 200, 0.6][seed]
    for seed in (0, 1, 2):
        right = found._scores["rare", "luffy", 200, 0.6][seed]["right"]
        row = found._scores["rare", "w_none", 200, 0.6][seed]
        row["right"] = {s: [min(8, n + 1) for n in right[s]] for s in right}
    assert found.best("rare", "luffy", "w_none").startswith("`w_none` has the highest mean")


@pytest.mark.parametrize("spread", [0.0, 0.06, 0.13, 0.25])
@pytest.mark.parametrize("n", [3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(n, spread):
    """A few seeds that differ by about what they do here, 200 problems, noise of 8 responses."""
    rng, inside, together = np.random.default_rng(0), 0, 0
    for _ in range(200):
        seeds, problems = rng.normal(0, spread, (n, 1)), rng.normal(0, 0.2, 200)
        rates = 0.6 + seeds + problems + rng.normal(0, 0.15, (n, 200))
        _, low, high = intervals.estimate(rates)
        inside += low <= 0.6 <= high
        _, low, high = intervals.estimate(rates, m=10)
        together += low <= 0.6 <= high
    assert 0.90 <= inside / 200 <= 0.99 and together >= 197
    assert intervals.estimate(np.ones((n, 200))) == (1.0, 1.0, 1.0)
    assert intervals.estimate(np.array([[0.9], [1.0]]), 0, 1)[2] == 1.0
    pairs = np.array([[0.1], [0.2], [0.6]])  # Student's: .3 ± 4.303 · .2646 / √3
    assert intervals.estimate(pairs) == pytest.approx((0.3, -0.357, 0.957), abs=1e-3)


def test_students_quantiles():
    table = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}
    assert {n: intervals.student(n, 0.95) for n in table} == pytest.approx(table, rel=1e-3)
    assert intervals.student(5, 0.998) == pytest.approx(7.173, rel=1e-2)


def test_numbers_are_written_alike():
    written = [intervals.number(x) for x in (0.5, -0.5, 1.0, 0.0, -0.001, 12.34)]
    assert written == [".50", "-.50", "1.00", ".00", ".00", "12.34"]
    assert intervals.number(0.5, sign=True) == "+.50" and intervals.number(0.2, 0) == "0"
    assert report.in_words({"lr": 5.5e-5, "gamma": 0.3}) == "5.5e-5, gamma 0.3"
