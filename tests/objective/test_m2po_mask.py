import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.objective.policy import PolicyTokens
from asyncrl.objective.trust_region import m2po_mask


def mini_batch(log_ratio, advantages, mask):
    zeros = torch.zeros_like(log_ratio)
    return PolicyTokens(log_ratio, log_ratio, zeros, advantages, mask, zeros.long(), zeros.long())


def reference(log_ratio, advantages, mask, limit):
    """Take out the largest, all equal ones at once, until what is left is within the limit."""
    rows = list(zip(log_ratio, advantages, mask, strict=True))
    candidates = [i for i, (d, a, m) in enumerate(rows) if m and ((a > 0 and d > 0) or (a < 0 and d < 0))]
    left = {i: log_ratio[i] ** 2 for i in candidates}
    while left and np.mean(list(left.values())) > limit:
        largest = max(left.values())
        left = {i: square for i, square in left.items() if square != largest}
    return [m and (i not in candidates or i in left) for i, (_, _, m) in enumerate(rows)]


coarse = st.integers(-8, 8).map(lambda k: k / 10)
token = st.tuples(coarse, st.integers(-1, 1).map(float), st.booleans())


@given(st.lists(token, max_size=30), st.sampled_from([0.0, 0.035, 0.2, 10.0]), st.randoms())
def test_agrees_with_taking_out_one_by_one_and_depends_on_no_order(rows, limit, random):
    def mask_of(rows):
        d, a, m = zip(*rows, strict=True) if rows else ((), (), ())
        kept = m2po_mask(
            mini_batch(
                torch.tensor(d, dtype=torch.float64),
                torch.tensor(a, dtype=torch.float64),
                torch.tensor(m, dtype=torch.bool),
            ),
            max_second_moment=limit,
        )
        assert kept.tolist() == reference(d, a, m, limit)
        return kept.tolist()

    kept = mask_of(rows)
    order = random.sample(range(len(rows)), len(rows))
    assert mask_of([rows[i] for i in order]) == [kept[i] for i in order]


def test_what_is_left_is_within_the_limit_and_no_more_is_left_out_than_needed():
    rng = np.random.default_rng(0)
    log_ratio = torch.from_numpy(rng.standard_t(2, 5000) * 0.2)
    advantages = torch.from_numpy(rng.normal(size=5000))
    mask = torch.from_numpy(rng.random(5000) < 0.8)
    kept = m2po_mask(mini_batch(log_ratio, advantages, mask))
    driven = mask & (log_ratio * advantages > 0)
    squares = log_ratio.square()
    assert 0 < (driven & ~kept).sum() < 0.2 * driven.sum()
    assert squares[driven & kept].mean() <= 0.04
    next_one = squares[driven & ~kept].min()
    assert torch.cat([squares[driven & kept], next_one[None]]).mean() > 0.04
    assert torch.equal(kept & ~driven, mask & ~driven)


def test_on_policy_everything_is_kept_and_masked_nonsense_does_not_matter():
    mask = torch.tensor([True, False, True])
    log_ratio = torch.tensor([0.0, float("nan"), 0.0])
    advantages = torch.tensor([1.0, float("nan"), -1.0])
    assert m2po_mask(mini_batch(log_ratio, advantages, mask)).tolist() == mask.tolist()
