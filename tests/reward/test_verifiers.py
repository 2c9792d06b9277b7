"""Verifiers on what a policy might try."""

import asyncio

import pytest
from reward_pools import request, running_pool

from asyncrl.reward.verifiers.answers import (
    json_schema,
    multiple_choice,
    number,
    regular_expression,
    strict_json,
)
from asyncrl.reward.verifiers.instructions import CHECKS, followed, followed_all
from asyncrl.reward.verifiers.references import reference_chain

CHOICES = [
    (r"so \boxed{B}", True),
    (r"\boxed{\text{(B)}}", True),
    (r"Option A is too small. \boxed{\textbf{(B)}\ 42}", True),
    (r"Option A is too small. \boxed{\mathrm{B. }42}", True),
    (r"\boxed{(A), (B)}", False),
    (r"\boxed{A or B}", False),
    (r"The answer is A. No, \boxed{B}.", True),
    ("The answer is (B).", True),
    ("**Answer:** B", True),
    ("Answer: **B**", True),
    (r"Option A is too small. The answer is $\text{(B)}$.", True),
    ("The correct option is B because A is wrong.", True),
    ("A is tempting.\nAnswer: A\nWait.\nAnswer: B", True),
    ("Answer: B. Option A is too long, and option C is too short.", True),
    ("Option A fails. **Option B**", True),
    ("answer" + 4 * ("." * 9999 + " " * 9999), False),
    (r"\boxed{" + 99_999 * " ", False),
    ("Let me see ...\n\n(B)", True),
    ("B", True),
    ("The answer is A or B.", False),
    ("Answer: B, C", False),
    ("Answer: B/C/D", False),
    (r"\boxed{B} or \boxed{C}", False),
    ("The answer is a matter of B vitamins.", False),
    ("Answer: B's opposite", False),
    ("A, B, C and D are choices", False),
    ("Better is best.", False),
    ("Answer: B\nNo, the answer is C.", False),
    ("", False),
]


@pytest.mark.parametrize(("text", "is_right"), CHOICES)
def test_one_letter_is_settled_on(text, is_right):
    assert multiple_choice([text], ["B"]) == [float(is_right)]


def test_the_letters_that_are_words():
    texts = ["Answer: A", "The answer is A because it is.", "The answer is a guess.", "Answer: I do not know"]
    assert multiple_choice(texts, ["(A)"] * 3 + ["I"]) == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="'Paris'; it should be the letter of a choice"):
        multiple_choice(["x"], ["Paris"])


NUMBERS = [
    (r"First 7, then \boxed{1{,}000}", "1000", True),
    (r"\boxed{7} no, \boxed{\text{$1,000$ euros}}, as 3 said", "1000", True),
    ("The answer is 1,000.", "1000", True),
    ("In all 0.50 litres", "1/2", True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{\frac12}", "1/2", True),
    (r"\boxed{-\dfrac 3{4}}", "-0.75", True),
    (r"\boxed{3\frac{1}{2}}", "3.5", True),
    (r"2, \frac{1}{2}", "0.5", True),
    (r"\frac{%s}{2}" % ("9" * 5000), "2", True),
    (r"\boxed{-3}", "-3", True),
    ("10-5", "5", True),
    ("10 - -5", "-5", True),
    (r"\boxed{3.0}", "3", True),
    (r"\boxed{3} and 4", "4", False),
    ("1/0", "1", False),
    ("three", "3", False),
    ("", "0", False),
    (r"\boxed{}", "0", False),
    (r"\boxed{" * 5000, "0", False),
    ("9" * 3000, "9", False),
    ("9" * 5000, "9", False),
    ("1/" + "3" * 5000, "9", False),
    ("It is \u22127", "-7", True),
]


@pytest.mark.parametrize(("text", "answer", "is_right"), NUMBERS)
def test_the_last_number_is_compared_by_its_value(text, answer, is_right):
    assert number([text], [answer]) == [float(is_right)]


def test_a_right_answer_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="`ground_truth` is 'x'; it should be a number"):
        number(["3"], ["x"])


def test_a_pattern_is_found_and_its_group_compared():
    texts = ["#### 7\n#### 12 ", "#### 12\n#### 7", "12", "ab\ncd"]
    assert regular_expression(texts[:3], [r"####\s*(\d+)"] * 3, [12] * 3) == [1.0, 0.0, 0.0]
    assert regular_expression(texts[3:], ["a.*d"]) == [1.0]
    assert regular_expression(["a" * 5000 + "!"], [r"(a|aa)+$"]) == [0.0]  # it would take for ever
    with pytest.raises(ValueError, match="no regular expression"):
        regular_expression(["x"], ["("])


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
JSONS = [
    ('{"n": 1}', True),
    ('Here it is:\n```json\n{"n": 1}\n```\nHope this helps.', True),
    ('{"n": 1.5}', False),
    ('{"n": NaN}', False),
    ('{"n": "1"}', False),
    ('{"n": true}', False),
    ('{"n": 1, "n": 2}', False),
    ('{"n": 1, "m": 2}', False),
    ('{"n": 1} or so', False),
    ('```json\n{"n": 1}\n```\n```json\n{"n": 2}\n```', False),
    ('```python\nx\n```\nprints\n```json\n{"n": 1}\n```', True),
    ("[" * 100_000, False),
    ("", False),
]


@pytest.mark.parametrize(("text", "is_allowed"), JSONS)
def test_json_is_what_the_schema_allows(text, is_allowed):
    pytest.importorskip("jsonschema")
    assert json_schema([text], [SCHEMA]) == [float(is_allowed)]
    assert json_schema(["1e999"], [{"multipleOf": 0.01}]) == [0.0]


def test_blocks_that_do_not_end_take_no_time_from_others():
    with pytest.raises(ValueError, match="Expecting value"):  # minutes, if each of them looks for its end
        strict_json("```json\n" * 99_999)


def test_a_schema_that_is_none_is_refused_and_nothing_is_fetched():
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="no JSON schema"):
        json_schema(["1"], ['{"type": "numbr"}'])
    with pytest.raises(ValueError, match="nothing is fetched"):
        json_schema(["1"], [{"$ref": "http://127.0.0.1:9/x"}])


INSTRUCTIONS = {
    "keywords:existence": ({"keywords": ["rain", "sun"]}, ["Sun and RAIN."], ["trains and sunny days"]),
    "keywords:frequency": (
        {"keyword": "rain", "relation": "at least", "frequency": 2},
        ["rain, Rain"],
        ["rain and trains"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["concatenate"], ["The Cat."]),
    "keywords:letter_frequency": (
        {"letter": "Q", "let_relation": "less than", "let_frequency": 2},
        ["q"],
        ["Qq"],
    ),
    "length_constraints:number_sentences": (
        {"relation": "less than", "num_sentences": 3},
        ["It is 3.14, e.g. pi. J. Doe says so!", "One"],
        ["One. Two? Three!", "a.\n\nb.\n\nc."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb"],
        ["a\n\nb", "a\n***\n\n***\nb", "a *** b *** c"],
    ),
    "length_constraints:number_words": (
        {"relation": "at least", "num_words": 3},
        ["it's well-known now"],
        ["- - - one, two"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weeks"},
        ['Many.\n\n"Weeks" ago'],
        ["Many.\n\nWeekset", "Weeks\n\nMany", "Weeks"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[a] [b c]"], ["[] []", "[[a]"]),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["Hi\np. s. more", "P.S. x"],
        ["tips. s", "P.S."],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", '- **A**: x\n* "b"\n---\n* * *'],
        ["* a", "- a\n- b\n- c", "**a**\n**b**", "-\n-"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is yes."],
        ["My answer is yes. My answer is no.", "Yes."],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and **b**"],
        ["*a*", "** ** * *", "***"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION one SECTION two"],
    ),
    "detectable_format:json_format": (
        {},
        ['```json\n{"a": 1}\n```', "[1]"],
        ["{a: 1}", "[NaN]", "So:\n```\n[1]\n```"],
    ),
    "detectable_format:title": ({}, ["<<Joy>>\nx"], ["<< >>", "<Joy>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a******"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, ["say it. it"], ["it. Say it."]),
    "startend:end_checker": ({"end_phrase": "That is all."}, ['x. "That is ALL."'], ["That is all. Not."]),
    "startend:quotation": ({}, [' "x\ny" '], ['"', 'x "y"']),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2},
        ["NASA is BIG"],
        ["Nasa Is BIG"],
    ),
    "change_case:english_capital": ({}, ["ALL 4 OF US"], ["aLL", "42"]),
    "change_case:english_lowercase": ({}, ["all 4 of us"], ["All", "42"]),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b"]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_instruction_is_followed_or_not(name):
    given, good, bad = INSTRUCTIONS[name]
    with_nulls = {"keywords": None, "num_words": None} | given
    for text in good:
        assert followed([text], [[name]], [[with_nulls]]) == [1.0], text
    for text in [*bad, "", " \n"]:
        assert followed([text], [[name]], [[given]]) == [0.0], text


@pytest.mark.parametrize("name", CHECKS)
def test_a_response_that_never_stops_takes_no_time_from_others(name):
    given, *_ = INSTRUCTIONS[name]
    # Each would take minutes of a pattern that looks at all ways to divide it.
    for text in ("\n" * 99_999, "<<" + "a" * 99_999, "<<" + " " * 99_999, "P.S." + " " * 99_999):
        followed([text], [[name]], [[given]])


def test_instructions_count_by_their_share_and_wrong_rows_are_refused():
    names, arguments = ["punctuation:no_comma", "detectable_format:title"], [{}, {}]
    assert followed(["a", "<<b>>"], [names] * 2, [arguments] * 2) == [0.5, 1.0]
    assert followed_all(["a", "<<b>>"], [names] * 2, [arguments] * 2) == [0.0, 1.0]
    with pytest.raises(ValueError, match="`language:x` is no instruction that can be checked"):
        followed(["a"], [["language:x"]], [[{}]])
    with pytest.raises(ValueError, match="not those of `keywords:existence`"):
        followed(["a"], [["keywords:existence"]], [[{"keyword": "a"}]])
    with pytest.raises(ValueError, match="2 instructions and arguments for 1"):
        followed(["a"], [names], [[{}]])


def test_the_key_words_of_a_reference_count_in_its_order():
    reference = "First boil water, then add tea leaves; water again if strong."
    points = [["boil", "water", "tea leaves"], [["strong"], ["dark", "again"]]]
    texts = [
        reference,
        "Boil water. Tea leaves, water: strong!",
        "water tea leaves boil",  # of water, tea leaves | water: 2 of 4
        "boil water tea leaves water " * 5 + "strong " * 4,  # stuffed
        "boiling waters",
        "",
    ]
    found = reference_chain(texts, [points] * 6, [reference] * 6)
    assert found == pytest.approx([1.0, 1.0, 0.25, (4 / 20 + 1 / 4) / 2, 0.0, 0.0])
    with pytest.raises(ValueError, match="none of dark, which"):
        reference_chain(["x"], [[["dark"]]], ["a"])


def test_arguments_stand_in_for_columns():
    part = {
        "function": "asyncrl.reward.verifiers.answers:regular_expression",
        "arguments": {"pattern": "a+"},
    }

    async def main():
        async with running_pool(part) as pool:
            rows = [request(["xa", "b"]), request(["xa", "b"], pattern="b")]
            return [[score.reward for score in await pool.score(row)] for row in rows]

    assert asyncio.run(main()) == [[1.0, 0.0], [0.0, 1.0]]
