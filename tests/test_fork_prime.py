"""forks.prime: the rule, and a second model that survives kill -9 and does not see the ranks."""

import pytest
import torch
from fork_runs import train

import luffy
from forks import prime
from machinery.processes import InputError


def test_the_rule_by_hand():
    q = [torch.tensor([1.0, -3.0, 1.0]), torch.tensor([2.0])]
    assert prime.to_go(q[0]).tolist() == [-1.0, -2.0, 1.0]
    process = prime.process_rewards(q)  # the largest return is 2, as long as |-2|
    torch.testing.assert_close(process[0], torch.tensor([0.5, -1.5, 0.5]))
    # n = 2: baselines (-1/6 + 1) / 2 = 5/12 and 1/2, both differences times 2
    found = prime.returns(process, torch.tensor([1.0, 0.0]), 2)
    expected = 2 * torch.tensor([-0.5 - 15 / 12, -1.0 - 10 / 12, 0.5 - 5 / 12]) + 1
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], 2 * torch.tensor([1 - 5 / 12]) - 1)
    torch.testing.assert_close(
        prime.whiten(torch.tensor([1.0, 3.0])), torch.tensor([-1, 1]) / 2**0.5
    )
    # φ = π_ref says nothing: log 2; its gradient is β (1/2 - r) on each token
    q, segment = torch.zeros(3, requires_grad=True), torch.tensor([0, 1, 1])
    loss = prime.verdict_loss(q, segment, torch.tensor([1.0, 0.0]), beta=0.05)
    torch.testing.assert_close(loss, torch.full((2,), 2.0).log())
    loss.sum().backward()
    torch.testing.assert_close(q.grad, 0.05 * torch.tensor([-0.5, 0.5, 0.5]))


@pytest.mark.slow  # its quicker relative: the same for forks.orz
def test_a_resumed_run_has_the_same_bits(tiny_model, tmp_path):
    whole, _, cut = train(tmp_path, "prime", tiny_model, ("whole", 4), ("cut", 2), ("cut", 4))
    assert len(whole) == 4 and whole == cut
    assert whole[3]["prm/grad_norm"] > 0


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_run(tiny_model, tmp_path):
    (one,) = train(tmp_path, "prime", tiny_model, ("1", 2))
    (two,) = train(tmp_path, "prime", tiny_model, ("2", 2), ranks=2)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_traces_are_refused():
    cfg = prime.Config(**luffy.ALGORITHMS["prime"] | dict(traces=1, sampler="torch"))
    with pytest.raises(InputError, match="--traces"):
        prime.check(cfg, 1)
