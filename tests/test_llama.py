"""A model of another family: a tiny Llama with the tokenizer settings of Llama 3's chat models."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data import ASK_FOR_A_BOX, Problem, choose_template, encode, render
from machinery.model import end_ids, load_config
from machinery.processes import InputError
from machinery.samplers import TorchSampler, to_samples

BOS, TURN, TEXT = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
SPECIAL = [BOS, TEXT, TURN, "<|start_header_id|>", "<|end_header_id|>"]
CHAT = (  # in the form of Llama 3's: its BOS is in the template
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
OF_THE_PAPER = "User: {{ messages[-1]['content'] }} Answer: Let's think step by step.\n"
TRACE = "<think>\n1+1=2\n</think>\nIt is \\boxed{2}."
ROW = {
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}],
    "target": [{"role": "assistant", "content": TRACE}],
    "reward_model": {"ground_truth": "2"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """One token a byte. A turn ends in another token than a text, as in Llama 3.1-8B-Instruct."""
    letters = bytes_to_unicode().values()
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate([*SPECIAL, *letters])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=TURN,
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT,
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512, bos_token_id=0))
    model.generation_config.eos_token_id = [1, 2]
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama)


def problem(prompt=ROW["prompt"], trace=TRACE, **fields) -> Problem:
    return Problem(prompt, "2", trace, **fields)


def encoded(some, tokenizer):
    (kept,), _ = encode([some], tokenizer, max_prompt_tokens=300, max_trace_tokens=300)
    return kept


def test_no_prompt_lacks_the_bos_or_has_two(tokenizer, tmp_path):
    """What a tokenizer puts before each text belongs before ours: template, file and plain text."""
    (tmp_path / "paper.jinja").write_text(OF_THE_PAPER)
    for template in ("auto", "own", str(tmp_path / "paper.jinja")):
        tokenizer.chat_template = CHAT
        choose_template([problem()], tokenizer, template)
        ids = list(encoded(problem(), tokenizer).prompt_ids)
        assert ids[0] == 0 and ids.count(0) == 1, template
    for text in ("1+1?", f"{BOS}1+1?"):
        ids = list(encoded(problem(text), tokenizer).prompt_ids)
        assert ids == tokenizer.encode("1+1?") and ids[0] == 0


def test_a_template_of_the_users_own(tokenizer, tmp_path):
    """The paper's Llama runs: no system text and no thought, and the trace keeps its <think>."""
    (tmp_path / "paper.jinja").write_text(OF_THE_PAPER)
    choose_template([problem()], tokenizer, str(tmp_path / "paper.jinja"))
    kept = encoded(problem(), tokenizer)
    prompt, trace = tokenizer.decode(kept.prompt_ids), tokenizer.decode(kept.trace_ids)
    assert prompt == f"{BOS}User: 1+1? Answer: Let's think step by step."
    assert trace == TRACE + TURN and kept.opened == ""

    tokenizer.chat_template = CHAT
    choose_template([problem()], tokenizer, "own")
    assert tokenizer.chat_template == CHAT and encoded(problem(), tokenizer).opened == ""
    choose_template([problem()], tokenizer, "auto")  # ours: for the trace has a thought
    kept = encoded(problem(), tokenizer)
    assert tokenizer.decode(kept.prompt_ids).endswith("Assistant: <think>\n")
    assert tokenizer.decode(kept.trace_ids) == TRACE.removeprefix("<think>\n") + TURN


def test_a_template_that_is_none(tokenizer, tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m }}")
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('no system text') }}")
    (tmp_path / "computes.jinja").write_text("{{ 1 / 0 }}")
    (tmp_path / "empty.jinja").write_text("")
    for name, words in {
        "absent.jinja": "expected auto, own, or a file",
        "broken.jinja": "endfor",
        "refuses.jinja": "no system text",
        "computes.jinja": "ZeroDivisionError",
        "empty.jinja": "the problem's text",
    }.items():
        with pytest.raises(InputError, match=f"--template .*{name}.*{words}"):
            choose_template([problem()], tokenizer, str(tmp_path / name))
    with pytest.raises(InputError, match="plain text"):
        choose_template([problem("1+1?")], tokenizer, str(tmp_path / "broken.jinja"))


def test_a_template_that_takes_no_system_message(tokenizer, tmp_path):
    """As Gemma's: ours then stands before the problem, and one of the data's is refused."""
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "gemma.jinja").write_text("\ufeff" + refuse + CHAT, "utf-8")
    bare = problem([ASK_FOR_A_BOX, {"role": "user", "content": "1+1?"}])
    choose_template([bare], tokenizer, str(tmp_path / "gemma.jinja"))
    prompt = tokenizer.decode(encoded(bare, tokenizer).prompt_ids)
    assert prompt.count("boxed") == 1 and "\n\n1+1?" in prompt and "\ufeff" not in prompt
    with pytest.raises(InputError, match="'Think.'.*no system.*--template FILE"):
        encoded(problem(), tokenizer)


def test_the_box_is_asked_for_once(tokenizer):
    """Data without a system message have ours, unless the template asks for a box itself."""
    bare = [ASK_FOR_A_BOX, {"role": "user", "content": "1+1?"}]
    assert render(bare, tokenizer).count("boxed") == 1
    tokenizer.chat_template = "Answer in \\boxed{}." + CHAT
    assert render(bare, tokenizer).count("boxed") == 1
    choose_template([problem(bare)], tokenizer, "auto")  # ours, with its own words for thoughts
    assert render(bare, tokenizer).count("boxed") == 1 and "</think>" in render(bare, tokenizer)


def test_whatever_ends_a_turn_or_a_text_ends_a_response(llama, tokenizer):
    ends = end_ids(llama, tokenizer)
    assert ends == [2, 1]  # the tokenizer's first: a trace ends in it
    (llama / "generation_config.json").rename(llama / "kept")
    assert end_ids(llama, tokenizer) == [2]  # of the config, which has none
    (llama / "kept").rename(llama / "generation_config.json")
    sampler = TorchSampler(llama, load_config(llama), ends)
    for one_end in ends:  # as if the model said this one only
        bias = torch.full((len(tokenizer),), -1e9)
        bias[[one_end, 50]] = torch.tensor([0.0, 2.0])
        logits = sampler.logits
        sampler.logits = lambda *args, plain=logits, bias=bias: 0 * plain(*args) + bias
        (group,) = sampler.generate([[0, 50]], 8, seeds=[0], temperature=1.0, max_tokens=30)
        sampler.logits = logits
        done = [s for s in group if not s.truncated]
        assert done and all(s.tokens[-1] == one_end and s.tokens.count(one_end) == 1 for s in done)
        assert all(one_end not in s.tokens and len(s.tokens) == 30 for s in group if s.truncated)

    logprobs = SimpleNamespace(token_ids=[50, 1], logprobs=[0.0, 0.0])
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=(50, 1), logprobs=logprobs)])
    assert [to_samples(output, e)[0].truncated for e in (ends, [2])] == [False, True]  # vLLM's


def test_a_run(llama, tmp_path):
    """The whole program on it, with the paper's template, which its checkpoint keeps."""
    data, template = tmp_path / "a.jsonl", tmp_path / "paper.jinja"
    data.write_text(json.dumps(ROW) + "\n")
    template.write_text(OF_THE_PAPER)
    sizes = "--steps 1 --problems_per_step 2 --max_prompt_tokens 80 --max_response_tokens 20"
    flags = [*sizes.split(), "--max_trace_tokens", 60, "--data", data, "--sample_every", 1]
    out = run("luffy.py", "--model", llama, "--template", template, *flags, "--out",
              tmp_path / "run").stdout  # fmt: skip
    assert "1 of 1 problems" in out and "template    " in out and 'step by step."' in out
    rows = (tmp_path / "run/samples/step-000001.jsonl").read_text().splitlines()
    trace = next(row for row in map(json.loads, rows) if row["off_policy"])
    assert trace["response"] == TRACE + TURN  # longer than a rollout may be
    assert trace["prompt"] == f"{BOS}User: 1+1? Answer: Let's think step by step."
    saved = tmp_path / "run/checkpoint-000001"
    assert end_ids(saved, AutoTokenizer.from_pretrained(saved)) == [2, 1]
    assert AutoTokenizer.from_pretrained(saved).chat_template.startswith("{{ bos_token }}User")


@pytest.mark.slow
def test_evaluations(llama, tmp_path):
    """The base model is asked with the template that training would give it."""
    data, template = tmp_path / "a.jsonl", tmp_path / "paper.jinja"
    data.write_text(json.dumps(ROW) + "\n")
    template.write_text(OF_THE_PAPER)
    asked = ["--bench", data, "--max_response_tokens", 8, "--samples", 2, "--temperature", 1]
    out = tmp_path / "out"
    said = run("eval.py", "--model", llama, "--template", template, *asked, "--out", out).stdout
    assert 'step by step."' in said
    (file,) = out.glob("*-rank0.jsonl")
    assert len(file.read_text().splitlines()) == 2
    refused = run("eval.py", "--model", llama, "--template", "chatml", *asked, check=False)
    assert "--template chatml: expected a file, or one of own," in refused.stderr
