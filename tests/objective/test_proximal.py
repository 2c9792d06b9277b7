import numpy as np
import pytest
import torch

from asyncrl.objective.catalogue import PROXIMALS
from asyncrl.objective.proximal import WITHOUT_PASS, behavior, ewma_update, loglinear


def test_the_ones_that_need_no_pass_are_in_the_catalogue():
    assert set(PROXIMALS) - set(WITHOUT_PASS) == {"recompute", "ewma"}


def test_loglinear_agrees_with_its_formula_and_carries_no_gradient():
    rng = np.random.default_rng(0)
    ages = rng.integers(0, 9, 50)
    theta, mu = -rng.exponential(size=(2, 50))
    logprobs = torch.from_numpy(theta).requires_grad_()
    prox = loglinear(logprobs, torch.from_numpy(mu), torch.from_numpy(ages))
    expected = [(m + d * t) / (d + 1) for t, m, d in zip(theta, mu, ages, strict=True)]
    np.testing.assert_allclose(prox, expected, rtol=1e-12)
    assert not prox.requires_grad


def test_loglinear_lies_between_the_behaviour_and_the_present_policy():
    theta, mu = torch.full((20,), -1.0), torch.full((20,), -2.0)
    prox = loglinear(theta, mu, torch.arange(20))
    assert prox[0] == mu[0]
    assert (prox.diff() > 0).all()
    assert prox[-1] < -1.0
    assert torch.equal(behavior(theta, mu, torch.arange(20)), mu)


def test_loglinear_is_exact_for_a_policy_that_moves_evenly():
    """Versions 0..9 of a token's log-probability on a line: version 9 is trained, 8 is the proximal one."""
    line = torch.linspace(-3.0, -1.2, 10, dtype=torch.float64)
    ages = torch.arange(9)
    prox = loglinear(line[9].expand(9), line[8 - ages], ages)
    torch.testing.assert_close(prox, line[8].expand(9))


@pytest.mark.parametrize("decay", [0.0, 0.5, 8 / 9])
def test_the_average_of_weights_agrees_with_its_formula(decay):
    rng = np.random.default_rng(0)
    history = rng.normal(size=(7, 2, 3))
    average = [torch.from_numpy(history[0, i].copy()) for i in range(2)]
    for n in range(1, 7):
        ewma_update(average, [torch.from_numpy(w) for w in history[n]], n, ewma_decay=decay)
        shares = decay ** np.arange(n, -1, -1.0)
        expected = np.tensordot(shares / shares.sum(), history[: n + 1], axes=1)
        np.testing.assert_allclose(torch.stack(average), expected, rtol=1e-12)


def test_constant_weights_are_their_average_to_the_last_bit():
    weights = [torch.randn(5), torch.randn(2).bfloat16()]
    average = [weights[0].clone(), weights[1].float()]
    for n in range(1, 50):
        ewma_update(average, weights, n)
    assert torch.equal(average[0], weights[0])
    assert torch.equal(average[1], weights[1].float())


def test_the_count_of_updates_starts_at_one():
    with pytest.raises(ValueError, match="updates=0"):
        ewma_update([], [], 0)
