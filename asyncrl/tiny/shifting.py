"""The tiny model's long task (shifting a word to the end of the alphabet), its sloppy teacher and its reward.

A response is many lines, and one wrong letter spoils all that follow: what the policy has changed multiplies
over 70 to 140 tokens, as it does in long reasoning.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from asyncrl.tiny.skill import ALPHABET, text_of

LETTERS = 8
"""In the word."""
LATEST_START = "h"
"""The word's first letter is at most this, so that there are at least 8 lines to write, and at most 15."""

TEACHER_IS_RIGHT = 0.985
"""How often a letter of the teacher's is right: 0.89 of the lines, and about a third of the responses."""


def right_lines(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The share of the answer's lines that a response has right before its first wrong one; 1 is the whole
    answer and nothing after it."""
    return [_share(text_of(c), right) for c, right in zip(completions, answer, strict=True)]


def _share(text: str, answer: str) -> float:
    lines, wanted = text.strip().split("\n"), answer.split("\n")
    right = next(
        (i for i, (line, other) in enumerate(zip(lines, wanted, strict=False)) if line != other),
        min(len(lines), len(wanted)),
    )
    runs_on = right == len(wanted) < len(lines)
    return (right - runs_on) / len(wanted)


@dataclass(frozen=True, slots=True)
class ShiftingProblem:
    word: str
    """`LETTERS` letters of the alphabet."""

    @property
    def answer(self) -> str:
        """The word shifted again and again, a line each, until its first letter is the alphabet's last."""
        lines, word = [], self.word
        while not ends(word):
            word = shifted(word)
            lines.append(word)
        return "\n".join(lines)

    @property
    def row(self) -> dict[str, Any]:
        """The dataset row: a conversation and the right answer."""
        return {"prompt": [{"role": "user", "content": f"shift {self.word}"}], "answer": self.answer}


def sample_problem(rng: random.Random) -> ShiftingProblem:
    first = rng.choice(ALPHABET[: ALPHABET.index(LATEST_START) + 1])
    return ShiftingProblem(first + "".join(rng.choices(ALPHABET, k=LETTERS - 1)))


def ends(word: str) -> bool:
    return word[0] == ALPHABET[-1]


def shifted(word: str, by: int = 1) -> str:
    """Every letter replaced by the next, the last by the first."""
    return "".join(ALPHABET[(ALPHABET.index(letter) + by) % len(ALPHABET)] for letter in word)


def demonstrations(problem: ShiftingProblem, rng: random.Random) -> tuple[str]:
    """The sloppy teacher's only response. Of its wrong letters half stay what they were, and half go back
    instead of on; it continues from what it has written."""
    lines, word = [], problem.word
    while not ends(word):
        word = "".join(shifted(letter, _step(rng)) for letter in word)
        lines.append(word)
    return ("\n".join(lines),)


def _step(rng: random.Random) -> int:
    return 1 if rng.random() < TEACHER_IS_RIGHT else rng.choice((0, -1))
