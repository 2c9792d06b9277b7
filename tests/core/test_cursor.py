import pytest

from asyncrl.core.cursor import PromptCursor


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
    second = PromptCursor(5, seed=1, position=first.position, returned=first.returned)
    assert second.next() == 3
    assert start + [second.next() for _ in range(5)] == whole


def test_without_shuffling_the_order_is_that_of_the_file():
    cursor = PromptCursor(3, seed=9, shuffle=False)
    assert [cursor.next() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert cursor.epoch == 7 / 3


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_can_leave_out_what_fills_no_batch(shuffle):
    cursor = PromptCursor(10, seed=2, shuffle=shuffle, multiple_of=4)
    epochs = [[cursor.next() for _ in range(8)] for _ in range(20)]
    assert cursor.epoch == 20
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    # Shuffled, no row is left out for ever.
    assert {row for epoch in epochs for row in epoch} == set(range(10 if shuffle else 8))


def test_an_epoch_without_a_whole_batch_is_refused():
    with pytest.raises(ValueError, match="at least 4 rows, not 3"):
        PromptCursor(3, seed=0, multiple_of=4)
