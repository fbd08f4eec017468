"""Problems and traces: one schema, one prompt format, every source.

A source is a name that `load_problems` understands: "toy", a local .jsonl or .parquet file, or the
name of a data set on the Hugging Face hub. Its rows may have one of the schemas in `SCHEMAS`; for
another one, add a function there.
"""

import hashlib
import json
import random
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow.parquet
from transformers import PreTrainedTokenizerBase as Tokenizer

from machinery import toy
from machinery.files import write
from machinery.processes import InputError, gather, progress, rank, say, world_size
from verify import Grader

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
    k: int = 0  # responses in an evaluation, where its file says so by repeating it; 0: it does not


# ------------------------------------------------------------------ sources
def load_problems(path_or_name: str, *, split: str = "train") -> list[Problem]:
    """All problems of a source, in its order.

    path_or_name: "toy" or "toy/SPLIT", a .jsonl or .parquet file, or ORGANISATION/NAME on the hub,
    perhaps with /CONFIG and :SPLIT; `split` is for the hub only, where none is named. Raises
    InputError on a source that is absent, empty or malformed.
    """
    problems = [to_problem(row, where) for where, row in read_rows(path_or_name, split)]
    if not problems:
        raise InputError(f"{path_or_name}: no rows; a data set needs at least one problem")
    return problems


def read_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for each row of the toy, a file or a hub data set."""
    path = Path(name)
    if path.parts[:1] == ("toy",):
        yield from ((name, row) for row in toy.rows(*path.parts[1:]))
        return
    if path.suffix in (".jsonl", ".parquet") and not path.is_file():
        raise InputError(f"{name}: no such file")
    if path.suffix == ".jsonl":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 is text
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 ({error})") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{name}, line {number}", parse_line(line, f"{name}, line {number}")
        return
    if path.suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{name}: not a parquet file ({error})") from error
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
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


# ------------------------------------------------------------------ schemas
def from_openr1(row: dict, where: str) -> Problem:
    """Elliott/Openr1-Math-46k-8192, and the official code's benchmark files (without target)."""
    trace = None
    if row.get("target") is not None:
        trace = field(messages(row, "target", where)[0], "content", str, f"{where}, column target")
    gold = field(row, "reward_model", dict, where)
    answer = field(gold, "ground_truth", str, f"{where}, column reward_model")
    source = str(row.get("data_source") or "")
    return Problem(messages(row, "prompt", where), answer, trace, source)


def from_gsm8k(row: dict, where: str) -> Problem:
    """GSM8K's own format: the human solution, calculator marks <<1+1=2>>, then `#### gold`."""
    solution, mark, gold = field(row, "answer", str, where).rpartition("####")
    if not mark:
        raise InputError(f"{where}, column answer: expected a solution that ends in '#### ANSWER'")
    gold = gold.strip().replace(",", "")
    solution = re.sub(r"<<[^>]*>>", "", solution).strip()
    user = {"role": "user", "content": field(row, "question", str, where)}
    prompt = [{"role": "system", "content": SYSTEM}, user]
    return Problem(prompt, gold, f"{solution}\nThe answer is \\boxed{{{gold}}}.", "gsm8k")


def from_problem(row: dict, where: str) -> Problem:
    """A problem and its answer, as MATH-500 and most benchmarks on the hub; no trace."""
    answer = row["answer"]  # a string, a number, or a list of one
    return bare(row, "problem", answer[0] if isinstance(answer, list) and answer else answer, where)


def from_arc(row: dict, where: str) -> Problem:
    """ARC: choices with their labels, which are letters or digits."""
    given = field(row, "choices", dict, where)
    choices = dict(zip(given["label"], given["text"]))
    return multiple_choice(row, "question", choices, row["answerKey"], where)


def from_mmlu_pro(row: dict, where: str) -> Problem:
    """MMLU-Pro: options, of which the answer is a letter."""
    choices = dict(zip(ascii_uppercase, field(row, "options", list, where)))
    return multiple_choice(row, "question", choices, row["answer"], where)


def from_gpqa(row: dict, where: str) -> Problem:
    """GPQA: the right answer and three wrong ones."""
    answers = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    return multiple_choice(row, "Question", dict(zip("ABCD", answers)), "A", where)


def multiple_choice(
    row: dict, column: str, choices: dict[str, str], answer: str, where: str
) -> Problem:
    """Shuffled by a function of the question, for the paper shuffles, and lettered anew.

    choices: label -> text; answer: one of the labels.
    """
    if answer not in choices:
        raise InputError(
            f"{where}: the answer {answer!r} is not the label of a choice: {', '.join(choices)}"
        )
    question = field(row, column, str, where)
    order = random.Random(question).sample(list(choices), len(choices))
    texts = [str(choices[label]).strip() for label in order]
    options = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, texts))
    right = ascii_uppercase[order.index(answer)]
    return bare({column: f"{question}\n\n{options}\n"}, column, right, where)


def bare(row: dict, column: str, answer: Any, where: str) -> Problem:
    """From a problem without a system message or a trace."""
    if answer is None or not str(answer).strip():
        raise InputError(f"{where}: the answer is empty")
    return Problem(
        prompt=[{"role": "user", "content": field(row, column, str, where)}],
        answer=str(answer),
        source=str(row.get("benchmark") or ""),
    )


SCHEMAS = {  # the columns that tell a schema -> its reader
    ("prompt", "reward_model"): from_openr1,
    ("question", "choices", "answerKey"): from_arc,
    ("question", "options", "answer"): from_mmlu_pro,
    ("Question", "Correct Answer"): from_gpqa,
    ("problem", "answer"): from_problem,
    ("question", "answer"): from_gsm8k,
}


def to_problem(row: dict, where: str) -> Problem:
    for columns, reader in SCHEMAS.items():
        if all(column in row for column in columns):
            return reader(row, where)
    known = " or ".join("{" + ", ".join(columns) + "}" for columns in SCHEMAS)
    raise InputError(f"{where}: expected the columns {known}, found {sorted(row)}")


def field(row: dict, column: str, kind: type, where: str) -> Any:
    value = row.get(column)
    if not isinstance(value, kind) or not value:
        raise InputError(
            f"{where}, column {column}: expected a non-empty {kind.__name__}, found {value!r:.80}"
        )
    return value


def messages(row: dict, column: str, where: str) -> list[dict[str, str]]:
    found = field(row, column, list, where)
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in found
    ):
        raise InputError(
            f"{where}, column {column}: expected a list of "
            f"{{role, content}} messages, found {found!r:.80}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in found]


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
    problems = load_problems(name)
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
    sources = [without_repeats(load_problems(name, split="test")) for name in names]
    return to_evaluate(sum(sources, []), tokenizer, max_prompt_tokens=max_prompt_tokens)


def without_repeats(problems: list[Problem]) -> list[Problem]:
    """Rows that a file repeats, as the official one does for avg@32, become one with that k.

    Only where a source repeats each of its problems equally often, and above once; says so.
    Anything else is no k: such rows stay as they are.
    """
    rows = Counter((p.source, key_of(p)) for p in problems)
    counts: dict[str, set[int]] = defaultdict(set)
    for (source, _), n in rows.items():
        counts[source].add(n)
    repeats = {source: max(n) for source, n in counts.items() if len(n) == 1 and n != {1}}
    first = {(p.source, key_of(p)): p for p in reversed(problems)}
    kept = [
        replace(p, k=repeats.get(p.source, 0))
        for p in problems
        if p.source not in repeats or first[p.source, key_of(p)] is p
    ]
    for source, n in repeats.items():
        few = sum(p.source == source for p in kept)
        say(f"{source or 'no source'}: {few} problems, each {n} times: k = {n}, if no flag sets it")
    return kept


def key_of(problem: Problem) -> tuple[str, str]:
    """Rows with the same one ask the same: the prompt and the answer."""
    return json.dumps(problem.prompt), problem.answer


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
