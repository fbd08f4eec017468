"""What is different on a GPU: its attention and bfloat16. `pytest -n 0 -m "gpu or vllm"`."""

import pytest
import torch

from data import Problem
from luffy import ShardedAdamW, Trajectory
from machinery import toy
from machinery.batches import collate
from machinery.model import Policy, from_pretrained, load_config, load_model, token_logprobs
from machinery.samplers import TorchSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def trajectories(*lengths):
    rng = torch.Generator().manual_seed(0)
    return [
        Trajectory(
            0,
            Problem("", "", prompt_ids=(5, 6, 7)),
            torch.randint(5, 50, (n,), generator=rng).tolist(),
        )
        for n in lengths
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_attention_equals_one_at_a_time(tiny_model, checkpointing):
    policy = Policy(load_model(tiny_model, load_config(tiny_model), checkpointing), 1.0)

    def outcome(batches):
        policy.zero_grad()
        logps = [policy(batch)[0] for batch in batches]
        torch.cat(logps).sum().backward()
        return torch.cat(logps).detach(), torch.cat(
            [p.grad.float().flatten() for p in policy.parameters()]
        )

    group = trajectories(200, 90, 7, 1)
    logp, gradient = outcome([collate(group)])
    logps, gradients = outcome([collate([t]) for t in group])
    torch.testing.assert_close(logp, logps, rtol=0.02, atol=0.02)  # bfloat16
    assert (gradient - gradients).norm() < 0.03 * gradients.norm()


def test_the_model_on_the_gpu_is_the_one_on_the_cpu(tiny_model, monkeypatch):
    batch = collate(trajectories(60, 30))
    on_gpu = Policy(load_model(tiny_model, load_config(tiny_model), True), 1.0)(batch)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = Policy(load_model(tiny_model, load_config(tiny_model), True), 1.0)(
        collate(trajectories(60, 30))
    )[0]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0.05, atol=0.05)


def test_the_vocabulary_head_in_bfloat16():
    torch.manual_seed(0)
    hidden = torch.randn(1024, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(151_936, 1536, device="cuda") * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(151_936, (1024,), device="cuda")

    def outcome(function, *inputs):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        logp, entropy = function(*inputs)
        gradients = torch.autograd.grad(logp.mean() + 0.1 * entropy.mean(), inputs)
        return logp.detach(), gradients, torch.cuda.max_memory_allocated() - before

    def plain(hidden, weight):
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)

    logp, gradients, memory = outcome(lambda h, w: token_logprobs(h, w, targets), hidden, weight)
    logp2, gradients2, memory2 = outcome(plain, hidden, weight)
    torch.testing.assert_close(logp, logp2, rtol=1e-3, atol=1e-2)
    for a, b in zip(gradients, gradients2):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()
    assert memory < 0.5 * memory2


def test_float32_masters_of_bfloat16_weights():
    p = torch.nn.Parameter(torch.ones(1000, device="cuda", dtype=torch.bfloat16))
    optimizer = ShardedAdamW([p], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step(1e9)
    assert p.float().mean().item() == pytest.approx(0.99, abs=4e-3)  # in bfloat16 alone: still 1


def test_greedy_equals_transformers():
    base = toy.base_model()
    model, config = from_pretrained(base), load_config(base)
    prompts = [[2, 15, 7, 3], [2, 16, 8, 9, 10, 3]]
    sampler = TorchSampler(base, config, [1])
    groups = sampler.generate(prompts, 1, seeds=[0, 1], temperature=0, max_tokens=12)
    for prompt, (sample,) in zip(prompts, groups):
        expected = model.generate(
            torch.tensor([prompt], device="cuda"),
            do_sample=False,
            eos_token_id=1,
            max_new_tokens=12,
            pad_token_id=0,
        )
        assert sample.tokens == expected[0, len(prompt) :].tolist()
