"""A model's tokenizer: the one way by which everything that needs it comes by it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from asyncrl.errors import AsyncRLError
from asyncrl.paths import user_path

_WHOLE, _TEKKEN = "tokenizer.json", "tekken.json"


class TokenizerError(AsyncRLError):
    """A model has no tokenizer that can be used.

    reason: why, without the model's name.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"no tokenizer could be loaded from {path}: {reason}; save the model's own into the folder"
        )
        self.reason = reason


class Source(Protocol):
    """The settings of a model: a folder or a name on the hub, and whether its code may run."""

    @property
    def path(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The same object for the same model: nobody changes it. Raises `TokenizerError`."""
    return _loaded_once(source.path, source.trust_remote_code)


@lru_cache(maxsize=4)
def _loaded_once(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return read_tokenizer(path, trust_remote_code=trust_remote_code)


def read_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """As the model's files have it now. Raises `TokenizerError`."""
    path = str(user_path(path, path)) if path.startswith("~") else path
    try:
        tokenizer = _read(path, trust_remote_code)
    except Exception as error:
        file = f"its {_WHOLE} cannot be used: " * _has(path, _WHOLE)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenizerError(path, file + lines[0]) from error
    # Where there are no tokenizer files, transformers 5 makes an empty one of the architecture's class.
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
    # Beside a tekken.json, transformers would prefer a class of mistral_common's, which encodes no special
    # token of a text that a chat template has written.
    chosen = {} if tekken is None else {"mistral_format": False}
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **chosen)


_QUIET: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def _has(path: str, name: str) -> bool:
    return cached_file(path, name, **_QUIET) is not None


def _converted(path: str, tekken: str) -> PreTrainedTokenizerFast:
    """Mistral's own format in Hugging Face's. The chat template is the folder's, or that which mistral_common
    makes of the file, where it is installed.

    A text begins with the token that begins a sequence, as mistral_common and Mistral's tokenizer.json files
    have it.
    """
    from transformers.integrations.mistral import convert_tekken_tokenizer

    try:
        tokenizer = convert_tekken_tokenizer(tekken)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {_TEKKEN} is not of a kind that transformers converts ({error!r})") from None
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    tokenizer.name_or_path = path
    return tokenizer
