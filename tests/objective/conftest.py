"""Random ragged batches of tokens."""

import numpy as np
import pytest
import torch

from asyncrl.objective.policy import PolicyTokens


def make_tokens(seed=0, *, sequences=12, spread=1.0, on_policy=False):
    """Sequences of 1 to 12 tokens in any order, 70% of them unmasked; one advantage a sequence."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.arange(sequences) * 3 + 5)
    index = np.repeat(numbers, rng.integers(1, 13, sequences))
    n = len(index)
    behavior = -rng.exponential(1.0, n)
    prox = behavior + (0 if on_policy else rng.normal(0, spread, n))
    logprobs = prox + (0 if on_policy else rng.normal(0, spread / 2, n))
    advantages = dict(zip(numbers.tolist(), rng.normal(size=sequences), strict=True))
    advantages[int(numbers[0])] = 0.0
    mask = rng.random(n) < 0.7
    return PolicyTokens(
        logprobs=torch.from_numpy(logprobs).requires_grad_(),
        prox_logprobs=torch.from_numpy(prox),
        behavior_logprobs=torch.from_numpy(behavior),
        advantages=torch.tensor([advantages[i] for i in index.tolist()], dtype=torch.float64),
        mask=torch.from_numpy(mask),
        sequences=torch.from_numpy(index),
        ages=torch.from_numpy(rng.integers(0, 4, n)),
        kept=torch.from_numpy(mask & (rng.random(n) < 0.8)),
        entropies=torch.from_numpy(rng.exponential(1.0, n)),
    )


@pytest.fixture
def random_tokens():
    return make_tokens
