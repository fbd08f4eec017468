"""The language model: found by its name, long enough, the same with or without checkpointing."""

import json

import pytest
import torch
from conftest import run
from transformers import Phi3Config, Qwen2Config, Qwen2ForCausalLM

from data import Problem
from luffy import Trajectory
from machinery.batches import collate
from machinery.model import Policy, fit_context, full_name, load_config, load_model
from machinery.processes import InputError


def test_a_bare_name_is_a_directory_or_one_of_qwens(tmp_path, monkeypatch):
    assert full_name("Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"
    assert full_name("Elliott/LUFFY") == "Elliott/LUFFY"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen2.5-Math-7B").mkdir()
    assert full_name("Qwen2.5-Math-7B") == "Qwen2.5-Math-7B"


def qwen_math(**changes) -> Qwen2Config:
    return Qwen2Config(**dict(max_position_embeddings=4096, rope_theta=10000.0) | changes)


def test_qwen_math_gets_the_papers_longer_context(capsys):
    config = qwen_math()
    fit_context(config, 1024, 8192)
    assert config.max_position_embeddings == 16384
    assert config.rope_parameters["rope_theta"] == 40000
    assert "4096 -> 16384" in capsys.readouterr().out
    config = qwen_math()
    fit_context(config, 1024, 3072)  # long enough as it is
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (4096, 10000)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "config, response",
    [
        (qwen_math(rope_theta=1e6), 8192),
        (qwen_math(max_position_embeddings=2048), 8192),
        (qwen_math(), 16000),
    ],
)
def test_an_unknown_model_that_is_too_short_is_refused(config, response):
    with pytest.raises(InputError, match=f"--max_response_tokens {response}"):
        fit_context(config, 1024, response)


def test_positions_that_depend_on_the_length_of_a_sequence():
    """Phi-3's: packed with a longer trajectory, or sampled on, a short one would be another."""
    factors = dict(short_factor=[1.0] * 48, long_factor=[2.0] * 48)
    rope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=4096)
    config = Phi3Config(rope_parameters=rope | factors, max_position_embeddings=131072)
    fit_context(config, 1024, 3072)
    with pytest.raises(InputError, match="more than the 4096 tokens up to which"):
        fit_context(config, 1024, 8192)


@pytest.mark.slow
def test_a_run_saves_the_longer_context_and_the_template(tiny_model, tmp_path):
    """From a model like Qwen2.5-Math: too short, and with a template that opens no thought."""
    from machinery import toy

    model, tokenizer = tmp_path / "model", toy.make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "\n", " ", ":", "A", "P", "U", "T", "R"])
    config = toy.make_model(tokenizer, seed=0).config
    config.max_position_embeddings = 4096
    Qwen2ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"b{i},c5,-;e?"}],
            "reward_model": {"ground_truth": "5"},
            "target": [{"role": "assistant", "content": "<think>\nd=5;</think>\n\\boxed{5}"}],
        }
        for i in range(2)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(
        "luffy.py",
        "--model",
        model,
        "--data",
        tmp_path / "a.jsonl",
        "--eval_data",
        "",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--problems_per_step",
        2,
        "--sample_every",
        1,
        "--max_prompt_tokens",
        4090,
        "--max_response_tokens",
        12,
    ).stdout
    assert "4096 -> 16384" in out and "2 of 2 problems" in out
    assert "template    ours (its own does not open the thought)" in out
    saved = tmp_path / "run" / "checkpoint-000001"
    assert load_config(saved).max_position_embeddings == 16384
    assert load_config(saved).rope_parameters["rope_theta"] == 40000
    samples = (tmp_path / "run" / "samples" / "step-000001.jsonl").read_text().splitlines()
    trace = next(row for row in map(json.loads, samples) if row["off_policy"])
    assert trace["prompt"].endswith("<think>\n") and trace["prompt"].count("<think>\n") == 1
    assert trace["response"] == "d=5;</think>\n\\boxed{5}<eos>"
    again = run(
        "luffy.py",
        "--model",
        saved,
        "--data",
        tmp_path / "a.jsonl",
        "--eval_data",
        "",
        "--out",
        tmp_path / "next",
        "--steps",
        1,
        "--problems_per_step",
        2,
        "--max_prompt_tokens",
        4090,
        "--max_response_tokens",
        12,
    ).stdout
    assert "template" not in again and "16384" not in again  # it has both by now


def test_checkpointing_changes_memory_only(tiny_model):
    problem = Problem("", "", prompt_ids=(5, 6, 7))
    batch = collate([Trajectory(0, problem, list(range(8, 8 + n))) for n in (9, 4, 1)])
    gradients, kept, config = [], [], load_config(tiny_model)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for checkpointing in (False, True):
        policy = Policy(load_model(tiny_model, config, checkpointing), temperature=1.0)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logp, entropy = policy(batch)
        assert len(kept) < 20 if checkpointing else len(kept) > 50
        (logp.sum() + entropy.sum()).backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
