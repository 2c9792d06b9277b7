"""AlpacaEval's length-controlled win rate: what a judge would prefer if responses were as long as those that
they are compared with. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

FOLDS = 5
STRENGTHS = np.logspace(-4, 4, 10)
"""Of the likelihood against the penalty, of which cross-validation chooses one."""
_STEPS, _SWEEPS, _ENOUGH = 100, 200, 1e-9


def length_controlled(
    preferences: Sequence[float], longer_by: Sequence[float], difficulty: Sequence[float]
) -> float:
    """The win rate, from 0 to 1.

    Of each prompt, preferences: how far the judge prefers the response, from 0 to 1. longer_by: characters by
    which it is longer than the baseline's. difficulty: of the instruction, all 0 where that is not known.

    The preference is fitted by logistic regression, logit p = a + b tanh(d / std(d)) + c difficulty, and told
    for d = 0. Source: Dubois et al. 2024, "Length-Controlled AlpacaEval", arXiv 2404.04475, with the
    penalty |a| + |b| + |c| whose weight five-fold cross-validation chooses, as in the authors' code.
    There the fit is drawn besides, by a weight of 0.2, to their annotations of baselines that were gamed,
    which are not here.
    """
    y, d = np.asarray(preferences, float), np.asarray(longer_by, float)
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    x = np.stack([np.ones(len(d)), np.tanh(d / spread) if spread else d * 0, np.asarray(difficulty)], axis=1)
    fold = np.arange(len(y)) % FOLDS
    losses = np.zeros(len(STRENGTHS))
    for k in range(min(FOLDS, len(y)) if len(y) > 1 else 0):
        here, others = fold == k, fold != k
        for i, strength in enumerate(STRENGTHS):
            losses[i] += _losses(x[here], y[here], _fit(x[others], y[others], 1 / strength)).mean()
    w = _fit(x, y, 1 / STRENGTHS[losses.argmin()])
    return float(_logistic(x[:, [0, 2]] @ w[[0, 2]]).mean())


def _fit(x: Vector, y: Vector, penalty: float) -> Vector:
    """float64[F]: the w of least sum of losses plus penalty * |w|_1, by Newton's steps on the loss, each
    solved coordinate by coordinate (Friedman, Hastie and Tibshirani 2010, "Regularization Paths for
    Generalized Linear Models")."""
    w = np.zeros(x.shape[1])

    def cost(w: Vector) -> float:
        return float(_losses(x, y, w).sum() + penalty * np.abs(w).sum())

    for _ in range(_STEPS):
        p = _logistic(x @ w)
        gradient, curvature = x.T @ (p - y), (x.T * (p * (1 - p))) @ x
        new = w.copy()
        for _ in range(_SWEEPS):
            before = new.copy()
            for j in range(len(w)):
                if curvature[j, j] > 0:
                    pull = curvature[j, j] * new[j] - gradient[j] - curvature[j] @ (new - w)
                    new[j] = np.sign(pull) * max(abs(pull) - penalty, 0.0) / curvature[j, j]
            if np.abs(new - before).max() < _ENOUGH:
                break
        step, now = 1.0, cost(w)
        while step > _ENOUGH and cost(w + step * (new - w)) > now:
            step /= 2
        moved, w = np.abs(step * (new - w)).max(), w + step * (new - w)
        if moved < _ENOUGH:
            break
    return w


def _losses(x: Vector, y: Vector, w: Vector) -> Vector:
    """float64[N]: cross-entropy of the preferences."""
    z = x @ w
    return np.logaddexp(0, z) - y * z


def _logistic(z: Vector) -> Vector:
    return np.exp(-np.logaddexp(0, -z))
