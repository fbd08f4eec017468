"""GPUs that are there and no use, too few, too old or to be left alone: all of them faked."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig

from machinery import processes
from machinery.model import SHAPES, find
from machinery.processes import InputError, choose_device
from machinery.samplers import no_compiler, vllm_environment

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\n"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020)."


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """A machine without: no variables, no driver, no nvidia-smi."""
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(processes, "DRIVER", tmp_path / "version")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


@pytest.fixture
def unusable(no_gpu, monkeypatch):
    """A GPU whose driver is older than what torch was built for."""
    (no_gpu / "version").write_text(VERSION)
    monkeypatch.setattr("torch.version.cuda", "13.0")

    def init():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr("torch.cuda.init", init)


@pytest.fixture
def two_gpus(no_gpu, monkeypatch):
    """-> the calls of torch.cuda.set_device."""
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "Tesla T4")
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    return chosen


def test_an_old_driver_is_not_a_cpu(unusable, monkeypatch):
    for device in ("auto", "cuda"):
        with pytest.raises(InputError) as error:
            choose_device(device)
        for words in (f"--device {device}", "535.183.01", TOO_OLD, "580 or newer", "--device cpu"):
            assert words in str(error.value)
    choose_device("cpu")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        choose_device("auto")


def test_a_gpu_and_a_torch_without_cuda(no_gpu, monkeypatch, capsys, tiny_model):
    """As on a laptop set up as the README says: the toy runs, what needs a GPU does not."""
    monkeypatch.setattr("torch.version.cuda", None)
    choose_device("auto")
    assert capsys.readouterr().out == ""
    smi = no_gpu / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-0)'\n")
    smi.chmod(0o755)
    choose_device("auto")
    assert "built without CUDA" in capsys.readouterr().out
    assert find(str(tiny_model)) == str(tiny_model)
    middling = SHAPES["Qwen/Qwen2.5-Math-1.5B"] | dict(num_hidden_layers=4, vocab_size=50_000)
    AutoConfig.for_model(**middling).save_pretrained(no_gpu / "middling")  # 264 million
    with pytest.raises(InputError, match="pip uninstall -y torch"):
        find(str(no_gpu / "middling"))
    with pytest.raises(InputError, match="--device cuda: there is a GPU, but torch"):
        choose_device("cuda")
    smi.write_text("#!/bin/sh\necho 'No devices found.'\n")  # nvidia-smi without a card
    assert find(str(no_gpu / "middling")) == str(no_gpu / "middling")
    with pytest.raises(InputError, match="--device cuda: torch finds no GPU"):
        choose_device("cuda")


def test_a_large_model_without_a_gpu(no_gpu, monkeypatch):
    with pytest.raises(InputError) as error:
        find("Qwen2.5-Math-7B")
    for words in ("--device auto", "Qwen/Qwen2.5-Math-7B", "7,615,616,512", "--device cpu"):
        assert words in str(error.value)
    assert find("Qwen2.5-Math-7B", "cpu") == "Qwen/Qwen2.5-Math-7B"
    with pytest.raises(InputError, match="--model nobody/has-this: neither"):
        find("nobody/has-this")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert find("Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"


def test_a_gpu_for_each_process(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    choose_device("auto")
    assert two_gpus == [1]
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for rank in ("0", "7"):  # rank 0 has a GPU, and would wait for the others
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(InputError, match="8 processes and 2 GPUs.*nproc_per_node=2") as error:
            choose_device("auto")
        assert isinstance(error.value, processes.OwnInputError) == (rank == "0")
    assert two_gpus == [1]


def test_an_allocator_that_the_user_has_configured(two_gpus, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    choose_device("cuda")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_expandable_segments_everywhere_but_in_vllm(two_gpus, monkeypatch):
    settings = []  # torch reads the environment once, maybe before it is set here
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    choose_device("cuda")
    assert settings == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda: settings[-1]))
    with vllm_environment() as engine:
        assert engine() == "max_split_size_mb:512,expandable_segments:False"
    assert settings[-1] == "max_split_size_mb:512,expandable_segments:True"
    count = len(settings)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    with vllm_environment():
        pass
    assert len(settings) == count  # the user's own word


def test_a_gpu_without_bfloat16(two_gpus, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: (7, 5))
    with pytest.raises(InputError, match=r"GPU 0, Tesla T4, has compute capability 7\.5"):
        choose_device("auto")
    assert two_gpus == []


BEFORE_CUDA = textwrap.dedent("""
    # what CUDA_VISIBLE_DEVICES is when a program looks at GPUs: CUDA reads it once, the first time
    import os, sys
    import torch
    asked = []
    for name in ("is_available", "device_count", "init", "current_device"):
        def looked(*_, answer={"is_available": False}.get(name, 0)):
            asked.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
            return answer
        setattr(torch.cuda, name, looked)
    sys.path.insert(0, ".")
    import eval, luffy
    from machinery.processes import InputError
    sys.argv[1:] = ["--device", "cpu", "--model", "absent", "--data", "toy", "--out", sys.argv[1]]
    try:
        luffy.main()
    except InputError:
        assert asked and set(asked) == {""}, asked
        print("hidden in time")
""")


@pytest.mark.slow
def test_gpus_are_hidden_before_anything_looks_at_them(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", BEFORE_CUDA, tmp_path / "run"]
    out = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert out.stdout.endswith("hidden in time\n"), out.stderr


@pytest.mark.parametrize("on_gpu, value", [(True, "unset"), (False, "1")])
def test_tests_of_vllm_leave_its_compiler_alone_on_a_gpu(monkeypatch, on_gpu, value):
    """Its engine does not start there without torch.compile."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "unset")
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    spec = importlib.util.spec_from_file_location("again", Path(__file__).with_name("test_vllm.py"))
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert os.environ["TORCHDYNAMO_DISABLE"] == value


def test_what_triton_needs(no_gpu, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler gcc" in no_compiler()
    for name in ("clang", "mycc"):
        (no_gpu / name).touch(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(no_gpu))
    assert f"no {no_gpu}/Python.h" in no_compiler()
    (no_gpu / "Python.h").touch()
    assert no_compiler() == ""
    monkeypatch.setenv("CC", "mycc")
    assert no_compiler() == ""
    monkeypatch.setenv("CC", "gone")
    assert "no C compiler gone" in no_compiler()
