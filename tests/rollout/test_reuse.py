"""What counts as computed again."""

import numpy as np
import pytest

from asyncrl.rollout.chat import Turn
from asyncrl.rollout.episodes.reuse import computed_again


def turn(prompt, completion, reused):
    return Turn(np.asarray(prompt, np.int32), np.asarray(completion, np.int32), reused=reused)


FIRST = turn([1, 2, 3], [4, 5], 0)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([], (0, 0)),
        ([turn([1, 2, 3, 4, 5, 6], [7], 4)], (0, 6)),
        ([turn([1, 2, 3, 4, 5, 6], [7], 1)], (3, 6)),
        # More than the episode has itself computed: somebody else's beginning was the same.
        ([turn([1, 2, 9, 9], [7], 3)], (0, 4)),
        # The same prompt again, as for a second draft; its last token is needed for the next.
        ([turn([1, 2, 3], [8], 0)], (2, 3)),
        ([turn([6, 6], [7], 0), turn([1, 2, 3, 4, 9, 9], [7], 1)], (3, 8)),
        ([turn([1, 2, 3, 4, 5, 6], [7], None), turn([1, 2, 3, 4, 5, 6, 7, 8], [9], 4)], (2, 8)),
    ],
)
def test_later_turns_tell_what_was_computed_twice(later, expected):
    assert computed_again([FIRST, *later]) == expected
