"""Traces as they come: several of a problem, none, long ones, with a teacher's log-probs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import Judge, run

from data import Problem, batch_at, encode, load_training_set
from luffy import ALGORITHMS, Config, rollout, score, set_normaliser, token_loss
from machinery import flags, plan, toy
from machinery.batches import Trajectory, collate
from machinery.metrics import Means
from machinery.processes import InputError
from machinery.samplers import Sample
from verify import grade


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def row(question, answer, trace):
    target = {} if trace is None else {"target": [{"role": "assistant", "content": trace}]}
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "reward_model": {"ground_truth": answer}} | target


grader = Judge(lambda jobs: [grade(*job) for job in jobs])


def load(tmp_path, tokenizer, *rows, **fields):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = Config(**dict(data=str(file), max_prompt_tokens=64, max_response_tokens=64) | fields)
    return load_training_set(cfg, tokenizer, grader, tmp_path / "verdicts.json")


def test_several_traces_take_turns(tmp_path, tokenizer, capsys):
    """Rows of the same problem are one problem, drawn once an epoch, each time with the next trace.
    A wrong trace does not take the others with it."""
    traces = "\\boxed{5}", "d=6;\\boxed{6}", "d=5;\\boxed{5}", "d=5;e=5;\\boxed{5}"
    rows = [row("a", "5", t) for t in traces] + [row("b", "5", "\\boxed{5}"), row("a", "5", None)]
    problems = load(tmp_path, tokenizer, *rows)
    assert [p.prompt[0]["content"] for p in problems] == ["a", "b"]
    assert (
        "2 of 2 problems, 4 traces; dropped 1: no trace; dropped 1: wrong"
        in capsys.readouterr().out
    )
    seen = {"a": [], "b": []}
    for step in range(7):  # a step is an epoch
        for p in batch_at(problems, step, 2, seed=0):
            seen[p.prompt[0]["content"]].append(p.trace)
            assert tokenizer.decode(p.trace_ids) == p.trace + "<eos>"
    right = [traces[0], *traces[2:]]
    assert seen == {"a": right * 2 + right[:1], "b": ["\\boxed{5}"] * 7}


class Counts:
    """A sampler of right answers that notes how many it is asked for."""

    def __init__(self, tokenizer):
        self.tokens, self.asked = [*tokenizer.encode("\\boxed{5}"), 1], []

    def generate(self, prompts, n, *, seeds, **_):
        self.asked.append((len(prompts), n))
        return [[Sample(self.tokens, [-0.5] * len(self.tokens)) for _ in range(n)] for _ in prompts]


def test_a_problem_without_a_trace(tmp_path, tokenizer, capsys):
    """drop: it is left out. rollout: its group is as large, but of rollouts alone."""
    rows = [row("a", "5", "d=5;\\boxed{5}"), row("b", "5", None)]
    assert len(load(tmp_path, tokenizer, *rows)) == 1
    assert len(load(tmp_path, tokenizer, *rows, traces=0)) == 2  # on-policy: none is needed
    capsys.readouterr()
    problems = load(tmp_path, tokenizer, *rows, untraced="rollout")
    assert "2 of 2 problems, 1 of them without a trace" in capsys.readouterr().out
    cfg, sampler = Config(untraced="rollout", rollouts=3), Counts(tokenizer)
    group = rollout(sampler, dict(enumerate(problems)), 0, cfg)
    assert sampler.asked == [(2, 3), (1, 1)]
    assert [(t.position, t.off_policy) for t in group] == [
        *[(0, False)] * 3, (0, True), *[(1, False)] * 4]  # fmt: skip
    group[-1].right = group[-1].reward = 0.0  # already graded
    metrics = score(group, grader, tokenizer, cfg)
    assert [t.advantage for t in group] == [0.0] * 4 + [0.25] * 3 + [-0.75]  # Eq. 4, as any group
    assert metrics["groups/mixed"] == 0.5 and metrics["trace_reward"] == 1.0


@pytest.mark.parametrize("algo", ["hpt", "rl_sft", "sft", "uft"])
def test_rows_that_take_the_last_of_a_group_for_a_trace_need_one(algo):
    cfg = Config(**ALGORITHMS[algo] | dict(algo=algo, untraced="rollout"))
    with pytest.raises(InputError, match=f"--untraced rollout: not with --algo {algo}"):
        flags.check(cfg, 1, {}, [])
    flags.check(replace(Config(), untraced="rollout"), 1, {}, [])


def test_a_teachers_log_probs_are_the_behaviour(tmp_path, tokenizer):
    """x = π_θ / π_φ with the data's π_φ where there are some; 1 elsewhere, and on no rollout."""
    trace = "d=5;\\boxed{5}"
    length = len(tokenizer.encode(trace)) + 1
    logps = [-0.1 * i for i in range(length)]
    prompt = [{"role": "user", "content": "a"}]
    limits = dict(max_prompt_tokens=64, max_trace_tokens=64)
    with pytest.raises(InputError, match=f"{length - 1} trace_logps for the {length} tokens"):
        encode([Problem(prompt, "5", trace, trace_logps=logps[1:])], tokenizer, **limits)
    known = Problem(prompt, "5", trace, trace_logps=logps)
    kept, _ = encode([known, replace(known, trace_logps=())], tokenizer, **limits)
    made = [Trajectory(i, p, p.trace_ids, off_policy=True) for i, p in enumerate(kept)]
    made.append(Trajectory(0, kept[0], [7, 1], logp_sampler=[-0.5, -0.5]))
    for t in made:
        t.advantage = 1.0
    cfg = Config(entropy_coef=0.0, max_response_tokens=10)
    set_normaliser(made, cfg)
    batch = collate(made)
    logp = torch.full((len(batch.segment),), math.log(0.3))
    loss = token_loss(logp, torch.zeros_like(logp), batch, cfg, Means())
    x = [0.3 / math.exp(lp) for lp in logps] + [0.3] * length
    expected = sum(x / (x + 0.1) for x in x) + 2  # a rollout's ratio is 1
    assert -loss.item() == pytest.approx(expected / 30, rel=1e-6)
    assert made[0].logp_behavior.tolist() == pytest.approx(logps)
    assert set(made[1].logp_behavior.tolist()) == {0.0}


def test_a_limit_of_its_own_for_traces(tmp_path, tokenizer):
    """Easy and hard subsets: by the traces' length, whatever a rollout may take."""
    rows = [row(q, "5", "d" * n + "\\boxed{5}") for q, n in (("a", 10), ("b", 30), ("c", 50))]
    counts = {
        limit: len(load(tmp_path, tokenizer, *rows, max_trace_tokens=limit, max_response_tokens=45))
        for limit in (0, 20, 64)
    }
    assert counts == {0: 2, 20: 1, 64: 3}
    cfg = Config(max_trace_tokens=16000)
    assert plan.longest(cfg) == 1024 + 16000 and plan.longest(Config()) == 9216
    assert plan.longest_row(cfg, 8)[0] == 17024
    with pytest.raises(InputError, match="context"):  # before anything is loaded
        plan.show(replace(cfg, model="Qwen2.5-Math-7B", dry_run="8x80"), lambda ranks: None, "")


@pytest.mark.slow
def test_runs_with_all_of_it(tmp_path, tiny_model):
    """Several traces, one with log-probs, and none: a run and its resumption."""
    rows = [row("a4,b1,-;d?", "5", t) for t in ("\\boxed{5}", "d=5;\\boxed{5}")]
    rows += [row("b4,b1,-;d?", "5", None), row("c4,b1,-;d?", "5", "d=5;\\boxed{5}")]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    sizes = "--problems_per_step 3 --updates_per_step 1 --rollouts 3 --max_response_tokens 12"
    fixed = ["--model", tiny_model, "--data", file, "--untraced", "rollout", "--max_trace_tokens",
             20, "--sample_every", 1, "--save_every", 1, *sizes.split()]  # fmt: skip
    for steps in (1, 2):
        run("luffy.py", *fixed, "--steps", steps, "--out", tmp_path / "run", "--eval_data", "none")
    for step, trace in ((1, "\\boxed{5}<eos>"), (2, "d=5;\\boxed{5}<eos>")):
        text = (tmp_path / f"run/samples/step-{step:06d}.jsonl").read_text()
        shown = [json.loads(line) for line in text.splitlines()]
        traces = {r["prompt"]: r["response"] for r in shown if r["off_policy"]}
        assert traces["<user>a4,b1,-;d?<assistant>"] == trace
        assert len(shown) == 12 and len(traces) == 2
