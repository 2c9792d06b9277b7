"""Arguments of the chat template from a row's columns `tools` and `chat_template_kwargs`, as in TRL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from asyncrl.data.messages import UnusablePromptError
from asyncrl.data.nulls import IN_SCHEMAS, without_nulls

TOOLS, ARGUMENTS = "tools", "chat_template_kwargs"
OURS = ("messages", "conversation", "tokenize", "add_generation_prompt", "continue_final_message")
"""Arguments of rendering that a row cannot set."""


def template_arguments(common: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a row's chat template: the `common` ones (`data.chat_template_kwargs`),
    overridden by those of the row, and the row's tools. Raises `UnusablePromptError` for invalid columns."""
    own = columns.get(ARGUMENTS) or {}
    if not isinstance(own, dict):
        raise UnusablePromptError(f"has `{ARGUMENTS}` of type {type(own).__name__}; it should be an object")
    if taken := sorted(own.keys() & set(OURS)):
        raise UnusablePromptError(f"has `{ARGUMENTS}.{taken[0]}`, which a row cannot set")
    tools = _tools(columns.get(TOOLS))
    own = {name: value for name, value in own.items() if value is not None}
    return {**common, **own, **({TOOLS: tools} if tools else {})}


def _tools(value: Any) -> list[Any]:
    """Tools as the template takes them. Datasets often store them as JSON text, since Arrow would give every
    schema the keys of all others."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError) as error:
            raise UnusablePromptError(f"has `{TOOLS}` that are not valid JSON: {error}") from None
    tools = without_nulls(value or [], IN_SCHEMAS)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusablePromptError(f"has `{TOOLS}` that are not a list of JSON schemas")
    return tools
