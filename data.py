"""Problems and traces: one schema, one prompt format, every source.

    python data.py problems.jsonl --model Qwen2.5-Math-7B    # look before you train

A source is a name that `load_problems` understands: "toy", a local .jsonl or .parquet file, or the
name of a data set on the Hugging Face hub. Its rows may have one of the schemas in `SCHEMAS`; for
another one, add a function there. docs/data.md has a row of each.
"""

import argparse
import hashlib
import json
import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import pyarrow.parquet
from transformers import PreTrainedTokenizerBase as Tokenizer

from machinery import toy
from machinery.files import write
from machinery.processes import InputError, gather, launch, progress, rank, say, world_size
import verify
from verify import Grader, extract_answer

THINK = "<think>\n"
SYSTEM = "Reason step by step, and put your final answer within \\boxed{}."  # for data without one

THINK_SYSTEM = (
    "Think it through between <think> and </think>, then write the solution and put "
    "your final answer within \\boxed{}."
)
CHAT_TEMPLATE = (  # ours, in the form of the paper's App. C.2
    "{% if messages[0]['role'] != 'system' %}{{ SYSTEM + '\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'User: This is the problem:\n', 'assistant': 'Assistant: '}"
    "[message['role']] + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' + OPENING }}{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A problem to roll out, the answer that the verifier checks and, if there is one, a trace.

    `encode` fills the token fields, `load_training_set` the trace's reward.
    """

    prompt: list[dict[str, str]] | str  # chat messages, or the text as the model shall see it
    answer: str  # the gold answer, bare LaTeX
    trace: str | None = None  # a teacher's response to the prompt
    source: str = ""  # metrics are reported by source
    prompt_ids: Sequence[int] = ()
    trace_ids: Sequence[int] = ()  # ends in the one EOS
    trace_reward: float = 0.0  # of the trace, by the verifier
    opened: str = ""  # "<think>\n" if the prompt ends in <think>: the response is in a thought
    trace_logps: Sequence[float] = ()  # the teacher's log π_φ, one for each of trace_ids; none: 0
    others: tuple["Problem", ...] = ()  # the same problem with its other traces


# ------------------------------------------------------------------ sources
def load_problems(path_or_name: str, *, split: str = "train") -> list[Problem]:
    """All problems of a source, in its order.

    path_or_name: "toy" or "toy/SPLIT", a .jsonl or .parquet file, or ORGANISATION/NAME on the hub,
    perhaps with /CONFIG and :SPLIT; `split` is for the hub only, where none is named. Raises
    InputError on a source that is absent, empty or malformed.
    """
    return read_problems(path_or_name, split)[0]


def read_problems(
    name: str, split: str = "train", broken: list[str] | None = None
) -> tuple[list[Problem], list[str], list[str]]:
    """-> problems, where each of them stands, and the columns that no reader looked at.

    broken: gets the complaint about each row that cannot be read, in place of an InputError.
    """
    problems, places = [], []
    columns: dict[str, None] = {}
    read: set[str] = set()
    for where, values in read_rows(name, split):
        row = Row(values, where)
        columns |= dict.fromkeys(values)
        try:
            problems.append(to_problem(row))
            places.append(where)
        except InputError as error:
            if broken is None:
                raise
            broken.append(str(error))
        read |= row.read
    if not columns:
        raise InputError(f"{name}: no rows; a data set needs at least one problem")
    return problems, places, [column for column in columns if column not in read]


def say_ignored(name: str, ignored: list[str]) -> None:
    """What stands in a source and has no effect, once."""
    if ignored:
        hint = "; trace_logps takes a teacher's log-probs" if "target_probs" in ignored else ""
        columns = f"column{'s' * (len(ignored) > 1)} {', '.join(ignored)}"
        say(f"{name}: ignores the {columns} (docs/data.md has those that are read){hint}")


OTHER_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zip|zst|xz|bz2)$", re.IGNORECASE)


def read_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for each row of the toy, a file or a hub data set."""
    path, suffix = Path(name), Path(name).suffix.lower()
    is_toy = path.parts[:1] == ("toy",)
    if path.is_dir() and not is_toy:
        raise InputError(f"{name}: a directory; name a .jsonl or .parquet file in it")
    if not path.is_file() and (path.is_absolute() or OTHER_FILE.search(name)):
        raise InputError(f"{name}: no such file")
    if suffix == ".jsonl":
        try:
            # utf-8-sig: Windows' editors put a mark first; not splitlines: U+2028 is text
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name}: cannot be read as UTF-8 text ({error})") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{name}, line {number}", parse_line(line, f"{name}, line {number}")
        return
    if is_toy:
        rows = toy.rows(*path.parts[1:])
    elif suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(f"{name}: not a parquet file that can be read ({error})") from error
    elif path.is_file():
        raise InputError(
            f"{name}: neither .jsonl (one JSON object a line) nor .parquet. Unpack it, or convert "
            "it: pandas.read_json or read_csv(...).to_json('NAME.jsonl', orient='records', "
            "lines=True)"
        )
    else:
        import datasets  # slow to import, and only the hub needs it

        repository, _, named = name.partition(":")
        organisation, *parts = repository.split("/", 2)  # NAME and perhaps CONFIG
        try:
            rows = datasets.load_dataset(
                "/".join([organisation, *parts[:1]]), *parts[1:], split=named or split
            )
        except Exception as error:  # a dozen kinds, and all mean that there is no data
            raise InputError(
                f"{name}: not a .jsonl or .parquet file, and no data set with a split "
                f"{named or split!r} that this machine reaches on the hub "
                f"({error})"
            ) from error
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def parse_line(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
        if r"\ud" in line.lower():  # half a surrogate pair is no text: it could not be written
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # not JSON, or a number or nesting without end
        raise InputError(f"{where}: not JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


# ------------------------------------------------------------------ schemas
class Row:
    """A row of a source: its columns, where it stands, and the columns that were looked at."""

    def __init__(self, columns: dict[str, Any], where: str):
        self.columns, self.where = columns, where
        self.read: set[str] = set()

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return self.columns.get(column)

    def text(self, column: str) -> str:
        value = self[column]
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(column, "a non-empty string", value)
        return value

    def wrong(self, column: str, expected: str, found: Any) -> InputError:
        found = f"{brief(found)} ({type(found).__name__})"
        return InputError(f"{self.where}, column {column}: expected {expected}, found {found}")


def from_openr1(row: Row) -> Problem:
    """Elliott/Openr1-Math-46k-8192, and the official code's benchmark files (without target)."""
    gold = row["reward_model"]
    if isinstance(gold, dict):
        gold = gold.get("ground_truth")
    return question(row, final(gold, "reward_model", row))


def from_question(row: Row) -> Problem:
    """A question and its answer, as MATH-500 and most sets on the hub have it."""
    answer = row["answer"]
    if answer is None and "solution" in row:
        return from_solution(row)
    if isinstance(answer, str) and "####" in answer:
        return from_gsm8k(row)
    lines = isinstance(answer, str) and "\n" in answer.strip() and "\\begin" not in answer
    if lines or isinstance(answer, str) and "boxed{" in answer:
        expected = "the bare answer, or GSM8K's: a solution that ends in '#### ANSWER'"
        raise row.wrong("answer", f"{expected} (a solution goes into a column solution)", answer)
    return question(row, final(answer, "answer", row))


def from_solution(row: Row) -> Problem:
    r"""MATH as the hub has it: the answer is what the solution boxes."""
    answer = extract_answer(row.text("solution"))
    if not answer:
        expected = "an answer in \\boxed{}, or a column answer beside it"
        raise row.wrong("solution", expected, row["solution"])
    return question(row, answer)


def from_gsm8k(row: Row) -> Problem:
    """GSM8K's own format: the human solution, calculator marks <<1+1=2>>, then `#### gold`."""
    solution, _, gold = row.text("answer").rpartition("####")
    if re.fullmatch(r"\s*-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?\s*", gold):
        gold = gold.replace(",", "")
    problem = question(row, final(gold.strip(), "answer, after ####", row))
    solution = re.sub(r"<<[^>]*>>", "", solution).strip()
    if not solution or any(column in row for column in TRACES):
        return problem
    prompt = [{"role": "system", "content": SYSTEM}, *problem.prompt]
    trace = f"{solution}\nThe answer is \\boxed{{{problem.answer}}}."
    return replace(problem, prompt=prompt, trace=trace, source=problem.source or "gsm8k")


def from_arc(row: Row) -> Problem:
    """ARC: choices with their labels."""
    given = row["choices"]
    given = given if isinstance(given, dict) else {}
    labels, texts = strings(given.get("label")), strings(given.get("text"))
    if not labels or len(labels) != len(texts):
        raise row.wrong("choices", "{label: [...], text: [...]}, as many of each", row["choices"])
    return multiple_choice(row, "question", zip(labels, texts), row.text("answerKey"))


def from_mmlu_pro(row: Row) -> Problem:
    """MMLU-Pro: options, of which the answer is a letter."""
    options = strings(row["options"])
    if not options:
        raise row.wrong("options", "a list of strings", row["options"])
    return multiple_choice(row, "question", zip("ABCDEFGHIJ", options), row.text("answer"))


def from_gpqa(row: Row) -> Problem:
    """GPQA: the right answer and three wrong ones, shuffled by a function of the question."""
    columns = "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))
    answers = [row.text(column) for column in columns]
    order = random.Random(row.text("Question")).sample(range(4), 4)
    choices = zip("ABCD", [answers[i].strip() for i in order])
    return multiple_choice(row, "Question", choices, "ABCD"[order.index(0)])


def multiple_choice(
    row: Row, column: str, choices: Iterable[tuple[str, str]], answer: str
) -> Problem:
    options = "\n".join(f"{label}) {text}" for label, text in choices)
    prompt = [{"role": "user", "content": f"{row.text(column)}\n\n{options}\n"}]
    return Problem(prompt, answer, source=source_of(row))


SCHEMAS: dict[tuple[str, ...], Callable[[Row], Problem]] = {
    # the columns that tell a schema -> its reader; docs/data.md has a row of each
    ("prompt", "reward_model"): from_openr1,
    ("question", "choices", "answerKey"): from_arc,
    ("question", "options", "answer"): from_mmlu_pro,
    ("Question", "Correct Answer"): from_gpqa,
    ("problem", "answer"): from_question,
    ("question", "answer"): from_question,
    ("prompt", "answer"): from_question,
    ("messages", "answer"): from_question,
    ("problem", "solution"): from_solution,
    ("question", "solution"): from_solution,
}
QUESTIONS = ("problem", "question", "prompt", "messages")
# The first of these columns that a row has holds its traces. A human's solution comes late.
# fmt: off
TRACES = ("target", "trace", "traces", "generations", "response", "completion", "messages",
          "solution", "reasoning")
# fmt: on


def to_problem(row: Row) -> Problem:
    for columns, reader in SCHEMAS.items():
        if all(column in row for column in columns):
            return reader(row)
    known = " or ".join("{" + ", ".join(columns) + "}" for columns in SCHEMAS)
    raise InputError(f"{row.where}: expected the columns {known}, found {sorted(row.columns)}")


def question(row: Row, answer: str) -> Problem:
    """A string is the user's message. Before a trace in messages stand those that it answers."""
    column = next((column for column in TRACES if column in row), None)
    asked = next(column for column in QUESTIONS if column in row)
    if column == "messages" and row[column] is not None:
        asked = column
    prompt = row[asked]
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    prompt = messages(prompt, asked, row)
    if asked == "messages" and prompt[-1]["role"] == "assistant":
        prompt.pop()
    if not prompt:
        raise row.wrong(asked, "a message before the assistant's", row[asked])
    bare = Problem(prompt, answer, source=source_of(row))
    return with_traces(bare, column, row) if column else bare


def with_traces(bare: Problem, column: str, row: Row) -> Problem:
    """A column holds a trace, a list of traces, or messages of which the last is the trace."""
    value, logps = row[column], row["trace_logps"]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        last = messages(value, column, row)[-1]
        value = last["content"] if last["role"] == "assistant" else None
    if not isinstance(value, list):
        value, logps = [value], [logps]
    elif logps is None:
        logps = [None] * len(value)
    elif not isinstance(logps, list) or len(logps) != len(value):
        raise row.wrong("trace_logps", f"{len(value)} lists, one for each of {column}", logps)
    found = [with_trace(bare, trace, logp, column, row) for trace, logp in zip(value, logps)]
    first, *others = [p for p in found if p.trace is not None] or [bare]
    return replace(first, others=tuple(others))


def with_trace(bare: Problem, trace: Any, logps: Any, column: str, row: Row) -> Problem:
    """Null or blank is none."""
    if trace is None or isinstance(trace, str) and not trace.strip():
        if logps:
            raise row.wrong("trace_logps", "null, for there is no trace", logps)
        return bare
    if not isinstance(trace, str):
        raise row.wrong(column, "a string, a list of strings, or {role, content} messages", trace)
    if logps is None:
        return replace(bare, trace=trace)
    if not (isinstance(logps, list) and logps and all(map(is_logp, logps))):
        raise row.wrong("trace_logps", "a list of finite numbers <= 0, one a token", logps)
    return replace(bare, trace=trace, trace_logps=array("f", logps))


def is_logp(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value <= 1e-6  # may be rounded


def final(value: Any, column: str, row: Row) -> str:
    """A final answer: text, a number, or a list of one of them."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if type(value) is float and math.isfinite(value):  # a column of 25 and null is one of floats
        value = int(value) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise row.wrong(column, "a final answer (a string or a number)", value)
    return value


def source_of(row: Row) -> str:
    value = row["data_source"] or row["benchmark"] or ""
    if not isinstance(value, str):
        raise row.wrong("data_source", "a string", value)
    return value


def strings(value: Any) -> list[str]:
    """The list, if it is one of strings alone, else an empty one."""
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else []


def messages(value: Any, column: str, row: Row) -> list[dict[str, str]]:
    if not (isinstance(value, list) and value) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    ):
        raise row.wrong(column, "a string, or a list of {role, content} messages", value)
    return [{"role": m["role"], "content": m["content"]} for m in value]


# ------------------------------------------------------------------ tokens
def encode(
    problems: list[Problem],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[list[Problem], Counter]:
    """Fill the token fields; drop what does not fit. -> (problems kept, reason -> number dropped).

    A trace becomes its tokens and exactly one EOS, and must fit into max_response_tokens with it.
    A problem without a trace is kept. Raises InputError if the tokenizer has no EOS, or no chat
    template while a prompt consists of messages.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token: a response could never end. "
            "Set eos_token in its tokenizer_config.json"
        )
    kept: list[Problem] = []
    dropped: Counter[str] = Counter()
    bar = progress("tokens", len(problems))
    for problem in problems:
        bar.update()
        text = render(problem.prompt, tokenizer)
        prompt_ids = tokenizer.encode(text, add_special_tokens=False)
        opened = THINK if text.rstrip().endswith(THINK.rstrip()) else ""
        trace_ids = trace_tokens(problem.trace, opened, tokenizer)
        if len(prompt_ids) > max_prompt_tokens:
            dropped[f"prompt longer than {max_prompt_tokens} tokens"] += 1
        elif len(trace_ids) > max_response_tokens:
            dropped[f"trace longer than {max_response_tokens} tokens"] += 1
        elif opened and problem.trace is not None and "</think>" not in problem.trace:
            dropped["trace without the </think> that its prompt asks for"] += 1
        elif tokenizer.eos_token_id in trace_ids[:-1]:
            dropped["EOS inside the trace"] += 1
        else:
            kept.append(
                replace(
                    problem,
                    prompt_ids=array("i", prompt_ids),  # 4 bytes a token
                    trace_ids=array("i", trace_ids),
                    opened=opened,
                )
            )
    bar.close()
    return kept, dropped


def render(prompt: list[dict[str, str]] | str, tokenizer: Tokenizer) -> str:
    """The text that the model sees: a plain prompt as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise InputError(
            "the tokenizer has no chat template, and the prompts are chat messages. "
            "Put a chat_template into its tokenizer_config.json"
        )
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


def text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Special tokens, too: what the verifier sees."""
    return str(tokenizer.decode(list(ids)))


def choose_template(problems: list[Problem], tokenizer: Tokenizer) -> None:
    """Give the tokenizer our chat template if its own does not suit the data, and say so.

    It suits if there is one and, where traces have thoughts, a prompt ends in the opened thought.
    This looks at the data, not at the algorithm: all arms see the same prompts. The template is
    saved with the checkpoints, as the tokenizer's own.
    """
    chats, thoughts = [], False
    for p in problems:
        if not isinstance(p.prompt, str):
            chats.append(p.prompt)
            thoughts = thoughts or (p.trace or "").lstrip().startswith("<think>")
    own = tokenizer.chat_template
    if not chats or own and (not thoughts or render(chats[0], tokenizer).endswith(THINK)):
        return
    system, opening = (THINK_SYSTEM, f" {THINK}") if thoughts else (SYSTEM, "\n")
    if chats[0][0]["role"] == "system":  # then so for problems without one, in evaluation
        system = chats[0][0]["content"]
    constants = f"{{% set SYSTEM = {system!r} %}}{{% set OPENING = {opening!r} %}}"
    tokenizer.chat_template = constants + CHAT_TEMPLATE
    say(
        f"template    ours ({'its own does not open the thought' if own else 'it has none'}): "
        f"...{render(chats[0], tokenizer)[-40:]!r}"
    )


def trace_tokens(trace: str | None, opened: str, tokenizer: Tokenizer) -> list[int]:
    r"""A trace as the continuation of its prompt, with exactly one EOS.

    Where the prompt already ends in `<think>\n`, the trace's own `<think>\n` would be a second one.
    """
    if trace is None:
        return []
    if opened:
        trace = re.sub(r"^\s*<think>\s?", "", trace)
    return tokenizer.encode(trace.removesuffix(tokenizer.eos_token), add_special_tokens=False) + [
        tokenizer.eos_token_id
    ]


# ------------------------------------------------------------------ the training set
def load_training_set(
    name: str,
    tokenizer: Tokenizer,
    grader: Grader,
    verdicts: Path,
    need_traces: bool,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> list[Problem]:
    """The problems of a source to train on, with verified traces that fit; says what it drops.

    Every algorithm gets the same problems, with one exception: an algorithm that uses no traces
    keeps the problems that have none. The file `verdicts` keeps the traces' rewards, so that a
    resumed run has the same problems even if a verifier's time limit would now decide otherwise.
    Raises InputError if no problem is left.
    """
    problems, _, ignored = read_problems(name)
    say_ignored(name, ignored)
    choose_template(problems, tokenizer)
    limits = dict(max_prompt_tokens=max_prompt_tokens, max_response_tokens=max_response_tokens)
    kept, dropped = encode(problems, tokenizer, **limits)
    if need_traces:
        dropped["no trace"] = sum(p.trace is None for p in kept)
        kept = [p for p in kept if p.trace is not None]
    jobs = [(p.opened + text_of(p.trace_ids, tokenizer), p.answer) for p in kept]
    key = hashlib.sha256(json.dumps(jobs).encode()).hexdigest()
    known = json.loads(verdicts.read_text()) if verdicts.exists() else {}
    rewards = known.get(key, [0.0] * len(jobs))
    if key not in known:
        for r, part in enumerate(gather(grader(jobs[rank() :: world_size()]))):
            rewards[r :: world_size()] = part
        if rank() == 0:  # after the gather: by now every rank has looked for the file
            write(verdicts, json.dumps({key: rewards}))
    kept = [replace(p, trace_reward=reward) for p, reward in zip(kept, rewards)]
    dropped["wrong trace"] = sum(p.trace is not None and p.trace_reward == 0 for p in kept)
    kept = [p for p in kept if p.trace is None or p.trace_reward > 0]
    reasons = "".join(f"; dropped {n}: {reason}" for reason, n in sorted(dropped.items()) if n)
    if not kept:
        raise InputError(f"--data {name}: no problem is left to train on{reasons}")
    say(f"{name}: {len(kept)} of {len(problems)} problems{reasons}")
    return kept


def load_benchmarks(
    names: Iterable[str], tokenizer: Tokenizer, max_prompt_tokens: int
) -> list[Problem]:
    """The problems of some sources to evaluate on, encoded; says what it drops."""
    problems = [p for name in names for p in load_problems(name, split="test")]
    return to_evaluate(problems, tokenizer, max_prompt_tokens=max_prompt_tokens)


def to_evaluate(
    problems: list[Problem], tokenizer: Tokenizer, *, max_prompt_tokens: int
) -> list[Problem]:
    """Encoded, without their traces: none is left out because its teacher was long-winded."""
    bare = [replace(p, trace=None) for p in problems]
    limits = dict(max_prompt_tokens=max_prompt_tokens, max_response_tokens=0)
    kept, dropped = encode(bare, tokenizer, **limits)
    for reason, number in dropped.items():
        say(f"evaluation leaves out {number} of {len(problems)} problems: {reason}")
    return kept


# ------------------------------------------------------------------ batches
def batch_at(problems: list[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The batch of a step (from 0): a pure function, so that there is no sampler state to save.

    The epochs' shuffles, each its own function of (seed, epoch), stand one after the other; step s
    reads positions [s * size, (s + 1) * size).
    """
    epochs: dict[int, list[int]] = {}
    batch = []
    for position in range(step * size, (step + 1) * size):
        epoch, i = divmod(position, len(problems))
        if epoch not in epochs:
            epochs[epoch] = list(range(len(problems)))
            random.Random(f"{seed}/{epoch}").shuffle(epochs[epoch])
        batch.append(problems[epochs[epoch][i]])
    return batch


# ------------------------------------------------------------------ look before you train
LIMITS = {"max_prompt_tokens": 1024, "max_response_tokens": 8192}  # luffy.py's defaults


def unread(golds: list[str], grader: Grader) -> list[bool]:
    """Which no parser reads? Beside the same text, only verify.compare's rules make one right."""
    plain = [verify.normal_form(gold[: verify.MAX_LENGTH]) for gold in golds]
    plain = [verify.ASSIGNMENT.sub("", text) for text in plain]
    rules = verify.number, verify.sequence, verify.BASED.fullmatch
    hard = [text for text in plain if all(rule(text) is None for rule in rules)]
    replies = grader.pool.map([(text, text, False) for text in hard], key=itemgetter(0))
    bad = {text for text, (reply, _) in zip(hard, replies) if not (reply and reply[0])}
    return [text in bad for text in plain]


def parse_args() -> tuple[argparse.Namespace, dict[str, int]]:
    """-> flags, and the limits of lengths: given, or the model's own, or luffy.py's."""
    from machinery.model import recipe

    parser = argparse.ArgumentParser(description="Look before you train.", allow_abbrev=False)
    parser.add_argument("data", metavar="FILE", help="or another source, as luffy.py's --data")
    parser.add_argument("--model", default="toy", help="a directory or a hub name [toy]")
    for name in LIMITS:
        parser.add_argument(f"--{name}", type=int, help="[luffy.py's for this model]")
    parser.add_argument("--out", type=Path, help="the picture of lengths [runs/data/NAME.png]")
    args = parser.parse_args()
    args.out = args.out or Path(
        "runs/data", re.sub(r"[^\w.-]+", "-", Path(args.data).name) + ".png"
    )
    given = {name: getattr(args, name) for name in LIMITS}
    own = LIMITS | recipe(args.model)
    limits = {name: own[name] if n is None else n for name, n in given.items()}
    for name, n in limits.items():
        if n < 1:
            raise InputError(f"--{name} {n}: must be at least 1")
    return args, limits


def main() -> None:
    from machinery import look  # it draws, and training from this file's functions does not
    from machinery.model import full_name, load_tokenizer

    args, limits = parse_args()
    is_toy = args.model == "toy"  # its tokenizer needs no trained model
    tokenizer = toy.make_tokenizer() if is_toy else load_tokenizer(full_name(args.model))
    broken: list[str] = []
    problems, places, ignored = read_problems(args.data, broken=broken)
    say(f"{args.data} for {args.model}, {len(tokenizer):,} tokens in its vocabulary")
    say_ignored(args.data, ignored)
    look.show_rows(problems, places, broken)
    if not problems:
        raise InputError(f"{args.data}: no row can be read; docs/data.md shows what rows look like")
    choose_template(problems, tokenizer)
    kept, some, lengths = look.encode_each(
        problems, places, partial(encode, tokenizer=tokenizer), limits
    )
    ends = {"prompt": limits["max_prompt_tokens"], "trace": limits["max_response_tokens"]}
    look.show_lengths(lengths, ends)
    look.draw_lengths(Path(args.data).name, lengths, ends, args.out)
    look.show_unknown(problems, tokenizer)
    with Grader() as grader:
        golds = {p.answer: place for place, p in reversed(list(zip(places, problems)))}
        look.show_golds(golds, grader.verdicts, partial(unread, grader=grader))
        jobs = [
            (place, p, p.opened + text_of(p.trace_ids, tokenizer))
            for place, problem in kept
            for p in look.with_others(problem)
            if p.trace_ids
        ]
        look.show_traces(kept, jobs, grader.verdicts, extract_answer)
    if some:
        look.show_prompt(some, render(some.prompt, tokenizer), tokenizer)


if __name__ == "__main__":
    launch(main)
