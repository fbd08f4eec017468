"""forks.orz: the rule, and a critic that survives kill -9 and does not depend on the ranks."""

import pytest
import torch
from fork_runs import train

from forks import orz


def test_the_rule_by_hand():
    returns, old = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.5, 0.75, 0.5])
    assert orz.gae(returns, old).tolist() == [0.5, 0.25, -0.5]
    normal = orz.normalise(torch.tensor([1.0, 2.0, 3.0, 6.0]))  # mean 3, mean square 14 / 4
    torch.testing.assert_close(normal, torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5**0.5)
    assert orz.normalise(torch.zeros(3)).tolist() == [0.0] * 3  # and not NaN

    # free; moved too far towards the return: no gradient; moved too far away from it: it learns
    values = torch.tensor([0.6, 0.9, 0.1], requires_grad=True)
    loss = orz.value_loss(values, torch.ones(3), torch.tensor([0.5, 0.5, 0.5]), clip=0.2)
    torch.testing.assert_close(loss, torch.tensor([0.08, 0.045, 0.405]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.4, 0.0, -0.9]))


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(tiny_model, tmp_path):
    whole, _, cut = train(tmp_path, "orz", tiny_model, ("whole", 4), ("cut", 2), ("cut", 4))
    assert len(whole) == 4 and whole == cut
    assert 0 < whole[3]["critic/loss"] != whole[0]["critic/loss"]


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_run(tiny_model, tmp_path):
    """The 5 updates of the critic have one problem of 8 or two: a rank has one of them or none."""
    (one,) = train(tmp_path, "orz", tiny_model, ("1", 2), more="--critic_updates 5")
    (two,) = train(tmp_path, "orz", tiny_model, ("2", 2), more="--critic_updates 5", ranks=2)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
