"""Ten real traces of DeepSeek-R1 through data.py, with the vocabulary of Qwen."""

import base64
import importlib.util
from pathlib import Path

import pytest
from conftest import SHARED
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data import load_problems, load_training_set, one_a_problem, one_a_trace
from luffy import Config
from machinery.run_directory import token_texts
from verify import Grader

TRACES = SHARED / "traces_r1_sample10.parquet"
package = importlib.util.find_spec("dashscope")
pytestmark = [
    pytest.mark.qwen,
    pytest.mark.skipif(package is None, reason="needs Qwen's vocabulary: tests/vllm-cpu.txt"),
    pytest.mark.skipif(not TRACES.exists(), reason="needs the real data files"),
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.fixture(scope="module")
def qwen_math(tmp_path_factory):
    """The tokenizer of Qwen2.5-Math, of its published ranks, with a template that opens no thought.

    A merge of ranks joins the two parts that are tokens and come first.
    """
    lines = (Path(package.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in ranks:
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        parts = [pair for pair in parts if pair[0] in ranks and pair[1] in ranks]
        merges += [
            tuple(map(text, pair))
            for pair in sorted(parts, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        ]
    directory = tmp_path_factory.mktemp("qwen")
    tokenizer = Qwen2Tokenizer(
        vocab={text(token): rank for token, rank in ranks.items()},
        merges=merges,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_it_is_qwens_tokenizer(qwen_math):
    assert qwen_math.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
        151643,
        151644,
        151645,
    ]
    assert qwen_math.encode("Hello world") == [9707, 1879]  # as published for Qwen2.5


def test_real_traces_keep_every_character_and_are_right(qwen_math, tmp_path):
    with Grader() as grader:
        cfg = Config(data=str(TRACES))
        problems = load_training_set(cfg, qwen_math, grader, tmp_path / "verdicts.json")
    assert len(problems) == 5  # of two traces each
    problems, originals = map(one_a_trace, (problems, one_a_problem(load_problems(str(TRACES)))))
    assert len(problems) == 10 and all(p.trace_reward == 1 for p in problems)
    eos = qwen_math.eos_token_id
    for original, problem in zip(originals, problems):
        prompt, trace = map(qwen_math.decode, (problem.prompt_ids, problem.trace_ids))
        system, question = (message["content"] for message in original.prompt)
        assert prompt == (
            f"{system}\n\nUser: This is the problem:\n{question}\n\nAssistant: <think>\n"
        )
        assert "<think>\n" + trace == original.trace + "<|endoftext|>"
        assert list(problem.trace_ids).count(eos) == 1 and problem.trace_ids[-1] == eos
        assert len(problem.trace_ids) < 8192 and eos not in problem.prompt_ids
        shown = token_texts(problem.trace_ids, qwen_math)  # with √ and π, of several tokens each
        assert "".join(shown) == trace and "\ufffd" not in trace
