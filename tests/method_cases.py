"""Reference values of other papers' official code, put through the functions of this project.

`evaluate` takes a case: a micro-batch with the loss, gradients and advantages that an official
function returned for it. It returns the fields that our code computes. Each rule is called by the
row that it has in machinery/rivals.py or forks/, as the trainer calls it: set_advantages,
set_normaliser, token_loss. What is set here is the case's parameters, and the units. An official
sum is divided by T alone, where ours is a mean over N trajectories, so rl_coef = N. An official
mean of micro-batches is had by calling ours for each. A coefficient c of a mean entropy over M
tokens is c N T / M.
"""

import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import luffy  # noqa: E402
from forks import orz, prime, relift, trapo  # noqa: E402
from luffy import ALGORITHMS, Config, Trajectory  # noqa: E402
from machinery import rivals  # noqa: E402
from machinery.batches import collate  # noqa: E402
from machinery.metrics import Means  # noqa: E402
from machinery.prefixes import keep_uncertain  # noqa: E402


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

    def leaf(self, name: str) -> Tensor:
        values = self.case.get(name) or [[0.0] * self.width] * len(self.lengths)
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    def trajectory(self, b: int) -> Trajectory:
        case, length = self.case, self.lengths[b]
        of_trace = sum(case["off_policy_mask"][b]) if "off_policy_mask" in case else 0
        reward = case["rewards"][b] if "rewards" in case else 1.0  # traces alone
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

    def loss(self, cfg: Config, rows: list[int] | None = None) -> Tensor:
        """Of one micro-batch, as if it were the update."""
        rows = range(len(self.lengths)) if rows is None else rows
        trajectories = [self.trajectories[b] for b in rows]
        luffy.set_normaliser(trajectories, cfg)
        logp, entropy = (
            torch.cat([x[b, : self.lengths[b]] for b in rows]) for x in (self.logp, self.entropy)
        )
        return luffy.token_loss(logp, entropy, collate(trajectories), cfg, Means())

    def result(self, loss: Tensor, **fields) -> dict:
        loss.backward()
        found = {"loss": loss.item(), "grad_log_prob": self.logp.grad.tolist()}
        if "grad_entropy" in self.case:
            found["grad_entropy"] = self.entropy.grad.tolist()
        if "advantages" in self.case and "advantages" not in fields:
            found["advantages"] = self.advantages()
        return found | fields

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
    mu = rivals.mu_at(how["step"], **how["mu_schedule"])
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
    return {"rows": [[*row, rivals.mu_at(*row)] for row in columns]}


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
    advantage = "whitened" if case["params"]["shift_mean"] else "batch_std"
    return advantages_alone(case, "reinforce_pp", advantage)


def rloo(case: dict) -> dict:
    whitened = case["params"]["normalize_std"] != "no"
    return advantages_alone(case, "on_policy", "others_white" if whitened else "others")


# ------------------------------------------------------------------ forks
def relift_step(case: dict) -> dict:
    how, rows = case["params"], Rows(case)
    for t in rows.trajectories:
        t.advantage = 1.0
    cfg = relift.as_sft(relift.Config(sft_entropy=how["entropy_coef"]))
    sft_alone, entropy_alone = dict(entropy_coef=0.0), dict(sft_coef=0.0, entropy_coef=-1.0)
    whole, sft, entropy = (
        [rows.loss(replace(cfg, **changes), some) for some in case["micro_batches"]]
        for changes in ({}, sft_alone, entropy_alone)
    )
    parts = dict(loss_sft=[x.item() for x in sft], loss_entropy=[x.item() for x in entropy])
    return rows.result(sum(whole) / how["divisor"], **parts)


def trapo_groups(case: dict) -> dict:
    how, rows = case["params"], Rows(case)
    group = len(rows.lengths) // len(set(case["problem"]))
    for t, prefix in zip(rows.trajectories, map(sum, case["off_policy_mask"])):
        t.off_policy, t.prefix = False, prefix  # also the whole trace is a rollout's prefix
    cfg = config(case, "trapo", rollouts=group, continuations=0, entropy_coef=0.0)
    cfg = replace(cfg, token_mean=how["token_mean"], trace_advantage=None)
    luffy.set_advantages(rows.trajectories, cfg)
    official = rows.advantages()  # of the continuations
    trapo.set_advantages(rows.trajectories, replace(cfg, trace_advantage=1.0))
    prefixes = [t.prefix for t in rows.trajectories]
    counts = [trapo.prefix_counts(prefixes[i : i + group]) for i in range(0, len(prefixes), group)]
    loss = rows.loss(cfg if how["token_mean"] else in_sums(cfg, rows))
    return rows.result(loss, advantages=official, prefix_counts=sum(counts, []))


class Packed:
    """A case's (B, T) fields as (N,) tensors of its response tokens, in float64, and back."""

    def __init__(self, case: dict):
        self.case, self.mask = case, torch.tensor(case["mask"], dtype=torch.bool)
        self.lengths = self.mask.sum(dim=1).tolist()
        self.rewards = torch.tensor(case["rewards"], dtype=torch.float64)  # (B,)
        self.segment = self.mask.nonzero()[:, 0]  # (N,), its row

    def field(self, name: str) -> Tensor:
        values = torch.tensor(self.case[name], dtype=torch.float64)[self.mask]
        return values.requires_grad_()

    def padded(self, values: Tensor) -> list[list[float]]:
        full = torch.zeros(self.mask.shape, dtype=torch.float64)
        full[self.mask] = values.detach()
        return full.tolist()

    def total(self, losses: Tensor, batches: list[list[int]], by_token: bool) -> Tensor:
        """Official: the mean over micro-batches of the mean over their tokens (or rows)."""
        total = torch.zeros((), dtype=torch.float64)
        rows = self.segment if by_token else torch.arange(len(losses))
        for batch in batches:
            mine = losses[torch.isin(rows, torch.tensor(batch))]
            inv_z, _ = luffy.inverse_z(len(batch), len(mine), 0, 1, token_mean=True)
            total = total + inv_z * mine.sum() / len(batches)
        return total

    def policy(self, advantage: Tensor, batches: list[list[int]]) -> dict:
        logp, old = self.field("log_prob"), self.field("old_log_prob").detach()
        of_trace = torch.zeros(len(logp), dtype=torch.bool)
        clip = self.case["params"]["clip"]
        objective = luffy.mixed_policy_objective(logp, old, advantage, of_trace, clip=clip)
        loss = self.total(-objective, batches, by_token=True)
        (grad,) = torch.autograd.grad(loss, logp)
        return {"loss": loss.item(), "grad_log_prob": self.padded(grad)}


def orz_critic(case: dict) -> dict:
    rows, packs = Packed(case), case["packs"]
    returns, old = rows.rewards[rows.segment], rows.field("old_values").detach()
    raw = orz.gae(returns, old)
    advantage, values = orz.normalise(raw), rows.field("values")
    losses = orz.value_loss(values, returns, old, case["params"]["value_clip"])
    value_loss = rows.total(losses, packs, by_token=True)
    (grad,) = torch.autograd.grad(value_loss, values)
    return rows.policy(advantage, packs) | {
        "advantages_raw": rows.padded(raw),
        "returns": rows.padded(returns),
        "advantages": rows.padded(advantage),
        "value_loss": value_loss.item(),
        "grad_values": rows.padded(grad),
    }


def prime_advantage(case: dict) -> dict:
    rows = Packed(case)
    q = (rows.field("prm_log_prob") - rows.field("ref_log_prob")).detach()
    order = sorted(range(len(rows.lengths)), key=lambda b: case["problem"][b])  # groups in a row
    qs = q.split(rows.lengths)
    process = prime.process_rewards([qs[b] for b in order])
    of_order = prime.returns(process, rows.rewards[order], case["params"]["group"])
    place = [order.index(b) for b in range(len(order))]
    returns = torch.cat([of_order[i] for i in place])
    advantage = prime.whiten(returns)
    return rows.policy(advantage, [list(range(len(order)))]) | {
        "process_reward": rows.padded(torch.cat([process[i] for i in place])),
        "returns": rows.padded(returns),
        "advantages": rows.padded(advantage),
    }


def prime_bce(case: dict) -> dict:
    rows, size = Packed(case), case["params"]["micro_batch"]
    logp, ref = rows.field("prm_log_prob"), rows.field("ref_log_prob").detach()
    losses = prime.verdict_loss(logp - ref, rows.segment, rows.rewards, case["params"]["beta"])
    batches = torch.arange(len(losses)).split(size)
    loss = rows.total(losses, [batch.tolist() for batch in batches], by_token=False)
    (grad,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.item(), "grad_prm_log_prob": rows.padded(grad)}


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
    "relift": relift_step,
    "trapo": trapo_groups,
    "orz": orz_critic,
    "prime_advantage": prime_advantage,
    "prime_bce": prime_bce,
}
