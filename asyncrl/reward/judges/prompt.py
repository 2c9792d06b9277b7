"""The prompts of judges: Jinja templates in files, the package's own or the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from asyncrl.config import RewardJudgeConfig
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.paths import user_path
from asyncrl.reward.judges.questions import Criterion
from asyncrl.reward.score import Message

_FOLDER = Path(__file__).with_name("prompts")
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
)
NAMES = ("prompt", "responses", "response", "reference", "rubric", "row", "scale", "fence")


class JudgePrompt:
    """What a judge is told. key: of the judge in the config. Raises `ConfigError` for a file that is not
    there, or is no such template."""

    def __init__(self, judge: RewardJudgeConfig, key: str = "reward.judges") -> None:
        self._judge = judge
        if judge.prompt is None:
            path = _FOLDER / f"{judge.asks}.jinja"
        else:
            path = user_path(judge.prompt, f"{key}.prompt={judge.prompt}")
        if not path.is_file():
            raise NotHereError(
                f"{key}.prompt={judge.prompt}: there is no such file",
                command="write it; paths are relative to the current directory",
            )
        try:
            source = path.read_text("utf-8")
            unknown = meta.find_undeclared_variables(_ENVIRONMENT.parse(source)) - set(NAMES)
            self._template = _ENVIRONMENT.from_string(source)
        except (TemplateSyntaxError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}.prompt: {path} is no Jinja template: {error}") from None
        if unknown:
            raise ConfigError(
                f"{key}.prompt: {path} names `{min(unknown)}`; there are {', '.join(NAMES)}, and the row's "
                "columns as row.NAME"
            )

    def render(
        self,
        prompt: str | Sequence[Message],
        shown: Sequence[str],
        rubric: Sequence[Criterion],
        row: Mapping[str, Any],
    ) -> str:
        """The user's message to the judge. shown: responses in the order of the question. Raises `ValueError`
        for a row without a column that the template reads."""
        column = self._judge.reference_column
        try:
            return self._template.render(
                prompt=_told(prompt),
                responses=shown,
                response=shown[0],
                reference=None if column is None else row[column],
                rubric=rubric,
                row=row,
                scale=self._judge.scale,
                fence=_fence(shown),
            )
        except Exception as error:  # of any kind: it is the user's program
            raise ValueError(f"the judge's prompt cannot be written for this row: {error}") from error


def _told(prompt: str | Sequence[Message]) -> str:
    """A conversation as text; one message alone as it is."""
    if isinstance(prompt, str):
        return prompt
    turns = [(str(turn.get("role")), _content(turn.get("content"))) for turn in prompt]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)


def _content(content: Any) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _fence(shown: Sequence[str]) -> str:
    """A word that no response has: what stands between its marks cannot end them, and tell the judge what to
    say. The same for the same responses, whose verdict is kept."""
    return hashlib.blake2b("\0".join(shown).encode(), digest_size=6).hexdigest()
