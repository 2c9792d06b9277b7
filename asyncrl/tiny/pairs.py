"""Preference pairs for the tiny model's task, to train a tiny reward model from.

The worth of a response is its closeness to the right answer. A model trained only on pairs of right and wrong
would find all wrong responses about equally bad, and a policy that is rarely right would learn nothing from
it; so wrong responses are also compared with each other. They include whatever a policy might try instead of
sorting: saying nothing, repeating a letter or the answer, copying the question, sorting other letters,
running on to the limit.
"""

from __future__ import annotations

import json
import random
import string
from collections import Counter
from pathlib import Path

from asyncrl.tiny.skill import ALPHABET, SortingProblem, demonstrate, sample_problem

LONGEST = 24
"""Length of a response that runs on."""
ANYTHING = string.ascii_letters + string.digits + " \n.,-"
RIGHT_SHARE = 0.7
"""Share of the pairs whose preferred response is the right answer."""
MARGIN = 0.1
"""Smallest difference in worth between the responses of a pair."""


def worth(problem: SortingProblem, response: str) -> float:
    """1 for the right answer, down to 0: the share of letters that need not be inserted, deleted or replaced
    to turn one into the other (Levenshtein 1966). Letters that are not in the question count twice."""
    answer = problem.answer
    foreign = Counter(response) - Counter(answer)
    faults = _distance(answer, response) + foreign.total()
    return max(0.0, 1 - faults / max(len(answer), len(response)))


def write_pairs(path: Path, *, pairs: int, seed: int = 0) -> None:
    """Write `pairs` rows (`prompt`, `chosen`, `rejected`) as JSONL."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample_pair(rng)) + "\n" for _ in range(pairs)))


def sample_pair(rng: random.Random) -> dict[str, object]:
    """A random row."""
    while True:
        problem = sample_problem(rng)
        one = problem.answer if rng.random() < RIGHT_SHARE else corrupt(problem, rng)
        other = corrupt(problem, rng)
        if abs(worth(problem, one) - worth(problem, other)) >= MARGIN:
            break
    chosen, rejected = sorted((one, other), key=lambda text: -worth(problem, text))
    return {"prompt": problem.row["prompt"], "chosen": chosen, "rejected": rejected}


def corrupt(problem: SortingProblem, rng: random.Random) -> str:
    """A response that is wrong in one of many ways, to a varying degree."""
    letters = list(problem.answer)
    n = len(letters)
    faults = min(n, rng.choice([1, 1, 2, 3, rng.randint(1, n)]))  # near misses are the hard cases
    match rng.randrange(10):
        case 0:  # neighbours swapped
            for _ in range(faults):
                i = rng.randrange(n - 1)
                letters[i], letters[i + 1] = letters[i + 1], letters[i]
        case 1:  # no order at all
            rng.shuffle(letters)
        case 2:  # letters missing
            left = rng.choice([n - faults, n - faults, 0])
            letters = [letters[i] for i in sorted(rng.sample(range(n), left))]
        case 3:  # some letters that the question does not have, or has only once
            letters = _with_others(letters, faults, rng)
        case 4 | 5:  # the same, and in order
            letters = sorted(_with_others(letters, faults, rng))
        case 6:  # the right answer to another question
            letters = list(sample_problem(rng).answer)
        case 7:  # more than was asked for, here and there, in order or at the end, often up to the limit
            junk = rng.choice([ALPHABET, ANYTHING])
            extra = rng.choices(junk, k=rng.choice([1, 1, 2, LONGEST - n]))
            letters = rng.choice(
                [letters + extra, sorted(letters + extra), rng.sample(letters + extra, n + len(extra))]
            )
        case 8:  # the right answer, or a few of its letters, again and again
            some = rng.choice([letters, rng.sample(letters, rng.randint(1, 3))])
            letters = (some * LONGEST)[: rng.choice([n, n + 1, rng.randint(1, LONGEST)])]
        case 9:  # what the model has learnt
            return demonstrate(problem, rng)
    return "".join(letters)


def _with_others(letters: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` letters replaced."""
    replaced = set(rng.sample(range(len(letters)), count))
    return [rng.choice(ALPHABET) if i in replaced else letter for i, letter in enumerate(letters)]


def _distance(a: str, b: str) -> int:
    """The smallest number of insertions, deletions and replacements between two texts."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]
