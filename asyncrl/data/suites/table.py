"""The suites by which language models are compared, by name: where their rows are, how a row is asked, and
what scores the response. A further one is a further row of the table."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from asyncrl.data.messages import UnusablePromptError

Ask: TypeAlias = Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]
"""Of a row: what the user asks, and the columns that the scorer reads."""

MATH = "asyncrl.reward.math:math_answer"
NUMBER = "asyncrl.reward.verifiers.answers:number"
CHOICE = "asyncrl.reward.verifiers.answers:multiple_choice"
CODE = "asyncrl.reward.code:passed_all_tests"
JUDGE = "the run's first judge"
"""Which compares the response with the row's own."""
INSTRUCTIONS = "asyncrl.reward.verifiers.instructions:followed_all"

_HERE = Path(__file__).parent
_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
_LETTER = 'Think step by step, and then finish with "The answer is (X)", where X is the letter of the choice.'
_PROGRAM = "Reply with the whole program, imports included, in one block that begins with ```python."
_LANGUAGE = "language:response_language"


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """The same suite in lm-evaluation-harness."""

    file: str
    """Of its settings, without the suffix, in the folder of all tasks."""
    metric: str
    """The one that is its score, as its samples call it."""
    filter: str = "none"
    """What of the response it looks at, where it looks in several ways."""


@dataclass(frozen=True, slots=True)
class Suite:
    area: str
    """What it measures; the mean over suites of an area is a figure of its own."""
    path: str
    """As `data.path`."""
    ask: Ask
    scorer: str
    """The reward function that gives 1 or 0; or `JUDGE`, who gives from 0 to 1."""
    subset: str | None = None
    split: str = "test"
    harness: HarnessTask | None = None
    """None where it has none, or one that runs a model's programs without a sandbox."""

    @property
    def is_shipped(self) -> bool:
        return self.path.startswith(str(_HERE))


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise UnusablePromptError(f"holds {value!r:.100} where a text should be")
    return str(value).strip()


def _mathematics(question: str, answer: str, read: Callable[[Any], Any] = _text) -> Ask:
    """question, answer: columns. read: the answer of what the latter holds."""
    return lambda row: (f"{_text(row[question])}\n\n{_BOXED}", {"ground_truth": read(row[answer])})


def _after_hashes(solution: str) -> str:
    """GSM8K's answer."""
    return _text(solution.rpartition("####")[2]).replace(",", "")


def _olympiad(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Some questions go on from what was said before them."""
    question = "\n\n".join(_text(part) for part in (row.get("context"), row["question"]) if part)
    return f"{_text(question)}\n\n{_BOXED}", {"ground_truth": _text(", ".join(row["final_answer"]))}


def _asked(question: str, options: Sequence[str], answer: str) -> tuple[str, dict[str, Any]]:
    listed = "\n".join(f"{chr(65 + i)}. {_text(option)}" for i, option in enumerate(options))
    return f"{_text(question)}\n\n{listed}\n\n{_LETTER}", {"ground_truth": answer}


def _options(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return _asked(row["question"], row["options"], _text(row["answer"]))


def _gpqa(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The right answer comes first in the rows; here in an order that is always the same."""
    right = row["Correct Answer"]
    options = [right, *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    random.Random(row["Question"]).shuffle(options)
    return _asked(row["Question"], options, chr(65 + options.index(right)))


def _humaneval(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    test = f"{row['test']}\ncheck({row['entry_point']})"
    asked = f"Complete this Python function. {_PROGRAM}\n\n```python\n{row['prompt'].rstrip()}\n```"
    return asked, {"tests": [test]}


def _mbpp(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    tests = ["\n".join([*row["test_imports"], test]) for test in row["test_list"]]
    asked = f"{_text(row['prompt'])}\n\nIt should pass this test:\n\n{row['test_list'][0]}\n\n{_PROGRAM}"
    return asked, {"tests": tests}


def _ifeval(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    names = row["instruction_id_list"]
    if _LANGUAGE in names:
        raise UnusablePromptError(f"asks for {_LANGUAGE}, which needs a classifier of languages")
    return _text(row["prompt"]), {"instruction_id_list": names, "kwargs": row["kwargs"]}


def _alpaca(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`instruction_difficulty` comes from another file of the same authors, and may be left out."""
    difficulty = float(row.get("instruction_difficulty") or 0.0)
    return _text(row["instruction"]), {"baseline": _text(row["output"]), "difficulty": difficulty}


def _shipped(name: str) -> str:
    return str(_HERE / f"{name}.jsonl")


_AIME = HarnessTask("aime/aime25", "exact_match")
_IFEVAL = HarnessTask("ifeval/ifeval", "prompt_level_strict_acc")

SUITES = {
    "math500": Suite(
        "mathematics",
        "hub:HuggingFaceH4/MATH-500",
        _mathematics("problem", "answer"),
        MATH,
        harness=HarnessTask("minerva_math/minerva_math500", "math_verify"),
    ),
    "gsm8k": Suite(
        "mathematics",
        "hub:openai/gsm8k",
        _mathematics("question", "answer", _after_hashes),
        NUMBER,
        subset="main",
        harness=HarnessTask("gsm8k/gsm8k-cot-zeroshot", "exact_match", "flexible-extract"),
    ),
    "aime24": Suite(
        "mathematics",
        "hub:HuggingFaceH4/aime_2024",
        _mathematics("problem", "answer"),
        NUMBER,
        split="train",
        harness=HarnessTask("aime/aime24", "exact_match"),
    ),
    "aime25": Suite(
        "mathematics", "hub:math-ai/aime25", _mathematics("problem", "answer"), NUMBER, harness=_AIME
    ),
    "amc23": Suite("mathematics", "hub:math-ai/amc23", _mathematics("question", "answer"), NUMBER),
    "minerva": Suite("mathematics", "hub:math-ai/minervamath", _mathematics("question", "answer"), MATH),
    "olympiad": Suite(
        "mathematics",
        "hub:Hothan/OlympiadBench",
        _olympiad,
        MATH,
        subset="OE_TO_maths_en_COMP",
        split="train",
    ),
    "gpqa": Suite(
        "science",
        "hub:Idavidrein/gpqa",
        _gpqa,
        CHOICE,
        subset="gpqa_diamond",
        split="train",
        harness=HarnessTask("gpqa/cot_zeroshot/gpqa_diamond_cot_zeroshot", "exact_match", "flexible-extract"),
    ),
    "mmlu_pro": Suite("science", "hub:TIGER-Lab/MMLU-Pro", _options, CHOICE),
    "humaneval": Suite("code", "hub:openai/openai_humaneval", _humaneval, CODE),
    "mbpp": Suite("code", "hub:google-research-datasets/mbpp", _mbpp, CODE, subset="sanitized"),
    "ifeval": Suite(
        "instructions", "hub:google/IFEval", _ifeval, INSTRUCTIONS, split="train", harness=_IFEVAL
    ),
    "alpaca_eval": Suite(
        "chat",
        "hub:tatsu-lab/alpaca_eval",
        _alpaca,
        JUDGE,
        subset="alpaca_eval_gpt4_baseline",
        split="eval",
    ),
    "mini_chat": Suite("chat", _shipped("mini_chat"), _alpaca, JUDGE),
    "mini_math": Suite(
        "mathematics", _shipped("mini_math"), _mathematics("problem", "answer"), NUMBER, harness=_AIME
    ),
    "mini_choice": Suite(
        "science",
        _shipped("mini_choice"),
        _options,
        CHOICE,
        harness=HarnessTask("mmlu_pro/mmlu_pro_other", "exact_match", "custom-extract"),
    ),
    "mini_code": Suite("code", _shipped("mini_code"), _mbpp, CODE),
    "mini_instructions": Suite(
        "instructions", _shipped("mini_instructions"), _ifeval, INSTRUCTIONS, harness=_IFEVAL
    ),
}
"""What they are of: MATH-500 (arXiv 2305.20050), GSM8K (2110.14168), AIME and AMC (the contests of these
years), the quantitative reasoning of Minerva (2206.14858), OlympiadBench's mathematics in English without
pictures (2402.14008), GPQA Diamond (2311.12022), MMLU-Pro (2406.01574), HumanEval (2107.03374), MBPP
sanitized (2108.07732), IFEval (2311.07911), AlpacaEval 2 (2404.04475). Those
that begin with `mini_` are of this package: a few easy rows each, for tests and a first look."""

GROUPS = {
    "mini": ("mini_math", "mini_choice", "mini_code", "mini_instructions"),
    "grlo": (
        *("math500", "gsm8k", "aime24", "aime25", "amc23", "minerva", "olympiad"),
        *("gpqa", "humaneval", "mbpp", "ifeval"),
    ),
}
"""Several by one name. `grlo`: of mathematics, science and code, as its paper tells of, and instructions."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs of responses, by which reward models are compared: rows with `prompt`, `chosen`, `rejected` and
    `subset`."""

    path: str
    """As `data.path`."""
    split: str = "train"


PREFERENCES = {
    "rewardbench": Preferences("hub:allenai/reward-bench", split="filtered"),
    "mini_preferences": Preferences(_shipped("mini_preferences")),
}

_CODE = ("cpp", "go", "java", "js", "python", "rust")
SECTIONS = {
    "chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
        "mini-chat": 4,
    },
    "chat hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
        "mini-chat-hard": 4,
    },
    "safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
        "mini-safety": 4,
    },
    "reasoning": {"math-prm": 984, **{f"hep-{name}": 164 for name in _CODE}, "mini-reasoning": 4},
}
"""RewardBench's (2403.13787), with the weight of each subset as in its authors' code (`math-prm` counts as
much as all programs), and those of this package."""
