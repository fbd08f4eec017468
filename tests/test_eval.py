"""Scores: unbiased, with honest errors; benchmarks, prompts, and evaluations that can be killed."""

import json
import random
import re
import runpy
import shutil
import textwrap
from argparse import Namespace
from itertools import combinations
from statistics import fmean, stdev

import pytest
from conftest import SHARED, Judge, run
from safetensors.torch import load_file, save_file

from data import Problem, Row, render, to_problem
from eval import (
    ask,
    by_source,
    compare,
    difference_table,
    load_benchmark,
    load_rows,
    parse_args,
    pass_at_k,
)
from eval import published_table, score_table, standard_error, summarize, to_prompt
from luffy import Config
from machinery import responses, toy
from machinery.published import BENCHMARKS, OUT_OF_DISTRIBUTION, SIX, SYSTEMS, TEMPLATES
from machinery.processes import InputError
from machinery.responses import Responses, file_name, whole_blocks
from machinery.samplers import Sample
from machinery.scores import JOBS, evaluate, graded, table
from verify import Grader


# ------------------------------------------------------------------ scores
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for bad in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def rows_of(rewards: list[list[float]], source: str = "hard", **more) -> list[dict]:
    return [
        {
            "problem": i,
            "sample": j,
            "source": source,
            "reward": reward,
            "lenient": 1.0,
            "response": "",
            "tokens": 10 * (j + 1),
            "truncated": j > 0,
        }
        | more
        for i, group in enumerate(rewards)
        for j, reward in enumerate(group)
    ]


def test_summary_by_hand():
    scores = summarize(rows_of([[1.0, 0.0], [0.0, 0.0]]))
    assert scores.pop("avg_se") == pytest.approx(0.25)  # stdev(.5, 0) / sqrt 2
    assert scores == {
        "problems": 2,
        "k": 2,
        "avg": 0.25,
        "lenient": 1.0,
        "pass_at": [0.25, 0.5],
        "length": 15.0,
        "truncated": 0.5,
    }
    scores = by_source(rows_of([[1.0, 0.0], [0.0, 0.0]]))
    assert "| hard (2) | avg@2 | 0.250 |" in table({"model": scores})
    assert summarize(rows_of([[1.0]]))["avg_se"] is None  # one problem tells no error; NaN: no JSON


def test_standard_errors_are_those_of_a_bootstrap_over_problems():
    rng = random.Random(0)
    rewards = [
        [float(rng.random() < p) for _ in range(8)]
        for p in (rng.betavariate(0.5, 0.5) for _ in range(200))
    ]
    means = [fmean(r) for r in rewards]
    resampled = [fmean(rng.choices(means, k=200)) for _ in range(4000)]
    assert standard_error(means) == pytest.approx(stdev(resampled), rel=0.05)
    samples = [r for group in rewards for r in group]
    assert standard_error(samples) < 0.6 * standard_error(means)  # over samples: far too small


def test_tables():
    scores = {
        ("math500", 0.6): summarize(rows_of([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])),
        ("toy", 0.6): summarize(rows_of([[1.0], [1.0]])),
    }
    text = score_table(scores)
    assert "| math500 | 0.6 | 3 | 50.0 ± 28.9 @2 | 100.0 | 66.7 @2 | 15 | 50.0% |" in text
    assert "| mean of 2 | 0.6 | | 75.0 ± 14.4 |" in text
    assert "| math500 | 0.6 | 50.0 ± 28.9 | 100.0 | 87.6 | -37.6 |" in published_table(
        scores, "luffy"
    )
    nine = {
        (name, 0.6): summarize(rows_of([[1.0], [float(name in SIX)]]))
        for name in (*SIX, *OUT_OF_DISTRIBUTION)
    }
    assert "| mean of 6 | 0.6 | | 100.0 ± 0.0 |" in score_table(nine)  # as the paper reports them
    assert "| mean of 3 | 0.6 | | 50.0 ± 28.9 |" in score_table(nine)
    assert "mean of 9" not in score_table(nine)
    llama = published_table(nine, "on-policy-llama")  # out of distribution it has no scores
    assert "| mean of 6 | 0.6 | 100.0 ± 0.0 | 100.0 | 9.6 | +90.4 |" in llama
    assert len(llama.splitlines()) == 2 + 6 + 1 and "arc_c" not in llama
    assert not published_table({("arc_c", 0.6): nine["arc_c", 0.6]}, "on-policy-llama")
    models = {
        "a": {("x", 0.6, 1): rows_of([[1.0], [0.0], [0.0]])},
        "b": {("x", 0.6, 1): rows_of([[1.0], [1.0], [0.0]])},
    }
    assert "| x | 0.6 | 1 | 33.3 ± 33.3 | 33.3 ± 33.3 |" in difference_table(models)


# ------------------------------------------------------------------ the paper's tables
def test_published_means_are_the_papers():
    """A published average is the mean of the six; those of three out of distribution by hand."""
    for name, ood in (("luffy", 57.8), ("sft-rl", 44.8), ("oat-zero", 45.2), ("on-policy", 57.3)):
        assert fmean(SYSTEMS[name].ood) == pytest.approx(ood, abs=0.06)
    for name, system in SYSTEMS.items():
        assert len(system.six) == len(SIX), name
        assert len(system.ood) in (0, len(OUT_OF_DISTRIBUTION)), name
        assert fmean(system.six) == pytest.approx(system.average, abs=0.06)
        assert system.template in TEMPLATES, name


PROMPTS = {  # written out from each system's own code
    "plain": "1 + {x}?",
    "qwen": "<|im_start|>system\nPlease reason step by step, and put your final answer within "
    "\\boxed{}.<|im_end|>\n<|im_start|>user\n1 + {x}?<|im_end|>\n<|im_start|>assistant\n",
    "simplerl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "1 + {x}?\nPlease reason step by step, and put your final answer within "
    "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n",
}
ENDS = {  # of the long ones
    "prime_zero": " <answer> answer here </answer>. User: 1 + {x}?\n\nPresent the answer in LaTex "
    "format: \\boxed{Your answer}. Assistant:",
    "openreasoner_zero": " the \\boxed{} tag.\nThis is the problem:\n1 + {x}?\nAssistant: <think>",
}


class Chat:
    """A tokenizer whose template says nothing of a box."""

    chat_template, bos_token_id = "some", None

    def apply_chat_template(self, messages, **_):
        return "".join(m["content"] for m in messages)


def test_every_template_is_the_systems_own():
    chat = [{"role": "system", "content": "S \\boxed{}"}, {"role": "user", "content": "1 + {x}?"}]
    problem = Problem(chat, "2")
    assert {*PROMPTS, *ENDS, "own", "own_no_system"} == {*TEMPLATES}
    for name, text in PROMPTS.items():
        assert to_prompt(problem, name).prompt == text
    for name, end in ENDS.items():
        text = to_prompt(problem, name).prompt
        assert text.startswith("A conversation between User and Assistant. The ")
        assert text.endswith(end)
    assert to_prompt(problem, "own").prompt == chat
    assert to_prompt(problem, "own_no_system").prompt == chat[1:]
    with pytest.raises(InputError, match="plain text"):
        to_prompt(Problem("text", "2"), "qwen")


def test_hub_formats_become_problems(tmp_path):
    rows = {
        "arc_c": {
            "question": "Why?",
            "choices": {"label": ["A", "B"], "text": ["x", "y"]},
            "answerKey": "B",
        },
        "mmlu_pro": {"question": "Why?", "options": ["x", "y"], "answer": "B", "answer_index": 1},
        "gpqa": {
            "Question": "Why?",
            "Correct Answer": "x",
            "Incorrect Answer 1": "y",
            "Incorrect Answer 2": "z",
            "Incorrect Answer 3": "w",
        },
        "math500": {"problem": "1/2?", "answer": ["0.5"]},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        _, [problem] = load_benchmark(name, str(tmp_path))
        text = problem.prompt[-1]["content"]
        if name == "gpqa":
            assert f"{problem.answer}) x" in text and "w" in text
        elif name == "math500":
            assert (text, problem.answer) == ("1/2?", "0.5")
        else:
            assert problem.answer in "AB" and f"\n{problem.answer}) y\n" in text and ") x\n" in text
    bad = rows["arc_c"] | {"answerKey": "E"}
    with pytest.raises(
        InputError, match="row 7, column answerKey: expected the label of a choice: A, B, found 'E'"
    ):
        to_problem(Row(bad, "row 7", set()))
    (tmp_path / "arc_c.jsonl").write_text(json.dumps(rows["math500"]) + "\n")
    for name, message in (("arc_c", "not the letter"), ("minerva", "minerva.jsonl or")):
        with pytest.raises(InputError, match=message):
            load_benchmark(name, str(tmp_path))


def test_choices_are_shuffled_and_the_gold_follows():
    """By a function of the question; each letter is right now and then; digits become letters."""
    golds = set()
    for labels in ("ABCDE", "12345"):
        for n in range(40):
            choices = {"label": list(labels), "text": ["no", "nor", "yes", "not", "none"]}
            row = {"question": f"Why {n}?", "choices": choices, "answerKey": labels[2]}
            problem = to_problem(Row(row, "", set()))
            head, *options = problem.prompt[1]["content"].strip().split("\n")
            assert head == f"Why {n}?" and f"{problem.answer}) yes" in options
            assert sorted(option[0] for option in options if option) == list("ABCDE")
            golds.add(problem.answer)
            assert to_problem(Row(row, "", set())) == problem
    assert golds == set("ABCDE")


def test_a_problem_is_sampled_as_often_as_its_file_or_a_flag_says():
    class Yes:
        def generate(self, prompts, n, **_):
            return [[Sample([1], [0.0])] * n for _ in prompts]

    problems = [Problem("", "", source=s, k=k) for s, k in (("a", 4), ("b", 0), ("c", 2), ("c", 0))]
    tokenizer = toy.make_tokenizer()
    tokenizer.eos_token_id = 1

    def asked(samples: int) -> dict[str, int]:
        cfg = Config(eval_samples=samples)
        judge = Judge(lambda jobs: [1.0] * len(jobs))
        scores = evaluate(Yes(), problems, judge, tokenizer, cfg)
        assert all(s["avg"] == 1 and len(s["pass_at"]) == s["k"] for s in scores.values())
        return {source: s["k"] for source, s in scores.items()}

    assert asked(0) == {"a": 4, "b": 8, "c (k = 2)": 2, "c (k = 8)": 8}
    assert asked(3) == {"a": 3, "b": 3, "c": 3}


def test_each_response_gets_its_own_verdicts():
    """More than are graded at a time, by both rules."""

    class Both(Judge):
        def judged(self, jobs, lenient=None):
            return [float(text) + 0.5 * bool(lenient) for text, _ in jobs]

    rows = [{"problem": 0, "response": str(i), "answer": ""} for i in range(2 * JOBS + 1)]
    for row in graded(rows, [Problem("", "")], Both(None), lenient=True):
        assert (row["reward"], row["lenient"]) == (float(row["response"]), row["reward"] + 0.5)
    assert len(rows) == 2 * JOBS + 1


def kept(out, problems: list[Problem], k: int, name: str = "f") -> Responses:
    numbers = [i for i, p in enumerate(problems) if p.k in (0, k)]
    how = dict(seed=0, model="m", verifier="v", temperature=0.6, room=[8] * len(problems))
    return Responses(out, name, problems, numbers, [p.answer for p in problems], k=k, **how)


def test_a_file_of_several_k_is_compared_by_source(tmp_path):
    problems = [Problem("a", "1", source="s1", k=1), Problem("b", "2", source="s2", k=2)]
    for k in (1, 2):
        asked = kept(tmp_path, problems, k)
        asked.begin()
        asked.add(rows_of([[1.0] * problems[i].k for i in (0, 1)])[k - 1 :][:k])
    assert list(load_rows(tmp_path)) == [("f/s1", 0.6, 1), ("f/s2", 0.6, 2)]


def test_what_is_not_complete_is_not_compared_and_a_broken_row_is_named(tmp_path, capsys):
    """Graded anew, and interrupted there, a problem may have some of its verdicts."""
    problems = [Problem(q, "1", source=s) for q, s in (("a", "s1"), ("b", "s1"), ("c", "s2"))]
    asked = kept(tmp_path, problems, 2)
    asked.begin()
    half, *whole = rows_of([[1.0], [1.0, 0.0]])
    asked.add([half])
    asked.add([row | {"reward": None} for row in whole])
    [(key, rows)] = load_rows(tmp_path).items()  # and s2 has none yet
    assert key == ("f/s1", 0.6, 2) and len(rows) == 2
    said = capsys.readouterr().out
    assert "2 of 3 problems" in said and "no verdict on 2 responses" in said
    [file] = tmp_path.glob("*-rank0.jsonl")
    row = json.loads(file.read_text().splitlines()[0])
    for broken in ({"sample": "0"}, {"key": [1]}, {"of": None}, {"reward": "1"}):
        file.write_text(json.dumps(row | broken) + "\n")
        with pytest.raises(InputError, match=f"rank0.jsonl, line 1: {[*broken][0]} is"):
            load_rows(tmp_path)
    [file] = tmp_path.glob("*-asked.json")
    for broken in ("[]", "{}", '{"benchmark": "f", "temperature": 1, "k": 1, "problems": [{}]}'):
        file.write_text(broken)
        with pytest.raises(InputError, match="asked.json: not"):
            load_rows(tmp_path)


def test_weights_below_a_models_directory_are_of_it(tiny_model, tmp_path):
    """transformers reads shards wherever the index says that they are."""
    weights = load_file(tiny_model / "model.safetensors")
    (tmp_path / "parts").mkdir()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = []
    for factor in (1, 2):
        changed = {name: factor * w for name, w in weights.items()}
        save_file(changed, tmp_path / "parts" / "a.safetensors", {"format": "pt"})
        found.append((responses.hashes(tmp_path), responses.stamps(tmp_path)))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    assert found[0][0].keys() == {"model.safetensors.index.json", "parts/a.safetensors"}


def test_a_file_that_is_spelt_twice_counts_once(tmp_path):
    """The mean of two of the same would have an error that is too small."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "1+1=?", "answer": "2"}\n')
    args = Namespace(bench=f"{file},{tmp_path}/./p.jsonl,toy", data_dir=None, template="own")
    args.max_prompt_tokens = 9
    benchmarks, _ = ask(args, None, 99)
    assert len(benchmarks) == 2


def test_scores_of_something_else_are_not_overwritten(tmp_path):
    (tmp_path / "scores.json").write_text("mine")
    with pytest.raises(InputError, match="--out .* has a scores.json of something else"):
        responses.take(tmp_path, {"seed": 0, "of": {}})
    (tmp_path / "config.json").write_text('{"seed": 0, "of": null}')
    with pytest.raises(InputError, match="earlier version"):
        responses.take(tmp_path, {"seed": 0, "of": {}})


def test_file_names_of_benchmarks(tmp_path, monkeypatch):
    """A file has one however it is spelt; no two have the same; none is hidden or has a [."""
    for part in "a", "b":
        (tmp_path / part).mkdir()
        for name in "p.jsonl", "p[1].jsonl":
            (tmp_path / part / name).touch()
    monkeypatch.chdir(tmp_path / "a")
    spelt = "p.jsonl", "./p.jsonl", "../a/p.jsonl", str(tmp_path / "a" / "p.jsonl")
    one, others = set(map(file_name, spelt)), {*map(file_name, ("../b/p.jsonl", "p[1].jsonl"))}
    assert len(one) == 1 and len(one | others) == 3
    hub = {file_name(name) for name in ("org/x", "org/x:test", "org/x/test", "toy/dev", "toy")}
    assert len(hub) == 5 and "toy.dev" in hub
    assert all(re.fullmatch(r"\w[\w.-]*", name) for name in one | others | hub)


def test_directories_of_one_name_are_compared(tmp_path, monkeypatch, capsys):
    """Named by their paths; labels may hold a $; the picture goes where it is said."""
    for part, reward in ("$\\frac{1}$", 1.0), ("b", 0.0):
        out = tmp_path / part / "model"
        out.mkdir(parents=True)
        asked = kept(out, [Problem("q", "1"), Problem("r", "2")], 1)
        asked.begin()
        asked.add(rows_of([[reward], [0.0]]))
    dirs = sorted(tmp_path.glob("*/model"))
    picture = tmp_path / "new" / "$x^$.png"
    compare([*map(str, dirs), str(dirs[0]) + "/", "--out", str(picture)])
    out = capsys.readouterr().out
    assert "| f | 0.6 | 1 | 50.0 ± 50.0 | -50.0 ± 50.0 |" in out and str(picture) in out
    assert picture.stat().st_size > 10_000
    with pytest.raises(InputError, match="--out c.xyz"):
        compare([str(dirs[0]), "--out", "c.xyz"])


def test_an_evaluation_of_the_hub_reads_its_snapshot(tiny_model, tmp_path, monkeypatch):
    """Other files of the repository are no part of it."""
    commit = tmp_path / "models--org--m" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model, commit)
    (commit.parent.parent / "refs").mkdir()
    (commit.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert responses.snapshot("org/m") == str(commit)
    with pytest.raises(InputError, match="org/none"):
        responses.snapshot("org/none")
    before = responses.hashes(commit)
    for name in ("README.md", "checksums.json", "optimizer-0.pt"):
        (commit / name).write_text("x")
    assert responses.hashes(commit) == before == responses.hashes(tiny_model)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_the_papers_files():
    """Counts, repeats as k, and every gold answer in a box is right."""
    found = {name: load_benchmark(name, str(SHARED)) for name in (*SIX, "arc_c", "gsm8k")}
    for name, (_, problems) in found.items():
        assert len(problems) == BENCHMARKS[name].problems
    for name in SIX:  # the official file with its repeats, and the same without
        (bench, some), (_, others) = (
            load_benchmark(name, str(SHARED / f"six_benchmarks_{file}"))
            for file in ("luffy.parquet", "unique.jsonl")
        )
        assert {p.k or bench.k for p in some} == {32 if name in ("aime24", "aime25", "amc") else 1}
        assert some[0].prompt[0]["role"] == "system"
        assert sorted(p.answer for p in some) == sorted(p.answer for p in others)
    problems = [p for _, problems in found.values() for p in problems]
    for template in TEMPLATES:
        for p in problems:
            question, prompt = p.prompt[-1]["content"], to_prompt(p, template).prompt
            assert question in render(prompt, Chat()) and "{problem}" not in str(prompt)
    with Grader() as grader:
        rewards = grader([(f"\\boxed{{{p.answer}}}", p.answer) for p in problems])
        assert rewards == [1.0] * len(problems)
        other = [
            (r"\boxed{%s}" % ("B" if p.answer == "A" else "A"), p.answer) for p in found["arc_c"][1]
        ]
        assert not any(grader(other))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_our_grading_agrees_with_recorded_labels():
    """5,276 answers of four models to GSM8K, labelled by their authors; none is boxed."""
    jobs, labels = [], []
    for line in (SHARED / "gsm8k_model_solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for value in row.values():
            if isinstance(value, dict):
                answer = value["solution"].rpartition("A:")[2].strip()
                jobs.append((rf"\boxed{{{answer}}}", gold))
                labels.append(float(value["is_correct"]))
    with Grader() as grader:
        rewards = grader(jobs)
    agree = fmean(a == b for a, b in zip(rewards, labels))
    assert len(jobs) == 4 * 1319 and agree >= 0.99


# ------------------------------------------------------------------ the command
DEALT = textwrap.dedent("""
    # eval.collect of 10 problems, 2 samples each, from a sampler that answers at once
    import sys
    from pathlib import Path
    sys.path.insert(0, ".")
    from data import Problem
    from eval import collect
    from machinery.processes import init_processes, launch, say
    from machinery.responses import Responses

    PROBLEMS = [Problem(str(i), "") for i in range(20)]
    ROW = dict(response="", source="", tokens=1, truncated=False, lenient=1.0)
    HOW = dict(k=2, temperature=1.0, room=range(20), seed=0, model=0, verifier=0)

    def respond(problems, blocks, grader, samples, **_):
        for block in blocks:
            yield [ROW | dict(problem=i, sample=j, reward=(i + j) % 3)
                   for i in block for j in range(samples)]

    def collected(out, rows_at_once):
        out.mkdir(exist_ok=True)
        asked = Responses(out, "b", PROBLEMS, range(0, 20, 2), [""] * 20, **HOW)
        rows = collect(asked, respond, None, rows_at_once, False)
        return [(row["problem"], row["sample"], row["reward"]) for row in rows]

    def main():
        init_processes()
        for rows_at_once in (4096, 8):
            say(collected(Path(sys.argv[1], str(rows_at_once)), rows_at_once))

    if __name__ == "__main__":
        launch(main)
""")


@pytest.mark.slow
def test_ranks_share_a_benchmark(tmp_path):
    """And each problem has its k samples, if some ranks are killed and others go on."""
    script = tmp_path / "dealt.py"
    script.write_text(DEALT)
    collected = runpy.run_path(str(script))["collected"]
    expected = collected(tmp_path / "alone", 4096)
    assert len(expected) == 20 == len(set(expected))
    assert run(script, tmp_path, ranks=2).stdout.splitlines() == [str(expected)] * 2
    for rows_at_once, left in ((4096, 0), (8, 8)):  # blocks of 5 problems; of 4 and of 1
        out = tmp_path / str(rows_at_once)
        files = [out / f"b-t1-k2-rank{i}.jsonl" for i in range(2)]
        assert [len(whole_blocks(file)) for file in files] == [10, 10]
        lines = files[1].read_text().splitlines(keepends=True)
        files[1].write_text("".join(lines[:9]))  # its last block is not whole
        assert len(whole_blocks(files[1])) == left
        assert collected(out, rows_at_once) == expected


@pytest.mark.slow
def test_an_evaluation_that_was_killed_ends_as_any_other(tiny_model, tmp_path):
    """And the command, its tables and its picture."""
    arguments = [
        "eval.py",
        "--model",
        tiny_model,
        "--bench",
        "toy/dev",
        "--samples",
        16,
        "--limit",
        48,
        "--temperature",
        "0,1",
        "--max_response_tokens",
        12,
    ]
    whole, killed, name = tmp_path / "whole", tmp_path / "killed", "toy.dev-t1-k16-rank0.jsonl"
    out = run(*arguments, "--out", whole).stdout
    for words in ("| toy/dev/easy | 0 | 12 |", "| toy/dev/hard | 1 | 12 |", "@16 |", "mean of 4 |"):
        assert words in out
    rows = (whole / name).read_text().splitlines()
    assert len(rows) == 512 + 256  # two blocks; of the second a part is left, and half a row
    shutil.copytree(whole, killed)
    (killed / "scores.json").unlink()
    (killed / name).write_text("\n".join(rows[:600]) + "\n" + rows[600][:30])
    shutil.move(killed / name, killed / name.replace("rank0", "rank7"))  # which is no more
    run(*arguments, "--out", killed, ranks=2)
    assert (killed / "scores.json").read_text() == (whole / "scores.json").read_text()

    def answered(row: dict) -> dict:  # without which rows were written together
        return {name: value for name, value in row.items() if name not in ("block", "of")}

    complete, continued = (
        {
            key: sorted(map(answered, rows), key=lambda row: (row["problem"], row["sample"]))
            for key, rows in load_rows(out).items()
        }
        for out in (whole, killed)
    )
    assert continued == complete
    out = run("eval.py", "compare", whole, killed, "--out", tmp_path / "c.png")
    assert "| toy/dev/ood | 1 | 16 | 0.0 ± 0.0 | 0.0 ± 0.0 |" in out.stdout
    assert (tmp_path / "c.png").stat().st_size > 10_000
    result = run(*arguments, "--out", killed, "--seed", 1, check=False)
    assert result.returncode != 0 and "seed was 0, now 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_models_path_names_its_directory(tmp_path, monkeypatch):
    """However it is spelt."""
    model = tmp_path / "run" / "checkpoint-000007"
    model.mkdir(parents=True)
    for here, spelt in (model, "."), (model.parent, "checkpoint-000007/"), (tmp_path, str(model)):
        monkeypatch.chdir(here)
        monkeypatch.setattr("sys.argv", ["eval.py", "--bench", "toy", "--model", spelt])
        assert str(parse_args().out) == "runs/eval/run-checkpoint-000007"


def test_what_cannot_be_evaluated(monkeypatch, capsys):
    for arguments, words in (
        (["--paper", "on-policy", "--bench", "six"], "no checkpoint"),
        (["--bench", "six"], "--model or --paper"),
        (["--bench", "six", "--limit", "0"], "--limit: 0"),
        (["--bench", "six", "--max_response_tokens", "0"], "--max_response_tokens: 0"),
        (["--bench", "six", "--max_response_tokens", "-5"], "--max_response_tokens: -5"),
        (["--bench", "six", "--temperature", "1e-05"], "--temperature: 1e-05"),
        (["--bench", "six", "--temperature", "0,b"], "--temperature: 'b'"),
    ):
        monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
        with pytest.raises((InputError, SystemExit)) as error:
            parse_args()
        assert words in str(error.value) + capsys.readouterr().err
    with pytest.raises(InputError, match="toy/exam"):
        load_benchmark("toy/exam")
