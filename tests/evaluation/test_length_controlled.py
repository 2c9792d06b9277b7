"""AlpacaEval's length-controlled win rate."""

import numpy as np
import pytest

from asyncrl.evaluation.length_controlled import _fit, _losses, length_controlled


def judged(seed, n):
    """Preferences that depend on quality, length and difficulty."""
    random = np.random.default_rng(seed)
    d, g = random.normal(100, 300, n).round(), random.normal(0, 1, n)
    chance = 1 / (1 + np.exp(0.4 - 1.5 * np.tanh(d / d.std(ddof=1)) + 0.6 * g))
    return (random.random((n, 4)) < chance[:, None]).mean(1), d, g


@pytest.mark.parametrize(
    ("seed", "n", "by_liblinear"),
    [(0, 40, 0.30830960897531706), (1, 200, 0.4129355514212317), (2, 805, 0.4126373338673156)],
)
def test_it_is_what_liblinear_gives_by_the_authors_procedure(seed, n, by_liblinear):
    """Computed once by scikit-learn 1.9's `LogisticRegression(l1_ratio=1, solver="liblinear")`, with the same
    five folds and ten strengths."""
    p, d, g = judged(seed, n)
    assert length_controlled(p, d, g) == pytest.approx(by_liblinear, abs=1e-6)
    assert p.mean() > by_liblinear + 0.05  # longer responses were liked better for being longer


def test_what_is_liked_for_its_length_alone_is_no_better():
    d = np.linspace(-300, 500, 400)
    p = 1 / (1 + np.exp(-2 * np.tanh(d / d.std(ddof=1))))
    assert p.mean() > 0.55
    assert length_controlled(p, d, d * 0) == pytest.approx(0.5, abs=0.01)


def test_a_fit_is_the_least_of_its_cost():
    p, d, g = judged(3, 60)
    x = np.stack([np.ones(60), np.tanh(d / d.std()), g], axis=1)
    for penalty in (0.01, 3.0, 1000.0):
        w = _fit(x, p, penalty)

        def cost(w, penalty=penalty):
            return _losses(x, p, w).sum() + penalty * np.abs(w).sum()

        moves = np.random.default_rng(0).normal(size=(200, 3))
        assert all(cost(w) < cost(w + 1e-3 * move) for move in moves)
    assert (w == 0).all()


def test_equal_lengths_and_few_prompts_give_the_plain_rate_or_nearly():
    assert length_controlled([1.0, 0.0, 1.0, 1.0] * 50, [0.0] * 200, [0.0] * 200) == pytest.approx(
        0.75, abs=0.01
    )
    assert 0 <= length_controlled([1.0], [5.0], [0.0]) <= 1
