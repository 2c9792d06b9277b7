"""A verifiable reward for open questions: the key words of a good answer, in its order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from asyncrl.reward.score import completion_text


def reference_chain(
    completions: Sequence[Any], keywords: Sequence[Sequence[Any]], reference: Sequence[str]
) -> list[float]:
    """How far a response has the key points of the row's `reference`, 0.0 to 1.0: the content reward of RLVRR
    (Jiang et al. 2026, arXiv 2601.18533).

    keywords: the row's key points, each a list of words or phrases, or several such lists, of which the best
    counts. For a key point, with x and y the words of its list in the order in which response and reference
    have them, repeated where they are repeated, it is |LCS(x, y)| / max(|x|, |y|), with LCS the longest
    common subsequence: words in another order, and words again and again, gain nothing. The reward is the
    mean over the key points. Raises `ValueError` for a row without key points, or with one that its reference
    has not.
    """
    each = zip(map(completion_text, completions), keywords, reference, strict=True)
    return [_overlap(text, points, of_row) for text, points, of_row in each]


def _overlap(text: str, points: Sequence[Any], reference: str) -> float:
    if not points:
        raise ValueError("the row's `keywords` has no key point")
    return sum(max(_agreement(text, w, reference) for w in _wordings(point)) for point in points) / len(
        points
    )


def _wordings(point: Any) -> list[list[str]]:
    wordings = point if point and all(isinstance(item, list) for item in point) else [point]
    for words in wordings:
        if (
            not isinstance(words, list)
            or not words
            or not all(isinstance(w, str) and w.strip() for w in words)
        ):
            raise ValueError(
                f"the row's `keywords` has the key point {point!r:.100}; it should be a list of texts"
            )
    return wordings


def _agreement(text: str, words: Sequence[str], reference: str) -> float:
    longest_first = sorted(words, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
    x, y = ([found.lower() for found in pattern.findall(source)] for source in (text, reference))
    if not y:
        raise ValueError(f"the row's `reference` has none of {', '.join(words)}, which its `keywords` name")
    return _common(x, y) / max(len(x), len(y))


def _common(x: Sequence[str], y: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(y) + 1)
    for item in x:
        before = row
        row = [0]
        for j, other in enumerate(y):
            row.append(before[j] + 1 if item == other else max(before[j + 1], row[j]))
    return row[-1]
