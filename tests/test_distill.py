"""A teacher's traces, from a local model or a server: right ones, whole, whatever interrupts."""

import io
import json
import subprocess
import threading
import time
import urllib.error
from argparse import Namespace
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, Judge, command, run

from data import SYSTEM, Problem, load_problems, load_training_set, render
from eval import collect
from luffy import Config
from machinery import toy
from machinery.distill import check_file, choose, finish
from machinery.files import read_jsonl
from machinery.processes import InputError
from machinery.responses import Responses
from machinery.server import Server
from verify import Grader, grade


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def write_problems(path, questions: dict[str, str]):
    rows = [
        {
            "data_source": "mine",
            "prompt": messages(question),
            "reward_model": {"ground_truth": answer},
        }
        for question, answer in questions.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def training_set(file, tokenizer):
    cfg = Config(data=str(file), max_prompt_tokens=64, max_response_tokens=64)
    grader = Judge(lambda jobs: [grade(*job) for job in jobs])
    return load_training_set(cfg, tokenizer, grader, file.with_suffix(".rewards"))


# ------------------------------------------------------------------ which responses
def test_which_responses_become_traces():
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    original, asked = Problem(system, "5", source="mine"), Problem("prompt <think>", "5")
    opened = Problem("prompt <think>", "5", opened="<think>\n")

    def kept(*rows, asked=asked, per_problem=9, max_tokens=None):
        plain = dict(response="a\\boxed{5}<eos>", reward=1.0, truncated=False, tokens=5)
        answered = [(original, asked, plain | row) for row in rows]
        [traces] = choose(answered, ["<end>", "<eos>"], per_problem, max_tokens).values()
        return [row["target"][0]["content"] for row in traces.values()]

    bad = {"response": "w", "reward": 0.0}, {"response": "t", "truncated": True}
    assert kept({}, *bad) == ["a\\boxed{5}"]
    assert kept({"response": "b<eos><end>"}, {}, {}) == ["b<eos>", "a\\boxed{5}"]  # as sampled
    assert kept({"response": "bbb"}, {"response": "b"}, per_problem=1) == ["bbb"]
    assert kept({"tokens": 6}, {"response": "b", "tokens": 5}, max_tokens=5) == ["b"]
    assert kept({}, asked=opened) == ["<think>\na\\boxed{5}"]
    assert kept({"reward": 0.0}) == []
    [[row]] = [list(t.values()) for t in choose([(original, asked, ROW)], [], 1, None).values()]
    assert row["prompt"] == system and row["data_source"] == "mine"


def test_traces_are_written_before_anything_is_printed(tmp_path):
    """Where nobody reads (| head), the program ends at its first word."""

    def show():
        raise SystemExit(141)

    file = tmp_path / "t.jsonl"
    args = Namespace(traces=file, traces_per_problem=1, max_trace_tokens=None)
    problem = Problem(messages("q"), "5")
    with pytest.raises(SystemExit):
        finish(args, [(problem, problem, ROW)], [], show)
    assert len(read_jsonl(file)) == 1
    for source in (file, tmp_path / "x" / ".." / "t.jsonl"):
        with pytest.raises(InputError, match="read for --bench"):
            check_file(file, {str(source)})


ROW = dict(response="\\boxed{5}", reward=1.0, truncated=False, tokens=5)


def test_a_run_that_fails_half_way_goes_on(tmp_path):
    """Also: texts of right responses alone are held in memory."""
    problems, asked, fails = [Problem("", str(i)) for i in range(6)], [], [True]

    def respond(problems, blocks, grader, samples, **_):
        for n, block in enumerate(blocks):
            if n == 2 and fails.pop():
                raise InputError("gone")
            asked.append(block)
            plain = dict(truncated=False, response="r", source="", tokens=1, lenient=1.0)
            yield [
                plain | dict(problem=i, sample=j, reward=float(i % 2))
                for i in block
                for j in (0, 1)
            ]

    how = dict(k=2, temperature=1.0, room=range(6), seed=0, model=0, verifier=0)
    options = Responses(tmp_path, "x", problems, range(6), [""] * 6, **how), respond, None
    with pytest.raises(InputError):
        collect(*options, 2, True)
    rows = collect(*options, 4, True)
    assert asked[:2] == [[0], [1]] and sorted(sum(asked, [])) == list(range(6))
    assert [row["problem"] for row in rows] == sorted(2 * [*range(6)])
    assert [row["response"] for row in rows] == ["", "", "r", "r"] * 3


# ------------------------------------------------------------------ a local teacher
@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Knows that the answer is 1, 2 or 3; the rest is luck. In a second."""
    directory, tokenizer = tmp_path_factory.mktemp("teacher") / "model", toy.make_tokenizer()
    model = toy.make_model(tokenizer, seed=0)
    system = [{"role": "system", "content": SYSTEM}]  # as eval.to_prompt has it
    prompts = [render(system + messages(f"{letter}?"), tokenizer) for letter in "abcdefgh"]
    ids = [tokenizer.encode(f"{p}z\\boxed{{{d}}}<eos>") for p in prompts for d in "123"]
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[:, :-5] = -100
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_the_file_of_a_local_teacher_goes_into_training(teacher, tmp_path):
    questions = {f"{letter}?": str(n % 4) for n, letter in enumerate("abcdefgh")}
    problems, file = write_problems(tmp_path / "p.jsonl", questions), tmp_path / "new" / "t.parquet"
    how = "--samples", 32, "--temperature", 1, "--out", tmp_path / "out", "--traces_per_problem", 2
    out = run("eval.py", "--model", teacher, "--bench", problems, "--traces", file, *how).stdout
    assert f"--data {file}" in out and ": 2 problems" in out  # nobody says 0
    tokenizer = toy.make_tokenizer()
    kept = training_set(file, tokenizer)
    assert {p.answer for p in kept} == {"1", "2", "3"} and {p.source for p in kept} == {"mine"}
    assert all(p.prompt == messages(p.prompt[0]["content"]) for p in kept)  # as in the file
    assert all("<eos>" not in p.trace for p in kept)
    traces = sum(1 + len(p.others) for p in kept)
    assert len(kept) == 6 <= traces == len(load_problems(str(file))) <= 12
    trained = "--data", file, "--model", teacher, "--problems_per_step", 2, "--eval_data", "none"
    run("luffy.py", *trained, "--steps", 2, "--out", tmp_path / "run")
    again = tmp_path / "t.jsonl"  # from the responses on disk
    run("eval.py", "--model", teacher, "--bench", problems, "--traces", again, *how)
    assert load_problems(str(again)) == load_problems(str(file))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--traces", "t.csv"], ".parquet or .jsonl"),
        (["--traces", "p.jsonl"], "or read for --bench"),
        (["--traces", "t.jsonl", "--traces_per_problem", "0"], "--traces_per_problem: 0"),
        (["--url", "http://x/v1", "--template", "qwen"], "--template qwen"),
    ],
)
def test_what_cannot_be_distilled(flags, words, monkeypatch, capsys):
    from eval import parse_args

    arguments = ["eval.py", "--model", "m", "--bench", "p.jsonl", *flags]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises((InputError, SystemExit)) as error:
        parse_args()
    assert words in str(error.value) + capsys.readouterr().err


@pytest.mark.slow
def test_the_toys_luffy_teaches_its_own_base(tmp_path):
    """The base alone solves no hard problem in 64 samples."""
    flags = "--problems_per_step", 16, "--eval_data", "none", "--save_every", 100
    run("luffy.py", "--steps", 50, "--out", tmp_path / "teacher", *flags)
    model, file = tmp_path / "teacher" / "checkpoint-000050", tmp_path / "t.parquet"
    how = "--samples", 4, "--out", tmp_path / "eval", "--max_response_tokens", 96
    run("eval.py", "--model", model, "--bench", "toy/train", "--traces", file, *how)
    hard = [p for p in training_set(file, toy.make_tokenizer()) if p.source == "hard"]
    assert len(hard) > 32  # of 128
    sft = "--algo", "sft", "--lr", 1e-3, "--steps", 60, "--out", tmp_path / "student"
    run("luffy.py", "--data", file, *sft, *flags)
    how = "--samples", 4, "--out", tmp_path / "eval2", "--limit", 96
    model = tmp_path / "student" / "checkpoint-000060"
    out = run("eval.py", "--model", model, "--bench", "toy/val", *how).stdout
    [line] = [line for line in out.splitlines() if "val/hard" in line]
    assert float(line.split("|")[4].split("±")[0]) > 10, out


# ------------------------------------------------------------------ a served teacher
class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that has faults, and answers as a function of what it is asked.

    Its answers are right for two seeds of three, and cut off for one of five.
    """

    def do_GET(self):
        self.answer(200, {"data": []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            fault = self.server.faults.pop(0) if self.server.faults else None
            hangs = len(self.server.asked) > self.server.hangs_after
        if hangs:
            self.server.let_go.wait(60)
            return self.connection.close()
        if fault == "reset":
            return self.connection.close()
        if fault == "nonsense":
            return self.answer(200, {"choices": []})
        if fault:
            return self.answer(fault, {"error": {"message": f"because of {fault}"}})
        question, seed = body["messages"][-1]["content"], body["seed"]
        right = question if seed % 3 else "0"
        message = {"role": "assistant", "content": f"\\boxed{{{right}}} {seed}"}
        if int(question) % 2:
            message |= {"reasoning_content": f"\nthought {seed}\n"}
        reason = "stop" if seed % 5 else "length"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self.answer(200, {"choices": [choice], "usage": {"completion_tokens": 7}})

    def answer(self, code, body):
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.keys, server.faults, server.hangs_after = [], [], [], 10**9
    server.lock, server.let_go = threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.let_go.set()
    server.shutdown()


PROBLEMS = [Problem([{"role": "user", "content": str(i)}], str(i)) for i in range(1, 7)]
HOW = dict(samples=4, temperature=0.6, max_tokens=64, seeds=range(6), lenient=True)


def respond(url, first_wait=0.0, concurrency=3):
    with Grader(1) as grader:
        asked = Server(url, "m", concurrency, first_wait)
        for rows in asked.respond(PROBLEMS, [[i] for i in range(6)], grader, **HOW):
            yield from rows


def by_number(rows):
    return sorted(rows, key=lambda row: (row["problem"], row["sample"]))


def test_a_server_answers_as_a_sampler_does(server, monkeypatch):
    """Faults that pass are waited out, and change nothing; thoughts are part of the response."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows = by_number(respond(server.url))
    assert len(server.asked) == 24 and len({body["seed"] for body in server.asked}) == 24
    assert {*server.keys} == {"Bearer secret"} and server.asked[0]["max_tokens"] == 64
    for i, row in enumerate(rows):
        seed = int(row["response"].split()[-1])
        assert (row["problem"], row["sample"]) == divmod(i, 4)
        assert row["tokens"] == 7 and row["truncated"] == (seed % 5 == 0)
        assert row["reward"] == row["lenient"] == (seed % 3 > 0)
        thought = f"<think>\nthought {seed}\n</think>\n\n" if row["problem"] % 2 == 0 else ""
        assert row["response"].startswith(f"{thought}\\boxed")
    server.faults = [429, "reset", 503, 500, 429]
    assert by_number(respond(server.url)) == rows


def test_a_server_that_refuses_says_why(server):
    """And what was complete, or under way, is not lost."""
    server.faults = 8 * [None] + [400]
    rows = []
    with pytest.raises(InputError, match="HTTP 400.*because of 400"):
        for row in respond(server.url, concurrency=1):
            rows.append(row)
    assert len(rows) == 8 and len(server.asked) < 12
    server.faults = [429] * 8
    with pytest.raises(InputError, match="429.*8 times in a row.*goes on"):
        list(respond(server.url, concurrency=1))
    server.faults = ["nonsense"]
    with pytest.raises(InputError, match="completion_tokens"):
        list(respond(server.url, concurrency=1))
    with pytest.raises(InputError, match="nothing answers"):
        Server("http://127.0.0.1:1/v1", "m", 1)
    with pytest.raises(InputError, match="expected http"):
        Server("localhost:8000/v1", "m", 1)


@pytest.mark.slow  # its quicker relatives: a run that fails half-way, the same server in-process
def test_a_server_is_distilled_and_a_killed_run_ends_as_any_other(server, tmp_path):
    problems = write_problems(tmp_path / "p.jsonl", {str(i): str(i) for i in range(1, 21)})
    arguments = "eval.py", "--model", "org/m", "--url", server.url, "--bench", problems
    arguments += "--samples", 4, "--concurrency", 2, "--out"

    def traces(name):
        return ["--traces", tmp_path / name, "--traces_per_problem", 2]

    out = run(*arguments, tmp_path / "whole", *traces("whole.jsonl")).stdout
    assert "| @4 |" not in out and "in " + str(tmp_path / "whole.jsonl") in out
    server.asked, server.hangs_after = [], 41
    killed = [*arguments, tmp_path / "killed", *traces("killed.jsonl")]
    process = subprocess.Popen(command(*killed), cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(sum(map(read_jsonl, (tmp_path / "killed").glob("*-rank0.jsonl")), [])) < 40:
        assert process.poll() is None  # ten problems complete; two requests hang
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed.jsonl").exists()
    server.asked, server.hangs_after = [], 10**9
    server.let_go.set()
    run(*killed)
    assert len(server.asked) == 40
    files = [(tmp_path / f"{name}.jsonl").read_text() for name in ("whole", "killed")]
    assert files[0] == files[1] and "<think>\\nthought" in files[0]
    rows = load_problems(str(tmp_path / "whole.jsonl"))
    assert len(rows) > 20 and all(grade(p.trace, p.answer) for p in rows)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["template"] == "the server's"


@pytest.mark.parametrize(
    "body, words",
    [
        (b"\xff\xfe\x00", "not JSON"),
        (
            b'{"choices": [{"message": "2"}], "usage": {"completion_tokens": 1}}',
            "expected an answer",
        ),
        (
            b'{"choices": [{"message": {"content": ["2"]}}], "usage": {"completion_tokens": 1}}',
            "expe",
        ),
        (
            b'{"choices": [{"message": {"content": "2"}}], "usage": {"completion_tokens": 1e999}}',
            "expected an answer",
        ),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_an_answer_of_another_form_is_said(body, words, server, monkeypatch):
    client = Server(server.url, "m", 1)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(body))
    with pytest.raises(InputError, match=words):
        client.ask([], temperature=1.0, max_tokens=1, seed=0)


def test_a_connection_that_breaks_amid_an_error_is_one_more_error(server, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise IncompleteRead(b"x", 9)

    def ask(*_, **__):
        raise urllib.error.HTTPError("u", 500, "gone", {}, Broken())

    client = Server(server.url, "m", 1, first_wait=0)
    monkeypatch.setattr("urllib.request.urlopen", ask)
    with pytest.raises(InputError, match="HTTP 500 gone IncompleteRead.* times in a row"):
        client.ask([], temperature=1.0, max_tokens=1, seed=0)


def test_half_a_surrogate_pair_costs_no_evaluation(server, monkeypatch):
    body = (
        b'{"choices": [{"message": {"content": "\\ud800 2"}}], "usage": {"completion_tokens": 1}}'
    )
    client = Server(server.url, "m", 1)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(body))
    assert client.ask([], temperature=1.0, max_tokens=1, seed=0)["response"] == "? 2"
