"""How a conversation becomes tokens and an answer's tokens a message, and how a conversation goes on without
anything that was sampled being tokenised again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncrl.config import Config
from asyncrl.data.stops import end_of_turn, stop_token_ids
from asyncrl.data.tokenise import cut_beyond
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.data.values import Message
from asyncrl.errors import ConfigError
from asyncrl.packages import need
from asyncrl.rollout.transcript import Completion

if TYPE_CHECKING:
    from renderers.base import Renderer
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of functions."""
AUTO, TEMPLATE = "auto", "template"


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer, and what it was an answer to.

    prompt_ids: int32[P]. messages: the conversation up to and with the answer; empty where it was asked for
    by tokens.
    """

    prompt_ids: NDArray[np.int32]
    completion: Completion
    messages: Sequence[Message] = ()
    tools: Tools | None = None

    @property
    def completion_ids(self) -> NDArray[np.int32]:
        return self.completion.token_ids

    @property
    def token_ids(self) -> NDArray[np.int32]:
        return np.concatenate([self.prompt_ids, self.completion_ids])

    def is_continued_by(self, messages: Sequence[Message], tools: Tools | None) -> bool:
        """Whether the messages begin with this conversation. Clients send back what they were given in their
        own words: without the reasoning, null for an empty text, other spaces in arguments."""
        n = len(self.messages)
        return (
            0 < n < len(messages)
            and list(self.tools or ()) == list(tools or ())
            and all(_essence(a) == _essence(b) for a, b in zip(self.messages, messages[:n], strict=True))
        )

    def thinks_as(self, messages: Sequence[Message]) -> bool:
        """Whether messages that continue it have its very reasoning, by which equal answers differ."""
        both = zip(self.messages, messages, strict=False)
        return all(a.get("reasoning_content") == b.get("reasoning_content") for a, b in both)


def _essence(message: Message) -> tuple[Any, ...]:
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return (
        message.get("role"),
        message.get("content") or "",
        [(call.get("name"), json_or_text(call.get("arguments"))) for call in calls],
        message.get("tool_call_id"),
    )


class ChatFormat(Protocol):
    def encode(self, text: str) -> list[int]:
        """Without special tokens that its beginning or end would get."""

    def decode(self, token_ids: Sequence[int] | NDArray[np.int32]) -> str:
        """With special tokens."""

    def render(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        """The prompt of a conversation, up to where the answer begins. Raises `ValueError`."""

    def extend(self, turn: Turn, new: Sequence[Message]) -> list[int] | None:
        """The prompt of a conversation that goes on: begins with the turn's tokens. None where the format
        writes what was before in another way once it goes on."""

    def parse(
        self, completion_ids: NDArray[np.int32], prompt_ids: NDArray[np.int32], tools: Tools | None
    ) -> Message:
        """The answer as an assistant's message."""

    def settled(
        self, completion_ids: Sequence[int], prompt_ids: NDArray[np.int32], tools: Tools | None
    ) -> str:
        """Of an answer that is being sampled, how its text begins, whatever may follow."""


class _OfTokenizer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int] | NDArray[np.int32]) -> str:
        ids = np.asarray(token_ids).tolist()
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class TemplateChat(_OfTokenizer):
    """By the tokenizer's chat template, whatever it is.

    ends: tokens that end a turn. arguments: of the template. context_tokens: longest sequence that there is
    room for; of a prompt that is far longer, only a beginning without room is tokenised.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        arguments: Mapping[str, Any] | None = None,
        context_tokens: int | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self._context_tokens = context_tokens
        self._arguments = dict(arguments or {})
        self._ends = {*ends, tokenizer.eos_token_id}
        end = end_of_turn(tokenizer)
        self._end = "" if end is None else self.decode([end])
        self._ends.add(end)
        template = str(tokenizer.chat_template or "")
        self._knows = {key for key in ("reasoning_content", "tool_calls") if key in template}

    def render(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        return self._shown(self._text(messages, tools))

    def extend(self, turn: Turn, new: Sequence[Message]) -> list[int] | None:
        """Where the template's text begins with what was read and sampled, what follows that; else where it
        writes the turn with other white space only (as JSON may have), what follows the turn."""
        before = turn.token_ids.tolist()
        text = self._text([*turn.messages, *new], turn.tools)
        seen = self.decode(before)
        if text.startswith(seen):
            return before + self._shown(text[len(seen) :])
        asked = self._text(turn.messages[:-1], turn.tools)
        closed = self._text(turn.messages, turn.tools, asks=False)
        answer, end, _ = closed.removeprefix(asked).rpartition(self._end or "\0")
        is_kept = text.startswith(closed) and closed.startswith(asked) and bool(end)
        if not is_kept or _squashed(answer) != _squashed(self.decode(self._inner(turn.completion_ids))):
            return None
        follows = text[len(asked) + len(answer) :]
        return before + self._shown(follows.removeprefix(end) if before[-1] in self._ends else follows)

    def parse(
        self, completion_ids: NDArray[np.int32], prompt_ids: NDArray[np.int32], tools: Tools | None
    ) -> Message:
        """Reasoning between `<think>` and `</think>`, calls as JSON between `<tool_call>` and `</tool_call>`.
        What the template has no place for stays in the text as well."""
        text = self.decode(self._inner(completion_ids))
        message: Message = {"role": "assistant"}
        thought, closed, rest = text.partition("</think>")
        opened = thought.lstrip().startswith("<think>")
        if "reasoning_content" in self._knows and (opened or (closed and self._is_thinking(prompt_ids))):
            message["reasoning_content"] = thought.strip().removeprefix("<think>").strip()
            text = rest.lstrip("\n")
        calls, besides = _calls(text) if tools else ([], text)
        if calls:
            message["tool_calls"] = calls
            if "tool_calls" in self._knows:
                text = besides.strip()
        return message | {"content": text}

    def settled(
        self, completion_ids: Sequence[int], prompt_ids: NDArray[np.int32], tools: Tools | None
    ) -> str:
        """Nothing as long as it may be reasoning, and nothing that may be a call's beginning, or white space
        before one. Characters of several tokens wait for the last of them."""
        text = self.decode(self._inner(np.asarray(completion_ids))).rstrip("\ufffd")
        if "reasoning_content" in self._knows:
            begun = text.lstrip()[: len("<think>")]
            if "<think>".startswith(begun) or self._is_thinking(prompt_ids):
                return ""
        if not tools:
            return text
        text = before_any(text, ["<tool_call>"])
        return "" if text[:1].isspace() else text.rstrip()

    def _shown(self, text: str) -> list[int]:
        if self._context_tokens is not None:
            text = cut_beyond(text, self._context_tokens, self._tokenizer)
        return self.encode(text)

    def _inner(self, completion_ids: NDArray[np.int32]) -> list[int]:
        """Without the token that ended it."""
        ids: list[int] = completion_ids.tolist()
        return ids[:-1] if ids and ids[-1] in self._ends else ids

    def _is_thinking(self, prompt_ids: NDArray[np.int32]) -> bool:
        return self.decode(prompt_ids[-4:]).rstrip().endswith("<think>")

    def _text(self, messages: Sequence[Message], tools: Tools | None, *, asks: bool = True) -> str:
        from jinja2 import TemplateError

        arguments = self._arguments | ({"tools": [dict(tool) for tool in tools]} if tools else {})
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [_for_template(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=asks,
                    **arguments,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the model's chat template rejects the conversation: {error}") from error


class RendererChat(_OfTokenizer):
    """By the package `renderers`, for a family of models that it knows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> None:
        super().__init__(tokenizer)
        self._renderer = renderer

    def render(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        return self._renderer.render_ids(
            [_for_template(message) for message in messages], tools=_specs(tools), add_generation_prompt=True
        )

    def extend(self, turn: Turn, new: Sequence[Message]) -> list[int] | None:
        extended = self._renderer.bridge_to_next_turn(
            *(turn.prompt_ids.tolist(), turn.completion_ids.tolist()),
            [_for_template(message) for message in new],
            tools=_specs(turn.tools),
        )
        before = turn.token_ids.tolist()
        if extended is None or extended.token_ids[: len(before)] != before:
            return None
        return list(extended.token_ids)

    def settled(
        self, completion_ids: Sequence[int], prompt_ids: NDArray[np.int32], tools: Tools | None
    ) -> str:
        """Nothing: the package reads whole answers."""
        return ""

    def parse(
        self, completion_ids: NDArray[np.int32], prompt_ids: NDArray[np.int32], tools: Tools | None
    ) -> Message:
        parsed = self._renderer.parse_response(
            completion_ids.tolist(), tools=_specs(tools), prompt_ids=prompt_ids.tolist()
        )
        message: Message = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning_content:
            message["reasoning_content"] = parsed.reasoning_content
        if calls := [call for call in parsed.tool_calls if call.status == "ok" and call.name]:
            message["tool_calls"] = [
                _call(i, str(call.name), call.arguments, call.id) for i, call in enumerate(calls)
            ]
        return message


def make_chat(config: Config, context_tokens: int | None = None) -> ChatFormat:
    """As `rollout.renderer` says. context_tokens: as of `TemplateChat`. Raises `ConfigError`."""
    tokenizer, name = load_tokenizer(config.model), config.rollout.renderer
    if name != TEMPLATE and (renderer := _renderer(tokenizer, config, name)) is not None:
        return RendererChat(tokenizer, renderer)
    ends = (*stop_token_ids(config.model), *config.rollout.stop_token_ids)
    return TemplateChat(tokenizer, ends, config.data.chat_template_kwargs, context_tokens)


def _renderer(tokenizer: PreTrainedTokenizerBase, config: Config, name: str) -> Renderer | None:
    """None where `auto` finds none."""
    if name != AUTO:
        need("renderers", f"rollout.renderer={name}")
    try:
        from renderers.base import MODEL_RENDERER_MAP, create_renderer
        from renderers.configs import config_from_name
    except ImportError:
        return None
    if name == AUTO and (name := MODEL_RENDERER_MAP.get(config.model.path, "")) == "":
        return None
    try:
        return create_renderer(
            tokenizer, config_from_name(name), chat_template_kwargs=config.data.chat_template_kwargs
        )
    except (ValueError, KeyError) as error:
        raise ConfigError(f"rollout.renderer={name}: {error}") from None


def _for_template(message: Message) -> Message:
    """With arguments of calls as objects, as templates take them."""
    if not (calls := message.get("tool_calls")):
        return message
    functions = [call.get("function", call) for call in calls]
    parsed = [{**call, "arguments": json_or_text(call.get("arguments"))} for call in functions]
    return {
        **message,
        "content": message.get("content") or "",
        "tool_calls": [{**call, "function": f} for call, f in zip(calls, parsed, strict=True)],
    }


def _specs(tools: Tools | None) -> list[Any] | None:
    """As `renderers` takes them: the functions alone."""
    return [dict(tool.get("function", tool)) for tool in tools] if tools else None


_END = "</tool_call>"
# Possessive, since a response may begin calls to its end.
_CALL = re.compile(rf"<tool_call>\s*+(\{{(?:(?!{_END}).)*+){_END}", re.DOTALL)


def _calls(text: str) -> tuple[list[dict[str, Any]], str]:
    """The calls in a text, and the text without them; what is none is left in it."""
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        call = json_or_text(found[1])
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return found[0]
        calls.append(_call(len(calls), call["name"], call.get("arguments", {})))
        return ""

    ended, end, rest = text.rpartition(_END)
    return calls, _CALL.sub(take, ended + end) + rest


def _call(i: int, name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    """In OpenAI's form."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {
        "id": call_id or f"call_{i}",
        "type": "function",
        "function": {"name": _paired(name), "arguments": _paired(text)},
    }


def _paired(text: str) -> str:
    """With U+FFFD for halves of characters, which JSON may name: they can be neither sent nor tokenised."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_or_text(value: Any) -> Any:
    """A JSON text's value; other texts and values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # also for a number of thousands of digits
        return value


def before_any(text: str, marks: Sequence[str]) -> str:
    """A text up to the first of these, or up to what may become one."""
    ends = [text.find(mark) for mark in marks if mark in text]
    for mark in marks:
        ends += [len(text) - n for n in range(1, len(mark)) if text.endswith(mark[:n])]
    return text[: min(ends, default=len(text))]


def _squashed(text: str) -> str:
    return re.sub(r"\s+", "", text)
