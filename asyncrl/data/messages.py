"""Checks prompts as datasets provide them: texts and conversations."""

from __future__ import annotations

import json
from typing import Any

from asyncrl.data.nulls import IN_MESSAGES, without_nulls
from asyncrl.data.prompts import Message


class UnusablePromptError(ValueError):
    """A prompt is unusable. The message says what is wrong with it and what would be right."""


def check_prompt(value: Any, system_prompt: str | None) -> str | list[Message]:
    """A row's prompt, with `system_prompt` (if any) put before it. Raises `UnusablePromptError`."""
    system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    match value:
        case None:
            raise UnusablePromptError("is null; it should be a string or a list of messages")
        case str():
            if not value.strip():
                raise UnusablePromptError("is empty")
            if _is_conversation_as_text(value):
                raise UnusablePromptError(
                    "is a conversation in JSON text, which the model would read as raw JSON; store it as a "
                    "list of messages"
                )
            return value if system_prompt is None else [*system, {"role": "user", "content": value}]
        case list():
            messages = [_with_content(message) for message in without_nulls(value, IN_MESSAGES)]
            _check_messages(messages)
            return messages if messages[0]["role"] == "system" else [*system, *messages]
    raise UnusablePromptError(
        f"is of type {type(value).__name__}; it should be a string or a list of messages"
    )


def _with_content(message: Any) -> Any:
    """A message that only calls tools gets an empty `content`, which templates expect."""
    if isinstance(message, dict) and message.get("tool_calls") and "content" not in message:
        return {**message, "content": ""}
    return message


def _is_conversation_as_text(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(message, dict) and "role" in message for message in value)


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise UnusablePromptError("is an empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UnusablePromptError(f"message {i} is of type {type(message).__name__}, not an object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise UnusablePromptError(f"message {i} has no `role` (system, user, ...)")
        calls_tools = content is None and bool(message.get("tool_calls"))
        if not isinstance(content, str) and not calls_tools:
            kind = "missing" if content is None else f"of type {type(content).__name__}"
            raise UnusablePromptError(f"the `content` of message {i} is {kind}; it should be text")
    last = messages[-1]
    if last["role"] == "assistant":
        raise UnusablePromptError("ends with the assistant's message; a prompt ends before the answer")
    if not last.get("content", "").strip():
        raise UnusablePromptError("ends with an empty message")
