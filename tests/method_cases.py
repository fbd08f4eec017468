"""Reference values of other papers' official code, put through the functions of this project.

`evaluate` takes a case: a micro-batch with the loss, gradients and advantages that an official
function returned for it. It returns the fields that our code computes. Each rule is called by the
row that it has in machinery/rivals.py, as the trainer calls it: set_advantages, set_normaliser,
token_loss. What is set here is the case's parameters, and the units. An official sum is divided by
T alone, where ours is a mean over N trajectories, so rl_coef = N. An official mean of micro-batches
is had by calling ours for each. A coefficient c of a mean entropy over M tokens is c N T / M.
"""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch

import luffy
from luffy import ALGORITHMS, Config, Trajectory
from machinery import rivals
from machinery.batches import collate
from machinery.metrics import Means
from machinery.prefixes import keep_uncertain


def evaluate(case: dict) -> dict:
    """A case -> its fields that our code computes, in its shapes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return METHODS[case["method"]](case)
    finally:
        torch.set_default_dtype(before)


class Rows:
    """A case's rows as trajectories, and the leaves that its gradients are taken at."""

    def __init__(self, case: dict):
        self.case, self.width = case, len(case["mask"][0])
        self.lengths = [sum(row) for row in case["mask"]]
        self.logp, self.entropy = (self.leaf(name) for name in ("log_prob", "entropy"))
        self.trajectories = [self.trajectory(b) for b in range(len(self.lengths))]

    def leaf(self, name: str) -> torch.Tensor:
        values = self.case.get(name) or [[0.0] * self.width] * len(self.lengths)
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    def trajectory(self, b: int) -> Trajectory:
        case, length = self.case, self.lengths[b]
        of_trace = sum(case["off_policy_mask"][b]) if "off_policy_mask" in case else 0
        reward = case["rewards"][b]
        t = Trajectory(
            0, SimpleNamespace(prompt_ids=[0]), [0] * length, right=reward, reward=reward
        )
        t.off_policy, t.prefix = of_trace == length, of_trace % length
        t.logp_old = torch.tensor(case.get("old_log_prob", case["log_prob"])[b][:length])
        t.entropy_old = self.entropy.detach()[b, :length]
        t.logp_sampler = [0.0] * length
        return t

    def set_advantages(self, cfg: Config, groups: list[list[Trajectory]]) -> None:
        """groups: rollouts, then the trace. Groups of one size stand together, as in a batch."""
        by_size = defaultdict(list)
        for group in groups:
            by_size[sum(not t.off_policy for t in group), len(group)] += group
        for (rollouts, size), trajectories in by_size.items():
            sizes = dict(rollouts=rollouts, traces=size - rollouts)
            luffy.set_advantages(trajectories, replace(cfg, **sizes))

    def groups(self) -> list[list[Trajectory]]:
        by_problem = defaultdict(list)
        for problem, t in zip(self.case["problem"], self.trajectories):
            by_problem[problem].append(t)
        return [
            sorted(group, key=lambda t: (t.off_policy, t.prefix > 0))
            for group in by_problem.values()
        ]

    def loss(self, cfg: Config, rows: list[int] | None = None) -> torch.Tensor:
        """Of one micro-batch, as if it were the update."""
        rows = range(len(self.lengths)) if rows is None else rows
        trajectories = [self.trajectories[b] for b in rows]
        luffy.set_normaliser(trajectories, cfg)
        logp, entropy = (
            torch.cat([x[b, : self.lengths[b]] for b in rows]) for x in (self.logp, self.entropy)
        )
        return luffy.token_loss(logp, entropy, collate(trajectories), cfg, Means())

    def result(self, loss: torch.Tensor, **fields) -> dict:
        loss.backward()
        found = {"loss": loss.item(), "grad_log_prob": self.logp.grad.tolist()}
        if "grad_entropy" in self.case:
            found["grad_entropy"] = self.entropy.grad.tolist()
        return found | {"advantages": self.advantages()} | fields

    def advantages(self) -> list:
        """(B) or (B, T), as in the case."""
        if not isinstance(self.case["advantages"][0], list):
            return [float(t.advantage) for t in self.trajectories]
        found = torch.zeros(len(self.lengths), self.width)
        for row, t in zip(found, self.trajectories):
            row[: len(t.response)] = torch.as_tensor(t.advantage)
        return found.tolist()


def config(case: dict, row: str, **changes) -> Config:
    fields = ALGORITHMS[row] | dict(max_response_tokens=len(case["mask"][0])) | changes
    return Config(**fields)


def in_sums(cfg: Config, rows: Rows, some: list[int] | None = None, entropy: float = 0.0) -> Config:
    """cfg for an official sum over tokens / T, and for its coefficient of the entropy."""
    some = range(len(rows.lengths)) if some is None else some
    is_sft = luffy.SHAPINGS[cfg.shaping].is_sft
    n = sum(not (rows.trajectories[b].off_policy and is_sft) for b in some)
    tokens = sum(rows.lengths[b] for b in some)
    units = n * cfg.max_response_tokens / tokens if n else 1.0
    return replace(cfg, rl_coef=float(max(n, 1)), entropy_coef=entropy * units)


# ------------------------------------------------------------------ demonstrations beside RL
def hpt(case: dict) -> dict:
    how, rows = case["params"], Rows(case)
    cfg = config(case, "hpt", sft_coef=how["sft_coef"], route="case")
    luffy.ROUTES["case"] = partial(rivals.gate, at_most=how["gate"])
    solved, size = case["problem_rewards"], len(case["problem_rewards"][0])
    kept = iter(rows.trajectories)
    keep = luffy.ROUTES["case"](torch.tensor([[*r, 1.0] for r in solved]), size).tolist()
    dropped = lambda reward, off: Trajectory(  # noqa: E731
        0, None, [0], right=reward, reward=reward, off_policy=off
    )
    groups = [
        [next(kept) if k else dropped(r, False) for k, r in zip(keep[p], rewards)]
        for p, rewards in enumerate(solved)
    ]
    for p, group in enumerate(groups):
        group.append(next(kept) if keep[p][-1] else dropped(1.0, True))
    rows.set_advantages(cfg, groups)
    parts, total = defaultdict(list), torch.zeros(())
    for some in case["micro_batches"]:
        plain = in_sums(cfg, rows, some)
        is_rl, is_sft = (
            any(rows.trajectories[b].off_policy == off for b in some) for off in (False, True)
        )
        rl = rows.loss(replace(plain, sft_coef=0.0), some).item() if is_rl else 0.0
        sft = rows.loss(replace(plain, rl_coef=0.0, sft_coef=1.0), some).item()
        parts["loss_rl"].append(rl)
        parts["loss_sft"].append(sft if is_sft else None)
        total = total + rows.loss(in_sums(cfg, rows, some, how["entropy_coef"]), some)
    gate = dict(keep_trace=[k[-1] for k in keep], keep_rollouts=[k[:-1] for k in keep])
    return rows.result(total, **parts, **gate)


def srft(case: dict) -> dict:
    how, rows = case["params"], Rows(case)
    row = "srft" if how["trace_sft_entropy_sign"] < 0 else "srft_plus"
    cfg = config(case, row, gamma=how["gamma"], sft_coef=1.0)
    rows.set_advantages(replace(cfg, advantage="group"), rows.groups())
    official = rows.advantages()  # of the group: those of rollouts are not used
    rows.set_advantages(cfg, rows.groups())
    total, no_bonus = torch.zeros(()), 0.0
    for some in case["micro_batches"]:
        no_bonus += rows.loss(in_sums(cfg, rows, some), some).item()
        total = total + rows.loss(in_sums(cfg, rows, some, how["entropy_coef"]), some)
    return rows.result(total, loss_sft_and_rl=no_bonus, advantages=official)


def rl_plus(case: dict) -> dict:
    how, rows = case["params"], Rows(case)
    cfg = config(case, "rl_plus", clip=how["clip"], token_mean=how["token_mean"])
    rows.set_advantages(cfg, rows.groups())
    return rows.result(rows.loss(cfg if how["token_mean"] else in_sums(cfg, rows)))


def chord(case: dict) -> dict:
    """Its demonstrations are of other problems; each stands here as the trace of a group."""
    how, rows = case["params"], Rows(case)
    mu = rivals.chord_mu(how["step"], **how["mu_schedule"])
    cfg = config(
        case, "chord_phi" if how["phi"] else "chord_mu", clip=how["clip"], schedule="constant"
    )
    if how["dual_clip"]:
        luffy.OBJECTIVES["case"] = partial(rivals.dual_clip, c=how["dual_clip"])
        cfg = replace(cfg, objective="case")
    demonstrations = [t for t in rows.trajectories if t.off_policy]
    groups = [g for g in rows.groups() if not g[0].off_policy]
    rows.set_advantages(cfg, groups)
    for t in demonstrations:
        t.advantage = cfg.trace_advantage
    n, total = len(rows.lengths) - len(demonstrations), torch.zeros(())
    for some in case["micro_batches"]:
        demos = [b for b in some if rows.trajectories[b].off_policy]
        others = [b for b in some if b not in demos]
        m, k = (sum(rows.lengths[b] for b in kind) for kind in (others, demos))  # tokens
        shares = dict(rl_coef=(1 - mu) * len(others) / n * m / (m + 1e-8))  # their 1e-8
        shares |= dict(sft_coef=mu * len(demos) / len(demonstrations) * k / (k + 1e-8))
        total = total + rows.loss(replace(cfg, **shares), some)
    official = [0.0 if t.off_policy else float(t.advantage) for t in rows.trajectories]
    return rows.result(total, advantages=official)  # a demonstration's advantage there: not used


def chord_schedule(case: dict) -> dict:
    columns = [row[:5] for row in case["rows"]]
    return {"rows": [[*row, rivals.chord_mu(*row)] for row in columns]}


def prefix_rft(case: dict) -> dict:
    how, rows = case["params"], Rows(case)
    advantage = how["advantage_rule"].replace("dr_grpo", "").removeprefix("_") or "group"
    objective = "dual_clip_all" if how["clip_prefix"] else "dual_clip"
    cfg = config(case, "prefix_rft", advantage=advantage, clip=how["clip"], objective=objective)
    cfg = replace(cfg, continuations=how["continuations"], token_mean=how["token_mean"])
    cfg = replace(cfg, entropy_coef=0.0)
    rows.set_advantages(cfg, rows.groups())
    before = rows.advantages()
    keep_uncertain(rows.trajectories, 1 - how["entropy_drop_share"])
    learning = sum(
        torch.as_tensor(t.advantage)[: t.prefix].count_nonzero()
        for t in rows.trajectories
        if t.prefix
    )
    loss = rows.loss(cfg if how["token_mean"] else in_sums(cfg, rows))
    return rows.result(loss, advantages_before_mask=before, prefix_tokens_that_learn=int(learning))


# ------------------------------------------------------------------ on-policy rules
def on_policy(case: dict, row: str, **changes) -> dict:
    """Z is the row's own where the case has no divisor, or the number of tokens as its divisor."""
    how, rows = case["params"], Rows(case)
    cfg = config(case, row, normalize_std=how["normalize_std"] != "no", **changes)
    if how.get("dual_clip"):
        luffy.OBJECTIVES["case"] = partial(rivals.dual_clip, c=how["dual_clip"])
        cfg = replace(cfg, objective="case")
    rows.set_advantages(cfg, rows.groups())
    divisor = how.get("divisor", sum(rows.lengths))
    if divisor != sum(rows.lengths) or row == "on_policy":
        cfg = in_sums(replace(cfg, token_mean=False, max_response_tokens=divisor), rows)
    return rows.result(rows.loss(cfg))


def clipped(case: dict, row: str) -> dict:
    how = case["params"]
    return on_policy(case, row, clip=how["clip_low"], clip_high=how["clip_high"])


def cispo(case: dict) -> dict:
    how = case["params"]
    return on_policy(case, "cispo", clip=1 - how["ratio_min"], clip_high=how["ratio_max"] - 1)


def gmpo(case: dict) -> dict:
    how = case["params"]
    return on_policy(case, "gmpo", clip=how["log_clip_low"], clip_high=how["log_clip_high"])


def advantages_alone(case: dict, row: str, advantage: str) -> dict:
    rows = Rows(case | {"log_prob": case["mask"]})
    cfg = config(case, row, normalize_std=False, advantage=advantage)
    rows.set_advantages(cfg, rows.groups())
    return {"advantages": rows.advantages()}


def reinforce_pp(case: dict) -> dict:
    advantage = "batch" if case["params"]["shift_mean"] else "batch_std"
    return advantages_alone(case, "reinforce_pp", advantage)


def rloo(case: dict) -> dict:
    whitened = case["params"]["normalize_std"] != "no"
    return advantages_alone(case, "on_policy", "others_white" if whitened else "others")


METHODS = {
    "hpt": hpt,
    "srft": srft,
    "rl_plus": rl_plus,
    "chord_phi": chord,
    "chord_mu": chord,
    "chord_schedule": chord_schedule,
    "prefix_rft": prefix_rft,
    "dapo": partial(clipped, row="dapo"),
    "gspo": partial(clipped, row="gspo"),
    "dr_grpo": partial(clipped, row="on_policy"),
    "cispo": cispo,
    "gmpo": gmpo,
    "reinforce_pp_baseline": reinforce_pp,
    "rloo": rloo,
}
