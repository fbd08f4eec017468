"""Other papers' rows: a token by hand; groups, prefixes and schedules; two processes."""

import math
import random
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import ALL_ROWS, Judge, run

import luffy
from luffy import ALGORITHMS, Config, Trajectory
from machinery import rivals
from machinery.batches import collate
from machinery.metrics import Means
from machinery.prefixes import continue_prefixes, keep_uncertain
from machinery.samplers import Sample

PI = (0.001, 0.1, 0.9)  # of three trace tokens
RATIO = (0.5, 1.0, 1.5)  # of three rollout tokens, π_old = .4; entropy .5 everywhere
SFT = (1, 1, 1)
UP, DOWN = (0.5, 1, 1.5), (-0.5, -1, -1.5)  # A = 1 and A = -1 without a clip
HELD_UP, HELD_DOWN = (0.5, 1, 0), (0, -1, -1.5)  # with a clip of .2 or .28
S = (0.5 * 1.5) ** (1 / 3)  # GSPO's ratio: below 1 - 3e-4, so it is held where A = -1
RISE, FALL = (0.5 * math.exp(0.4)) ** (1 / 3), (math.exp(-0.4) * 1.5) ** (1 / 3)  # GMPO's
# row -> ∂ objective / ∂ log π: of a trace with A = 1, of a rollout with A = 1, with A = -1
SLOPES = {
    "sft_2604": (SFT, None, None),
    "rl_2604": (None, HELD_UP, HELD_DOWN),
    "dft": (PI, None, None),
    "trsft": ((0.01, 1, 1), None, None),
    "sft_shaped": ((0.0098030, 0.25, 0.09), None, None),
    "hpt": (SFT, UP, DOWN),
    "hpt_2": (SFT, UP, DOWN),
    "chord_phi": ((0.000999, 0.09, 0.09), HELD_UP, HELD_DOWN),
    "chord_mu": (SFT, HELD_UP, HELD_DOWN),
    "rl_plus": ((0.0039861, 0.2919026, 0.3076811), UP, DOWN),  # π_old = π
    # f's slope plus ½ e^-.5 or ½ e^.5, with a Z of SFT that is RL's (sft_ratio 1)
    "srft": ((0.3130683, 0.5532653, 0.3932653), (0.1648721,) * 3, (-1, -1, -1)),
    "srft_plus": ((0.8341636, 1.0743606, 0.9143606), (0.1648721,) * 3, (-1, -1, -1)),
    "dapo": (None, HELD_UP, HELD_DOWN),
    "cispo": (None, UP, DOWN),
    "gspo": (None, (S, S, S), (0, 0, 0)),
    "gmpo": (None, (RISE, RISE, 0), (0, -FALL, -FALL)),
    "reinforce_pp": (None, HELD_UP, HELD_DOWN),
    "prefix_rft": ((1, 1, 1), HELD_UP, HELD_DOWN),  # π_old = π on the prefix
    "uft": (SFT, HELD_UP, HELD_DOWN),
}


def three_tokens(algo: str, pi, pi_old, advantage: float, off_policy: bool) -> list[float]:
    """The slopes that are recorded of a trajectory of three tokens."""
    t = Trajectory(0, SimpleNamespace(prompt_ids=[0]), [0, 0, 0], off_policy=off_policy)
    t.logp_sampler, t.advantage, t.inv_z, t.sft_ratio = [0.0] * 3, advantage, 1.0, 1.0
    t.logp_old = torch.tensor(pi_old).log()
    logp, entropy = torch.tensor(pi).log(), torch.full((3,), 0.5)
    luffy.token_loss(logp, entropy, collate([t]), Config(**ALGORITHMS[algo]), Means())
    return t.slope.tolist()


def test_every_rival_is_in_the_table_below():
    assert set(SLOPES) == set(rivals.ROWS)


@pytest.mark.parametrize("algo", SLOPES)
def test_slopes_of_three_tokens_by_hand(algo):
    on_trace, rise, fall = SLOPES[algo]
    if on_trace:
        assert three_tokens(algo, PI, PI, 1.0, True) == pytest.approx(on_trace, rel=1e-4)
    for advantage, expected in ((1.0, rise), (-1.0, fall)):
        if expected:
            found = three_tokens(algo, [0.4 * x for x in RATIO], [0.4] * 3, advantage, False)
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_hpt_learns_the_trace_where_no_rollout_is_right_else_the_rollouts():
    right = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 1]])
    assert rivals.gate(right, 2).int().tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 0]]
    assert rivals.gate(right, 2, at_most=1).int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_schedules_begin_turn_and_end_where_their_papers_say():
    cfg = Config(**ALGORITHMS["sft_2604"] | dict(steps=100, lr=1.0))
    rates = [luffy.at_step(cfg, step).lr for step in (0, 9, 10, 55, 99)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1.0, 0.55, 0.1], abs=1e-3)
    cfg = Config(**ALGORITHMS["chord_mu"])
    for step, mu in ((0, 0.9), (100, 0.475), (200, 0.05), (499, 0.05)):
        now = luffy.at_step(cfg, step)
        assert (now.sft_coef, now.rl_coef) == pytest.approx((mu, 1 - mu))
    first, last = (
        [rivals.fifths(progress, random.Random(i)) for i in range(2000)] for progress in (0, 0.59)
    )
    assert sum(first) / 2000 == pytest.approx(0.95, abs=0.01) and sum(last) / 2000 < 0.07
    assert rivals.fifths(0.6, random.Random(0)) == 0
    lows = [min(rivals.uniform(p, random.Random(i)) for i in range(500)) for p in (0.0, 0.5, 1.0)]
    assert lows == pytest.approx([0.95, 0.5, 0.05], abs=0.01)


class Echo:
    """A sampler that notes its prompts, and answers 7 8 9."""

    def generate(self, prompts, n, **_):
        self.prompts = [list(p) for p in prompts]
        return [[Sample([7, 8, 9], [-0.1, -0.2, -0.3])] * n for _ in prompts]


def test_a_continuation_is_prompt_and_prefix_sampled_on_and_judged_as_a_whole(monkeypatch):
    problem = SimpleNamespace(prompt_ids=(1, 2), trace_ids=(3, 4, 5, 6, 0), opened="", answer="x")
    cfg = Config(**ALGORITHMS["prefix_rft"] | dict(max_response_tokens=4, rollouts=3))
    monkeypatch.setitem(rivals.PREFIXES, "uniform", lambda progress, rng: 0.5)
    sampler = Echo()
    (t,) = continue_prefixes(sampler, {4: problem}, 0, cfg)[4]
    assert sampler.prompts == [[1, 2, 3, 4]]
    assert (t.response, t.prefix, t.position) == ([3, 4, 7, 8], 2, 4)  # cut at 4 tokens
    assert t.logp_sampler == [0.0, 0.0, -0.1, -0.2]
    plain, also, continued = luffy.rollout(sampler, {4: problem}, 0, cfg)
    assert not plain.prefix and not also.prefix and continued.prefix == 2
    judged = []
    grader = Judge(lambda jobs: judged.extend(jobs) or [0.0, 1.0, 1.0])
    decode = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    luffy.grade([plain, also, continued], grader, decode)
    assert judged[-1][0].split() == ["3", "4", "7", "8"]
    luffy.set_advantages([plain, also, continued], cfg)
    assert (plain.advantage, continued.advantage) == pytest.approx((-2 / 3, 1 / 3))
    assert collate([continued]).off_policy.tolist() == [True, True, False, False]
    monkeypatch.setitem(rivals.PREFIXES, "uniform", lambda progress, rng: 1.0)
    (t,) = continue_prefixes(sampler, {4: problem}, 0, cfg)[4]
    assert t.prefix == 4 and 0 not in t.response  # never the trace's EOS


def test_of_a_prefix_only_the_uncertain_tokens_learn():
    kinds = (4, 0.5), (1, -0.5), (0, 1.0)
    made = [Trajectory(0, None, [0] * 6, prefix=n, advantage=a) for n, a in kinds]
    made[0].entropy_old = torch.tensor([0.1, 0.9, 0.2, 0.8, 5.0, 5.0])
    made[1].entropy_old = torch.tensor([0.85, 5.0, 5.0, 5.0, 5.0, 5.0])
    keep_uncertain(made, 0.4)
    assert made[0].advantage.tolist() == [0, 0.5, 0, 0, 0.5, 0.5]
    assert made[1].advantage.tolist() == [-0.5] * 6 and made[2].advantage == 1.0


def test_the_entropy_bonus_is_a_mean_as_the_rl_part_is():
    """Over the tokens of all responses, over those of each, or over M x L; once each, if A = 1."""
    for algo, total in (("dapo", 1.0), ("gspo", 1.0), ("hpt", 400 / (2 * 500)), ("sft", 1.0)):
        cfg = Config(**ALGORITHMS[algo] | dict(entropy_coef=1.0, max_response_tokens=500))
        made = [Trajectory(i, None, [0] * n, algo == "sft") for i, n in enumerate((100, 300))]
        luffy.set_normaliser(made, cfg)
        assert sum(t.bonus * len(t.response) for t in made) == pytest.approx(total), algo


def test_the_sft_of_rivals_is_the_papers_row():
    names = "rollouts", "traces", "trace_advantage", "lr", "problems_per_step", "steps", "scale"
    for name in names:
        assert rivals.SFT[name] == ALGORITHMS["sft"][name]


def test_statistics_over_rollouts_leave_the_trace_out():
    """RLOO's and the whitened advantages of a row whose baseline is the rollouts'."""
    verdicts = [0.0] * 8 + [1.0] + [1.0] * 4 + [0.0] * 4 + [1.0]
    for advantage, expected in (("others", [0, 4 / 7, -4 / 7]), ("whitened", [0, 1.369, -1.369])):
        cfg = Config(**ALGORITHMS["hpt"] | dict(advantage=advantage, route="all"))
        made = [Trajectory(0, None, [0], right=r, reward=r) for r in verdicts]
        luffy.set_advantages(made, cfg)
        found = [made[i].advantage for i in (0, 9, 13)]
        assert found == pytest.approx(expected, abs=1e-3), advantage


def test_srfts_trace_is_learnt_by_sft_where_all_are_right():
    """Its advantage is 0 there; and in no other row does a trace without an advantage learn."""
    for algo, learns in (("srft", True), ("luffy", False)):
        t = Trajectory(0, None, [0, 0], off_policy=True, advantage=0.0)
        luffy.set_normaliser([t], Config(**ALGORITHMS[algo]))
        assert t.signal == learns


ROWS = textwrap.dedent("""
    import copy, sys
    sys.path[:0] = [".", "tests"]
    import torch
    import luffy
    from machinery.model import from_pretrained
    from machinery.processes import init_processes, launch, rank, world_size
    from test_update import KeepGradient, config, make_trajectories
    def rows():
        found = {}
        for algo in luffy.ALGORITHMS:
            cfg = config(algo, updates_per_step=2, token_budget=60, entropy_coef=1e-3)
            model = from_pretrained(sys.argv[1], attn_implementation="packed")
            policy = luffy.DDP(luffy.Policy(model, 1.0), gradient_as_bucket_view=True)
            optimizer = KeepGradient(policy.parameters(), lr=1e-3, eps=1e-3)
            mine = [t for t in make_trajectories(cfg) if t.position % world_size() == rank()]
            for t in mine:
                t.right, t.logp_sampler = t.reward, [-1.0] * len(t.response)
            luffy.set_advantages(mine, cfg)
            metrics = luffy.update(policy, optimizer, mine, cfg)
            found[algo] = optimizer.gradients, metrics
        if rank() == 0:
            torch.save(found, sys.argv[2])
    init_processes()
    launch(rows)
""")


@pytest.mark.slow  # its quicker relative: test_distributed, LUFFY's runs
def test_one_and_two_processes_have_the_same_gradients_in_every_row(tiny_model, tmp_path):
    script = tmp_path / "rows.py"
    script.write_text(ROWS)
    for ranks in (1, 2):
        run(script, tiny_model, tmp_path / f"{ranks}.pt", ranks=ranks)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert set(one) == set(ALL_ROWS)
    for algo, (gradients, metrics) in one.items():
        assert len(gradients) == 2, algo
        for a, b in zip(gradients, two[algo][0]):
            assert a.norm() > 0 and (a - b).norm() <= 2e-5 * a.norm(), algo
        assert metrics == pytest.approx(two[algo][1], rel=1e-4, abs=1e-6), algo
