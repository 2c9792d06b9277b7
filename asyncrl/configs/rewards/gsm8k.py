"""The reward of configs/ablation-gsm8k.yaml: whether the last number of a response is the right one."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct(completions, answer, **_):
    """1 or 0. The column `answer` of `openai/gsm8k` ends with `#### 1,234`."""
    right = [value(text.rpartition("####")[2]) for text in answer]
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [
        float(number is not None and value(text) == number) for text, number in zip(texts, right, strict=True)
    ]


def value(text):
    """The last number in a text; None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
