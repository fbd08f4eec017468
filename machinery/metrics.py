"""What is measured of a step: means over all ranks' tokens and trajectories, and a line of them."""

import math
from collections import Counter, defaultdict

import torch
from torch import Tensor

from machinery.batches import MicroBatch, Trajectory
from machinery.processes import gather

FAR = 0.1  # nats a token: more than a sampler's rounding
UNLIKELY = 0.1  # a trace token's π below it: what shaping is for


class Means:
    """Averages and maxima of quantities that come in parts, from micro-batches and from ranks."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0))  # sum, count
        self.peaks: dict[str, float] = {}  # maximum

    def add(self, name: str, values: Tensor | list, weights: Tensor | None = None) -> None:
        """weights: the mean is theirs, over all parts together; none: all count alike."""
        values = torch.as_tensor(values, dtype=torch.float64)
        weights = torch.ones_like(values) if weights is None else weights.double()
        total, count = self.parts[name]
        self.parts[name] = total + (weights * values).sum().item(), count + weights.sum().item()

    def peak(self, name: str, values: Tensor) -> None:
        if values.numel():
            self.peaks[name] = max(values.max().item(), self.peaks.get(name, -math.inf))

    def reduce(self) -> dict[str, float]:
        """name -> mean (or maximum) over all ranks, for every name with a value."""
        every = Means()
        for parts, peaks in gather((dict(self.parts), self.peaks)):
            for name, (total, count) in parts.items():
                sum_so_far, count_so_far = every.parts[name]
                every.parts[name] = sum_so_far + total, count_so_far + count
            for name, value in peaks.items():
                every.peak(name, torch.tensor(value, dtype=torch.float64))
        means = {name: total / count for name, (total, count) in every.parts.items() if count}
        for name, value in (every.peaks | means).items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}: the step is not logged, nor saved")
        return every.peaks | means


def trajectory_metrics(trajectories: list[Trajectory], rollouts: int) -> dict[str, float]:
    """Means over all ranks' trajectories, traces apart from rollouts, `rollouts` in a group.

    Groups are solved by the verifier's word, whatever the reward.
    """
    means = Means()
    for t in trajectories:
        kind = "trace_" if t.off_policy else ""
        means.add(f"{kind}reward", [t.reward])
        means.add(f"{kind}length", [len(t.response)])
        if not t.off_policy:
            means.add("right", [t.right])
            if t.problem.source:
                means.add(f"reward/{t.problem.source}", [t.reward])
            means.add("truncated", [t.truncated])
    if rollouts:
        groups: dict[int, list[float]] = defaultdict(list)
        for t in trajectories:
            if not t.off_policy:
                groups[t.position].append(t.right)
        solved = torch.tensor([sum(group) / len(group) for group in groups.values()])
        means.add("groups/none", solved == 0)
        means.add("groups/mixed", (solved > 0) & (solved < 1))
        means.add("groups/all", solved == 1)
    return means.reduce()


def failure_metrics(failures: Counter) -> dict[str, float]:
    """Over all ranks: responses that the grader failed on, by kind."""
    total = sum(gather(failures), Counter())
    kinds = {f"grader_failures/{kind}": count for kind, count in total.items()}
    return {"grader_failures": total.total()} | kinds


def add_token_metrics(
    means: Means,
    batch: MicroBatch,
    logp: Tensor,
    old: Tensor,
    entropy: Tensor,
    factor: Tensor,
    slope: Tensor,
) -> None:
    """From one micro-batch, all (N,): each metric over rollout tokens or over trace tokens only."""
    on, off = ~batch.off_policy, batch.off_policy
    log_ratio = (old - batch.logp_sampler)[on]  # the sampler's numerics against the trainer's
    means.add("entropy", entropy[on])
    means.add("ratio", (logp - old)[on].exp())
    means.add("ratio_far", ((logp - old)[on].abs() > 0.2).float())
    # k3 of http://joschu.net/blog/kl-approx.html: unbiased for KL(sampler || trainer)
    means.add("sampler_kl", log_ratio.exp() - 1 - log_ratio)
    means.peak("sampler_ratio_max", log_ratio.exp())  # --tis_cap cuts it
    means.add("trace_prob", logp[off].exp())
    means.add("trace_unlikely", logp[off] < math.log(UNLIKELY))
    means.add("trace_f", factor[off])
    # of Σ |∂J / ∂log π|: a ratio of sums over micro-batches, updates and ranks
    means.add("trace_share", off, (batch.inv_z * slope).abs())


def evaluation_metrics(scores: dict[str, dict]) -> dict[str, float]:
    """From the scores of a row of evals.jsonl."""
    return {f"eval/{source}": score["avg"] for source, score in scores.items()}


def smooth(values: list, window: int = 10) -> list[float]:
    """The mean of the last `window` values; NaN where there are none."""
    means = []
    for i in range(len(values)):
        last = [v for v in values[max(0, i + 1 - window) : i + 1] if v is not None]
        means.append(sum(last) / len(last) if last else math.nan)
    return means


def one_line(row: dict, seconds: dict) -> str:
    """A step for a person: what the rows of metrics.jsonl hold, abbreviated; and what is wrong."""

    def number(name: str, form: str = ".2f") -> str:
        text = format(row[name], form) if name in row else "-"
        return text[1:] if text.startswith("0.") else text

    sources = "".join(f"{k[7:]} {number(k)} " for k in row if k.startswith("reward/")).rstrip()
    sources += ", " if sources else ""
    groups = "/".join(number(f"groups/{kind}") for kind in ("none", "mixed", "all"))
    parts = (
        f"step {row['step']}",
        f"reward {number('reward')} ({sources}trace {number('trace_reward')})",
        f"groups 0/mix/1 {groups}",
        f"len {number('length', '.0f')}",
        f"trunc {number('truncated', '.0%')}",
        f"H {number('entropy')}",
        f"π(trace) {number('trace_prob')}",
        f"gnorm {number('grad_norm', '.3f')}",
        " ".join(f"{phase} {spent:.1f}s" for phase, spent in seconds.items()),
    )
    line = " | ".join(parts)
    if row.get("sampler_kl", 0) > FAR:
        line += (
            f"\nwarning     sampler_kl {row['sampler_kl']:.2g}: the rollouts are not of the policy "
            "that learns from them. Does `--sampler torch` have it, too? See docs/real-runs.md"
        )
    return line
