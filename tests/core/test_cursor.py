from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config.data import DatasetConfig
from asyncrl.core.cursor import PromptCursor
from asyncrl.curriculum.mix import make_mix


def test_every_row_once_per_epoch_in_a_seeded_order():
    cursor = PromptCursor(5, seed=1)
    epochs = [[cursor.next() for _ in range(5)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = PromptCursor(5, seed=1)
    assert [again.next() for _ in range(15)] == [row for epoch in epochs for row in epoch]


def test_a_restart_goes_on_where_it_was():
    cursor = PromptCursor(5, seed=1)
    whole = [cursor.next() for _ in range(12)]
    first = PromptCursor(5, seed=1)
    start = [first.next() for _ in range(7)]
    first.give_back(3)
    second = PromptCursor(5, seed=1, positions=first.positions, returned=first.returned)
    assert second.next() == 3
    assert start + [second.next() for _ in range(5)] == whole


def test_without_shuffling_the_order_is_that_of_the_file():
    cursor = PromptCursor(3, seed=9, shuffle=False)
    assert [cursor.next() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert cursor.epochs == [7 / 3]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_can_leave_out_what_fills_no_batch(shuffle):
    cursor = PromptCursor(10, seed=2, shuffle=shuffle, multiple_of=4)
    epochs = [[cursor.next() for _ in range(8)] for _ in range(20)]
    assert cursor.epochs == [20]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    # Shuffled, no row is left out for ever.
    assert {row for epoch in epochs for row in epoch} == set(range(10 if shuffle else 8))


def test_an_epoch_without_a_whole_batch_is_refused():
    with pytest.raises(ValueError, match="at least 4 rows, not 3"):
        PromptCursor(3, seed=0, multiple_of=4)


ROWS = (7, 5, 3)
MIX = make_mix(
    [
        DatasetConfig(path="a", weight=2.0),
        DatasetConfig(path="b", weight=1.0),
        DatasetConfig(path="c", weight=3.0, from_step=10, until_step=20),
    ]
)


def dataset_of(row):
    return sum(row >= end for end in (7, 12))


def test_datasets_get_their_shares_from_the_first_prompt_on():
    cursor = PromptCursor(ROWS, 3, mix=MIX)
    drawn = Counter()
    for number in range(1, 601):
        drawn[dataset_of(cursor.next(step=0))] += 1
        assert abs(drawn[0] - number * 2 / 3) < 3
    assert drawn[2] == 0
    drawn = Counter(dataset_of(cursor.next(step=19)) for _ in range(600))
    assert drawn == {i: pytest.approx(n, abs=4) for i, n in enumerate((200, 100, 300))}
    assert dataset_of(cursor.next(step=20)) != 2
    assert cursor.epochs == [n / rows for n, rows in zip(cursor.positions, ROWS, strict=True)]


@given(st.lists(st.sampled_from(["next", "give back", "restart"]), max_size=60), st.data())
def test_every_row_of_a_mix_comes_once_per_epoch_also_over_restarts(events, data):
    cursor, out, seen = PromptCursor(ROWS, 3, mix=MIX), [], Counter()
    for step, event in enumerate(events):
        if event == "next":
            again = bool(cursor.returned)
            out.append(cursor.next(step))
            seen[out[-1]] += not again
        elif event == "give back" and out:
            cursor.give_back(out.pop(data.draw(st.integers(0, len(out) - 1))))
        elif event == "restart":
            positions, returned = list(cursor.positions), list(cursor.returned)
            cursor = PromptCursor(ROWS, 3, mix=MIX, positions=positions, returned=returned)
        for i, first in enumerate((0, 7, 12)):
            counts = [seen[row] for row in range(first, first + ROWS[i])]
            assert max(counts) - min(counts) <= 1
            assert sum(counts) == cursor.positions[i]


def test_a_single_dataset_is_a_mix_of_one():
    alone, mixed = (
        PromptCursor(9, 4),
        PromptCursor([9], 4, mix=make_mix([DatasetConfig(path="a", weight=0.1)])),
    )
    assert [alone.next() for _ in range(30)] == [mixed.next() for _ in range(30)]


def test_a_cursor_refuses_what_it_cannot_walk():
    with pytest.raises(ValueError, match="no dataset has a share of step 4"):
        PromptCursor([3], 0, mix=make_mix([DatasetConfig(path="a", until_step=4)])).next(4)
    with pytest.raises(ValueError, match="cannot go on from the positions"):
        PromptCursor(ROWS, 0, mix=MIX, positions=[4])
