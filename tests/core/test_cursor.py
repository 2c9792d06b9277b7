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
