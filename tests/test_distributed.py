"""Ranks share the work and change nothing: 2 gloo processes against 1, also on two nodes."""

import json
import re
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, few, forked, run
from safetensors.torch import load_file


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def luffy(model, out, *more):
    return [
        "luffy.py",
        "--model",
        model,
        "--steps",
        2,
        "--out",
        out,
        "--updates_per_step",
        2,
        "--problems_per_step",
        8,
        "--max_response_tokens",
        64,
        "--token_budget",
        300,
        "--entropy_coef",
        1e-3,
        "--eval_samples",
        2,
        *more,
    ]


def two_nodes(*args) -> subprocess.CompletedProcess:
    """torchrun --nnodes=2: two agents that meet at a port of this machine -> what both print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=test",
        *args,
    ]
    nodes = [
        subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        printed = [node.communicate(timeout=200) for node in nodes]
        assert all(node.returncode == 0 for node in nodes), printed
        return subprocess.CompletedProcess(command, 0, "".join(out for out, _ in printed))
    finally:
        for node in nodes:
            node.kill()


LAUNCHERS = dict(fork=partial(forked, ranks=2), torchrun=partial(run, ranks=2), nodes=two_nodes)
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "algo, by", [("luffy", "fork"), slow("luffy", "nodes"), slow("rl_sft", "torchrun")]
)
def test_one_and_two_processes_make_the_same_run(tiny_model, tmp_path, algo, by):
    """Of two nodes, where the process's number on its node is 0 twice, one speaks."""
    args = ["tests/no_pictures.py", *luffy(tiny_model, tmp_path / "1")[1:], "--algo", algo]
    args += few(tmp_path, problems=5)
    run(*args)
    args += ["--out", tmp_path / "2", "--checkpointing", "true"]
    printed = LAUNCHERS[by](*args).stdout
    assert printed.count("step 2 | reward") == 1 and printed.count(f"{algo} on") == 1
    one, two = (rows(tmp_path / n / "metrics.jsonl") for n in "12")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    scores = [rows(tmp_path / n / "evals.jsonl") for n in "12"]
    assert scores[0][0] == scores[1][0]  # the same samples of the same weights
    one, two = (load_file(tmp_path / n / "checkpoint-000002" / "model.safetensors") for n in "12")
    before = load_file(tiny_model / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=2e-6)
    assert any((one[name] - before[name]).abs().max() > 1e-4 for name in one)


SHARDED = textwrap.dedent("""
    import torch
    from luffy import DDP, ShardedAdamW
    from machinery.processes import init_processes, launch, rank
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 128),
                                   torch.nn.GELU(), torch.nn.Linear(128, 64)).bfloat16()
    def compare(offload):
        mine, theirs = (DDP(net(), gradient_as_bucket_view=True) for _ in range(2))
        settings = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, eps=1e-8)
        sharded = ShardedAdamW(mine.parameters(), **settings, offload=offload)
        masters = [p.detach().float().clone() for p in theirs.parameters()]
        replicated = torch.optim.AdamW(masters, **settings, fused=True)
        for step in range(20):
            g = torch.Generator().manual_seed(100 * step + rank())
            x, y = torch.randint(64, (2, 16), generator=g)
            for m in (mine, theirs):
                m.zero_grad()
                torch.nn.functional.cross_entropy(m(x).float(), y).backward()
            for p, w in zip(theirs.parameters(), masters):
                w.grad = p.grad.float()
            norm = torch.nn.utils.clip_grad_norm_(masters, 0.5)
            assert norm > 0.5, "the clip must act"
            assert sharded.step(0.5) == norm.item()
            replicated.step()
            for p, w in zip(theirs.parameters(), masters):
                p.data.copy_(w)
            assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
        for i, w in sharded.mine.items():
            assert torch.equal(w, masters[i])
        share = sum(w.numel() for w in sharded.mine.values()) / sum(w.numel() for w in masters)
        assert 0.3 < share < 0.7, share
        moved = sum((a != b).sum().item() for a, b in zip(mine.parameters(), net().parameters()))
        print(f"rank {rank()}: share {share:.2f}, moved {moved}")
        assert moved > 1000
    init_processes()
    launch(lambda: [compare(offload) for offload in (False, True)])
""")


def test_sharded_adamw_equals_replicated_masters_bit_for_bit(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text("import sys; sys.path.insert(0, '.')\n" + SHARDED)
    out = forked(script, ranks=2).stdout
    assert out.count("share") == 4, out


BUCKETS = textwrap.dedent("""
    from contextlib import nullcontext
    import torch
    from luffy import data_parallel
    from machinery.plan import AllocationCounter
    from machinery.processes import init_processes, launch, rank
    def micro_batches():
        net = torch.nn.Sequential(*[torch.nn.Linear(300, 300, bias=False) for _ in range(20)])
        with AllocationCounter() as memory:
            policy = data_parallel(net)
            held, one, x = memory.now, 4 * 300 * 300, torch.randn(2, 300)
            for update in range(3):
                for last in (False, True):
                    memory.peak = memory.now
                    with nullcontext() if last else policy.no_sync():
                        policy(x).sum().backward()
                    assert memory.peak < held + 2 * one, (update, last, memory.peak - held)
        print("one set of gradients")
    init_processes()
    launch(micro_batches)
""")


@pytest.mark.slow
def test_there_is_one_set_of_gradients_from_the_start(tmp_path):
    """DDP alone holds a second one in the first update, and in the second."""
    script = tmp_path / "buckets.py"
    script.write_text("import sys; sys.path.insert(0, '.')\n" + BUCKETS)
    assert run(script, ranks=2).stdout.count("one set") == 2


UNEVEN = textwrap.dedent("""
    import random, sys
    import torch
    import luffy
    from data import Problem
    from machinery.model import load_config
    from machinery.processes import gather, init_processes, launch, rank
    def steps():
        cfg = luffy.Config(**luffy.ALGORITHMS["on_policy"] | dict(problems_per_step=2, lr=1e-2,
            updates_per_step=1, max_response_tokens=32, entropy_coef=0.0, token_budget=40))
        model = luffy.load_model(sys.argv[1], luffy.load_config(sys.argv[1]), False)
        policy = luffy.data_parallel(luffy.Policy(model, 1.0))
        optimizer = luffy.ShardedAdamW(policy.parameters(), lr=cfg.lr)
        rng = random.Random(rank())
        for silent in (0, 1, None, 1):  # the rank whose advantages are all zero
            luffy.update(policy, optimizer, [luffy.Trajectory(
                rank(), Problem("", "", prompt_ids=(5, 6)), rng.choices(range(5, 50), k=20),
                logp_sampler=[0.0] * 20, advantage=0.0 if rank() == silent else i - 3.5)
                for i in range(8 + 4 * rank())], cfg)
        sums = gather([p.double().sum().item() for p in model.parameters()])
        assert sums[0] == sums[1]
        print("the same on both")
    init_processes()
    launch(steps)
""")


@pytest.mark.slow
def test_a_rank_may_have_no_gradient(tiny_model, tmp_path):
    """It has no backward pass but the last, and the other rank does not wait for more."""
    script = tmp_path / "uneven.py"
    script.write_text("import sys; sys.path.insert(0, '.')\n" + UNEVEN)
    assert run(script, tiny_model, ranks=2).stdout.count("the same on both") == 2


FAILING = textwrap.dedent("""
    import sys; sys.path.insert(0, ".")
    import os, signal
    import luffy
    from machinery.processes import launch, rank
    how, score = sys.argv.pop(1), luffy.score
    def fail(*args):
        if rank() == 1 and how == "raises":
            raise RuntimeError("the disk of rank 1 is full")
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*args)
    luffy.score = fail
    launch(luffy.main)
""")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, error",
    [
        ("raises", "[rank1]: RuntimeError: the disk of rank 1 is full"),
        ("dies", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_its_error(tiny_model, tmp_path, how, error):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    start = time.monotonic()
    result = run(script, how, *luffy(tiny_model, tmp_path / "run")[1:], ranks=2, check=False)
    assert result.returncode != 0 and error in result.stderr
    assert "rank      : 1" in result.stderr  # in torchrun's summary; within a second any is first
    assert time.monotonic() - start < 100


SHARING = textwrap.dedent("""
    import hashlib, sys; sys.path.insert(0, ".")
    from pathlib import Path
    from data import load_training_set
    from luffy import Config
    from machinery import toy
    from machinery.processes import init_processes, launch, rank
    from verify import Grader
    def load():
        init_processes()
        for file in sys.argv[1:]:
            with Grader(1) as grader:
                asked, grade = [], grader.right_and_reward
                grader.right_and_reward = lambda x, **how: asked.extend(x) or grade(x, **how)
                problems = load_training_set(Config(data=file, max_response_tokens=99),
                    toy.make_tokenizer(), grader, Path(file).with_suffix(".verdicts"))
            digest = hashlib.sha256(repr(problems).encode()).hexdigest()
            print(f"rank {rank()}: {digest}, graded {len(asked)}", flush=True)
    launch(load)
""")


@pytest.mark.slow
def test_ranks_share_the_reading_of_traces_and_its_errors(tmp_path):
    """Each does its part and has the same problems as one process, in more blocks than one. A row
    that only one of them looks at ends all, with its message."""
    script = tmp_path / "sharing.py"
    script.write_text(SHARING)
    traces = "\\boxed{5}", "\\boxed{6}", "d" * 99, "<eos>a", None, "e=5;\\boxed{5}", "d\\boxed{5}"
    good = [{"problem": f"{i}", "answer": "5", "trace": traces[i % 7]} for i in range(299)]
    bad = [good[0], good[0] | {"trace_logps": [-1.0]}]
    for name, lines in (("good", good), ("bad", bad)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    one = run(script, tmp_path / "good.jsonl").stdout
    (tmp_path / "good.verdicts").unlink()
    two = run(script, tmp_path / "good.jsonl", tmp_path / "bad.jsonl", ranks=2, check=False)
    assert one.splitlines()[0] in two.stdout  # what is dropped, and why
    (alone,) = re.findall(r"rank 0: (\w+), graded (\d+)", one)
    both = [re.findall(rf"rank {r}: (\w+), graded (\d+)", two.stdout)[0] for r in range(2)]
    assert [digest for digest, _ in both] == [alone[0]] * 2
    assert sum(int(n) for _, n in both) == int(alone[1]) and "0" not in [n for _, n in both]
    assert two.returncode != 0 and two.stderr.count("1 trace_logps for the ") == 1
