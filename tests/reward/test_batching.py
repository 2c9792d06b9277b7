"""Which pairs are scored together."""

from hypothesis import given
from hypothesis import strategies as st

from asyncrl.reward.batching import choose_pairs


def test_the_oldest_goes_with_those_nearest_to_it_in_length():
    assert choose_pairs([10, 90, 12, 8, 50], budget=36) == [0, 2, 3]
    assert choose_pairs([90, 10, 12], budget=100) == [0]


def test_a_pair_over_the_budget_goes_alone():
    assert choose_pairs([200, 200], budget=100) == [0]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=50), st.integers(1, 500))
def test_a_batch_holds_the_oldest_and_keeps_to_the_budget(lengths, budget):
    chosen = choose_pairs(lengths, budget)
    assert 0 in chosen
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == 1 or max(lengths[i] for i in chosen) * len(chosen) <= budget
