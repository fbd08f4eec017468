"""Problems and traces: read from every source, rendered once, ended once."""

import json

import pytest
from conftest import SHARED

from machinery import toy
from data import Problem, batch_at, encode, load_benchmarks, load_problems, load_training_set
from data import render, without_repeats
from machinery.processes import InputError
from verify import grade

OPENR1 = {
    "data_source": "openr1",
    "prompt": [{"role": "user", "content": "b2,c5,-;e?"}],
    "target": [{"role": "assistant", "content": "d=5-2=3;e=3-5=5;\\boxed{535}"}],
    "reward_model": {"ground_truth": "535", "style": "rule"},
}
GSM8K = {"question": "How many?", "answer": "2+2=<<2+2=4>>4 thousand\n#### 4,000"}


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def write(path, *rows) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_jsonl_and_parquet_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl = load_problems(write(tmp_path / "a.jsonl", OPENR1, OPENR1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([OPENR1, OPENR1]), tmp_path / "a.parquet")
    assert load_problems(str(tmp_path / "a.parquet")) == jsonl
    assert jsonl[0] == Problem(OPENR1["prompt"], "535", OPENR1["target"][0]["content"], "openr1")


def test_gsm8k(tmp_path):
    (problem,) = load_problems(write(tmp_path / "g.jsonl", GSM8K))
    assert problem.answer == "4000"
    assert problem.trace == "2+2=4 thousand\nThe answer is \\boxed{4000}."
    assert [m["role"] for m in problem.prompt] == ["system", "user"]


@pytest.mark.parametrize(
    "row, words",
    [
        ("{not json", ["line 2", "JSON"]),
        ("[1]", ["line 2", "object"]),
        ({"text": "x"}, ["line 2", "columns", "text"]),
        (OPENR1 | {"prompt": "text"}, ["line 2", "column prompt", "list"]),
        (OPENR1 | {"prompt": []}, ["line 2", "column prompt"]),
        (OPENR1 | {"prompt": [{"role": "user"}]}, ["line 2", "column prompt", "content"]),
        (OPENR1 | {"reward_model": {}}, ["line 2", "column reward_model"]),
        (OPENR1 | {"reward_model": {"ground_truth": 5}}, ["line 2", "ground_truth", "str", "5"]),
        (
            OPENR1 | {"target": [{"role": "assistant", "content": None}]},
            ["line 2", "column target"],
        ),
        (GSM8K | {"answer": "no mark"}, ["line 2", "column answer", "####"]),
    ],
)
def test_a_broken_row_names_file_row_column_and_what_was_expected(tmp_path, row, words):
    path = write(tmp_path / "broken.jsonl", OPENR1, row)
    with pytest.raises(InputError) as error:
        load_problems(path)
    for word in [path, *words]:
        assert word in str(error.value)


def test_sources_that_hold_nothing(tmp_path):
    for source, words in (
        (write(tmp_path / "empty.jsonl"), "no rows"),
        (str(tmp_path / "absent.parquet"), "no such file"),
        (write(tmp_path / "text.parquet", "{}"), "not a parquet file"),
        ("toy/nothing", "train"),
        ("nobody/nothing-at-all", "hub"),
    ):
        with pytest.raises(InputError, match=words):
            load_problems(source)


def limits(prompt=64, response=64):
    return dict(max_prompt_tokens=prompt, max_response_tokens=response)


def test_a_trace_ends_in_exactly_one_eos(tokenizer):
    eos = tokenizer.eos_token_id
    prompt = [{"role": "user", "content": "b2"}]
    for trace in ("d=5;", "d=5;<eos>"):
        (problem,), dropped = encode([Problem(prompt, "5", trace)], tokenizer, **limits())
        assert problem.trace_ids.count(eos) == 1 and problem.trace_ids[-1] == eos and not dropped
        assert tokenizer.decode(problem.trace_ids) == "d=5;<eos>"
        assert tokenizer.decode(problem.prompt_ids) == "<user>b2<assistant>"
    _, dropped = encode([Problem(prompt, "5", "d=5;<eos>e=6;")], tokenizer, **limits())
    assert dropped == {"EOS inside the trace": 1}


def test_what_does_not_fit_is_dropped_and_counted(tokenizer):
    prompt = [{"role": "user", "content": "b2"}]  # 4 tokens
    rows = [Problem(prompt, "5", "d" * n) for n in (8, 9, 10)] + [Problem(prompt, "5", None)]
    kept, dropped = encode(rows, tokenizer, **limits(response=10))
    assert [len(p.trace_ids) for p in kept] == [9, 10, 0]
    assert dropped == {"trace longer than 10 tokens": 1}
    _, dropped = encode(rows, tokenizer, **limits(prompt=3))
    assert dropped == {"prompt longer than 3 tokens": 4}


def test_think_is_opened_once(tokenizer):
    r"""A prompt that ends in `<think>\n` and a trace that begins with it share it."""
    trace = "<think>\nd=5;</think>\\boxed{5}"
    (inside,), _ = encode([Problem("b2?<think>\n", "5", trace)], tokenizer, **limits())
    for variant in ("<think>d=5;</think>\\boxed{5}", "\n<think> d=5;</think>\\boxed{5}"):
        assert (
            encode([Problem("b2?<think>\n", "5", variant)], tokenizer, **limits())[0][0].trace_ids
            == inside.trace_ids
        )
    (outside,), _ = encode([Problem("b2?", "5", trace)], tokenizer, **limits())
    assert inside.opened == "<think>\n" and outside.opened == ""
    assert len(outside.trace_ids) - len(inside.trace_ids) == len(tokenizer.encode("<think>\n"))


def test_traces_are_verified_once_as_rollouts_are(tokenizer, tmp_path):
    """A trace in an opened thought must close it; a resumed run does not judge again."""
    rows = [
        {
            "prompt": [{"role": "user", "content": q}],
            "reward_model": {"ground_truth": "5"},
            "target": [{"role": "assistant", "content": t}],
        }
        for q, t in (("a", "\\boxed{5}"), ("b", "\\boxed{6}"), ("c", "</think>\\boxed{5}"))
    ]
    path, judged = write(tmp_path / "a.jsonl", *rows), []

    def grader(jobs):
        judged.extend(jobs)
        return [grade(*job) for job in jobs]

    def load():
        return [
            p.prompt[0]["content"]
            for p in load_training_set(
                path,
                tokenizer,
                grader,
                need_traces=True,
                verdicts=tmp_path / "verdicts.json",
                **limits(),
            )
        ]

    assert load() == load() == ["a", "c"] and len(judged) == 3
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(["</think>"])
    tokenizer.chat_template += "{{ '<think>\\n' }}"
    assert load() == ["c"] and judged[3][0] == "<think>\n</think>\\boxed{5}<eos>"


def test_a_line_separator_inside_a_string_is_text(tmp_path):
    row = OPENR1 | {"target": [{"role": "assistant", "content": "a\u2028b\x85c"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_problems(str(tmp_path / "a.jsonl"))[0].trace == "a\u2028b\x85c"
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        load_problems(str(tmp_path / "b.jsonl"))


def test_a_tokenizer_without_eos_or_chat_template_is_refused():
    tokenizer = toy.make_tokenizer()
    problem = Problem([{"role": "user", "content": "b2"}], "5")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat_template"):
        encode([problem], tokenizer, **limits())
    assert render("plain text needs none", tokenizer) == "plain text needs none"
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="eos_token"):
        encode([problem], tokenizer, **limits())


def test_batch_at_is_pure_and_covers_each_epoch_once():
    problems = list(range(10))
    batches = [batch_at(problems, step, 4, seed=1) for step in range(5)]
    assert [batch_at(problems, step, 4, seed=1) for step in (4, 3, 2, 1, 0)] == batches[::-1]
    flat = sum(batches, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == problems and flat[:10] != flat[10:]
    assert batch_at(problems, 0, 4, seed=2) != batches[0]
    assert problems == list(range(10))


def test_rows_that_a_source_repeats_equally_often_are_its_k(tokenizer, tmp_path, capsys):
    def row(source: str, answer: int) -> dict:
        gold = {"ground_truth": str(answer)}
        return OPENR1 | {"data_source": source, "reward_model": gold}

    rows = [row("aime", i) for i in range(3)] * 4 + [row("math", i) for i in range(2)]
    rows += [row("odd", 0), row("odd", 1), row("odd", 0)]
    path = write(tmp_path / "a.jsonl", *rows)
    found = [(p.source, p.answer, p.k) for p in load_benchmarks([path], tokenizer, 64)]
    assert found == [("aime", str(i), 4) for i in range(3)] + [
        *[("math", "0", 0), ("math", "1", 0), ("odd", "0", 0), ("odd", "1", 0), ("odd", "0", 0)]
    ]
    assert capsys.readouterr().out == "aime: 3 problems, each 4 times: k = 4, if no flag sets it\n"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data files")
def test_the_official_benchmarks_are_1590_problems():
    problems = without_repeats(load_problems(str(SHARED / "six_benchmarks_luffy.parquet")))
    assert len(problems) == 1590 and sum(p.k for p in problems) == 32 * (30 + 30 + 83)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data files")
@pytest.mark.parametrize(
    "name, rows, traces",
    [
        ("gsm8k_train.jsonl", 7473, 7473),
        ("traces_gsm8k_train_human.parquet", 7473, 7473),
        ("traces_math4500_human.parquet", 4500, 4500),
        ("traces_r1_sample10.parquet", 10, 10),
        ("six_benchmarks_luffy.parquet", 6023, 0),
    ],
)
def test_real_files(name, rows, traces):
    problems = load_problems(str(SHARED / name))
    assert len(problems) == rows
    assert sum(p.trace is not None for p in problems) == traces
