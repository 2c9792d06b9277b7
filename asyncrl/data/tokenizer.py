"""Loads a model's tokenizer, for everything that needs one."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from asyncrl.data.hub import is_name
from asyncrl.errors import AsyncRLError
from asyncrl.paths import user_path

_WHOLE, _TEKKEN = "tokenizer.json", "tekken.json"


class TokenizerError(AsyncRLError):
    """A model has no usable tokenizer. reason: why, without the model's name."""

    def __init__(
        self, path: str, reason: str, advice: str = "save the model's tokenizer to the folder"
    ) -> None:
        super().__init__(f"no tokenizer could be loaded from {path}: {reason}; {advice}")
        self.reason = reason


class Source(Protocol):
    """Settings of a model: its folder or hub name, and whether its code may run."""

    @property
    def path(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """A shared object for each model, not to be changed. Raises `TokenizerError`."""
    return _loaded_once(source.path, source.trust_remote_code)


@lru_cache(maxsize=4)
def _loaded_once(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return read_tokenizer(path, trust_remote_code=trust_remote_code)


def read_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A new object from the model's current files. Raises `TokenizerError`."""
    path = str(user_path(path, path)) if path.startswith("~") else path
    if not is_name(path) and not Path(path).is_dir():
        raise TokenizerError(path, "there is no such folder", "name a model's folder, or a model of the hub")
    try:
        tokenizer = _read(path, trust_remote_code)
    except Exception as error:
        file = f"its {_WHOLE} cannot be used: " * _has(path, _WHOLE)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenizerError(path, file + lines[0]) from error
    # Without tokenizer files, transformers 5 makes an empty tokenizer of the architecture's class.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        files = {_WHOLE, "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
        there = sorted(name for name in files if _has(path, name))
        lacks = f"{', '.join(there)} without a vocabulary" if there else f"none of {', '.join(sorted(files))}"
        raise TokenizerError(path, f"the folder has {lacks}")
    return tokenizer


def _read(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tekken = cached_file(path, _TEKKEN, **_QUIET)
    if tekken is not None and not _has(path, _WHOLE):
        return _converted(path, tekken)
    # If there is a tekken.json, transformers prefers a class of mistral_common, which encodes no special
    # tokens in a text from a chat template.
    chosen = {} if tekken is None else {"mistral_format": False}
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **chosen)


_QUIET: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def _has(path: str, name: str) -> bool:
    return cached_file(path, name, **_QUIET) is not None


def _converted(path: str, tekken: str) -> PreTrainedTokenizerFast:
    """Mistral's own format converted to Hugging Face's. The chat template comes from the folder, or from
    mistral_common if that is installed.

    A text starts with the beginning-of-sequence token, as in mistral_common and Mistral's tokenizer.json
    files.
    """
    from transformers.integrations.mistral import convert_tekken_tokenizer

    try:
        tokenizer = convert_tekken_tokenizer(tekken)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"transformers cannot convert its {_TEKKEN} ({error!r})") from None
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    tokenizer.name_or_path = path
    return tokenizer
