"""The tiny model's task (sorting letters), the sloppy teacher that warmed it up, and the reward function.

`exact_match` is an example for your own reward functions: plain Python, named in the config as
`package.module:function` or `path/file.py:function`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

ALPHABET = "abcdefghijklmnop"
MIN_LETTERS = 6
MAX_LETTERS = 10

TEACHER_IS_RIGHT = 0.25
"""How often the teacher's demonstration is right. The model also learns the mistakes, so its first rewards
are about this high: the right behaviour is one of several, which RL has to single out."""


def exact_match(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Reward 1 for a response that is exactly the row's `answer`, else 0.

    A reward function is called once for each prompt, with all its completions. Every column of the dataset
    arrives as an argument of that name, with one value per completion (here `answer`); `**_` takes the rest.
    A completion is a string, or a list of messages if the prompt is one.
    """
    return [float(text_of(c).strip() == right) for c, right in zip(completions, answer, strict=True)]


def text_of(completion: Any) -> str:
    """A completion's text, whether it is a string or a list of messages."""
    text: str = completion if isinstance(completion, str) else completion[-1]["content"]
    return text


@dataclass(frozen=True, slots=True)
class SortingProblem:
    letters: str
    """Distinct lowercase letters, in random order."""

    @property
    def answer(self) -> str:
        return "".join(sorted(self.letters))

    @property
    def row(self) -> dict[str, Any]:
        """The dataset row: a conversation and the right answer."""
        return {"prompt": [{"role": "user", "content": f"sort {self.letters}"}], "answer": self.answer}


def sample_problem(rng: random.Random) -> SortingProblem:
    """A random problem of `MIN_LETTERS` to `MAX_LETTERS` letters."""
    return SortingProblem("".join(rng.sample(ALPHABET, rng.randint(MIN_LETTERS, MAX_LETTERS))))


def demonstrations(problem: SortingProblem, rng: random.Random) -> tuple[str, ...]:
    """The sloppy teacher's responses, one of each kind, all as likely: right, in descending order, with a
    letter left out, with two swapped."""
    answer = problem.answer
    i, j = (rng.randrange(len(answer) - 1) for _ in range(2))
    return (
        answer,
        answer[::-1],
        answer[:i] + answer[i + 1 :],
        answer[:j] + answer[j + 1] + answer[j] + answer[j + 2 :],
    )


def demonstrate(problem: SortingProblem, rng: random.Random) -> str:
    """One response of the sloppy teacher's."""
    return rng.choice(demonstrations(problem, rng))
