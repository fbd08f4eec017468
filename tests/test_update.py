"""One update: its gradient depends on the trajectories alone, and on all of them."""

import contextlib
import copy
import random
from dataclasses import replace

import pytest
import torch
from conftest import ALL_ROWS, Judge, rows
from transformers import AutoConfig

import luffy
from data import Problem
from luffy import ALGORITHMS, Config, ShardedAdamW, Trajectory
from luffy import group_advantages, mixed_policy_objective, pack, record_old_logprobs
from luffy import score, set_normaliser, update
from machinery import batches, optimizer as optimizer_module, rivals
from machinery.batches import Packing, collate
from machinery.model import Policy, from_pretrained, on_paper


class OneRank(torch.nn.Module):
    """What update() needs of DDP, without a process group."""

    def __init__(self, policy):
        super().__init__()
        self.module = policy

    def forward(self, batch):
        return self.module(batch)

    def no_sync(self):
        return contextlib.nullcontext()


class KeepGradient(ShardedAdamW):
    """The real optimizer, which remembers the gradients and the parameters that it saw."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients, self.parameters = [], []

    def step(self, max_norm):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.params]))
        self.parameters.append([p.detach().clone() for p in self.params])
        return super().step(max_norm)


@pytest.fixture
def policy(tiny_model):
    model = from_pretrained(tiny_model, attn_implementation="packed")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return OneRank(Policy(model, 1.0))


def make_trajectories(cfg: Config, problems: int = 4) -> list[Trajectory]:
    rng, made = random.Random(0), []
    for position in range(problems):
        problem = Problem(
            "", "", prompt_ids=tuple(rng.choices(range(5, 50), k=rng.randint(3, 9))), source="s"
        )
        rewards = torch.tensor(
            [[float(rng.random() < 0.3) for _ in range(cfg.rollouts)] + [1.0] * cfg.traces]
        )
        advantages = group_advantages(rewards)[0].tolist()
        for i, advantage in enumerate(advantages):
            response = rng.choices(range(5, 50), k=rng.randint(2, 20))
            made.append(
                Trajectory(
                    position,
                    problem,
                    response,
                    off_policy=i >= cfg.rollouts,
                    logp_sampler=None,
                    reward=rewards[0, i].item(),
                    advantage=advantage or 0.5,
                )
            )
            if cfg.rollouts - cfg.continuations <= i < cfg.rollouts:  # it continues a prefix
                made[-1].prefix = len(response) // 2
                if cfg.trace_advantage is not None:
                    made[-1].advantage = made[-1].by_token(advantage or 0.5, cfg.trace_advantage)
    return made


def config(algo: str = "luffy", **kwargs) -> Config:
    return Config(
        **ALGORITHMS[algo]
        | dict(problems_per_step=4, updates_per_step=1, lr=1e-3, max_response_tokens=32)
        | kwargs
    )


def one_gradient(policy, trajectories, cfg):
    policy = copy.deepcopy(policy)
    optimizer = KeepGradient(policy.parameters(), lr=cfg.lr)
    update(policy, optimizer, copy.deepcopy(trajectories), cfg)
    return optimizer.gradients[0]


@pytest.mark.parametrize("algo", rows("hpt", "srft", "gspo", "prefix_rft", "uft"))
def test_gradient_is_the_same_for_any_token_budget_and_order(policy, algo):
    cfg = config(algo, token_budget=10_000)
    trajectories = make_trajectories(cfg)
    expected = one_gradient(policy, trajectories, cfg)
    assert expected.norm() > 0
    for budget in (1, 40, 200):
        found = one_gradient(policy, trajectories, config(algo, token_budget=budget))
        assert (found - expected).norm() <= 1e-5 * expected.norm(), budget
    for order in range(3):
        shuffled = random.Random(order).sample(trajectories, len(trajectories))
        found = one_gradient(policy, shuffled, config(algo, token_budget=100))
        assert (found - expected).norm() <= 1e-5 * expected.norm(), order


@pytest.mark.parametrize("budget", [60, 10_000])
def test_trajectories_without_a_gradient_count_in_metrics_alone(policy, budget):
    """And take no backward pass, but for the last: DDP's ranks meet there."""
    cfg = config("luffy", entropy_coef=0.0, token_budget=budget)
    trajectories = make_trajectories(cfg)
    for t in trajectories:
        t.logp_sampler, t.advantage = [-1.0] * len(t.response), t.advantage * (t.position == 1)
    learning = sum(len(t.response) for t in trajectories if t.position == 1)
    through_backward = []
    policy.register_forward_hook(lambda *args: through_backward.append(len(args[2][0])))
    ours, theirs = (KeepGradient(policy.parameters(), lr=0.0) for _ in range(2))
    metrics = update(policy, ours, trajectories, cfg)
    assert sum(through_backward) == learning
    for_all = update(
        policy, theirs, trajectories, config("luffy", entropy_coef=1e-30, token_budget=budget)
    )
    assert ours.gradients[0].norm() > 0
    torch.testing.assert_close(ours.gradients, theirs.gradients, rtol=1e-5, atol=1e-8)
    assert metrics == pytest.approx(for_all, rel=1e-5)
    through_backward.clear()
    for t in trajectories:
        t.advantage = 0.0
    assert update(policy, ours, trajectories, cfg)["skipped_updates"] == 1
    assert len(through_backward) == 1


def plain_logps(model, t):
    """Log-probs and entropies of a trajectory's response, by the simplest forward there is."""
    ids = torch.tensor([[*t.problem.prompt_ids, *t.response]])
    logits = model(
        input_ids=ids, use_cache=False, packing=Packing.of([(ids.shape[1], ids[0])])
    ).logits[0]
    log_p = logits[len(t.problem.prompt_ids) - 1 : -1].log_softmax(-1)
    return log_p.gather(1, torch.tensor(t.response)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain_f(pi, pi_old, cfg):
    """What multiplies the advantage of a trace token."""
    logp, fixed = pi.log(), pi.detach()
    return {
        "luffy": lambda: pi / (pi + cfg.gamma),
        "none": lambda: pi,
        "log": lambda: logp,
        "phi": lambda: fixed * (1 - fixed) * logp,
        "trsft": lambda: pi / fixed.clamp(min=cfg.gamma),
        "rl_plus": lambda: 4 * pi / (3 * pi_old + 1) * (1 - fixed) ** 0.5,
        "old": lambda: pi / pi_old,
    }[cfg.shaping]()


def plain_rollout(pi, pi_old, advantage, entropy, cfg):
    """The objective of a rollout's own tokens: all of them, for some rules have one ratio."""
    ratio, low, high = pi / pi_old, 1 - (cfg.clip or 9.0), 1 + (cfg.clip_high or cfg.clip or 9e9)
    if cfg.objective == "cispo":
        return ratio.clamp(0, high).detach() * advantage * pi.log()
    if cfg.objective.startswith("srft"):
        scale = torch.where(advantage > 0, 0.1 * entropy.mean().exp(), 1.0)
        return scale.detach() * advantage * pi.log()
    if cfg.objective == "gmpo":
        log_ratio = ratio.log()
        one_sided = torch.where(
            advantage > 0, log_ratio.clamp(max=cfg.clip), log_ratio.clamp(min=-cfg.clip)
        )
        return advantage * one_sided.mean().exp()
    if cfg.objective == "gspo":
        ratio = ratio.log().mean().exp()
    if cfg.shape_rollouts:
        ratio = (pi / (pi + cfg.gamma)) / (pi_old / (pi_old + cfg.gamma))
    clipped = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if cfg.objective.startswith("dual_clip"):
        clipped = torch.where(advantage < 0, clipped.maximum(3 * advantage), clipped)
    return clipped


def plain_loss(model, old_model, trajectories, cfg):
    """The loss of one update, a trajectory at a time."""
    is_sft = cfg.shaping in ("log", "phi")
    given = [len(t.response) if t.off_policy else t.prefix for t in trajectories]  # trace tokens
    rl_tokens = [len(t.response) - n * is_sft for t, n in zip(trajectories, given)]
    z = sum(map(bool, rl_tokens)) * (1 if cfg.sequence_mean else cfg.max_response_tokens)
    z = sum(rl_tokens) if cfg.token_mean else z
    sft_z, loss = max(1, sum(given)), 0.0
    with torch.no_grad():
        olds = [plain_logps(old_model, t) for t in trajectories]
    bar = -1.0  # entropy of prefix tokens that learn
    if cfg.prefix_learns < 1:
        entropies = sorted(
            h for t, n, o in zip(trajectories, given, olds) for h in o[1][:n].tolist()
        )
        bar = entropies[int((1 - cfg.prefix_learns) * len(entropies))]
    for t, n, (logp_old, entropy_old) in zip(trajectories, given, olds):
        logp, entropy = plain_logps(model, t)
        advantage, fixed = torch.as_tensor(t.advantage).expand(len(logp)), entropy.detach()
        rl, sft = cfg.rl_coef / z if z else 0.0, cfg.sft_coef / sft_z
        rl = rl / (len(logp) - n * is_sft) if cfg.sequence_mean else rl
        pi, pi_old = logp.exp(), logp_old.exp()
        on_trace = advantage * plain_f(pi, pi_old, cfg)
        if cfg.objective == "dual_clip_all":
            learns = entropy_old >= bar
            on_trace = plain_rollout(pi, pi_old, advantage * learns, fixed, cfg)
        loss = loss - (sft if is_sft else rl) * on_trace[:n].sum()
        if cfg.objective.startswith("srft"):
            sign = 1 if cfg.objective.endswith("plus") else -1
            loss = loss - sft * 0.5 * ((sign * fixed.mean()).exp() * logp)[:n].sum()
        if n < len(logp):
            own = plain_rollout(pi[n:], pi_old[n:], advantage[n:], fixed[n:], cfg)
            if cfg.tis_cap is not None:
                trust = pi_old / torch.tensor(t.logp_sampler).exp()
                own = trust[n:].clamp(max=cfg.tis_cap) * own
            own = own.expand(len(logp) - n) if own.dim() else own * (len(logp) - n)
            loss = loss - rl * own.sum()
        bonus = (
            cfg.entropy_coef / (z or sft_z) / (len(logp) - n * is_sft if cfg.sequence_mean else 1)
        )
        loss = loss - bonus * entropy.sum()
    return loss


@pytest.mark.parametrize(
    "algo, tis_cap", [(algo, None) for algo in ALL_ROWS] + [("luffy", 1.5), ("on_policy", 1.5)]
)
def test_both_updates_of_a_step_by_hand(policy, algo, tis_cap):
    """In the second one the policy has moved: ratios, clips and shaped ratios act."""
    cfg = config(
        algo, updates_per_step=2, token_budget=100, lr=3e-2, max_grad_norm=1e9, tis_cap=tis_cap
    )
    trajectories = make_trajectories(cfg)
    optimizer = KeepGradient(policy.parameters(), lr=cfg.lr)
    old, now = (copy.deepcopy(policy.module.model) for _ in range(2))
    rng = random.Random(0)
    for t in trajectories:  # a sampler that is not quite the policy
        if not t.off_policy:
            t.logp_sampler = [x + rng.gauss(0, 0.5) for x in plain_logps(old, t)[0].tolist()]
    metrics = update(policy, optimizer, copy.deepcopy(trajectories), cfg)
    for i in range(2):
        for p, value in zip(now.parameters(), optimizer.parameters[i]):
            p.data.copy_(value)
            p.grad = None
        plain_loss(now, old, [t for t in trajectories if t.position // 2 == i], cfg).backward()
        expected = torch.cat([p.grad.flatten() for p in now.parameters()])
        error = (optimizer.gradients[i] - expected).norm() / expected.norm()
        assert error <= 1e-4, (i, error)
    if cfg.rollouts:  # else the test would not see a clip
        assert metrics["ratio_far"] > 0.1 and metrics["sampler_ratio_max"] > 1.5
        assert 0.05 < metrics["sampler_kl"] < 0.25  # E[exp x - 1 - x] = .13, x of N(0, .5)


def test_scores_become_the_advantages_of_each_arm():
    """score(): rewards from the grader, the trace's own reward, the arm's baseline."""

    class Tokenizer:
        eos_token_id, decode = 1, staticmethod(lambda ids: " ".join(map(str, ids)))

    def judge(jobs):
        assert all(answer == "a" for _, answer in jobs)
        return [1.0 if response.startswith("think 7") else 0.0 for response, answer in jobs]

    problem = Problem("", "a", prompt_ids=(2,), trace_ids=(9, 1), trace_reward=1.0, opened="think ")
    for algo, right, wrong, trace in (
        ("luffy", 0.75, -0.25, 0.75),
        ("rl_sft", 6 / 7, -1 / 7, 1.0),
        ("mixed", 0.75, -0.25, 0.75),
        ("sft", None, None, 1.0),
        ("on_policy", 0.875, -0.125, None),
        ("grpo", 0.875 * 8**0.5, -0.125 * 8**0.5, None),
    ):
        cfg = config(algo)
        group = [Trajectory(0, problem, [7 if i == 0 else 8, 1]) for i in range(cfg.rollouts)]
        group += [Trajectory(0, problem, (9, 1), off_policy=True)] * cfg.traces
        metrics = score(group, Judge(judge), Tokenizer, cfg)
        found = [t.advantage for t in group]
        expected = (
            [right] * (cfg.rollouts > 0) + [wrong] * (cfg.rollouts - 1) + [trace] * cfg.traces
        )
        assert found == pytest.approx(expected, rel=1e-4), algo
        if cfg.rollouts:
            assert metrics["reward"] == pytest.approx(1 / cfg.rollouts)
            assert metrics["groups/mixed"] == 1.0 and metrics["truncated"] == 0.0


def test_packed_equals_one_by_one(policy):
    trajectories = make_trajectories(config())
    for t in trajectories:
        t.inv_z = 1.0
    packed = pack(trajectories, 150)
    assert 1 < len(packed) < len(trajectories)
    assert all(batch.input_ids.shape[1] <= 150 for batch in packed)
    assert sorted(id(t) for b in packed for t in b.trajectories) == sorted(map(id, trajectories))
    for batch in packed:
        together = policy(batch)[0].split([len(t.response) for t in batch.trajectories])
        for t, logp in zip(batch.trajectories, together):
            torch.testing.assert_close(logp, policy(collate([t]))[0], rtol=1e-5, atol=1e-5)


def test_a_group_has_its_prompt_once(monkeypatch):
    """In a row; and gradients are those of rows where each trajectory has its own."""
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=50)
    shape = AutoConfig.for_model("gpt2", **sizes)  # all of it computes in float64 if asked to
    model = on_paper(shape, torch.float64).eval()
    found, trajectories, moved = {}, make_trajectories(config()), Policy(model, 0.7)
    prompts = sum({t.position: len(t.problem.prompt_ids) for t in trajectories}.values())
    for name, key in (("shared", batches.shared), ("own", id)):
        monkeypatch.setattr(batches, "shared", key)
        model.zero_grad()
        (row,) = pack(random.Random(0).sample(trajectories, len(trajectories)), 10_000)
        logp, entropy = moved(row)
        row.give(logp=logp)
        (logp.sum() + entropy.sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[name] = row.input_ids.shape[1], torch.cat([t.logp for t in trajectories]), gradient
    responses = sum(len(t.response) for t in trajectories)
    assert found["shared"][0] == prompts + responses and found["own"][0] == 8 * prompts + responses
    for ours, own in zip(found["shared"][1:], found["own"][1:]):
        assert (ours - own).norm() <= 1e-12 * own.norm()


def test_groups_stay_whole_where_a_row_has_room():
    problems = [Problem("", "", prompt_ids=(i,) * 10) for i in range(5, 8)]
    trajectories = [Trajectory(i, p, [5] * 9) for _ in range(4) for i, p in enumerate(problems)]
    rows = {budget: pack(trajectories, budget) for budget in (5, 30, 46, 100)}
    sizes = {budget: [b.input_ids.shape[1] for b in found] for budget, found in rows.items()}
    assert sizes == {5: [19] * 12, 30: [28] * 6, 46: [46] * 3, 100: [92, 46]}
    short = [replace(t, response=[5]) for t in trajectories]  # 44 keys of a row's 14 tokens
    assert [b.input_ids.shape[1] for b in pack(short, 44)] == [28, 14]


def test_old_logprobs_are_recorded_before_the_policy_moves(policy):
    """The ratio of the second mini-batch is against the policy that sampled, not the moved one."""
    cfg = config(updates_per_step=2, token_budget=100)
    trajectories = make_trajectories(cfg)
    later = [t for t in trajectories if t.position >= 2]
    expected = copy.deepcopy(later)
    record_old_logprobs(policy, [[], expected], cfg)
    metrics = update(policy, ShardedAdamW(policy.parameters(), lr=1e-2), trajectories, cfg)
    for t, e in zip(later, expected):
        if t.off_policy:
            assert t.logp_old is None
        else:
            torch.testing.assert_close(t.logp_old, e.logp_old)
    assert metrics["ratio"] != 1.0 and metrics["skipped_updates"] == 0


def test_an_update_without_signal_is_skipped_and_counted(policy):
    cfg = config(entropy_coef=1.0)
    trajectories = make_trajectories(cfg)
    for t in trajectories:
        t.advantage = 0.0
    before = copy.deepcopy(policy.state_dict())
    metrics = update(policy, ShardedAdamW(policy.parameters(), lr=1.0), trajectories, cfg)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())


def test_an_update_changes_no_trajectory_but_for_what_it_records(policy):
    cfg = config(updates_per_step=2)
    trajectories = make_trajectories(cfg)
    before = copy.deepcopy(trajectories)
    update(policy, ShardedAdamW(policy.parameters(), lr=1e-3), trajectories, cfg)
    for t, b in zip(trajectories, before):
        for name in ("position", "problem", "response", "off_policy", "reward", "advantage"):
            assert getattr(t, name) == getattr(b, name)


def test_one_over_z_of_rl_tokens_do_not_depend_on_length():
    cfg = config("rl_sft")
    trajectories = make_trajectories(cfg)
    set_normaliser(trajectories, cfg)
    assert {t.inv_z for t in trajectories if not t.off_policy} == {1 / (4 * 7 * 32)}
    sft = [t for t in trajectories if t.off_policy]
    assert sum(t.inv_z * len(t.response) for t in sft) == pytest.approx(cfg.sft_coef)


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ShardedAdamW([p], lr=1.0)
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(FloatingPointError):
        optimizer.step(1.0)
    assert p.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("algo", ["luffy", "on_policy", "sft"])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_policy_that_is_not_finite_takes_no_step(policy, algo, updates):
    """Without an advantage, too: there is no gradient then that would not be finite."""
    cfg = config(algo, updates_per_step=updates)
    trajectories = make_trajectories(cfg)
    for t in trajectories:
        t.advantage = 0.0
    with torch.no_grad():
        policy.module.model.model.norm.weight[0] = torch.nan
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(FloatingPointError, match="logp.* of a response is not finite"):
        update(policy, ShardedAdamW(policy.parameters(), lr=1.0), trajectories, cfg)
    for p, was in zip(policy.parameters(), before):
        assert torch.equal(p.nan_to_num(), was.nan_to_num())


def test_one_rank_is_plain_adamw_bit_for_bit():
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.arange(6.0)) for _ in range(2))
    settings = dict(lr=0.1, betas=(0.9, 0.95), weight_decay=0.01, eps=1e-8)
    a, b = ShardedAdamW([mine], **settings), torch.optim.AdamW([theirs], **settings, fused=True)
    for _ in range(5):
        gradient = torch.randn(6) * 10
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        assert a.step(1.0) == norm.item()
        b.step()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_optimizer_takes_the_same_steps(policy, dtype):
    """On the gradients of all micro-batches, bit for bit; and goes on from the other's state."""
    cfg = config(updates_per_step=2, token_budget=40)
    steps = [make_trajectories(cfg) for _ in range(3)]
    ends = []
    for offloads in ([False] * 3, [True] * 3, [False, True, False]):
        moving, state = copy.deepcopy(policy).to(dtype), None
        for step, offload in enumerate(offloads):
            optimizer = ShardedAdamW(moving.parameters(), lr=cfg.lr, offload=offload)
            if state:
                optimizer.load_state_dict(state)
            update(moving, optimizer, copy.deepcopy(steps[step]), cfg)
            state = optimizer.state_dict()
        ends.append((list(moving.parameters()), state))
    before = [p.to(dtype) for p in policy.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(before, ends[0][0]))
    for parameters, state in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(parameters, ends[0][0]))
        for i, saved in state.items():
            assert saved["step"] == 6
            assert all(torch.equal(x, ends[0][1][i][name]) for name, x in saved.items())


def test_adams_state_is_there_before_the_first_step():
    p = torch.nn.Parameter(torch.randn(3, 4).bfloat16())
    optimizer = ShardedAdamW([p], lr=1e-3)
    made = optimizer.state_dict()[0]
    p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    assert made.keys() == {"master", "step", "exp_avg", "exp_avg_sq"}
    assert all(x is made[name] and x.any() for name, x in optimizer.state_dict()[0].items())


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_the_clip_acts_on_the_scaled_gradient(policy, scale):
    """A plain gradient step then has the length max_grad_norm / scale, or the gradient's own."""

    class SGD(ShardedAdamW):
        def optimizer_of(self, master):
            return torch.optim.SGD([master], lr=self.settings["lr"])

    cfg = config(scale=scale)
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    metrics = update(policy, SGD(policy.parameters(), lr=1.0), make_trajectories(cfg), cfg)
    moved = torch.cat([p.detach().flatten() for p in policy.parameters()]) - before
    clipped = scale > 1
    assert metrics["clipped"] == clipped and metrics["grad_norm"] < cfg.max_grad_norm
    expected = cfg.max_grad_norm / scale if clipped else metrics["grad_norm"]
    assert moved.norm().item() == pytest.approx(expected, rel=1e-3)


def test_the_objectives_default_arguments_are_luffys():
    cfg = Config()
    x = (torch.tensor([-1.0]), torch.tensor([0.0]), torch.tensor([0.5]), torch.tensor([True]))
    assert mixed_policy_objective(*x) == mixed_policy_objective(
        *x, shaping=cfg.shaping, gamma=cfg.gamma, clip=cfg.clip
    )


# ------------------------------------------------------------------ what forks lean on
def test_what_is_recorded_is_what_was_computed(policy):
    """The slope of each token, and what its advantage was multiplied by: clip, cap and all."""
    for algo in set(ALL_ROWS) - set(rivals.ROWS):
        cfg = config(algo, updates_per_step=2, lr=3e-2, max_grad_norm=1e9, tis_cap=1.5)
        trajectories = make_trajectories(cfg)
        for t in trajectories:
            if not t.off_policy:
                t.logp_sampler = [-3.0] * len(t.response)
        moving = copy.deepcopy(policy)
        metrics = update(moving, ShardedAdamW(moving.parameters(), lr=cfg.lr), trajectories, cfg)
        weights = [((t.inv_z * t.slope).abs().sum().item(), t.off_policy) for t in trajectories]
        of_traces = sum(weight for weight, off_policy in weights if off_policy)
        share = of_traces / sum(weight for weight, _ in weights)
        assert metrics["trace_share"] == pytest.approx(share, rel=1e-5)
        for t in trajectories:
            pi, old = t.logp.exp(), t.logp_behavior.exp()
            if t.off_policy:
                assert torch.equal(t.logp_behavior, torch.zeros(len(t.response)))
                slopes = {"luffy": cfg.gamma * pi / (pi + cfg.gamma) ** 2, "none": pi}
                f = {"luffy": pi / (pi + cfg.gamma), "none": pi, "log": t.logp}[cfg.shaping]
                slope = t.advantage * slopes.get(cfg.shaping, torch.ones_like(pi))
            else:
                f, slope = pi / old, t.advantage * pi / old
                if cfg.shape_rollouts:
                    f = pi / (pi + cfg.gamma) / (old / (old + cfg.gamma))
                    slope = t.advantage * f * cfg.gamma / (pi + cfg.gamma)
                if cfg.clip is not None:
                    far = (f > 1 + cfg.clip) if t.advantage > 0 else (f < 1 - cfg.clip)
                    slope = slope * ~far
                slope = slope * (t.logp_behavior + 3.0).exp().clamp(max=1.5)
            torch.testing.assert_close(t.factor, f, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(t.slope, slope, rtol=1e-4, atol=1e-6)


def test_who_does_not_learn_moves_nothing_but_counts_in_z(policy):
    """A route leaves out whole trajectories: also their entropy, and the SFT loss's mean."""
    for algo in ("luffy", "rl_sft"):
        cfg = config(algo, entropy_coef=0.01)
        trajectories = make_trajectories(cfg)
        for t in trajectories:
            t.learns = t.position != 1 if t.off_policy else t.position != 2
        found = one_gradient(policy, trajectories, cfg)
        model, loss = copy.deepcopy(policy.module.model), 0.0
        rl = 4 * (8 if algo == "luffy" else 7) * cfg.max_response_tokens  # those left out, too
        sft = sum(len(t.response) for t in trajectories if t.off_policy and t.learns)
        for t in (t for t in trajectories if t.learns):
            logp, entropy = plain_logps(model, t)
            pi, inv_z = logp.exp(), 1 / rl
            objective = t.advantage * (pi / (pi + cfg.gamma) if t.off_policy else pi / pi.detach())
            if t.off_policy and algo == "rl_sft":
                objective, inv_z = t.advantage * logp, cfg.sft_coef / sft
            loss = loss - (inv_z * objective + cfg.entropy_coef / rl * entropy).sum()
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (found - expected).norm() <= 1e-4 * expected.norm(), algo


def test_routes_see_verdicts_and_metrics_too_whatever_the_reward(monkeypatch):
    """A length penalty: no group is all right any more by its rewards, but by the verifier."""

    def failed(right, rollouts):
        learns = torch.ones_like(right, dtype=torch.bool)
        learns[:, rollouts:] = right[:, :rollouts].sum(dim=1, keepdim=True) == 0
        return learns

    monkeypatch.setitem(luffy.ROUTES, "failed", failed)
    cfg = config("luffy", rollouts=2, route="failed", problems_per_step=2)
    trajectories = []
    for position, rewards in enumerate(([0.98, -0.02], [-0.03, -0.04])):
        problem = Problem("", "", source="s")
        for reward in (*rewards, 1.0):
            t = Trajectory(position, problem, [5, 1], off_policy=reward == 1.0, reward=reward)
            t.right = float(reward > 0.5)
            trajectories.append(t)
    luffy.set_advantages(trajectories, cfg)
    assert [t.learns for t in trajectories] == [True, True, False, True, True, True]
    assert trajectories[0].advantage == pytest.approx(0.98 - (0.98 - 0.02 + 1) / 3)
    metrics = luffy.trajectory_metrics(trajectories, 2)
    assert (metrics["groups/none"], metrics["groups/mixed"]) == (0.5, 0.5)
    assert metrics["right"] == 0.25 and metrics["reward"] == pytest.approx(0.89 / 4)


def test_an_advantage_may_be_one_a_token(policy):
    cfg = config("luffy")
    trajectories = make_trajectories(cfg)
    expected = one_gradient(policy, trajectories, cfg)
    for t in trajectories:
        t.advantage = torch.full((len(t.response),), t.advantage)
    assert torch.equal(one_gradient(policy, trajectories, cfg), expected)
    trajectories[0].advantage[0] += 1.0
    assert not torch.equal(one_gradient(policy, trajectories, cfg), expected)


def test_another_optimizer_is_one_method():
    class ShardedSGD(ShardedAdamW):
        def optimizer_of(self, master):
            return torch.optim.SGD([master], lr=self.settings["lr"], momentum=0.5)

    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    one, two = ShardedSGD([p], lr=0.1), ShardedSGD([q], lr=0.1)
    for optimizer in (one, one):
        p.grad = torch.ones(2)
        optimizer.step(1e9)
    assert p.tolist() == pytest.approx([0.75, 0.75])  # 1 - .1 - .1 (1 + .5)
    two.load_state_dict(one.state_dict())
    two.set_lr(0.2)
    q.grad = torch.ones(2)
    two.step(1e9)
    assert q.tolist() == pytest.approx([0.4, 0.4])  # .75 - .2 (1 + .5 (1 + .5))


def test_groups_are_dealt_by_their_tokens(monkeypatch):
    """Whole, each once, in both updates about as many tokens; a problem stays the object it is."""
    batch = [Problem("", "", prompt_ids=range(5)) for _ in range(16)]
    by_rank = [
        [Trajectory(p, batch[p], [7] * n) for p in range(r, 16, 2) for n in (1, 4 * p * p)]
        for r in range(2)
    ]
    sent = []
    monkeypatch.setattr(batches, "world_size", lambda: 2)

    def dealt(r: int, gather) -> list[Trajectory]:
        monkeypatch.setattr(batches, "gather", gather)
        monkeypatch.setattr(batches, "rank", lambda: r)
        return batches.deal(by_rank[r], batch, 2)

    for r in range(2):
        dealt(r, lambda own: sent.append(copy.deepcopy(own)) or [own])
    now = [dealt(r, lambda own: copy.deepcopy(sent)) for r in range(2)]
    assert sorted(t.position for ts in now for t in ts) == sorted([*range(16)] * 2)
    for ts in now:
        assert all(t.problem is batch[t.position] for t in ts)
        assert [t.position for t in ts[::2]] == [t.position for t in ts[1::2]]
        assert [len(t.response) for t in ts[::2]] == [1] * (len(ts) // 2)

    def tokens(of_ranks, half):
        def group(ts, p):
            return batches.length([t for t in ts if t.position == p])

        return [sum(group(ts, p) for p in range(8 * half, 8 * half + 8)) for ts in of_ranks]

    for half in range(2):
        before, after = sorted(tokens(by_rank, half)), sorted(tokens(now, half))
        assert before[1] > 1.1 * before[0] and after[1] < 1.06 * after[0], (before, after)


def test_the_hosts_optimizer_has_the_threads_of_the_start(monkeypatch):
    """vLLM's engine leaves one, and its compiled code needs one."""
    monkeypatch.setattr(optimizer_module, "THREADS", 3)
    before, seen = torch.get_num_threads(), []

    class Looks(torch.optim.SGD):
        def step(self):
            seen.append(torch.get_num_threads())

    class Sharded(ShardedAdamW):
        def optimizer_of(self, master):
            return Looks([master], lr=1.0)

    for offload in (True, False):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        Sharded([p], lr=1.0, offload=offload).step(1.0)
    assert seen == [3, before] and torch.get_num_threads() == before
