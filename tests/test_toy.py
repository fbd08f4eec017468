"""The toy is what it claims to be, and a laptop shows the paper's point on it."""

import json
from pathlib import Path

import pytest
from conftest import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from machinery import toy
from data import encode, load_problems
from machinery.model import load_config, load_tokenizer
from machinery.samplers import TorchSampler
from verify import grade


def test_splits_share_no_problem_and_no_answer_is_luck():
    seen = set()
    for split, sizes in toy.SIZES.items():
        chains = toy.splits()[split]
        for kind, size in sizes.items():
            assert sum(k == kind for k, _ in chains) == size
        for kind, chain in chains:
            assert chain.question() not in seen
            seen.add(chain.question())
            operators, steps = toy.KINDS[kind]
            assert chain.is_fair() and chain.op in operators and chain.steps in steps
            taken_for = chain.by("+") if kind == "medium" else None
            assert not taken_for or taken_for.answer(chain.steps) != chain.answer(chain.steps)
    assert "ood" not in toy.SIZES["train"]


def test_the_teacher_is_right_and_detours():
    for split in toy.SIZES:
        problems = load_problems(f"toy/{split}")
        assert all(grade(p.trace, p.answer) == 1.0 for p in problems)
        assert problems == load_problems(f"toy/{split}")
    traces = [p.trace for p in load_problems("toy") if p.source == "hard"]
    assert sum("wait" in t for t in traces) > 20 and sum("check" in t for t in traces) > 40
    assert any("wait" not in t and "check" not in t for t in traces)


def test_the_tokenizer_and_model_come_back_through_auto_classes(tiny_model):
    tokenizer, back = toy.make_tokenizer(), AutoTokenizer.from_pretrained(tiny_model)
    text = "f=6-1=5waitf=6-1=4checkf=6-1=5;\\boxed{215}"
    ids = tokenizer.encode(text)
    assert back.encode(text) == ids and back.decode(ids) == text
    assert len(ids) == len(text) - len("wait") + 1 - len("check") + 1 - len("\\boxed{") + 1
    chat = [{"role": "user", "content": "b2,c5,-;e?"}]
    assert (
        back.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        == "<user>b2,c5,-;e?<assistant>"
    )
    assert (back.eos_token_id, back.pad_token_id, len(back)) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        len(tokenizer),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_the_base_model_in_the_project_is_of_this_very_toy():
    """Else each run would train its own first. Make it anew: python -m machinery.toy --out DIR."""
    assert [toy.made_before()] == [*Path(toy.__file__).parent.glob("toy-*.safetensors")]


@pytest.fixture(scope="module", params=["made before", "trained here"])
def base(request, tmp_path_factory):
    if request.param == "made before":
        return toy.base_model()
    return toy.save_base(tmp_path_factory.mktemp("toy") / "base", toy.GOALS, seed=0)


@pytest.mark.slow
def test_the_base_model_solves_no_hard_problem_and_few_samples_of_medium_ones(base):
    tokenizer = load_tokenizer(base)
    problems, dropped = encode(
        load_problems("toy"), tokenizer, max_prompt_tokens=32, max_trace_tokens=96
    )
    assert not dropped
    sampler = TorchSampler(base, load_config(base), [tokenizer.eos_token_id], max_rows=1024)
    for kind, least, most in (("hard", 0, 0), ("medium", 0.01, 0.1), ("easy", 0.6, 1)):
        some = [p for p in problems if p.source == kind]
        groups = sampler.generate(
            [p.prompt_ids for p in some],
            64,
            seeds=list(range(len(some))),
            temperature=1.0,
            max_tokens=96,
        )
        right = [
            tokenizer.decode(s.tokens).endswith(f"\\boxed{{{p.answer}}}<eos>")
            for p, group in zip(some, groups)
            for s in group
        ]
        assert least <= sum(right) / len(right) <= most, (kind, sum(right) / len(right))


@pytest.mark.slow
def test_luffy_learns_what_rl_alone_never_meets(tmp_path):
    """A short run of the README's demo: rewards of the last ten steps."""
    hard, medium = {}, {}
    for algo, steps in (("luffy", 60), ("on_policy", 30)):
        run(
            "luffy.py",
            "--algo",
            algo,
            "--steps",
            steps,
            "--eval_data",
            "",
            "--out",
            tmp_path / algo,
        )
        rows = [
            json.loads(line)
            for line in (tmp_path / algo / "metrics.jsonl").read_text().splitlines()
        ]
        hard[algo] = [row["reward/hard"] for row in rows]
        medium[algo] = [row["reward/medium"] for row in rows if "reward/medium" in row]
        assert sum(row.get("reward/easy", 1.0) for row in rows[-10:]) / 10 > 0.5
    assert max(hard["on_policy"]) < 0.02
    for rewards in medium.values():  # which both learn
        assert sum(rewards[:3]) / 3 < 0.2 and sum(rewards[-10:]) / 10 > 0.2
    assert sum(hard["luffy"][-10:]) / 10 > 0.2
