"""Problems and traces: read from every source, rendered once, ended once."""

import json
import re
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SHARED, Judge

import data
from luffy import Config, parse_args
from machinery import toy
from data import SCHEMAS, TRACES, Problem, batch_at, choose_template, encode, load_benchmarks
from data import load_problems
from data import load_training_set, read_problems, render, without_repeats
from machinery.files import append
from machinery.look import LIMITS
from machinery.processes import InputError
from machinery.run_directory import Run
from machinery.sources import BATCH
from test_run_directory import State
from verify import Grader, grade

OPENR1 = {
    "data_source": "openr1",
    "prompt": [{"role": "user", "content": "b2,c5,-;e?"}],
    "target": [{"role": "assistant", "content": "d=5-2=3;e=3-5=5;\\boxed{535}"}],
    "reward_model": {"ground_truth": "535", "style": "rule"},
}
ARC = {"question": "a", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
GSM8K = {"question": "How many?", "answer": "2+2=<<2+2=4>>4 thousand\n#### 4,000"}


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def write(path, *rows) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_jsonl_and_parquet_read_alike(tmp_path):
    jsonl = load_problems(write(tmp_path / "a.jsonl", OPENR1, OPENR1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([OPENR1, OPENR1]), tmp_path / "a.parquet")
    assert load_problems(str(tmp_path / "a.parquet")) == jsonl
    assert jsonl[0] == Problem(OPENR1["prompt"], "535", OPENR1["target"][0]["content"], "openr1")


def test_gsm8k(tmp_path):
    (problem,) = load_problems(write(tmp_path / "g.jsonl", GSM8K))
    assert problem.answer == "4000"
    assert problem.trace == "2+2=4 thousand\nThe answer is \\boxed{4000}."
    assert [m["role"] for m in problem.prompt] == ["system", "user"]


PLAIN = {"problem": "b2,c5,-;e?", "answer": "535"}
TRACE = {"trace": "d=3;", "trace_logps": [-0.5, 0]}


def load(tmp_path, *rows) -> list[Problem]:
    return load_problems(write(tmp_path / "a.jsonl", *rows))


def test_each_row_of_the_document_is_read(tmp_path):
    """docs/data.md: one row of each schema at least; all of the same problem but the choices."""
    text = (ROOT / "docs" / "data.md").read_text()
    rows = [json.loads(row) for row in re.findall(r"^(\{.*\})$", text, re.M)]
    problems, ignored = read_problems(write(tmp_path / "a.jsonl", *rows))
    first = [next(s for s in SCHEMAS if set(s) <= row.keys()) for row in rows]
    assert set(first) == set(SCHEMAS) and not ignored
    for row, problem in zip(rows, problems):
        assert problem.prompt[-1]["role"] == "user"
        if not {"choices", "options", "Question"} & row.keys():
            assert problem.prompt[-1]["content"] == "What is 1 + 1?" and problem.answer == "2"
            has_trace = bool({*TRACES} & row.keys()) or "####" in str(row["answer"])
            assert (problem.trace is not None) == has_trace
            assert len(problem.others) == (len(row["traces"]) - 1 if "traces" in row else 0)
    table = re.search(r"\| traces \| the first of (.*) \|", text)[1]
    assert table == ", ".join(f"`{column}`" for column in TRACES)


def test_the_first_column_of_traces_decides(tmp_path):
    """OpenR1-Math-220k has four of them; a null is no trace, not a reason to take another's."""
    row = PLAIN | {
        "solution": "human",
        "generations": ["one", " ", "two"],
        "messages": [{"role": "user", "content": "b2"}, {"role": "assistant", "content": "said"}],
        "correctness_math_verify": [True, False, True],
    }
    without = {k: v for k, v in row.items() if k != "generations"}
    path = write(tmp_path / "a.jsonl", row, row | {"generations": None}, without)
    (several, null, said), ignored = read_problems(path)
    assert [p.trace for p in (several, *several.others)] == ["one", "two"]
    assert several.others[0] == Problem(several.prompt, "535", "two")
    assert null.trace is None and null.others == ()
    assert (said.prompt, said.trace) == ([{"role": "user", "content": "b2"}], "said")
    assert said.where == f"{path}, line 3"
    assert ignored == ["solution", "correctness_math_verify"]


def test_answers_that_are_numbers(tmp_path):
    for given, answer in ((25, "25"), (25.0, "25"), (0.5, "0.5"), ([25], "25"), ("025", "025")):
        for row in (PLAIN | {"answer": given}, OPENR1 | {"reward_model": {"ground_truth": given}}):
            assert load(tmp_path, row)[0].answer == answer


def test_numbers_are_as_exact_as_they_are_written(tmp_path):
    """Those that no float holds, and those of a column of 32-bit floats."""
    for text in ("3.14159265358979323846", "0." + "0" * 400 + "1", "12345678901234567.5", "25.50"):
        (problem,) = load(tmp_path, f'{{"problem": "a", "answer": {text}}}')
        assert problem.answer == text.removesuffix("0")
    assert load(tmp_path, '{"problem": "a", "answer": 1e400}')[0].answer == "1" + "0" * 400
    logps = '{"problem": "a", "answer": 1, "trace": "2", "trace_logps": [-0.1234567890123456789]}'
    assert list(load(tmp_path, logps)[0].trace_logps) == pytest.approx([-0.1234567890123456789])
    for kind in (pyarrow.float16(), pyarrow.float32()):
        golds = pyarrow.array([0.1, 25], kind)
        nested = pyarrow.StructArray.from_arrays([golds], ["ground_truth"])
        for columns in ({"answer": golds}, {"reward_model": nested}):
            table = pyarrow.table({"prompt": ["a"] * 2} | columns)
            pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
            problems = load_problems(str(tmp_path / "a.parquet"))
            assert [p.answer for p in problems] == ["0.1", "25"]


def test_rows_of_a_large_file_keep_their_places(tmp_path):
    n = 2 * BATCH + 1  # more than become objects at a time
    table = pyarrow.table({"problem": [f"{i}" for i in range(n)], "answer": list(range(n))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    problems = load_problems(str(tmp_path / "a.parquet"))
    assert [p.answer for p in problems] == [f"{i}" for i in range(n)]
    assert problems[-1].where.endswith(f"row {n - 1}")


def test_what_messages_have_beside_role_and_content_is_said(tmp_path):
    """A thought in a key of its own would be lost."""
    thought = {
        "role": "assistant",
        "content": "\\boxed{1}",
        "reasoning_content": "d=3;",
        "name": "",
    }
    row = {"messages": [{"role": "user", "content": "b2"}, thought], "answer": "1"}
    _, ignored = read_problems(write(tmp_path / "a.jsonl", row))
    assert ignored == ["messages.reasoning_content"]


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, tokenizer):
    """Another file of the same content, too; no edited, shortened or reordered one."""
    rows = [PLAIN | {"problem": f"b{n}", "trace": "\\boxed{535}"} for n in range(3)]
    verdicts = tmp_path / "verdicts.json"

    def begin(path: str) -> Run:
        cfg = replace(parse_args([]), data=path, out=str(tmp_path / "run"))
        problems = load_training_set(cfg, tokenizer, Judge(right), verdicts)
        run = Run(cfg)
        run.begin(toy.make_model(tokenizer, seed=0), tokenizer, problems, problems[:1], State())
        return run

    def right(jobs):
        return [1.0 for _ in jobs]

    run = begin(write(tmp_path / "a.jsonl", *rows))
    append(run.out / "metrics.jsonl", {"step": 1})
    run.save(1, toy.make_model(tokenizer, seed=0), tokenizer)
    same = [json.dumps(row | {"note": 1}, indent=None)[:-1] + " }\r" for row in rows]
    assert begin(write(tmp_path / "moved.jsonl", *same)).first_step == 1
    edited = [rows[0] | {"problem": "b9"}, *rows[1:]]
    for other in (edited, rows[:2], rows[::-1], [rows[0] | {"answer": "535.0"}, *rows[1:]]):
        with pytest.raises(InputError, match=r"--data \S+a.jsonl: its problems.*not those"):
            begin(write(tmp_path / "a.jsonl", *other))
    assert begin(write(tmp_path / "a.jsonl", *rows)).first_step == 1


def test_log_probs_belong_to_their_trace(tmp_path):
    both = PLAIN | {"traces": ["a", None, "b"], "trace_logps": [[-1, -2], None, [-0.5]]}
    one, several = load(tmp_path, PLAIN | TRACE, both)
    assert list(one.trace_logps) == [-0.5, 0]
    assert [list(p.trace_logps) for p in (several, *several.others)] == [[-1, -2], [-0.5]]


@pytest.mark.parametrize(
    "row, words",
    [
        ("{not json", ["JSON"]),
        ("[1]", ["object"]),
        ("[" * 100_000, ["JSON"]),
        ('{"problem": "a", "answer": ' + "1" * 5000 + "}", ["JSON"]),
        ('{"problem": "a\\ud800", "answer": "1"}', ["JSON", "surrogate"]),
        ('{"problem": "a", "answer": "1", "answer": "2"}', ["'answer' stands twice"]),
        ('{"prompt": "a", "reward_model": {"a": 1, "a": 2}}', ["'a' stands twice"]),
        ('{"problem": "a", "answer": 1e99999999999999999999}', ["JSON"]),
        ({"text": "x"}, ["columns", "text"]),
        (OPENR1 | {"prompt": {"role": "user"}}, ["column prompt", "list"]),
        (OPENR1 | {"prompt": []}, ["column prompt"]),
        (OPENR1 | {"prompt": [{"role": "user"}]}, ["column prompt", "content"]),
        (OPENR1 | {"reward_model": {}}, ["column reward_model"]),
        (OPENR1 | {"target": [{"role": "assistant", "content": None}]}, ["column target"]),
        (OPENR1 | {"data_source": ["a"]}, ["column data_source"]),
        (OPENR1 | {"data_source": 0}, ["column data_source"]),
        (OPENR1 | {"data_source": None, "benchmark": {}}, ["column benchmark"]),
        (OPENR1 | {"prompt": [{"role": "system", "content": "a"}]}, ["column prompt", "user's"]),
        (GSM8K | {"answer": "2 + 2\nis 4"}, ["column answer", "####"]),
        (GSM8K | {"answer": "2 #### "}, ["column answer", "####"]),
        (GSM8K | {"answer": "#### Step 1\nIt is 5."}, ["column answer", "one line"]),
        (OPENR1 | {"reward_model": "so #### 5"}, ["column reward_model", "####"]),
        *((PLAIN | {"answer": a}, ["column answer", "list"]) for a in ("['1', '2']", '{"a": 1}')),
        (PLAIN | {"problem": "[{'role': 'user', 'content': 'a'}]"}, ["column problem", "as text"]),
        (PLAIN | {"trace": "['a', 'b']"}, ["column trace", "as text"]),
        (PLAIN | {"choices": ["a", "b"]}, ["column choices", "none beside problem"]),
        (PLAIN | {"options": ["a", "b"]}, ["column options", "none beside problem"]),
        (PLAIN | {"problem": ""}, ["column problem"]),
        *((PLAIN | {"answer": a}, ["column answer"]) for a in (None, " ", True, [], ["1", "2"])),
        *((PLAIN | {"answer": a}, ["column answer"]) for a in ([["1"]], {"a": 1}, float("nan"))),
        *((PLAIN | {"trace": t}, ["column trace"]) for t in (5, {"a": 1}, ["a", 5], [["a"]])),
        (PLAIN | {"messages": ["a", {"role": "user"}]}, ["column messages"]),
        ({"messages": [{"role": "assistant", "content": "a"}], "answer": "1"}, ["column messages"]),
        *((PLAIN | TRACE | {"trace_logps": x}, ["column trace_logps"]) for x in ([], "a", [[-1]])),
        *((PLAIN | TRACE | {"trace_logps": [x]}, ["trace_logps"]) for x in (0.1, None, -1e999)),
        (PLAIN | {"traces": ["a", "b"], "trace_logps": [[-1]]}, ["column trace_logps", "2 lists"]),
        (PLAIN | TRACE | {"trace": None}, ["column trace_logps", "no trace"]),
        ({"problem": "a", "solution": "no box"}, ["column solution", "boxed"]),
        ({"question": "a", "choices": {"text": ["a"]}, "answerKey": "A"}, ["column choices"]),
        (ARC | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, ["column choices", "twice"]),
        (ARC | {"answerKey": "C"}, ["column answerKey", "label of a choice: A, B"]),
        ({"question": "a", "options": ["a", 1], "answer": "A"}, ["column options"]),
        ({"question": "a", "options": ["a"] * 27, "answer": "A"}, ["column options", "letter"]),
        ({"Question": "a", "Correct Answer": "b"}, ["column Incorrect Answer 1"]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_broken_row_names_file_row_column_and_what_was_expected(tmp_path, row, words):
    path = write(tmp_path / "broken.jsonl", OPENR1, row)
    with pytest.raises(InputError) as error:
        load_problems(path)
    for word in [f"{path}, line 2", *words, f"Mend or remove it; python data.py {path} lists"]:
        assert word in str(error.value)


def test_sources_that_hold_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for source, words in (
        (write(tmp_path / "empty.jsonl"), "no rows"),
        (str(tmp_path / "absent.parquet"), "no such file"),
        (write(tmp_path / "text.parquet", "{}"), "not a parquet file"),
        (write(tmp_path / "table.csv", "a,b"), "convert"),
        (write(tmp_path / "rows.jsonl.gz", "a,b"), "Unpack"),
        (str(tmp_path), "directory"),
        (str(tmp_path / "absent.json"), "no such file"),
        ("docs/data.md", "convert"),
        ("docs/absent:train", "hub"),
        ("machinery:train", "no such file"),
        ("x" * 300, "no such file"),
        (" ", "empty"),
        ("toy/val/x", "train"),
        ("toy/nothing", "train"),
        ("nobody/nothing-at-all", "hub"),
    ):
        with pytest.raises(InputError, match=words):
            load_problems(source)


def limits(prompt=64, response=64):
    return dict(max_prompt_tokens=prompt, max_trace_tokens=response)


def config(data, **fields):
    return Config(data=str(data), max_prompt_tokens=64, max_trace_tokens=64, **fields)


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

    def judge(jobs):
        judged.extend(jobs)
        return [grade(*job) for job in jobs]

    def load():
        return [
            p.prompt[0]["content"]
            for p in load_training_set(
                config(path), tokenizer, Judge(judge), tmp_path / "verdicts.json"
            )
        ]

    assert load() == load() == ["a", "c"] and len(judged) == 3
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(["</think>"])
    tokenizer.chat_template += "{{ '<think>\\n' }}"
    assert load() == ["c"] and judged[3][0] == "<think>\n</think>\\boxed{5}<eos>"


def test_a_graders_failure_is_no_verdict_on_a_trace(tokenizer, tmp_path, capsys):
    """It is tried again, until the run has a checkpoint: then its problems stay what they are."""
    trace = {"role": "assistant", "content": "\\boxed{5}"}
    rows = [{"problem": q, "answer": "5", "target": [trace]} for q in "abc"]
    cfg, failing, asked = config(write(tmp_path / "a.jsonl", *rows)), {"a", "b", "c"}, []

    class Failing(Judge):
        def right_and_reward(self, jobs, failed=0.0):
            asked.append(len(jobs))
            here = sorted(failing)
            return [(failed, 1.0) if i < len(here) else (1.0, 1.0) for i in range(len(jobs))]

    def load():
        judge, file = Failing(lambda jobs: []), tmp_path / "verdicts.json"
        return len(load_training_set(cfg, tokenizer, judge, file))

    with pytest.raises(
        InputError, match="dropped 3: trace on which the grader failed\\. `python data.py"
    ):
        load()
    failing -= {"b", "c"}
    assert load() == 2 and "2 of 3 problems; dropped 1: trace on which" in capsys.readouterr().out
    failing -= {"a"}
    (tmp_path / "checkpoint-000002").mkdir()
    assert load() == 2
    (tmp_path / "checkpoint-000002").rmdir()
    assert load() == 3 == load() and asked == [3, 3, 1]


def test_unreadable_golds_are_said_and_dropped_if_asked(tokenizer, tmp_path, capsys):
    """The same problems when a run resumes, even if time limits would now decide otherwise."""
    golds = "5", "t(0,4]", "\\text{Friday}", "C", "52_8", "t(0,4]"
    rows = [{"problem": f"b{n}", "answer": gold} for n, gold in enumerate(golds)]
    cfg, file = config(write(tmp_path / "a.jsonl", *rows), traces=0), tmp_path / "verdicts.json"

    def load(cfg):
        problems = load_training_set(cfg, tokenizer, grader, file)
        return [p.answer for p in problems], capsys.readouterr().out

    with Grader(1) as grader:
        kept, said = load(cfg)
        assert kept == list(golds) and "dropped" not in said
        assert "unreadable  1 of 5 different golds (20.0%): " in said
        assert "\n            line 2: 't(0,4]'\n" in said
        grader.unread = None
        kept, said = load(replace(cfg, unreadable="drop"))
        assert kept == [gold for gold in golds if gold != "t(0,4]"]
        assert "4 of 6 problems; dropped 2: unreadable gold\n" in said
        with pytest.raises(TypeError):  # they are other golds
            load(config(write(tmp_path / "b.jsonl", *rows[1:])))


def test_a_line_separator_inside_a_string_is_text(tmp_path):
    row = OPENR1 | {"target": [{"role": "assistant", "content": "a\u2028b\x85c"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_problems(str(tmp_path / "a.jsonl"))[0].trace == "a\u2028b\x85c"
    (tmp_path / "a.JSONL").write_text(json.dumps(row), encoding="utf-8-sig")  # as on Windows
    assert load_problems(str(tmp_path / "a.JSONL"))[0].answer == "535"
    (tmp_path / "b.jsonl").write_bytes(json.dumps(row).encode() + b"\n\xff\xfe")
    with pytest.raises(InputError, match="b.jsonl, line 2: not JSON in UTF-8"):
        load_problems(str(tmp_path / "b.jsonl"))


def test_a_row_that_its_template_cannot_render_is_named(tmp_path, tokenizer):
    """With ours, when it is chosen, and with a model's own, after that."""
    odd = OPENR1 | {"prompt": [{"role": "martian", "content": "b2"}]}
    odd["target"] = [{"role": "assistant", "content": "<think>\nd=3;"}]
    problems = load(tmp_path, odd, PLAIN)
    with pytest.raises(InputError, match="--template ours.*a.jsonl, line 1: the chat template"):
        choose_template(problems, toy.make_tokenizer())
    strict = toy.make_tokenizer()
    strict.chat_template = "{{ {'user': 'a'}[messages[-1]['role']] + messages[-1]['content'] }}"
    with pytest.raises(InputError, match="a.jsonl, line 2: the chat template cannot render"):
        encode(load(tmp_path, PLAIN, odd), strict, **limits())
    with pytest.raises(InputError, match="a.jsonl, line 1: 2 trace_logps"):
        encode(load(tmp_path, PLAIN | TRACE), tokenizer, **limits())


def test_a_prompt_that_ends_in_an_answer_is_refused(tmp_path):
    chat = [{"role": "user", "content": "b2"}, {"role": "assistant", "content": "5"}]
    with pytest.raises(InputError, match="line 1, column prompt: expected a user's message at the"):
        load(tmp_path, {"prompt": chat, "answer": "5"})


def test_a_models_own_template_shows_the_problem_and_always_the_same_day(tmp_path):
    tokenizer, problems = toy.make_tokenizer(), load(tmp_path, PLAIN)
    tokenizer.chat_template = "{{ messages[-1]['content'][:3] }}"
    with pytest.raises(InputError, match="--template own: its prompts do not have the problem's"):
        choose_template(problems, tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}, {{ messages[-1]['content'] }}"
    choose_template(problems, tokenizer)  # a run that goes on tomorrow has the same prompts
    assert render(problems[0].prompt, tokenizer).startswith("26 Jul 2024, ")


def test_a_cell_that_python_cannot_have_is_named(tmp_path):
    cells = pyarrow.array([b"1", b"\xff"], pyarrow.binary()).view("string")
    table = pyarrow.table({"problem": ["a", "b"], "answer": cells})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet, row 1, column answer: .*utf-8"):
        load_problems(str(tmp_path / "a.parquet"))


def test_marks_without_an_end_take_no_minutes(tmp_path):
    """`<<` that no `>>` ends, in GSM8K's solution: quadratic once."""
    (problem,) = load(tmp_path, GSM8K | {"answer": "<" * 100_000 + "\n#### 4"})
    assert problem.answer == "4"


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


def test_look_says_what_a_run_would_drop_and_why(tmp_path, monkeypatch, capsys):
    wrong, long = {"trace": "d=3;\\boxed{53}"}, {"trace": "\\boxed{535}" + "d" * 96}
    rows = [
        PLAIN | {"trace": "d=3;\\boxed{535}", "level": 5},
        PLAIN | wrong | {"problem": "b2,c5,+;e?"},
        PLAIN | long | {"problem": "b2,c5,+;f?"},
        PLAIN | {"answer": "1", "trace": None},
        PLAIN | {"problem": "b" * 33, "answer": "t(0,4]", "trace": "N\\boxed{1}"},
        PLAIN | {"answer": {}},
        "{half a line",
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    picture = tmp_path / "pictures" / "a.png"
    monkeypatch.setattr("sys.argv", ["data.py", path, "--out", str(picture)])
    data.main()
    said = capsys.readouterr().out
    for words in (
        "ignores the column level (",
        "5 problems, 4 traces",
        f"2 rows, and training does not start with such a row:\n            - {path}, line 6",
        f"            - {path}, line 7: not JSON",
        "1 rows have the prompt of an earlier row",
        f"1 prompts have more than one gold answer:\n            - {path}, line 1: '535'",
        "dropped     2\n",
        f"1: trace longer than 96 tokens, such as {path}, line 3: 'b2,c5,+;f?'",
        f"1: prompt longer than 32 tokens, such as {path}, line 5: 'bbb",
        "| prompts | 12 | 12 | 12 | 12 | 30 | 35 | 32 | 1 |",
        "loses characters of 11% of messages and traces:\n            'N'\n",
        "unreadable  1 of 3 different golds (33.3%): little but the same text is right; "
        "see luffy.py --unreadable\n            line 5: 't(0,4]'\n",
        f"1 of 2 that fit are right (50.0%)\n            - {path}, line 2: gold '535', given '53'",
        "| - | 3 | 2 | 1 | 1 |",
        "to train on 1 problems with a right trace; 1 more have no trace",
        "<user>b2,c5,-;e?<assistant>",
        "'?' '<assistant>' | 'd' '=' '3' ';' '\\\\boxed{' '5' '3' '5'",
        "end         '5' '}' '<eos>'",
    ):
        assert words in said, (words, said)
    assert picture.stat().st_size > 10_000
    defaults = {name: getattr(Config(), name) for name in LIMITS}
    assert LIMITS == defaults


def test_rows_that_a_source_repeats_equally_often_are_its_k(tokenizer, tmp_path, capsys):
    def row(source: str, answer: int) -> dict:
        gold = {"ground_truth": str(answer)}
        return OPENR1 | {"data_source": source, "reward_model": gold}

    rows = [row("aime", i) for i in range(3)] * 4 + [row("math", i) for i in range(2)]
    rows += [row("odd", 0), row("odd", 1), row("odd", 0)]
    path = write(tmp_path / "a.jsonl", *rows)
    found = [(p.source, p.answer, p.k) for p in load_benchmarks(path, tokenizer, 64)]
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
