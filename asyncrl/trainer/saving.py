"""The trainer's snapshots: its state, and the policy as a folder that `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from asyncrl.scratch import scratch_folder
from asyncrl.trainer.models.checks import ModelError, model_name
from asyncrl.trainer.models.policy import published
from asyncrl.trainer.state import HeldState, on_host
from asyncrl.weights.hashes import hash_weights


class ModelFolder:
    """What a folder of the policy has beside the trained weights.

    Taken before an optimizer takes the model apart. Of the model itself, only what training leaves alone is
    used later on: its config, its names, the types of its modules. Raises `ModelError` for a model whose
    config transformers loads but refuses to save.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        refuse_unsavable(model)
        self._model = model
        self._generation_settings = _generation_settings(model)
        if self._generation_settings is not None:
            model.generation_config = GenerationConfig()  # transformers writes none that contradicts itself
        self._tokenizer = tokenizer
        self.dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        aliases = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self._untrained = {
            name: on_host(tensor) for name, tensor in published(model).items() if name not in aliases
        }

    @property
    def names(self) -> list[str]:
        return [*self.dtypes, *self._untrained]

    def weight(self, name: str, trained: Mapping[str, Tensor]) -> Tensor:
        """In the model's dtype, given the `trained` ones in that or in float32."""
        if name in self._untrained:
            return self._untrained[name]
        return trained[name].to(self.dtypes[name])

    def write(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        weights = {name: self.weight(name, trained) for name in self.names}
        self._model.save_pretrained(folder, state_dict=weights)
        if self._generation_settings is not None:
            (folder / GENERATION_CONFIG_NAME).write_bytes(self._generation_settings)
        self._tokenizer.save_pretrained(folder)


def _generation_settings(model: PreTrainedModel) -> bytes | None:
    """The model's own, as they came; None where it came without."""
    if not model.name_or_path:
        return None
    found = cached_file(
        model.name_or_path,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).read_bytes()


def refuse_unsavable(model: PreTrainedModel) -> None:
    """Raises `ModelError`."""
    with scratch_folder() as folder:
        try:
            model.config.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{model_name(model)}: transformers loads its config.json, but refuses to save it with a "
                f"checkpoint: {error}; correct it in the file"
            ) from error


class ModelSnapshot:
    """A trainer's state at the end of a step, in host memory, which the next step does not change.

    It takes 12 bytes a parameter of the policy and of the critic, and with objective.proximal=ewma 4 more of
    the policy; of several ranks, each keeps its share of that. Rank 0 has the policy in its
    own dtype besides (one rank alone: while it is written).

    state: this rank's, which writes the other ranks' too where there are any.
    """

    def __init__(self, state: HeldState, folder: ModelFolder) -> None:
        self._state = state
        self._folder = folder

    def write(self, folder: Path) -> None:
        """`Snapshot`. Other threads run on meanwhile: safetensors holds no lock of Python's as it writes."""
        self._state.write(folder)
        self._folder.write(folder / "hf", self._state.policy)

    def weights_hash(self) -> str:
        return hash_weights(self._folder.names, lambda name: self._folder.weight(name, self._state.policy))
