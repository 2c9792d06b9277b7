"""What can be known of a model without its weights; refuses what cannot be trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.config import ModelConfig
from asyncrl.data import hub
from asyncrl.decoders.facts import DTYPE_BYTES, LayerShape, ModelFacts
from asyncrl.decoders.layer_sizes import largest_of_layers
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.paths import user_path

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that the settings name."""

    key: str
    """The setting, for messages."""
    path: str
    trust_remote_code: bool
    advice: str
    """What to do where there is no such model."""

    def __str__(self) -> str:
        return f"{self.key}={self.path}"

    def lacks(self, what: str, advice: str) -> NotHereError:
        """What to raise where the model, or a part of it, is not on this machine."""
        if hub.is_name(self.path):
            return NotFetchedError(
                f"{self}: not in this machine's cache of the Hugging Face hub",
                command=f"a run fetches it at its start, or now: hf download {self.path}",
            )
        is_tiny = self.key == "model.path" and self.path == "models/tiny"
        command = f"asyncrl tiny-model {self.path}" if is_tiny else f"{self.key}=FOLDER, or a name on the hub"
        return NotHereError(f"{self}: {what}", command=command, advice=advice)


class NotFetchedError(NotHereError):
    """A model of the hub is not in this machine's cache, or not whole: a run fetches it before it starts."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model whose `config.json` can be read; its weights and tokenizer may be missing."""

    source: ModelSource
    folder: Path | None
    """None where only its sizes are known."""
    config: PreTrainedConfig


def find_policy(model: ModelConfig) -> FoundModel:
    """The decoder-only language model that `model.path` names. Raises as `find_model`."""
    advice = (
        f"if it is the quickstart's model, build it with `asyncrl tiny-model {model.path}`; else give a "
        "folder with a Hugging Face model, or a hub name such as Qwen/Qwen3-0.6B"
    )
    source = ModelSource("model.path", model.path, model.trust_remote_code, advice)
    return find_model(source, check_decoder_only)


def find_model(source: ModelSource, check: Callable[[ModelSource, PreTrainedConfig], None]) -> FoundModel:
    """The model, if `check` has nothing against its `config.json`. Raises `NotHereError` when it is not on
    this machine, `ConfigError` when it is something else."""
    folder = _find(source)
    config = _config(source, folder)
    check(source, config)
    return FoundModel(source, folder, config)


def _find(source: ModelSource) -> Path:
    """The model's folder: its own, or that in the cache of the hub."""
    path = source.path
    folder = user_path(path, str(source))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            mistral = "; params.json is in Mistral's own format: use the model in Hugging Face's"
            raise ConfigError(
                f"{source}: the folder holds no Hugging Face model (no config.json in it)"
                + mistral * (folder / "params.json").is_file()
            )
        return folder
    if folder.is_file():
        raise ConfigError(f"{source}: this is a file, not a model's folder; name the folder that holds it")
    cached = hub.cached(path) if hub.is_name(path) else None
    if cached is None:
        raise source.lacks(f"there is no folder {folder.absolute()}", source.advice)
    return cached


def _config(source: ModelSource, folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # noqa: BLE001 - transformers and its checks raise kinds of their own
        raise ConfigError(f"{source}: its config.json cannot be used: {_first_line(error)}") from None


def check_decoder_only(source: ModelSource, config: PreTrainedConfig) -> None:
    """Raises `ConfigError` for what is no decoder-only language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    declared = config.architectures or []
    if (
        config.is_encoder_decoder
        or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or (declared and not known & set(declared))
    ):
        kind = ", ".join(declared) or config.model_type
        raise ConfigError(
            f"{source}: {kind} is not a decoder-only language model; only those can be trained "
            "(`...ForCausalLM`: Qwen, Llama, Mistral, Gemma, ...)"
        )


def check_weights(found: FoundModel) -> None:
    """Raises `NotHereError` when weights of a model are missing."""
    source, folder = found.source, found.folder
    if folder is None:
        return
    missing = hub.missing_weights(folder)
    if missing is None:
        raise source.lacks(
            "the folder has a config.json but no weights (model.safetensors)",
            "download or save the model again",
        )
    if missing:
        raise source.lacks(
            f"{len(missing)} of its weight files are missing ({missing[0]}, ...)", "download the model again"
        )


def find_tokenizer(found: FoundModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `NotHereError` when none could be loaded."""
    from asyncrl.data.tokenizer import TokenizerError, read_tokenizer  # imports transformers

    source = found.source
    try:
        return read_tokenizer(str(found.folder), trust_remote_code=source.trust_remote_code)
    except TokenizerError as error:
        if hub.is_name(source.path) and hub.missing_weights(Path(str(found.folder))) == ():
            raise ConfigError(  # it was fetched whole: another try would give the same
                f"{source}: no tokenizer could be loaded from it: {error.reason}; name a model that has one"
            ) from None
        raise source.lacks(
            f"no tokenizer could be loaded from it: {error.reason}",
            "save the model's tokenizer into the folder",
        ) from None


_measured: dict[tuple[str, ...], ModelFacts] = {}
"""By all that they follow from. A run's models are often alike, and a large one's layers take seconds."""


def model_facts(found: FoundModel, dtype: str) -> ModelFacts:
    """A decoder's sizes, from its structure alone. dtype: what it computes in. Raises `ConfigError` for a
    config.json of which no decoder can be made, or none whose layers are alike."""
    with measuring(found.source):
        described = found.config.to_dict()
        if not found.source.trust_remote_code:  # else the model's folder tells whose code it is
            described.pop("_name_or_path", None)
        key = type(found.config).__name__, json.dumps(described, default=str), dtype
        if key not in _measured:
            _measured[key] = _measure(found, dtype)
        return _measured[key]


@contextmanager
def measuring(source: ModelSource) -> Iterator[None]:
    """Whatever transformers raises of a `config.json` is told as a `ConfigError`."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{source}: its config.json does not describe a usable model: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _measure(found: FoundModel, dtype: str) -> ModelFacts:
    import torch
    from transformers import AutoModelForCausalLM

    from asyncrl.decoders.linear_layers import linear_layers
    from asyncrl.plan.facts.footprint import kept_values
    from asyncrl.rollout.engines.torch.probe import why_by_rows

    config = found.config
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=found.source.trust_remote_code)
    text = config.get_text_config()
    layer = layer_shape(config, shell)
    sizes = (text.num_hidden_layers, text.vocab_size, *asdict(layer).values())
    if not all(isinstance(size, int) and (size > 0 or size is False) for size in sizes):
        raise ValueError(f"layers, vocabulary and the sizes of a layer are {sizes}; each should be above 0")
    try:
        kv_values, state_values = kept_values(shell)
    except Exception:  # noqa: BLE001 - code of a model's own, which does not run without values
        kv_values, state_values = 2 * text.num_hidden_layers * layer.kv_heads * layer.head_dim, 0
    return ModelFacts(
        model_type=config.model_type,
        parameters=sum(parameter.numel() for parameter in shell.parameters()),
        vocab_size=text.vocab_size,
        layers=text.num_hidden_layers,
        layer=layer,
        tied_head=bool(getattr(config, "tie_word_embeddings", False)),
        kv_bytes_per_token=kv_values * DTYPE_BYTES[dtype],
        max_positions=getattr(text, "max_position_embeddings", None),
        state_values=state_values,
        linear_layers={n: (m.out_features, m.in_features) for n, m in linear_layers(shell).items()},
        by_rows=why_by_rows(shell),
    )


def layer_shape(config: PreTrainedConfig, shell: nn.Module) -> LayerShape:
    """Of a decoder's layers, the largest of each; without attention they count as of one head. shell: the
    model, without its weights."""
    text = config.get_text_config()
    heads = largest_of_layers(text, "num_attention_heads") or 1
    dense = largest_of_layers(text, "intermediate_size") or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None)
    of_experts = (experts or 0) * (largest_of_layers(text, "moe_intermediate_size") or dense)
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return LayerShape(
        hidden_size=text.hidden_size,
        intermediate_size=of_experts + shared if experts else dense,
        heads=heads,
        kv_heads=largest_of_layers(text, "num_key_value_heads") or heads,
        head_dim=largest_of_layers(text, "head_dim") or text.hidden_size // heads,
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in shell.named_parameters()),
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
