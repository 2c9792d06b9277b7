import numpy as np
import pytest

from asyncrl.core.kept import KeptSets


def ints(*values):
    return np.array(values, np.int32)


SETS = [ints(), ints(4, 7), ints(), ints(~0, ~3), ints(5)]
TOKENS = ints(9, 7, 2, 8, 5)


def as_lists(kept):
    return [ids.tolist() for ids in np.split(kept.ids, np.cumsum(kept.sizes)[:-1])]


def test_joined_and_taken_apart_they_stay_what_they_were():
    kept = KeptSets.of(SETS)
    assert as_lists(kept) == [ids.tolist() for ids in SETS]
    assert as_lists(KeptSets.join([(None, 2), (kept, 5)])) == [[], [], *as_lists(kept)]
    order = np.array([3, 0, 3, 4])
    assert as_lists(kept.take(order)) == [SETS[i].tolist() for i in order]


def test_where_nothing_is_left_out_there_is_nothing():
    assert KeptSets.of([ints(), ints()]) is KeptSets.join([(None, 3), (None, 2)]) is None
    assert KeptSets.without([], 3, 5) is KeptSets.without([1], 0, 5) is None


def test_what_a_response_must_not_end_with_is_left_out_at_first():
    assert as_lists(KeptSets.without([1, 6], 2, 3)) == [[~1, ~6], [~1, ~6], []]
    assert as_lists(KeptSets.without([1], 9, 2)) == [[~1], [~1]]  # one that was aborted


def changed(at, ids):
    return KeptSets.of([*SETS[:at], ids, *SETS[at + 1 :]])


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        (KeptSets.of(SETS), None),
        (changed(1, ints(4, 6)), "token 1 was sampled from outside its own kept set"),
        (changed(3, ints(~8)), "token 3 was sampled from outside its own kept set"),
        (changed(4, ints(5, ~6)), "token 4 has a kept set that lists both what it keeps and what not"),
        (KeptSets.of(SETS[:4]), "the kept sets have 4 sizes for 5 tokens, and 4 ids"),
        (KeptSets(ints(5), ints(0, 3, 0, -2, 0)), "the kept sets have 5 sizes for 5 tokens, and 1 ids"),
    ],
)
def test_a_token_from_outside_its_own_set_is_impossible(kept, problem):
    assert kept.problem(TOKENS) == problem
