"""Models of other architectures: computed as they compute themselves, or refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, make_tiny, tiny_config
from transformers import AutoModelForCausalLM

from machinery import probe, toy
from machinery.model import Policy, end_ids, find, from_pretrained, load_config, load_model
from machinery.model import load_tokenizer, recipe
from machinery.processes import InputError
from machinery.samplers import TorchSampler

QUICK = {  # architecture -> is it trained in packed rows?
    "llama": True,
    "gpt2": True,  # dropout, learnt positions, a tied head
    "granite": True,  # a scaled head
    "mistral": True,  # a sliding window
    "mixtral": True,
    "gptj": False,  # positions of another name, attention of its own
    "falcon": False,
    "stablelm": False,  # passes nothing on to its attention
    "gemma2": False,  # capped head and attention
    "phi": False,  # a biased head
    "gpt_oss": False,  # sinks
    "lfm2": False,  # convolutions over the row
}


@pytest.mark.parametrize("name", QUICK)
def test_log_probs_are_the_models_own(name, tmp_path):
    """Of the policy, however rows are packed, and of the sampler; in float32, by eager attention.

    Longer than its window, at another temperature.
    """
    path = make_tiny(name, tmp_path / name)
    config = load_config(path)
    model = load_model(path, config, checkpointing=True)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(50, (n,), generator=generator).tolist() for n in (90, 7, 40)]
    policy = Policy(model, temperature=0.7)
    found = probe.of_policy(policy, rows)
    for row, logps in zip(rows, found):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([row])).logits[0, :-1] / 0.7
        own = logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        assert torch.allclose(logps, own, atol=1e-3), name
    torch.cat(found).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert (model.config._attn_implementation == "packed") == QUICK[name]

    sampler = TorchSampler(path, config, ends=[1])
    groups = sampler.generate(rows[1:], 2, seeds=[0, 1], temperature=1.0, max_tokens=12)
    for row, sample in ((r, s) for r, group in zip(rows[1:], groups) for s in group):
        (logps,) = probe.of_policy(Policy(model, 1.0), [row + sample.tokens])
        assert torch.allclose(logps[len(row) - 1 :], torch.tensor(sample.logps), atol=1e-3), name


@pytest.mark.parametrize("name", ["phi", "nanochat", "lfm2"])
def test_what_only_a_trained_model_shows(name, tmp_path):
    """A bias that is still 0, a cap above all logits, a leak as small as the weights."""
    AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    model = load_model(tmp_path, config, checkpointing=False)
    assert model.config._attn_implementation != "packed"
    loaded = from_pretrained(tmp_path, config=config).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_cache_is_not_used_where_it_would_choose_other_keys(tmp_path):
    """Of so many tokens before that attention chooses among them."""
    path = make_tiny("deepseek_v32", tmp_path / "model", index_topk=64)
    assert not TorchSampler(path, load_config(path), [1]).cached


def test_a_model_that_is_another_one_in_training_is_refused(tmp_path):
    path = make_tiny("phimoe", tmp_path / "phimoe")
    with pytest.raises(InputError, match="a phimoe cannot .* differ by"):
        load_model(path, load_config(path), checkpointing=False)


def test_a_model_that_sees_the_future_is_refused(tmp_path):
    path = make_tiny("bert", tmp_path / "bert")
    with pytest.raises(InputError, match="a bert cannot .* differ by"):
        load_model(path, load_config(path), checkpointing=False)
    with pytest.raises(InputError, match="a bert cannot .* differ by"):
        TorchSampler(path, load_config(path), [1])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


def without(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def with_more(weights):
    weights["value_head.weight"] = torch.zeros(1, 64)


def with_another_shape(weights):
    weights["lm_head.weight"] = torch.zeros(60, 64)


def with_nan(weights):
    weights["model.norm.weight"][3] = torch.nan


@pytest.mark.parametrize(
    "change, words",
    [
        (without, "lack 1 .model.layers.1.mlp.up_proj.weight"),
        (with_more, "have besides 1 .value_head.weight"),
        (with_another_shape, r"another shape 1 .lm_head.weight \(60, 64\), not \(55, 64\)"),
        (with_nan, "not as finite numbers 1 .model.norm.weight"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(llama, tmp_path, change, words):
    path = shutil.copytree(llama, tmp_path / "changed")
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=words):
        load_model(path, load_config(path), checkpointing=False)


def test_a_runs_directory_is_no_model_but_has_some(tmp_path):
    (tmp_path / "checkpoint-000002").mkdir()
    (tmp_path / "config.json").write_text('{"algo": "luffy"}')  # of the run
    with pytest.raises(InputError, match="it, as .*checkpoint-000002$"):
        find(str(tmp_path))


def test_a_directory_with_two_models_is_refused(llama, tmp_path):
    """Of which one would be taken in silence."""
    path = shutil.copytree(llama, tmp_path / "two")
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="its adapter_config.json is of an adapter"):
        from_pretrained(path)
    (path / "adapter_config.json").unlink()
    weights, half = load_file(path / "model.safetensors"), {}
    shards = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(weights)}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    for name in set(shards.values()):
        half = {k: w for k, w in weights.items() if shards[k] == name}
        save_file(half, path / name, metadata={"format": "pt"})
    with pytest.raises(InputError, match="model.safetensors has .* not there by model.safetensors"):
        from_pretrained(path)
    (path / "model.safetensors").unlink()
    from_pretrained(path)
    other = next(k for k, file in shards.items() if file != name)  # in both shards
    save_file(half | {other: weights[other] + 1}, path / name, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name} has {other}, which is not there by"):
        from_pretrained(path)


def test_a_head_of_its_own_where_the_config_ties_it(llama, tmp_path):
    path = shutil.copytree(llama, tmp_path / "tied")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(InputError, match="a head of its own, .* tie_word_embeddings"):
        from_pretrained(path)


def test_files_that_are_no_model_are_an_error_in_one_line(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # run the model's own code?
    path = shutil.copytree(llama, tmp_path / "broken")
    weights, config = path / "model.safetensors", path / "config.json"
    tokens, ends = path / "tokenizer.json", path / "generation_config.json"
    odd = json.loads(config.read_text())
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    foreign = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (path / "code.py").write_text("raise SystemExit('code of a model was run')")
    for file, content, words in [
        (weights, pointer, "model.safetensors is what Git LFS puts"),
        (weights, weights.read_bytes()[:5000], "its files cannot be read .SafetensorError"),
        (weights, b"", "its files cannot be read"),
        (config, b"{", "its files cannot be read"),
        (config, b"[1]", "its files cannot be read"),
        (
            config,
            json.dumps(odd | {"luffy_recipe": ["lr"]}).encode(),
            "its luffy_recipe is no object",
        ),
        (config, json.dumps(foreign).encode(), "its files cannot be read"),
        (
            config,
            json.dumps(odd | {"rope_parameters": {"rope_type": "none"}}).encode(),
            "cannot be",
        ),
        (tokens, b"{}", "its files cannot be read"),
        (ends, b"{", "its files cannot be read .OSError: .*generation_config.json"),
        (ends, b"[1]", "its files cannot be read"),
        (ends, b'{"eos_token_id": [[1]]}', r"an eos_token_id \[\[1\]\]"),
        (ends, b'{"eos_token_id": "1"}', r"an eos_token_id \['1'\]"),
    ]:
        kept = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            find(str(path))
            recipe(str(path))
            end_ids(path, load_tokenizer(path))
            load_model(path, load_config(path), checkpointing=False)
        assert "\n" not in str(caught.value)
        file.write_bytes(kept)
    load_model(path, load_config(path), checkpointing=False)


def test_a_tokenizer_with_words_beyond_the_vocabulary(llama, tmp_path):
    path = shutil.copytree(llama, tmp_path / "larger")
    tokenizer = toy.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(path)
    load_tokenizer(path)  # as Gemma-3's: no text has it
    tokenizer.add_tokens(["whatever"])
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="1 tokens .'whatever', .* beyond .* vocabulary of 55"):
        load_tokenizer(path)


def test_a_tokenizer_without_words_and_one_with_several_templates(llama, tmp_path):
    path = shutil.copytree(llama, tmp_path / "several")
    tokenizer = toy.make_tokenizer()
    own = tokenizer.chat_template
    for templates, kept in (({"default": own, "rag": "a"}, own), ({"rag": "a", "tool": "b"}, None)):
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(path)
        assert load_tokenizer(path).chat_template == kept  # a dict could not be saved with a model
        shutil.rmtree(path / "additional_chat_templates")
        (path / "chat_template.jinja").unlink(missing_ok=True)
    (path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="its tokenizer has . words"):
        load_tokenizer(path)


def test_masks_that_old_files_hold_beside_the_weights(tmp_path):
    path = make_tiny("gptj", tmp_path / "gptj")
    weights = load_file(path / "model.safetensors")
    old = {f"transformer.h.0.attn.{name}": torch.zeros(2) for name in ("bias", "masked_bias")}
    save_file(weights | old, path / "model.safetensors", metadata={"format": "pt"})
    from_pretrained(path)


def test_pickled_weights_are_read_and_pickled_code_is_not_run(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = shutil.copytree(llama, tmp_path / "pickled")
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    from_pretrained(path)
    torch.save(weights | {"code": Runs(tmp_path / "ran")}, path / "pytorch_model.bin")
    with pytest.raises(InputError, match="UnpicklingError"):
        from_pretrained(path)
    assert not (tmp_path / "ran").exists()
    for file in ROOT.glob("machinery/*.py"):  # the variable counts where nothing is said
        for call in re.findall(r"torch\.load\(.*", file.read_text("utf-8")):
            assert "weights_only=True" in call, (file, call)


class Runs:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.slow
def test_every_architecture_trains_or_is_refused():
    """By tests/every_model.py: a step each from the command line, held against transformers."""
    ended = subprocess.run(
        [sys.executable, "tests/every_model.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."},
        text=True, capture_output=True,
    )  # fmt: skip
    lines = ended.stdout.splitlines()
    print(ended.stdout)
    ends = Counter(line.split(" ")[1] for line in lines)
    assert ended.returncode == 0 and len(lines) == len(ARCHITECTURES), ended.stderr
    assert ends.keys() <= {"right", "refused"}, ended.stdout + ended.stderr
    assert ends["right"] >= 100
