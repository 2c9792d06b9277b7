"""Scores responses with a Hugging Face sequence-classification model of one output."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from asyncrl.config import RewardModelConfig
from asyncrl.data.tokenizer import TokenizerError, load_tokenizer
from asyncrl.decoders.attention_cap import keep_cap
from asyncrl.errors import RunFailed
from asyncrl.reward.score import Message, RewardError
from asyncrl.reward.template import UnreadablePairError, pair_ids

log = logging.getLogger(__name__)


class SequenceScorer:
    """Scores tokenised pairs. Not thread-safe."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self.max_tokens: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        """Length of the longest pair that the model's positions allow."""

    def tokens(self, prompt: str | Sequence[Message], response: str) -> list[int]:
        """A pair's token ids. Raises `UnreadablePairError`."""
        ids = pair_ids(self._tokenizer, prompt, response)
        if not ids:
            raise UnreadablePairError("its chat template renders the pair as an empty text")
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise UnreadablePairError(
                f"the pair has {len(ids)} tokens, but the model has only {self.max_tokens} positions"
            )
        return ids

    @torch.inference_mode()
    def score(self, pairs: Sequence[list[int]]) -> list[float]:
        """The scores of tokenised pairs, in one forward pass, or in several if the GPU's memory requires
        it."""
        try:
            return pooled_logits(self._model, pairs).tolist()
        except torch.OutOfMemoryError:
            if len(pairs) == 1:
                raise
        half = len(pairs) // 2
        log.warning("out of memory with %d pairs: scoring them in two halves", len(pairs))
        return self.score(pairs[:half]) + self.score(pairs[half:])


class LocalRewardModel:
    """A reward model in this process, for `inline` mode. It scores pair by pair, so that no score depends on
    which other pairs happened to be waiting."""

    def __init__(self, label: str, scorer: SequenceScorer) -> None:
        self._label = label
        self._scorer = scorer

    async def score(self, prompt: str | list[Message], response: str) -> float:
        try:
            return self._scorer.score([self._scorer.tokens(prompt, response)])[0]
        except UnreadablePairError as error:
            raise RewardError(self._label, str(error), 1, kind="model") from None

    def drain_metrics(self) -> dict[str, tuple[float, int]]:
        return {}


def pooled_logits(model: PreTrainedModel, pairs: Sequence[list[int]]) -> Tensor:
    """float32[N]: the model's output for N tokenised pairs, padded on the right."""
    text = model.config.get_text_config()
    pad = _padding_id({ids[-1] for ids in pairs})
    longest = max(len(ids) for ids in pairs)
    input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in pairs], device=model.device)
    lengths = torch.tensor([len(ids) for ids in pairs], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    no_cache = {"use_cache": False} if hasattr(text, "use_cache") else {}
    before = text.pad_token_id
    text.pad_token_id = pad
    try:
        logits = model(input_ids=input_ids, attention_mask=mask.long(), **no_cache).logits
    finally:
        text.pad_token_id = before
    return logits.float().squeeze(-1)


def _padding_id(last_ids: set[int]) -> int:
    """A token id that no pair ends with.

    Decoders pool at the last token that is not the padding token. Many tokenizers have no padding token, or
    use the end of sequence: their models would pool one token too early.
    """
    return next(i for i in range(len(last_ids) + 1) if i not in last_ids)


def load_scorer(config: RewardModelConfig) -> SequenceScorer:
    """Load a reward model. Raises `RunFailed` unless its files are complete, the head included."""
    disable_progress_bar()  # it belongs on a terminal, not in a log
    where = f"reward model `{config.label}` ({config.path})"
    try:
        tokenizer = load_tokenizer(config)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.path,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError, TokenizerError) as error:
        raise RunFailed(f"{where} cannot be loaded: {error}") from error
    if random := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise RunFailed(
            f"{where}: its files lack {', '.join(random)}, which would be random; save the whole model again"
        )
    keep_cap(model)
    device = _device(config)
    if device.type == "cuda" and config.gpu_memory < 1:
        torch.cuda.set_per_process_memory_fraction(config.gpu_memory)
    _score_in_float32(model)
    return SequenceScorer(model.to(device), tokenizer)


def _score_in_float32(model: PreTrainedModel) -> None:
    """In bfloat16, scores around 20 are multiples of 1/8: too coarse to compare the responses of a group."""
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _device(config: RewardModelConfig) -> torch.device:
    chosen = config.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen)
