"""What counts as computed again."""

import numpy as np
import pytest

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.chat import Turn
from asyncrl.rollout.episodes.reuse import computed_again
from asyncrl.rollout.transcript import Completion


def turn(prompt, completion, reused, *versions):
    """versions: of each sampled token, the last one's for the rest."""
    ids = np.asarray(completion, np.int32)
    by = [*versions, *[(versions or (0,))[-1]] * (len(ids) - len(versions))]
    spans = tuple(VersionSpan(i, 1, version) for i, version in enumerate(by))
    return Turn(
        np.asarray(prompt, np.int32),
        Completion(ids, np.zeros(len(ids), np.float32), spans, FinishReason.STOP, reused=reused),
    )


FIRST = turn([1, 2, 3], [4, 5], 0)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([], (0, 0, 0)),
        ([turn([1, 2, 3, 4, 5, 6], [7], 4)], (0, 0, 6)),
        ([turn([1, 2, 3, 4, 5, 6], [7], 1)], (3, 0, 6)),
        # More than the episode has itself computed: somebody else's beginning was the same.
        ([turn([1, 2, 9, 9], [7], 3)], (0, 0, 4)),
        # The same prompt again, as for a second draft; its last token is needed for the next.
        ([turn([1, 2, 3], [8], 0)], (2, 0, 3)),
        ([turn([6, 6], [7], 0), turn([1, 2, 3, 4, 9, 9], [7], 1)], (3, 0, 8)),
        ([turn([1, 2, 3, 4, 5, 6], [7], None), turn([1, 2, 3, 4, 5, 6, 7, 8], [9], 4)], (2, 0, 8)),
        # New weights in between; and in an answer, whose context the newest of them computed once more.
        ([turn([1, 2, 3, 4, 5, 6], [7], 1, 1)], (0, 3, 6)),
        ([turn([1, 2, 3, 4, 5], [6, 7], 4, 0, 1), turn([1, 2, 3, 4, 5, 6, 7, 8], [9], 0, 1)], (6, 0, 13)),
    ],
)
def test_later_turns_tell_what_was_computed_twice(later, expected):
    """And why, where contexts are computed anew after an update; where they are kept, there is no other
    reason than room."""
    assert computed_again([FIRST, *later], keeps=False) == expected
    lost, outdated, tokens = expected
    assert computed_again([FIRST, *later], keeps=True) == (lost + outdated, 0, tokens)
