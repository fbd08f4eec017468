"""Every arm runs by its name, from sampling to a step, with the group that its row says."""

import json
from collections import Counter

import pytest
import torch.distributed as dist

import luffy
from run import init_processes


@pytest.fixture(scope="module", autouse=True)
def one_process():
    init_processes()
    yield
    dist.destroy_process_group()


class LuckyGrader:
    """A random model is never right; here half of its rollouts are, and all of the traces."""

    failures = Counter()

    def __init__(self, *_):
        pass

    def __call__(self, jobs):
        return [float("boxed" in response or i % 2) for i, (response, _) in enumerate(jobs)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("algo", luffy.ALGORITHMS)
def test_every_algorithm_runs(tiny_model, tmp_path, monkeypatch, algo):
    monkeypatch.setattr(luffy, "Grader", LuckyGrader)
    out = tmp_path / "run"
    cfg = luffy.parse_args(["--algo", algo, "--model", str(tiny_model), "--out", str(out),
                            "--steps", "2", "--problems_per_step", "4", "--sample_every", "1",
                            "--max_response_tokens", "64", "--eval_data", "", "--graders", "1"])
    luffy.check(cfg, ranks=1)
    luffy.train(cfg, cfg.model)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert ("reward" in rows[0]) == (cfg.rollouts > 0)
    assert ("trace_reward" in rows[0]) == (cfg.traces > 0)
    samples = [json.loads(line) for line in
               (out / "samples" / "step-000001.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * (cfg.rollouts + cfg.traces)
    assert sum(s["off_policy"] for s in samples) == 4 * cfg.traces
    for s in samples:  # what report.html is made from
        assert len(s["tokens"]) == len(s["logp"]) and "".join(s["tokens"]) == s["response"]
        assert max(s["logp"]) <= 0 and (s["logp_old"] is None) == s["off_policy"]
    watched = [json.loads(line) for line in (out / "watched.jsonl").read_text().splitlines()]
    assert [row["step"] for row in watched] == [0, 1, 2]
    first, _, last = (sum(sum(t["logp"]) for t in row["traces"]) for row in watched)
    if cfg.traces:
        assert last > first  # the traces are learnt
    if cfg.trace_advantage is not None:
        assert {s["advantage"] for s in samples if s["off_policy"]} == {cfg.trace_advantage}
    assert (out / "checkpoint-000002" / "model.safetensors").exists()
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows)
