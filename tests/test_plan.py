"""The plan is right where it can be measured, and says what is known where it cannot."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from conftest import ROOT

import luffy
from machinery import plan
from machinery.flags import differences
from machinery.model import fit_context, shape_of
from machinery.processes import InputError


@pytest.fixture
def quick(monkeypatch):
    """For tests of the arithmetic: activations are what they would be found to be, nearly."""
    monkeypatch.setattr(plan, "activation_bytes", lambda *_: 8 * plan.GIB)


def planned(capsys, *args) -> str:
    cfg = luffy.parse_args([*args])
    plan.show(cfg, partial(luffy.check, cfg), differences(cfg, luffy.Config()))
    return capsys.readouterr().out


def test_a_small_gpu_and_another_recipe(capsys, quick):
    """The paper's models on GPUs of 80 GiB are in the README, and checked there."""
    text = planned(capsys, "--model", "Qwen2.5-Math-1.5B", "--dry_run", "1x24", "--lr", "1e-5")
    assert "verdict     DOES NOT FIT in 23.6 GiB" in text and "1,543,714,304 parameters" in text
    assert "recipe      LUFFY's, but lr 1e-05\n" in text


def test_what_is_missing_is_said(capsys, quick):
    """Of the sampler's memory: where the rest alone is too much, or a response is."""
    args = ["--model", "Qwen2.5-Math-1.5B", "--dry_run"]
    text = planned(capsys, *args, "1x24")
    # 12 bytes of state and 3 x 2 of weights and gradients a parameter; 10 GiB are assumed
    missing = (1_543_714_304 * 18 - 0.985 * 24 * plan.GIB) / plan.GIB + 10
    assert f"{'keys and values: missing':44}{missing:7.1f}\n" in text and " 0.0" not in text
    response = 9216 * 28_672 / plan.GIB  # 28 layers x 2 heads x 128, keys and values, 2 bytes
    assert f"not one response fits in: {missing + response:.1f} GiB are missing" in text
    assert f"sampling takes {missing + 0.985 * 24:.1f} GiB, {missing:.1f} too many" in text
    text = planned(capsys, *args, "1x80", "--cache_gib", "0.1")
    assert f"vLLM's keys and values lack {response - 0.1:.1f} GiB for one response" in text


def test_an_offloaded_optimizer_is_in_the_hosts_memory(capsys, quick):
    """And so 1.5B is on one card of 24 GiB."""
    args = ["--model", "Qwen2.5-Math-1.5B", "--dry_run", "1x24", "--offload_optimizer", "true"]
    text = planned(capsys, *args)
    assert "17.3 GiB for masters and Adam's state" in text and "fits in 23.6 GiB" in text
    assert "float32 masters" not in text


def test_a_config_alone_is_enough_for_a_plan(capsys, quick, tmp_path):
    shape_of("Qwen2.5-0.5B").save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "mine.json")
    text = planned(capsys, "--model", str(tmp_path / "mine.json"), "--dry_run", "1x24")
    assert "494,032,768 parameters" in text
    with pytest.raises(InputError, match="--model .*yours.json: neither"):
        planned(capsys, "--model", str(tmp_path / "yours.json"), "--dry_run", "1x24")


def test_the_arithmetic_of_a_rank(capsys, quick):
    text = planned(capsys, "--model", "Qwen2.5-Math-7B", "--dry_run", "8x80")
    assert "recipe      LUFFY's\n" in text and "7,615,616,512 parameters" in text
    assert "= 1,024 trajectories, 2 updates" in text and "verdict     fits in 78.8 GiB" in text
    assert "112 rollouts a step: at most 917,504 tokens" in text  # 16 problems x 7; x 8192
    assert "64 trajectories an update: at most 532,480 tokens in 24 micro-batches" in text
    cfg = luffy.parse_args(["--model", "Qwen2.5-Math-7B"])
    config = shape_of("Qwen2.5-Math-7B")
    table = plan.memory(cfg, config, 8, 80 * plan.GIB)
    n = 7_615_616_512
    always = {purpose: size for phase, purpose, size in table if phase == "always"}
    assert list(always.values()) == [2 * n, 2 * n, round(12 * n / 8), plan.RESERVE]
    # 2 (keys, values) x 28 layers x 4 heads x 128 x 2 bytes; the cache takes what is left
    assert plan.cache_bytes_per_token(cfg, config, 2) == 57_344
    assert plan.total(table, "sampling") == 80 * plan.GIB
    halved = plan.memory(luffy.replace(cfg, tensor_parallel=2), config, 8, 80 * plan.GIB)
    assert halved[-3][-1] == n  # half of the engine's weights
    with pytest.raises(InputError, match="28 attention heads"):
        plan.memory(luffy.replace(cfg, tensor_parallel=8), config, 8, 80 * plan.GIB)


def test_verdicts_of_other_samplers(capsys, quick):
    """Too large a cache, TorchSampler with hundreds of long responses, SFT without a sampler."""
    args = ["--model", "Qwen2.5-Math-1.5B", "--dry_run", "1x80"]
    text = planned(capsys, *args, "--cache_gib", "60")
    assert "verdict     DOES NOT FIT in 78.8 GiB: sampling takes" in text
    text = planned(capsys, *args, "--sampler", "torch")
    assert "vLLM" not in text and "DOES NOT FIT" in text
    text = planned(capsys, *args, "--algo", "sft")
    assert "vLLM" not in text and "verdict     fits in 78.8 GiB" in text


def test_the_machine(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")  # under torchrun
    assert plan.machine("this", parameters=1000)[0] == 3
    with pytest.raises(InputError, match="--dry_run 8by80"):
        plan.machine("8by80", parameters=1000)
    ranks, capacity = plan.machine("8x80", parameters=1000)
    assert ranks == 8 and 78 < capacity / plan.GIB < 79.1  # torch has 79.1 to 79.2 of an A100


MEASURE = textwrap.dedent("""
    # what the first two updates of a run add to this process's resident memory
    import json, sys
    sys.path.insert(0, ".")
    import luffy
    from machinery import plan
    from benchmarks.tiny import PeakMemory
    from data import Problem
    from machinery.processes import init_processes

    def update(cfg):
        model = luffy.load_model(sys.argv[1], config, cfg.checkpointing)
        policy = luffy.data_parallel(luffy.Policy(model, 1.0))
        optimizer = luffy.ShardedAdamW(policy.parameters(), lr=cfg.lr)
        problem = Problem("", "", prompt_ids=tuple(range(5, 5 + cfg.max_prompt_tokens)))
        trajectories = [luffy.Trajectory(0, problem, [7] * cfg.max_response_tokens, advantage=1.0,
                                         logp_sampler=[0.0] * cfg.max_response_tokens)
                        for _ in range(cfg.rollouts)]
        luffy.update(policy, optimizer, trajectories, cfg)

    init_processes()
    config = luffy.load_config(sys.argv[1])
    def sizes(rollouts):
        return luffy.parse_args(["--model", sys.argv[1], "--problems_per_step", "1",
            "--updates_per_step", "1", "--rollouts", str(rollouts), "--traces", "0",
            "--token_budget", "100000", "--max_response_tokens", "96"])
    update(sizes(8))  # libraries and thread pools are loaded by now
    cfg = sizes(400)
    with PeakMemory() as peak:
        update(cfg)
    table = plan.memory(cfg, config, 1, None)
    print(json.dumps([peak.bytes, plan.total(table, "updating")]))
""")


@pytest.mark.slow
def test_the_toys_plan_agrees_with_a_measured_update(tiny_model, tmp_path):
    """51,200 tokens in one micro-batch: 700 MB, far above what Python itself takes or frees.

    Every tensor is returned to the system when it is freed: fragmentation is not in the plan.
    """
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    out = subprocess.run(
        [sys.executable, script, tiny_model],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=200,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    assert out.returncode == 0, out.stderr
    measured, expected = json.loads(out.stdout.splitlines()[-1])
    assert expected > 300e6
    assert measured == pytest.approx(expected, rel=0.15)


def test_the_engine_gets_what_the_plan_says_or_what_is_asked_for(monkeypatch, quick):
    config = shape_of("Qwen2.5-Math-1.5B")
    cfg = luffy.parse_args(["--model", "Qwen2.5-Math-1.5B"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for gib, fits in ((24, False), (80, True)):
        free = gib * plan.GIB, 141 * plan.GIB  # another program has the rest
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda free=free: free)
        assert plan.machine("this", parameters=1)[1] == gib * plan.GIB
        assert plan.cache_bytes(luffy.replace(cfg, cache_gib=2), config, 1) == 2 * plan.GIB
        if fits:
            assert 40 * plan.GIB < plan.cache_bytes(cfg, config, 1) < 50 * plan.GIB
        else:
            with pytest.raises(InputError, match="in the 24.0 GiB that are free: updating takes"):
                plan.cache_bytes(cfg, config, 1)
    assert plan.evaluation_cache_bytes(config) == 70 * plan.GIB - 4 * 1_543_714_304
    config = shape_of("meta-llama/Llama-3.1-8B")
    config.num_hidden_layers *= 3
    with pytest.raises(InputError, match="in the 80.0 GiB that are free: without any keys"):
        plan.evaluation_cache_bytes(config)


def test_counting_sees_what_is_freed():
    with plan.AllocationCounter() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
    assert memory.now == 8000 and memory.peak == 8000
    del b, c
    assert memory.now == 0


def test_activations_are_counted_once(monkeypatch):
    """Of a run: by its preflight before the context is made longer, and by its sampler's cache."""
    calls = []
    monkeypatch.setattr(plan, "COUNTED", {})
    monkeypatch.setattr(plan, "count_activations", lambda *args: calls.append(args) or 1)
    config = shape_of("Qwen2.5-Math-7B")
    longer = copy.deepcopy(config)
    fit_context(longer, 1024, 8192)
    for of in config, longer, shape_of("Qwen2.5-Math-1.5B"):
        plan.activation_bytes(of, torch.bfloat16, True, [100])
    assert len(calls) == 2
