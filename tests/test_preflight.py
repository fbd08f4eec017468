"""--preflight passes on a sound machine, and says what is wrong with any other."""

import importlib.util
import json
import textwrap

import pytest
from conftest import run

from machinery import preflight

has_vllm = importlib.util.find_spec("vllm") is not None

# Faults, made to happen: patches of what the run itself calls.
FAULTS = textwrap.dedent("""
    import copy, shutil, sys, time
    sys.path.insert(0, ".")
    import torch
    import luffy
    from machinery import preflight, processes, samplers
    from machinery.processes import InputError, init_processes, launch, rank, say

    class DoesNotPush(luffy.TorchSampler):
        def push(self, named_parameters):
            self.awake = True

    class VLLMDoesNotPush(luffy.VLLMSampler):
        def push(self, named_parameters):
            super().push([])

    class WrongRoPE(luffy.TorchSampler):
        def __init__(self, path, config, ends, **how):
            config = copy.deepcopy(config)
            config.rope_parameters["rope_theta"] *= 4
            super().__init__(path, config, ends, **how)

    def vllm_options(*args, of=samplers.vllm_options):
        options = of(*args)
        del options["hf_overrides"]["rope_parameters"]  # so that it takes the file's
        return options

    def load_model(*args, of=luffy.load_model):
        model = of(*args)
        if rank() == 1:  # of a node with another version of it
            model.get_output_embeddings().weight.data[0] += 1e-3
        return model

    def learner(model, cfg, of=luffy.learner):
        policy, optimizer = of(model, cfg)
        if rank() == 1:  # an update that did not arrive
            optimizer.params[3].data[0] += 1e-3
        return policy, optimizer

    def own_gradients(model, cfg, of=luffy.learner):
        policy, optimizer = of(model, cfg)
        policy.require_backward_grad_sync = False
        return policy, optimizer

    def token_logprobs(*args, of=preflight.token_logprobs, **how):
        logp, entropy = of(*args, **how)
        return logp, entropy + 0.01 * logp

    def slow(*args, **how):
        time.sleep(30 * (rank() == 1))

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    class Usage:
        free = 10**6

    PATCHES = {
        "nothing": [],
        "not pushed": [(luffy, "TorchSampler", DoesNotPush),
                       (luffy, "VLLMSampler", VLLMDoesNotPush)],
        "wrong RoPE": [(luffy, "TorchSampler", WrongRoPE),
                       (samplers, "vllm_options", vllm_options)],
        "another model": [(luffy, "load_model", load_model)],
        "other weights": [(luffy, "learner", learner)],
        "own gradients": [(luffy, "learner", own_gradients)],
        "full disk": [(preflight.shutil, "disk_usage", lambda path: Usage)],
        "no driver": [(processes, "driver", lambda: "535.183.01"), (torch.cuda, "init", init),
                      (torch.version, "cuda", "13.0")],
        "wrong head": [(preflight, "token_logprobs", token_logprobs)],
        "no answer": [(preflight, "SECONDS", 3), (preflight.dist, "all_reduce", slow)],
    }
    def main():
        faults = sys.argv.pop(1).split(",")
        cfg = luffy.parse_args()
        init_processes()
        for fault in faults:
            kept = [(place, name, getattr(place, name)) for place, name, _ in PATCHES[fault]]
            for patch in PATCHES[fault]:
                setattr(*patch)
            functions = luffy.Grader, luffy.load, luffy.learner, luffy.rollout, luffy.update
            try:
                processes.choose_device(cfg.device)
                preflight.run(*functions, cfg, luffy.find(cfg.model))
                say(f"{fault}: passed")
            except InputError as error:
                say(f"{fault}: {error}")
            for patch in kept:
                setattr(*patch)
    launch(main)
""")


@pytest.fixture
def preflights(tmp_path, tiny_model):
    """Faults -> what preflights with them print, and the directory that they shall leave alone."""

    def preflights(*faults: str, ranks: int = 1, model=tiny_model, **how) -> str:
        script = tmp_path / "faults.py"
        script.write_text(FAULTS)
        where = tmp_path / "empty"
        where.mkdir(exist_ok=True)
        small = "--problems_per_step", 4, "--max_response_tokens", 64, "--token_budget", 200
        args = ",".join(faults), "--model", model, "--out", where / "run", *small
        flags = [x for name, value in how.items() for x in (f"--{name}", value)]
        result = run(script, *args, *flags, ranks=ranks, check=False)
        assert not list(where.iterdir())
        return result.stdout + result.stderr

    return preflights


def test_what_is_wrong_is_named(preflights):
    printed = preflights(
        "nothing", "not pushed", "wrong RoPE", "full disk", "no driver", "wrong head"
    )
    assert "nothing: passed" in printed and "0% differ" in printed
    assert "not pushed: preflight, push, other weights, rank 0: KL" in printed
    assert "wrong RoPE: preflight, sampler and trainer, rank 0: KL" in printed
    assert "full disk: preflight, disk, rank 0: 1.0 MiB are free" in printed
    assert "Make room in" in printed
    assert "no driver: --device auto: there is a GPU (driver 535.183.01), but torch" in printed
    assert "wrong head: preflight, head, in chunks, rank 0: off by" in printed


@pytest.mark.slow
def test_two_ranks_have_the_same_weights_or_fail(preflights):
    faults = "another model", "other weights", "own gradients", "nothing"
    printed = preflights(*faults, ranks=2)
    assert "another model: preflight, weights, loaded, rank 0: rank 1 has others" in printed
    assert "own gradients: preflight, gradient norms, rank 1: " in printed
    assert "other weights: preflight, weights, rank 0: rank 1 has others" in printed
    assert "nothing: passed" in printed and "all-reduce, speed" in printed


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["sft", "prefix_rft"])
def test_a_run_that_samples_otherwise_passes(preflights, algo):
    """SFT samples in evaluation alone; a prefix's tokens were not sampled at all."""
    assert "nothing: passed" in preflights("nothing", algo=algo)


def test_a_run_that_would_be_refused_is_refused(preflights, tmp_path):
    (tmp_path / "file").write_text("")
    printed = preflights("nothing", out=tmp_path / "file" / "run")
    assert f"nothing: --out {tmp_path}/file/run: {tmp_path}/file is a file" in printed


@pytest.mark.slow
@pytest.mark.parametrize("fork", ["dapo", "exgrpo", "orz", "prime", "relift", "trapo"])
def test_forks_pass_it_with_their_own_update(fork, tiny_model, tmp_path):
    small = "--problems_per_step", 8, "--max_response_tokens", 64, "--token_budget", 200
    how = "--preflight", "--model", tiny_model, "--out", tmp_path / "run", *small
    assert "preflight passed" in run("-m", f"forks.{fork}", *how, ranks=2).stdout


@pytest.mark.slow
def test_ranks_that_cannot_talk_end_in_time(preflights):
    printed = preflights("no answer", ranks=2)
    assert "preflight, collectives: no answer in 3 s. NCCL_DEBUG=INFO" in printed


@pytest.mark.vllm
@pytest.mark.skipif(not has_vllm, reason="needs vLLM")
def test_with_vllm(preflights, tiny_model):
    """The very command, on two processes; then an engine without the weights, or with old RoPE."""
    printed = preflights("nothing", ranks=2, sampler="vllm")
    assert "nothing: passed" in printed and "engine, runner" in printed
    printed = preflights("not pushed", sampler="vllm")
    assert "not pushed: preflight, sampler and trainer, rank 0: KL" in printed
    config = tiny_model / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps(json.loads(plain) | {"max_position_embeddings": 4096}))
    try:
        printed = preflights("wrong RoPE", sampler="vllm", max_prompt_tokens=4096)
    finally:
        config.write_text(plain)
    assert "wrong RoPE: preflight, " in printed and ": KL" in printed


def test_a_quota_is_a_full_disk_too(tmp_path, monkeypatch):
    """There is room, but not for this user."""

    def write(*_):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(preflight.os, "fsync", write)
    with pytest.raises(preflight.InputError, match="Disk quota exceeded.*Name another --out"):
        preflight.written(tmp_path, 10)
    assert not list(tmp_path.iterdir())
