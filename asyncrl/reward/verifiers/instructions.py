"""A verifiable reward: whether a response follows instructions about its form.

Names, arguments and meaning of the instructions are those of IFEval (Zhou et al. 2023, arXiv 2311.07911),
whose rows have the columns `instruction_id_list` and `kwargs`. Sentences and words are told apart by
punctuation and white space, not by a trained splitter, and key words are whole words;
`language:response_language`, which needs a classifier, is not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asyncrl.reward.score import completion_text
from asyncrl.reward.verifiers.answers import strict_value

Check = Callable[..., bool]


def followed(
    completions: Sequence[Any],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
) -> list[float]:
    """The share, 0.0 to 1.0, of the row's instructions that a response follows; an empty one follows none.

    instruction_id_list: names such as `punctuation:no_comma`. kwargs: the arguments of each, by name; those
    that are null are left out. Raises `ValueError` for an instruction that is not here, or without an
    argument that it needs.
    """
    return [sum(found) / len(found) for found in _all(completions, instruction_id_list, kwargs)]


def followed_all(
    completions: Sequence[Any],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
) -> list[float]:
    """1.0 if a response follows all of the row's instructions, else 0.0 (see `followed`)."""
    return [float(all(found)) for found in _all(completions, instruction_id_list, kwargs)]


def _all(
    completions: Sequence[Any],
    names: Sequence[Sequence[str]],
    arguments: Sequence[Sequence[Mapping[str, Any]]],
) -> list[list[bool]]:
    each = zip(map(completion_text, completions), names, arguments, strict=True)
    return [_each(text, *of_row) for text, *of_row in each]


def _each(text: str, names: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> list[bool]:
    if not names or len(names) != len(arguments):
        raise ValueError(
            f"the row has {len(names)} instructions and arguments for {len(arguments)}; give each its own"
        )
    return [_follows(text, name, given) for name, given in zip(names, arguments, strict=True)]


def _follows(text: str, name: str, given: Mapping[str, Any] | None) -> bool:
    check = CHECKS.get(name)
    if check is None:
        raise ValueError(
            f"`{name}` is no instruction that can be checked here; there are {', '.join(CHECKS)}"
        )
    arguments = {key: value for key, value in (given or {}).items() if value is not None}
    try:
        holds = check(text, **arguments)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"the arguments {arguments!r:.200} are not those of `{name}`: {error}") from None
    return holds and bool(text.strip())


_RELATIONS = {"less than": int.__lt__, "at least": int.__ge__}


def _compares(count: int, relation: str, number: int) -> bool:
    return bool(_RELATIONS[relation](count, int(number)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _has_word(text: str, word: str) -> bool:
    return _count(text, word) > 0


def _count(text: str, phrase: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _sentences(text: str) -> int:
    """Runs of text that a mark ends, or the text itself; not at the dots of 3.14, e.g. or single capitals."""
    ends = re.split(r"(?<!\b[A-Z])(?<!\be\.g)(?<!\bi\.e)[.!?]++[\"'”’)\]]*+(?:\s+|$)|\n{2,}", text.strip())
    return sum(bool(re.search(r"\w", part)) for part in ends)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs that *** divides; one at either end may be empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if not all(parts[1:-1]):
        return False
    return sum(map(bool, parts)) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    words = _words(parts[nth_paragraph - 1])
    return bool(words) and words[0].lower() == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    """A line that begins with the marker, whose dots may have spaces after them, and goes on."""
    marker = r"\.\s?".join(map(re.escape, postscript_marker.rstrip(".").split("."))) + r"\.?"
    return re.search(rf"^[^\S\n]*{marker}\s*[^\s.]", text, re.IGNORECASE | re.MULTILINE) is not None


def _highlights(text: str) -> int:
    found = re.findall(r"\*\*([^\n*]+)\*\*|(?<!\*)\*([^\n*]+)\*(?!\*)", text)
    return sum(bool((bold or slanted).strip()) for bold, slanted in found)


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _bullets(text: str) -> int:
    """Lines with a word that begin with a mark; not those of `**bold**`, nor rules."""
    return len(re.findall(r"^[^\S\n]*(?:\*(?!\*)|-(?!-))[^\w\n]*\w", text, re.MULTILINE))


def _is_json(text: str) -> bool:
    """The whole of it, which may stand in a code block."""
    try:
        strict_value(re.sub(r"\A```(?:json)?|```\Z", "", text.strip(), flags=re.IGNORECASE))
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    inner = [part for i, part in enumerate(parts) if part or 0 < i < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, keywords: all(_has_word(text, word) for word in keywords),
    "keywords:frequency": lambda text, keyword, relation, frequency: _compares(
        _count(text, keyword), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_has_word(text, word) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_relation, let_frequency: _compares(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "length_constraints:number_sentences": lambda text, relation, num_sentences: _compares(
        _sentences(text), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, relation, num_words: _compares(
        len(_words(text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: _bullets(text) == num_bullets,
    "detectable_format:constrained_response": lambda text: (
        sum(f"My answer is {word}." in text for word in ("yes", "no", "maybe")) == 1
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        _highlights(text) >= num_highlights
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: re.search(r"<<[^\w\n<>]*\w[^\n<>]*>>", text) is not None,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: re.fullmatch(r'\s*".*"\s*', text, re.DOTALL) is not None,
    "change_case:capital_word_frequency": lambda text, capital_relation, capital_frequency: _compares(
        sum(word.isupper() for word in _words(text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
"""Each by its name: takes the response, and the arguments of IFEval."""
