"""What is different on a GPU: its attention and bfloat16. `pytest -n 0 -m "gpu or vllm"`."""

import copy
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from conftest import run

from data import Problem
from luffy import ShardedAdamW, Trajectory
from machinery import preflight, toy
from machinery.batches import collate
from machinery.model import Policy, add_product, from_pretrained, load_config, load_model
from machinery.model import product, token_logprobs
from machinery.optimizer import data_parallel
from machinery.processes import init_processes, use_expandable_segments
from machinery.samplers import TorchSampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # by hand, without the mark
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
    n = 4096  # of several chunks: one alone takes .9 of the plain function's memory, four .25
    hidden = torch.randn(n, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(151_936, 1536, device="cuda") * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(151_936, (n,), device="cuda")

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


def test_products_of_bfloat16_are_float32():
    """Of views as the head takes them: transposed, and some rows or columns of a larger one."""
    torch.manual_seed(0)
    a = torch.randn(300, 512, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(1000, 512, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(300, 1000, device=DEVICE, dtype=torch.bfloat16)
    for x, y in (
        (a, b.T),
        (a[100:217], b.T),
        (grad.T, a),
        (grad.T[256:], a),
        (grad[:37].T, a[:37]),
    ):
        exact = x.double() @ y.double()
        found = product(x, y)
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 1e-5 * exact.norm()
    total = torch.ones(1000, 512, device=DEVICE)
    add_product(total, grad.T, a, rows=256)
    assert (total - 1 - grad.T.double() @ a.double()).norm() < 1e-5 * total.norm()


@pytest.fixture
def one_rank():
    """A process group of this process alone, as a run has it: of NCCL for what is on the GPU."""
    init_processes("auto")
    yield
    torch.distributed.destroy_process_group()


def test_one_set_of_gradients(one_rank):
    module = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16)))
    module = module.to(DEVICE, torch.bfloat16)
    plain = copy.deepcopy(module)
    x = torch.randn(3, 8, 1024, device=DEVICE, dtype=torch.bfloat16)
    policy, size = data_parallel(module), sum(p.nbytes for p in module.parameters())
    places = [p.grad.data_ptr() for p in module.parameters()]
    plain(x[0]).square().mean().backward()  # cuBLAS takes its workspace
    plain.zero_grad()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
    for _ in range(2):  # updates
        for p in module.parameters():
            p.grad.zero_()
        plain.zero_grad()
        for i, part in enumerate(x):
            with nullcontext() if i == 2 else policy.no_sync():
                policy(part).square().mean().backward()
            plain(part).square().mean().backward()
        for p, q in zip(module.parameters(), plain.parameters()):
            assert torch.equal(p.grad, q.grad)
        assert [p.grad.data_ptr() for p in module.parameters()] == places
    if DEVICE == "cuda":  # the plain module's gradients alone, and not another set of buckets
        assert torch.cuda.memory_allocated() - before < 1.5 * size


def test_the_optimizer_on_the_host_is_the_one_on_the_gpu():
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(300, 200, device=DEVICE).bfloat16()) for _ in range(2)]
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    here, there = ShardedAdamW(ps, lr=1e-3), ShardedAdamW(qs, lr=1e-3, offload=True)
    for step in range(4):
        for p, q in zip(ps, qs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        assert here.step(1.0) == there.step(1.0)
        if step == 1:  # saved and restored, each to where it was
            for optimizer in (here, there):
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.load_state_dict(saved)
    for i, tensors in there.state_dict().items():
        assert {x.device.type for x in tensors.values()} == {"cpu"}
        for name, x in here.state_dict()[i].items():
            torch.testing.assert_close(x.cpu(), tensors[name], rtol=1e-5, atol=1e-7)
    for p, q in zip(ps, qs):
        assert (p != q).float().mean() < 1e-3  # a master beside the middle of two bfloat16


def test_the_preflight_at_this_models_geometry(tiny_model, capsys):
    preflight.kernels(load_model(tiny_model, load_config(tiny_model), True))
    assert capsys.readouterr().out.count("ok\n") == 2


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_what_torch_counts_of_other_pools():
    allocated, reserved = preflight.in_pools()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        x = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    y = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    more = preflight.in_pools()
    assert more[0] - allocated == x.nbytes and x.nbytes <= more[1] - reserved < 2 * x.nbytes
    del x, y  # before their pool


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_expandable_segments_are_torchs_setting(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

    def expandable() -> bool:
        return torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]

    before = expandable()
    try:
        for on in (True, False):
            use_expandable_segments(on)
            assert expandable() == on
    finally:
        use_expandable_segments(before)


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_preflight_passes(tiny_model, tmp_path, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    small = "--problems_per_step", 4, "--max_response_tokens", 64, "--token_budget", 200
    where = "--model", tiny_model, "--out", tmp_path / "run", "--cache_gib", 1
    printed = run("luffy.py", "--preflight", *where, *small, ranks=ranks).stdout
    assert "preflight passed" in printed and "engine, asleep" in printed


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
