"""Pydantic's validation errors in words: where a setting was made, what is wrong, what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from asyncrl.config.yaml_tree import COMMAND_LINE

OF_PEERS = {
    "learning_rate": "trainer.lr",
    "max_steps": "run.steps",
    "total_training_steps": "run.steps",
    "train_batch_size": "trainer.batch_groups",
    "ppo_mini_batch_size": "trainer.mini_batches",
    "n": "rollout.group_size",
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_new_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "beta": "reference.kl_coef",
    "adv_estimator": "objective.advantage",
    "loss_agg_mode": "objective.aggregation",
    "clip_ratio_low": "objective.clip_eps_low",
    "clip_ratio_high": "objective.clip_eps_high",
    "reward_funcs": "reward.functions",
}
"""What TRL's and verl's settings are called here, as far as their names do not tell."""


def explain(
    error: ValidationError, valid_keys: Sequence[str], source: str, overridden: Sequence[str]
) -> list[str]:
    """One line for each thing that is wrong. `valid_keys` are dotted, with `*` for a list item's number;
    `overridden` are the keys that the command line set, all others come from `source`."""
    return list(_lines(error, valid_keys, source, overridden))


def did_you_mean(key: str, valid_keys: Sequence[str]) -> str:
    """`; did you mean ...?` with the nearest valid keys in full, or else what is valid there."""
    number = re.search(r"(?<=\.)\d+(?=\.)", key)
    here = key.replace(f".{number[0]}.", ".*.") if number else key
    if near := _nearest(here, valid_keys):
        item = number[0] if number else "0"
        return f"; did you mean {' or '.join(f'`{k}`' for k in near).replace('*', item)}?"
    parent = here.rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in valid_keys if k.rpartition(".")[0] == parent]
    return f"; valid here: {', '.join(siblings)}" if siblings else ""


def _nearest(key: str, valid_keys: Sequence[str]) -> list[str]:
    """All keys of the same name elsewhere; else the one that peers call so; else the nearest name in the same
    section, else anywhere."""
    parent, _, name = key.rpartition(".")
    names = {k: k.rpartition(".")[2] for k in valid_keys}
    if same_name := [k for k in valid_keys if names[k] == name]:
        return same_name
    if name in OF_PEERS:
        return [OF_PEERS[name]]
    siblings = {names[k]: k for k in valid_keys if k.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(name, siblings, n=1) or [s for s in siblings if s.startswith(name)]
    if close:
        return [siblings[close[0]]]
    close = difflib.get_close_matches(name, names.values(), n=1, cutoff=0.75)
    return [k for k in valid_keys if names[k] in close]


def _lines(
    error: ValidationError, valid_keys: Sequence[str], source: str, overridden: Sequence[str]
) -> Iterator[str]:
    for e in error.errors(include_url=False):
        key = ".".join(str(part) for part in e["loc"])
        where = COMMAND_LINE if any(_same_path(key, k) for k in overridden) else source
        yield f"{where}: {_explain(key, e, valid_keys, where)}"


def _same_path(a: str, b: str) -> bool:
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _explain(key: str, error: Mapping[str, Any], valid_keys: Sequence[str], where: str) -> str:
    """What is wrong at `key`, which was set at `where`, and what would be right."""
    kind, value = error["type"], error["input"]
    inside = [k.rpartition(".")[2] for k in valid_keys if k.rpartition(".")[0] == key]
    of_items = [k.rpartition(".")[2] for k in valid_keys if k.rpartition(".")[0] == f"{key}.*"]
    match kind:
        case "extra_forbidden":
            return f"unknown key `{key}`{did_you_mean(key, valid_keys)}"
        case "missing" if inside:
            return f"the section `{key}` is missing (its keys: {', '.join(inside)})"
        case "missing":
            return f"`{key}` is missing, and has no default"
        case "model_type" | "model_attributes_type":
            return f"`{key}` is {_yaml(value)}; it is a section" + (
                f" with the keys {', '.join(inside)}" * bool(inside)
            )
        case "list_type" if of_items:
            return (
                f"`{key}` is {_yaml(value)}; it should be a list, [{{key: value, ...}}, ...], of sections "
                f"with the keys {', '.join(of_items)}"
            )
        case "literal_error":
            return f"`{key}` is {_yaml(value)}; valid: {error['ctx']['expected']}"
        case "value_error":
            return f"`{key}` is {_yaml(value)}; {error['ctx']['error']}"
        case "string_type" if isinstance(value, bool | int | float):
            quoted = f"'\"{_yaml(value)}\"'" if where == COMMAND_LINE else f'"{_yaml(value)}"'
            return f"`{key}` is the {_yaml_kind(value)} {_yaml(value)}; it should be text: write {quoted}"
        case "too_short" | "too_long":
            least = error["ctx"].get("min_length")
            most = error["ctx"].get("max_length")
            return f"`{key}` is {_yaml(value)}; it should have " + (
                f"at least {least} item{'s'[: least != 1]}" if most is None else f"at most {most} items"
            )
        case "bool_type":
            return f"`{key}` is {_yaml(value)}; it should be true or false"
        case "float_type" | "int_type" if isinstance(value, str):
            return f"`{key}` is the text {value!r}; it should be {_should(error)}"
    return f"`{key}` is {_yaml(value)}; it should be {_should(error)}"


def _yaml(value: Any) -> str:
    """A value as one would write it in the file, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _yaml_kind(value: bool | float) -> str:
    return "boolean" if isinstance(value, bool) else "number"


def _should(error: Mapping[str, Any]) -> str:
    """What pydantic asks for, as the end of a sentence."""
    words: str = error["msg"]
    for start in ("Input should be ", "Input should have ", "Input should "):
        if words.startswith(start):
            words = words.removeprefix(start)
            return f"something with {words}" if start.endswith("have ") else words
    return words[0].lower() + words[1:]
