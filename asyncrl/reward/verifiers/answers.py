"""Verifiable rewards: the right choice, the right number, a pattern, JSON of a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import regex

from asyncrl.packages import need
from asyncrl.reward.score import completion_text

LIMIT_S = 1.0
"""Longest time of a pattern with one response; some take for ever on some texts."""

# `A` and `I` are words, too: `the answer is a matter of taste`, `answer: I am not sure`.
_LETTER = r"(?:[B-HJ-Z]|[AI](?!\s+(?!because\b|since\b)[a-z]))\b(?!['’])"
# Possessive, since a response may go on with dots or blanks to its end.
_SAYS = (
    r"[^\n\w]*+(?i:(?:is|was)\b)?+[^\n\w]*+(?i:(?:option|choice)\b)?+[^\n\w]*+"
    rf"(?:(?:text|math)[a-z]*+\{{[^\n\w]*+)?+({_LETTER})"
)
_STATED = re.compile(rf"(?i:\banswer\b){_SAYS}")
_NAMED = re.compile(rf"(?i:\b(?:choice|option)\b){_SAYS}")
# What the choice says may stand behind its letter: `\boxed{\textbf{(B)}\ 42}`.
_IN_TEXT = r"(?:\\(?:text|math)[a-z]*+\s*+\{\s*+)?+"
_BOXED = re.compile(rf"\\boxed\s*+\{{\s*+{_IN_TEXT}\(?([A-Za-z])(?:\)|\s*+(?=[}}.:]))")
_ALONE = re.compile(r"^[^\w\n]*([A-Z])[^\w\n]*$", re.MULTILINE)
_ANOTHER = re.compile(r"[^\w\n]*(?:(?:or|and)\b|[/&,])[^\w\n]*[A-Z]\b(?!\s*\w)")


def multiple_choice(completions: Sequence[Any], ground_truth: Sequence[Any]) -> list[float]:
    """1.0 if the letter that a response settles on is the row's `ground_truth`, else 0.0.

    It is the last one that is boxed (`\\boxed{B}`); else the last that is called the answer (`the answer is
    (B)`, `Answer: B`); else the last that is called an option (`**Option B**`): options are also named to say
    why they are wrong; else the last that has a line for itself. A letter in running text counts for nothing,
    and neither do several: `A or B` is no answer. Raises `ValueError` for a row whose answer is no single
    letter.
    """
    return [
        float(_choice(completion_text(text)) == _letter(answer))
        for text, answer in zip(completions, ground_truth, strict=True)
    ]


def _letter(answer: Any) -> str:
    found = re.fullmatch(r"\W*([A-Za-z])\W*", str(answer))
    if found is None:
        raise ValueError(f"`ground_truth` is {answer!r:.100}; it should be the letter of a choice")
    return found[1].upper()


def _choice(text: str) -> str | None:
    for pattern in (_BOXED, _STATED, _NAMED, _ALONE):
        if found := list(pattern.finditer(text)):
            is_one_of_several = _ANOTHER.match(text, found[-1].end())
            return None if is_one_of_several else found[-1][1].upper()
    return None


_BOXED_NUMBER = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# `\frac12` takes two digits; `3\frac{1}{2}` is three and a half.
_FRACTION = re.compile(
    r"(?:(?<![\d.,])(\d{1,999}+)\s*+)?\\[dt]?frac\s*+(?:\{(-?\d{1,999})\}|(\d))\s*+(?:\{(\d{1,999})\}|(\d))"
)
_LONGEST_NUMBER = 1000
"""Characters. A response may repeat a digit to its end, and Python reads 4,300 of them at most."""
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|\s*/\s*\d+)?|\.\d+)")


def number(completions: Sequence[Any], ground_truth: Sequence[Any]) -> list[float]:
    """1.0 if a response's answer equals the row's `ground_truth` as a number (1,000 is 1000, 0.5 is 1/2),
    else 0.0. The answer is the last number in the last box (`\\boxed{42}`); without a box, the last number.
    Raises `ValueError` for a row whose answer is no number. It needs no package, and reads no formulas
    (`asyncrl.reward.math` does).
    """
    return [
        float(_last_number(_boxed(completion_text(text))) == _right_number(answer))
        for text, answer in zip(completions, ground_truth, strict=True)
    ]


def _right_number(answer: Any) -> Fraction:
    if (found := _last_number(str(answer))) is None:
        raise ValueError(f"`ground_truth` is {answer!r:.100}; it should be a number")
    return found


def _boxed(text: str) -> str:
    boxes = _BOXED_NUMBER.findall(text)
    return boxes[-1] if boxes else text


def _last_number(text: str) -> Fraction | None:
    found = _NUMBER.findall(_FRACTION.sub(_on_a_line, text.replace("{,}", ",").replace("\u2212", "-")))
    if not found or len(found[-1]) > _LONGEST_NUMBER:
        return None
    top, _, bottom = found[-1].replace(",", "").partition("/")
    return Fraction(top.strip()) / int(bottom or 1) if int(bottom or 1) else None


def _on_a_line(fraction: re.Match[str]) -> str:
    whole, in_braces, digit, *bottoms = fraction.groups()
    top, bottom = int(in_braces or digit), int(bottoms[0] or bottoms[1])
    return f"{int(whole or 0) * bottom + top}/{bottom}"


def regular_expression(
    completions: Sequence[Any], pattern: Sequence[str], ground_truth: Sequence[Any] = ()
) -> list[float]:
    """1.0 if `pattern`, a column or an argument, is found in a response (`.` matches line ends, too), else
    0.0. Where rows have a `ground_truth` and the pattern a group, what the group of the last match found must
    equal it, but for white space around it.

    A pattern that takes more than a second has found nothing. Raises `ValueError` for what is no pattern.
    """
    each = zip(
        map(completion_text, completions), pattern, ground_truth or [None] * len(completions), strict=True
    )
    return [float(_matches(text, of_row, answer)) for text, of_row, answer in each]


def _matches(text: str, pattern: str, answer: Any) -> bool:
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except (regex.error, TypeError) as error:
        raise ValueError(f"`pattern` is {pattern!r:.100}, which is no regular expression: {error}") from None
    try:
        if answer is None or not compiled.groups:
            return compiled.search(text, timeout=LIMIT_S) is not None
        found = compiled.findall(text, timeout=LIMIT_S)
    except TimeoutError:
        return False
    last = found[-1] if found else None
    return last is not None and (last if isinstance(last, str) else last[0]).strip() == str(answer).strip()


def json_schema(completions: Sequence[Any], schema: Sequence[Mapping[str, Any] | str]) -> list[float]:
    """1.0 if a response is JSON that the `schema` (a column or an argument; an object, or its text) allows,
    else 0.0. The JSON may stand in a code block, if there is one alone. Constants that JSON has not (NaN) and
    keys that come twice are refused. Needs `pip install 'asyncrl[schema]'`. Raises `ValueError` for what is
    no schema.
    """
    need("jsonschema", "asyncrl.reward.verifiers.answers:json_schema")
    each = zip(map(completion_text, completions), schema, strict=True)
    return [float(_is_allowed(text, of_row)) for text, of_row in each]


def _is_allowed(text: str, schema: Mapping[str, Any] | str) -> bool:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        tree = json.loads(schema) if isinstance(schema, str) else schema
        kind = validator_for(tree)
        kind.check_schema(tree)
    except (SchemaError, ValueError) as error:
        raise ValueError(f"`schema` is {schema!r:.100}, which is no JSON schema: {error}") from None
    try:
        return bool(kind(tree, registry=Registry()).is_valid(strict_json(text)))
    except Unresolvable as error:
        raise ValueError(f"`schema` is {schema!r:.100}, and nothing is fetched for it: {error}") from None
    except (ValueError, OverflowError, RecursionError):
        return False


# Possessive, and no line of a block begins like its end: a response may begin blocks to its end.
_JSON_BLOCK = re.compile(
    r"^```(?:json)?[ \t]*+\n((?:(?!```).*+\n)*+)```[ \t]*$", re.MULTILINE | re.IGNORECASE
)


def strict_json(text: str) -> Any:
    """The value that a text is, or its only code block. Raises `ValueError` or `RecursionError`."""
    blocks = _JSON_BLOCK.findall(text)
    return strict_value(blocks[0] if len(blocks) == 1 else text)


def strict_value(text: str) -> Any:
    """The value that a text is. Raises `ValueError` or `RecursionError`."""
    return json.loads(text, parse_constant=_refused, object_pairs_hook=_with_own_keys)


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _with_own_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found
