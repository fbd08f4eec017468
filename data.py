"""Problems and traces: one schema, one prompt format, every source.

    python data.py problems.jsonl --model Qwen2.5-Math-7B    # look before you train

A source is a name that `load_problems` understands: "toy", a local .jsonl or .parquet file, or the
name of a data set on the Hugging Face hub (read in machinery.sources). Its rows may have one of the
schemas in `SCHEMAS`; for another one, add a function there. docs/data.md has a row of each.
"""

import hashlib
import json
import random
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from reprlib import repr as brief
from string import ascii_uppercase
from typing import Any

import numpy as np

from machinery import toy
from machinery.checkpoints import checkpoints
from machinery.files import read_json, write
from machinery.flags import Config
from machinery.kinds import Tokenizer
from machinery.processes import InputError, launch, progress, rank, say, share
from machinery.sources import DUMP, Row, final, is_logp, messages, read_rows, say_ignored
from machinery.sources import source_of, strings
from verify import Grader, extract_answer

TEXTS = 64  # tokenized in one call of a rank: 40 MiB with traces of 4,000 tokens
JOBS = 512  # verified by a rank at a time: a slow one holds up only the end of them
THINK = "<think>\n"
A_DAY = date(2024, 7, 26).strftime  # Llama-3.1's, where a template asks for today: for all of a run
SYSTEM = "Reason step by step, and put your final answer within \\boxed{}."  # for data without one
ASK_FOR_A_BOX = {"role": "system", "content": SYSTEM}  # left out where the template asks for it

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
    trace_right: float = 0.0  # the verifier's word on the trace, 1 or 0
    trace_reward: float = 0.0  # the same, or by the function of --reward
    opened: str = ""  # "<think>\n" if the prompt ends in <think>: the response is in a thought
    trace_logps: Sequence[float] = ()  # the teacher's log π_φ, one for each of trace_ids; none: 0
    others: tuple["Problem", ...] = ()  # the same problem with its other traces
    k: int = 0  # responses in an evaluation, where its file says so by repeating it; 0: it does not
    where: str = field(default="", compare=False)  # file and row


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
) -> tuple[list[Problem], list[str]]:
    """-> problems, and the columns that no reader looked at.

    broken: gets the complaint about each row that cannot be read, in place of an InputError.
    """
    problems = []
    columns: dict[str, None] = {}
    read: set[str] = set()
    for where, values in progress("rows", None, read_rows(name, split)):
        try:
            row = Row(values, where, read)
            problems.append(to_problem(row))
            columns |= dict.fromkeys(row.columns)
        except InputError as error:
            if broken is None:
                hint = f"Mend or remove it; python data.py {name} lists all such rows"
                raise InputError(f"{error}. {hint}") from None
            broken.append(str(error))
    if not problems and not broken:
        raise InputError(f"{name}: no rows; a data set needs at least one problem")
    return problems, [column for column in columns if column not in read]


# ------------------------------------------------------------------ schemas
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
    if "\n" in gold.strip():
        raise row.wrong("answer", "one line after the last ####, the bare answer", gold)
    if re.fullmatch(r"\s*-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?\s*", gold):
        gold = gold.replace(",", "")
    problem = question(row, final(gold.strip(), "answer, after ####", row))
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()
    if not solution or any(column in row for column in TRACES):
        return problem
    trace = f"{solution}\nThe answer is \\boxed{{{problem.answer}}}."
    return replace(problem, trace=trace, source=problem.source or "gsm8k")


def from_arc(row: Row) -> Problem:
    """ARC: choices with their labels, which are letters or digits."""
    given = row["choices"]
    given = given if isinstance(given, dict) else {}
    labels, texts = strings(given.get("label")), strings(given.get("text"))
    if not labels or len(labels) != len(texts) or len(set(labels)) < len(labels):
        expected = "{label: [...], text: [...]}, as many of each, and no label twice"
        raise row.wrong("choices", expected, row["choices"])
    return multiple_choice(row, "question", dict(zip(labels, texts)), "answerKey")


def from_mmlu_pro(row: Row) -> Problem:
    """MMLU-Pro: options, of which the answer is a letter."""
    options = strings(row["options"])
    if not 0 < len(options) <= len(ascii_uppercase):
        raise row.wrong("options", "a list of strings, at most one a letter", row["options"])
    return multiple_choice(row, "question", dict(zip(ascii_uppercase, options)), "answer")


def from_gpqa(row: Row) -> Problem:
    """GPQA: the right answer and three wrong ones."""
    columns = "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))
    choices = {letter: row.text(column) for letter, column in zip("ABCD", columns)}
    return multiple_choice(row, "Question", choices)


def multiple_choice(
    row: Row, column: str, choices: dict[str, str], labelled: str | None = None
) -> Problem:
    """Shuffled by a function of the question, for the paper shuffles, and lettered anew.

    choices: label -> text, at most 26; labelled: the column of the right one's label, or none: A.
    """
    answer = row.text(labelled) if labelled else "A"
    if labelled and answer not in choices:
        raise row.wrong(labelled, f"the label of a choice: {', '.join(choices)}", answer)
    asked = row.text(column)
    order = random.Random(asked).sample(list(choices), len(choices))
    texts = [choices[label].strip() for label in order]
    options = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, texts))
    prompt = [ASK_FOR_A_BOX, {"role": "user", "content": f"{asked}\n\n{options}\n"}]
    letter = ascii_uppercase[order.index(answer)]
    return Problem(prompt, letter, source=source_of(row), where=row.where)


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
    for column_of_choices in ("choices", "options"):
        if row[column_of_choices]:
            expected = f"none beside {asked}: another schema, or this question lacks its choices"
            raise row.wrong(column_of_choices, expected, row[column_of_choices])
    if isinstance(prompt, str) and prompt.strip() and not DUMP.match(prompt):
        prompt = [ASK_FOR_A_BOX, {"role": "user", "content": prompt}]
    prompt = messages(prompt, asked, row)
    if asked == "messages" and prompt[-1]["role"] == "assistant":
        prompt.pop()
    if prompt[-1:] and prompt[-1]["role"] == "assistant":
        raise row.wrong(asked, "a user's message at the end, for the policy to answer", row[asked])
    if all(m["role"] == "system" for m in prompt):
        raise row.wrong(asked, "a user's message, before the assistant's", row[asked])
    bare = Problem(prompt, answer, source=source_of(row), where=row.where)
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
    return replace(first, others=tuple(others)) if others else first


def with_trace(bare: Problem, trace: Any, logps: Any, column: str, row: Row) -> Problem:
    """Null or blank is none."""
    if trace is None or isinstance(trace, str) and not trace.strip():
        if logps:
            raise row.wrong("trace_logps", "null, for there is no trace", logps)
        return bare
    if not isinstance(trace, str) or DUMP.match(trace):
        expected = "a string, a list of strings, or {role, content} messages, not written as text"
        raise row.wrong(column, expected, trace)
    if logps is None:
        return replace(bare, trace=trace)
    if not (isinstance(logps, list) and logps and all(map(is_logp, logps))):
        raise row.wrong("trace_logps", "a list of finite numbers <= 0, one a token", logps)
    return replace(bare, trace=trace, trace_logps=array("f", logps))


# ------------------------------------------------------------------ tokens
def encode(
    problems: list[Problem], tokenizer: Tokenizer, *, max_prompt_tokens: int, max_trace_tokens: int
) -> tuple[list[Problem], Counter]:
    """Fill the token fields; drop what does not fit. -> (problems kept, reason -> number dropped).

    A trace becomes its tokens and exactly one EOS, and must fit into max_trace_tokens with it. A
    problem without a trace is kept. Raises InputError if the tokenizer has no EOS, or no chat
    template while a prompt consists of messages, or if trace_logps are not one for each token.
    """
    kept: list[Problem] = []
    dropped: Counter[str] = Counter()
    for problem, reason in tokenize(problems, tokenizer, max_prompt_tokens, max_trace_tokens):
        if reason:
            dropped[reason] += 1
        else:
            kept.append(problem)
    return kept, dropped


def tokenize(
    problems: list[Problem], tokenizer: Tokenizer, max_prompt_tokens: int, max_trace_tokens: int
) -> list[tuple[Problem, str]]:
    """As `encode`: each problem with its tokens, and the reason to drop it, or an empty one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "the tokenizer has no EOS token: a response could never end. "
            "Set eos_token in its tokenizer_config.json"
        )

    def some(problems: list[Problem]) -> list[tuple[dict, str]]:
        limits = eos, max_prompt_tokens, max_trace_tokens
        found = zip(problems, token_fields(problems, tokenizer))
        return [(fields, unfit(replace(p, **fields), *limits)) for p, fields in found]

    found = share("tokens", some, problems, TEXTS)  # without the texts: every rank has them
    return [(replace(p, **fields), reason) for p, (fields, reason) in zip(problems, found)]


def token_fields(problems: list[Problem], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What a problem gets by its tokens."""
    texts = [prompt_of(p, tokenizer) for p in problems]
    opened = [THINK if text.rstrip().endswith(THINK.rstrip()) else "" for text in texts]
    traces = trace_tokens([p.trace or "" for p in problems], opened, tokenizer)
    return [
        dict(
            prompt_ids=array("i", prompt),  # 4 bytes a token
            trace_ids=array("i", trace if p.trace is not None else ()),
            opened=thought,
        )
        for p, prompt, trace, thought in zip(problems, token_ids(texts, tokenizer), traces, opened)
    ]


def unfit(problem: Problem, eos: int, max_prompt_tokens: int, max_trace_tokens: int) -> str:
    """The reason to drop a problem that has its tokens, or an empty one."""
    trace_ids = problem.trace_ids
    if len(problem.prompt_ids) > max_prompt_tokens:
        return f"prompt longer than {max_prompt_tokens} tokens"
    if len(trace_ids) > max_trace_tokens:
        return f"trace longer than {max_trace_tokens} tokens"
    if problem.opened and problem.trace is not None and "</think>" not in problem.trace:
        return "trace without the </think> that its prompt asks for"
    if eos in trace_ids[:-1]:
        return "EOS inside the trace"
    if problem.trace_logps and len(problem.trace_logps) != len(trace_ids):
        raise InputError(
            f"{problem.where}: {len(problem.trace_logps)} trace_logps for the {len(trace_ids)} "
            f"tokens of the trace {problem.trace!r:.60}, its EOS included, but without the <think> "
            "that the prompt has: the teacher's have to be of the same tokens"
        )
    return ""


def token_ids(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """In one call, which uses all cores. They hold all special tokens that they need."""
    how = dict(add_special_tokens=False, return_attention_mask=False)
    return tokenizer(texts, **how)["input_ids"]


def prompt_of(problem: Problem, tokenizer: Tokenizer) -> str:
    """As `render`; its errors have the problem's place."""
    try:
        return render(problem.prompt, tokenizer)
    except InputError as error:
        raise InputError(f"{problem.where}: {error}") from error


def render(prompt: list[dict[str, str]] | str, tokenizer: Tokenizer) -> str:
    """The text that the model sees: messages through the chat template, or a plain prompt as it is.

    Both begin with the tokenizer's BOS. Our own system message is left out where the template asks
    for a box, and stands in the user's message where the template takes none. Raises InputError if
    the template fails.
    """
    if isinstance(prompt, str):
        bos = bos_of(tokenizer)
        return prompt if prompt.startswith(bos) else bos + prompt
    if tokenizer.chat_template is None:
        raise InputError(
            "the tokenizer has no chat template, and the prompts are chat messages. "
            "Put a chat_template into its tokenizer_config.json, or name a file: --template FILE"
        )
    from jinja2 import TemplateError

    given = [m for m in prompt if m != ASK_FOR_A_BOX]
    template: Any = partial(tokenizer.apply_chat_template, strftime_now=A_DAY)
    template = partial(template, add_generation_prompt=True, tokenize=False)
    try:
        text = str(template(given))
        asked = "boxed" in text + str(tokenizer.chat_template)  # by the template, or in the problem
        if asked or len(given) == len(prompt):
            return text
        try:
            return str(template(prompt))
        except TemplateError:  # Gemma's refuses system messages: then in the first one
            first, *others = given
            return str(template([first | {"content": f"{SYSTEM}\n\n{first['content']}"}, *others]))
    except Exception as error:  # whatever a template may compute
        raise InputError(
            f"the chat template cannot render {brief(given)} ({type(error).__name__}: {error}). "
            "--template FILE names another one"
        ) from error


def bos_of(tokenizer: Tokenizer) -> str:
    """The BOS that this tokenizer puts before a text, or "". Chat templates have it in them."""
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer.encode("")[:1] == [bos] else ""


def text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Special tokens, too: what the verifier sees."""
    return str(tokenizer.decode(np.asarray(ids)))  # of a list it would look at each number


def choose_template(problems: list[Problem], tokenizer: Tokenizer, template: str = "auto") -> None:
    """Give the tokenizer the chat template that is to be used, and say so if it is not its own.

    template: "own", a file with a template in jinja, or "auto": ours if the tokenizer has none, or
    if traces have thoughts and a prompt by its own does not end in the opened thought. This looks
    at the data, not at the algorithm: all arms see the same prompts. The template is saved with the
    checkpoints, as the tokenizer's own. Raises InputError on a file that is no such template.
    """
    chats = [p for p in problems if not isinstance(p.prompt, str)]
    thoughts = any((p.trace or "").lstrip().startswith("<think>") for p in chats)
    messages: list[Any] = [m for p in chats[:1] for m in p.prompt if m != ASK_FOR_A_BOX]
    first = [replace(p, prompt=messages) for p in chats[:1]]
    own = tokenizer.chat_template
    if template not in ("auto", "own"):
        return use_template(tokenizer, template_file(template), first, template)
    suits = own and (not thoughts or first and prompt_of(first[0], tokenizer).endswith(THINK))
    if not first or template == "own" or suits:
        if first and own:
            check_template(tokenizer, first[0], "own")
        return
    system, opening = (THINK_SYSTEM, f" {THINK}") if thoughts else (SYSTEM, "\n")
    if messages[0]["role"] == "system":  # then so for problems without one, in evaluation
        system = messages[0]["content"]
    constants = f"{{% set SYSTEM = {system!r} %}}{{% set OPENING = {opening!r} %}}"
    why = "its own does not open the thought" if own else "it has none"
    use_template(tokenizer, constants + CHAT_TEMPLATE, first, f"ours ({why})")


def use_template(tokenizer: Tokenizer, text: str, first: list[Problem], name: str) -> None:
    """first: the one to try it on, if there is one."""
    if not first:
        raise InputError(f"--template {name}: the prompts are plain text, not chat messages")
    tokenizer.chat_template = text
    try:
        if not prompt_of(first[0], tokenizer).startswith(bos_of(tokenizer)):
            tokenizer.chat_template = "{{ bos_token }}" + text
    except InputError as error:
        raise InputError(f"--template {name}: {error}") from error
    check_template(tokenizer, first[0], name)
    say(f"template    {name}: ...{render(first[0].prompt, tokenizer)[-40:]!r}")


def check_template(tokenizer: Tokenizer, first: Problem, name: str) -> None:
    shown: Any = first.prompt
    asked = replace(first, prompt=[*shown[:-1], shown[-1] | {"content": "PROBLEM"}])
    if "PROBLEM" not in prompt_of(asked, tokenizer):
        words = "its prompts do not have the problem's text in them"
        raise InputError(f"--template {name}: {words}; name a file with another one")


def template_file(name: str) -> str:
    try:
        # editors end a file with a newline, and Windows' begin it with a mark
        return Path(name).read_text("utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template {name}: expected auto, own, or a file ({error})") from error


def trace_tokens(traces: list[str], opened: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    r"""Traces as the continuations of their prompts, each with exactly one EOS.

    Where a prompt already ends in `<think>\n`, the trace's own `<think>\n` would be a second one.
    """
    texts = []
    for trace, thought in zip(traces, opened):
        if thought:
            trace = re.sub(r"^\s*<think>\s?", "", trace)
        texts.append(trace.removesuffix(tokenizer.eos_token))
    return [[*ids, tokenizer.eos_token_id] for ids in token_ids(texts, tokenizer)]


# ------------------------------------------------------------------ the training set
def load_training_set(
    cfg: Config, tokenizer: Tokenizer, grader: Grader, verdicts: Path
) -> list[Problem]:
    """The problems of cfg.data to train on, with verified traces that fit; says what it drops.

    A trace that is too long or wrong is dropped, and a problem with its last trace. So every
    algorithm gets the same problems, with one exception: one that uses no traces, or rolls out in
    their place (--untraced rollout), keeps the problems that never had one. The file `verdicts`
    keeps the traces' rewards, and which golds no parser reads, so that a resumed run has the same
    problems even if a verifier's time limit would now decide otherwise. Raises InputError if no
    problem is left.
    """
    rows, ignored = read_problems(cfg.data)
    say_ignored(cfg.data, ignored)
    choose_template(rows, tokenizer, cfg.template)
    problems = one_a_trace(rows)
    limits = dict(max_prompt_tokens=cfg.max_prompt_tokens)
    limits["max_trace_tokens"] = cfg.max_trace_tokens or cfg.max_response_tokens
    kept, dropped = encode(problems, tokenizer, **limits)
    golds = first_places(rows)
    key = hashlib.sha256(json.dumps(list(golds)).encode()).hexdigest()
    bad = share_once(verdicts, key, "golds", grader.unread, list(golds))
    unreadable = say_unreadable(golds, bad)
    if cfg.traces + cfg.continuations and cfg.untraced == "drop":
        dropped["no trace"] = sum(p.trace is None for p in kept)
        kept = [p for p in kept if p.trace is not None]
    if cfg.unreadable == "drop":
        dropped["unreadable gold"] = sum(p.answer in unreadable for p in kept)
        kept = [p for p in kept if p.answer not in unreadable]
    kept, failed = with_rewards(kept, tokenizer, grader, verdicts)
    judged_by = f"--reward {cfg.reward}" if cfg.reward else "the grader"
    dropped[f"trace on which {judged_by} failed"] = failed
    wrong = sum(p.trace is not None and p.trace_reward <= 0 for p in kept)
    dropped["wrong trace"] = wrong - failed
    kept = [p for p in kept if p.trace is None or p.trace_reward > 0]
    reasons = "".join(f"; dropped {n}: {reason}" for reason, n in sorted(dropped.items()) if n)
    if not kept:
        raise InputError(
            f"--data {cfg.data}: no problem is left to train on{reasons}. "
            f"`python data.py {cfg.data} --model {cfg.model}` shows rows and lengths"
        )
    merged = one_a_problem(kept)
    traces = f", {len(kept)} traces" if len(kept) > len(merged) else ""
    untraced = sum(p.trace is None for p in merged) if cfg.traces else 0
    rolled_out = f", {untraced} of them without a trace" if untraced else ""
    total = len(set(map(key_of, problems)))
    say(f"{cfg.data}: {len(merged)} of {total} problems{traces}{rolled_out}{reasons}")
    return merged


def with_rewards(
    problems: list[Problem], tokenizer: Tokenizer, grader: Grader, verdicts: Path
) -> tuple[list[Problem], int]:
    """With the verdicts and rewards of their traces; and on how many of these the grader failed."""
    traced = [p for p in problems if p.trace is not None]

    def judge(some: list[Problem]) -> list[tuple[float, float] | None]:
        jobs = [(p.opened + text_of(p.trace_ids, tokenizer), p.answer) for p in some]
        found = grader.right_and_reward(jobs, failed=None)
        return [None if None in pair else pair for pair in found]

    found = share_once(verdicts, key_of_traces(traced, grader), "verdicts", judge, traced)
    of_trace = {id(p): pair or (0.0, 0.0) for p, pair in zip(traced, found)}
    judged = []
    for p in problems:
        right, reward = of_trace.get(id(p), (0.0, 0.0))
        judged.append(replace(p, trace_right=right, trace_reward=reward))
    return judged, found.count(None)


def share_once(file: Path, key: str, name: str, judge: Callable[[list], list], items: list) -> list:
    """As `share`; or what it made of them before, if the file has it by that key.

    What is None came to nothing, and is tried again; but not in a run that has checkpoints, whose
    problems stay what they are.
    """
    known = read_json(file) if file.exists() else {}
    found = known.setdefault(key, [])
    if is_new := len(found) != len(items):
        found[:] = [None] * len(items)
    left = [i for i, value in enumerate(found) if value is None]
    if left and (is_new or not checkpoints(file.parent)):
        for i, value in zip(left, share(name, judge, [items[i] for i in left], JOBS)):
            found[i] = value
        if rank() == 0:  # after the ranks met: by now each of them has looked for the file
            write(file, json.dumps(known))
    return found


def first_places(problems: list[Problem]) -> dict[str, str]:
    """Gold answer -> where it stands first; in the order of the rows."""
    found: dict[str, str] = {}
    for p in problems:
        found.setdefault(p.answer, p.where)
    return found


def say_unreadable(golds: dict[str, str], unread: list[bool | None]) -> set[str]:
    """golds: of `first_places`; unread: which of them no parser reads. -> those."""
    bad = [gold for gold, is_bad in zip(golds, unread) if is_bad]
    if bad:
        some = "; ".join(f"{golds[gold].split(', ')[-1]}: {gold!r:.60}" for gold in bad[:3])
        part = len(bad) / len(golds)
        say(
            f"unreadable  {len(bad)} of {len(golds)} different golds ({part:.1%}): little but the "
            f"same text is right; see luffy.py --unreadable\n            {some}"
        )
    return set(bad)


def key_of_traces(problems: list[Problem], grader: Grader) -> str:
    """Of all that their rewards depend on: the ids say what the texts are, and take less time."""
    digest = hashlib.sha256(json.dumps(grader.rule).encode())
    for p in problems:
        digest.update(json.dumps([p.opened, p.answer, len(p.trace_ids)]).encode())
        digest.update(array("i", p.trace_ids))
    return digest.hexdigest()


def one_a_trace(problems: list[Problem]) -> list[Problem]:
    found = [trace for p in problems for trace in (p, *p.others)]
    return [replace(p, others=()) if p.others else p for p in found]


def one_a_problem(problems: list[Problem]) -> list[Problem]:
    """Those of the same prompt and answer become one, with `others`. The first ones' order."""
    found: dict[tuple[str, str], list[Problem]] = {}
    for p in problems:
        found.setdefault(key_of(p), []).append(p)
    merged = []
    for same in found.values():
        first, *others = [p for p in same if p.trace is not None] or same[:1]
        merged.append(replace(first, others=tuple(others)) if others else first)
    return merged


def load_benchmarks(names: str, tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Problem]:
    """The problems of the sources A,B to evaluate on, encoded; says what it drops."""
    sources = [source for source in names.split(",") if source not in ("", "none")]
    found = [without_repeats(load_problems(name, split="test")) for name in sources]
    return to_evaluate(sum(found, []), tokenizer, max_prompt_tokens=max_prompt_tokens)


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
    bare = [replace(p, trace=None, trace_logps=(), others=()) for p in problems]
    limits = dict(max_prompt_tokens=max_prompt_tokens, max_trace_tokens=0)
    kept, dropped = encode(bare, tokenizer, **limits)
    for reason, number in dropped.items():
        say(f"evaluation leaves out {number} of {len(problems)} problems: {reason}")
    return kept


# ------------------------------------------------------------------ batches
def batch_at(problems: list[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The batch of a step (from 0): a pure function, so that there is no sampler state to save.

    The epochs' shuffles, each its own function of (seed, epoch), stand one after the other; step s
    reads positions [s * size, (s + 1) * size). Of several traces of a problem an epoch has one, in
    turn.
    """
    epochs: dict[int, list[int]] = {}
    batch = []
    for position in range(step * size, (step + 1) * size):
        epoch, i = divmod(position, len(problems))
        if epoch not in epochs:
            epochs[epoch] = list(range(len(problems)))
            random.Random(f"{seed}/{epoch}").shuffle(epochs[epoch])
        problem = problems[epochs[epoch][i]]
        same = problem, *getattr(problem, "others", ())
        batch.append(same[epoch % len(same)])
    return batch


# ------------------------------------------------------------------ look before you train
def main() -> None:
    from machinery import look  # it draws, and training from this file's functions does not
    from machinery.model import full_name, load_tokenizer

    args, limits = look.parse_args()
    is_toy = args.model == "toy"  # its tokenizer needs no trained model
    tokenizer = toy.make_tokenizer() if is_toy else load_tokenizer(full_name(args.model))
    broken: list[str] = []
    problems, ignored = read_problems(args.data, broken=broken)
    say(f"{args.data} for {args.model}, {len(tokenizer):,} tokens in its vocabulary")
    say_ignored(args.data, ignored)
    look.show_rows(problems, broken)
    if not problems:
        raise InputError(f"{args.data}: no row can be read; docs/data.md shows what rows look like")
    choose_template(problems, tokenizer, args.template)
    encoder = partial(tokenize, tokenizer=tokenizer)
    kept, some, lengths = look.encode_each(one_a_trace(problems), encoder, limits)
    ends = {"prompt": limits["max_prompt_tokens"], "trace": limits["max_trace_tokens"]}
    look.show_lengths(lengths, ends)
    look.draw_lengths(Path(args.data).name, lengths, ends, args.out)
    look.show_unknown(problems, tokenizer)
    with Grader() as grader:
        golds = first_places(problems)
        look.show_golds(golds, grader.verdicts)
        say_unreadable(golds, share("golds", grader.unread, list(golds), look.JOBS))
        jobs = [(p, p.opened + text_of(p.trace_ids, tokenizer)) for p in kept if p.trace_ids]
        fit = list({p.where: p for p in reversed(kept)}.values())[::-1]  # one a row
        look.show_traces(fit, jobs, grader.verdicts, extract_answer)
    if some:
        look.show_prompt(some, render(some.prompt, tokenizer), tokenizer)


if __name__ == "__main__":
    launch(main)
