"""Every arm runs by its name, from sampling to a step, with the group that its row says."""

import json
import math
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import few, rows

import luffy
from data import Problem
from machinery.processes import InputError, init_processes
from machinery.samplers import Sample, TorchSampler
from verify import Grader


@pytest.fixture(scope="module", autouse=True)
def one_process():
    init_processes()
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch):
    """All is drawn but the pixels, which take longer than a run."""
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, file, **how: Path(file).touch())


class LuckyGrader(Grader):
    """A random model is never right; here half of its rollouts are, and all of the traces."""

    def __call__(self, jobs, lenient=None):
        return [float("boxed" in response or i % 2) for i, (response, _) in enumerate(jobs)]


@pytest.mark.parametrize("algo", rows("hpt", "chord_mu", "srft", "prefix_rft", "uft"))
def test_every_algorithm_runs(tiny_model, tmp_path, monkeypatch, algo):
    monkeypatch.setattr(luffy, "Grader", LuckyGrader)
    out = tmp_path / "run"
    cfg = luffy.parse_args(
        [
            "--algo",
            algo,
            "--model",
            str(tiny_model),
            "--out",
            str(out),
            "--steps",
            "2",
            "--problems_per_step",
            "4",
            "--sample_every",
            "1",
            "--max_response_tokens",
            "64",
            "--eval_data",
            "",
            "--graders",
            "1",
        ]
    )
    luffy.check(cfg, ranks=1)
    luffy.train(cfg, cfg.model)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    assert ("reward" in steps[0]) == (cfg.rollouts > 0)
    assert ("trace_reward" in steps[0]) == (cfg.traces > 0)
    samples = [
        json.loads(line)
        for line in (out / "samples" / "step-000001.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 4 * (cfg.rollouts + cfg.traces)
    assert sum(s["off_policy"] for s in samples) == 4 * cfg.traces
    for s in samples:  # what report.html is made from
        assert "".join(s["tokens"]) == s["response"] and max(s["logp"]) <= 0
        assert {len(s[name]) for name in ("logp", "logp_behavior", "factor", "slope")} == {
            len(s["tokens"])
        }
        inv_z = s["inv_z"] if isinstance(s["inv_z"], list) else [s["inv_z"]]
        assert s["right"] in (0, 1) and all((z > 0) == s["learns"] for z in inv_z)
        if s["off_policy"] and luffy.SHAPINGS[cfg.shaping].log_pi_phi is None:
            assert set(s["logp_behavior"]) == {luffy.LOG_PI_PHI}
    watched = [json.loads(line) for line in (out / "watched.jsonl").read_text().splitlines()]
    assert [row["step"] for row in watched] == [0, 1, 2]
    first, _, last = (sum(sum(t["logp"]) for t in row["traces"]) for row in watched)
    # hpt's are not where rollouts are right, chord_phi's have w = π(1 - π): little, untrained
    if any(s["off_policy"] and s["learns"] for s in samples) and cfg.shaping != "phi":
        assert last > first  # the traces are learnt
    if cfg.traces and cfg.trace_advantage is not None:
        assert {s["advantage"] for s in samples if s["off_policy"]} == {cfg.trace_advantage}
    assert (out / "checkpoint-000002" / "model.safetensors").exists()
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in steps)


def test_the_loop_pushes_samples_sleeps_and_only_then_updates(tiny_model, tmp_path, monkeypatch):
    """Each rollout is of the policy as the last update left it, and the update has the memory."""
    calls, pushed = [], []

    class Watched(TorchSampler):
        def push(self, named_parameters):
            weights = list(named_parameters)
            calls.append("push")
            pushed.append(sum(p.double().sum().item() for _, p in weights))
            super().push(weights)

        def generate(self, prompts, n, **options):
            calls.append("generate")
            now = sum(p.double().sum().item() for p in self.model.parameters())
            assert now == pushed[-1]
            return super().generate(prompts, n, **options)

        def sleep(self):
            calls.append("sleep")
            super().sleep()

    def update(*args, original=luffy.update):
        calls.append("update")
        return original(*args)

    monkeypatch.setattr(luffy, "Grader", LuckyGrader)
    monkeypatch.setattr(luffy, "TorchSampler", Watched)
    monkeypatch.setattr(luffy, "update", update)
    cfg = luffy.parse_args(
        [
            "--model",
            str(tiny_model),
            "--out",
            str(tmp_path / "run"),
            "--steps",
            "2",
            "--problems_per_step",
            "4",
            "--max_response_tokens",
            "64",
            "--eval_samples",
            "1",
            *map(str, few(tmp_path)),
        ]
    )
    luffy.train(cfg, cfg.model)
    sampled = ["push", "generate", "sleep"]
    # First it takes the trainer's weights, to share them; evaluation is before and after.
    assert calls == ["push", *sampled, *(sampled + ["update"]) * 2, *sampled]
    assert pushed[0] == pushed[1] == pushed[2] and len(set(pushed)) == 3
    timing = [
        json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()
    ]
    assert all(row["sync"] > 0 for row in timing)

    class Deaf(TorchSampler):
        """As if the call in the loop were deleted."""

        def push(self, named_parameters):
            pass

    monkeypatch.setattr(luffy, "TorchSampler", Deaf)
    with pytest.raises(RuntimeError, match="push"):
        luffy.train(luffy.replace(cfg, out=str(tmp_path / "next"), eval_data=""), cfg.model)


def test_a_schedule_changes_what_is_computed_and_what_is_recorded(
    tiny_model, tmp_path, monkeypatch
):
    """A γ that falls: slopes are of the step's γ, not of config.json's; so are watched traces'."""
    monkeypatch.setattr(luffy, "Grader", LuckyGrader)
    falling = [0.5, 0.1]
    schedule = lambda cfg, step: {"gamma": falling[step], "lr": 1e-3 * falling[step]}  # noqa: E731
    monkeypatch.setitem(luffy.SCHEDULES, "falling", schedule)
    rates = []
    monkeypatch.setattr(luffy.ShardedAdamW, "set_lr", lambda self, lr: rates.append(lr))
    out = tmp_path / "run"
    arguments = ["--model", str(tiny_model), "--out", str(out), "--schedule", "falling"]
    sizes = ["--steps", "2", "--problems_per_step", "2", "--sample_every", "1", "--eval_data", ""]
    cfg = luffy.parse_args([*arguments, *sizes, "--updates_per_step", "1"])
    luffy.train(cfg, cfg.model)

    def rows(name):
        return [json.loads(line) for line in (out / name).read_text().splitlines()]

    def check(row, gamma, advantage):
        for logp, factor, slope in zip(row["logp"], row["factor"], row["slope"]):
            pi = math.exp(logp)
            assert factor == pytest.approx(pi / (pi + gamma), rel=1e-3)
            expected = advantage * gamma * pi / (pi + gamma) ** 2
            assert slope == pytest.approx(expected, rel=1e-3, abs=1e-9)

    for step in (1, 2):
        for row in rows(f"samples/step-{step:06d}.jsonl"):
            if row["off_policy"]:
                check(row, falling[step - 1], row["advantage"])
    for row in rows("watched.jsonl"):
        for trace in row["traces"]:
            check(trace, falling[min(row["step"], 1)], 1.0)  # after the last step as in it
    assert rates == [5e-4, 1e-4]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"temperature": 0.5}, "cannot change temperature"),
        ({"updates_per_step": 3}, "cannot change updates_per_step"),
        ({"gamma": -0.1}, "--gamma -0.1"),
    ],
)
def test_a_schedule_of_what_cannot_change_is_refused(monkeypatch, changes, words):
    late = lambda cfg, step: changes if step == 150 else {}  # noqa: E731
    monkeypatch.setitem(luffy.SCHEDULES, "late", late)
    with pytest.raises(InputError, match=words):
        luffy.check(luffy.parse_args(["--schedule", "late"]), ranks=1)


def test_a_trace_never_goes_through_the_sampler():
    """The policy is given the problem alone; the trace stands last in its group, as it is."""
    asked = []

    class Stub:
        def generate(self, prompts, n, **options):
            asked.extend(map(tuple, prompts))
            return [[Sample([7, 1], [-0.1, -0.2])] * n for _ in prompts]

    batch = {i: Problem("", "", prompt_ids=(2, i), trace_ids=(40 + i, 1)) for i in range(3)}
    made = luffy.rollout(Stub(), batch, 0, luffy.parse_args(["--rollouts", "2"]))
    assert asked == [(2, 0), (2, 1), (2, 2)]
    rollout = ((7, 1), False)
    groups = [[rollout, rollout, ((40 + i, 1), True)] for i in range(3)]
    assert [(tuple(t.response), t.off_policy) for t in made] == sum(groups, [])
