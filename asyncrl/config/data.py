"""Settings of what is trained on."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from asyncrl.core.share import Share
from asyncrl.section import Section

_OWN = ("path", "split", "subset", "prompt_column", "system_prompt", "chat_template_kwargs")
"""What a dataset of several may have for itself."""


class DatasetConfig(Section):
    path: str
    """As `data.path`."""
    name: str | None = None
    """Its name in the metrics, and what the column `dataset` of its rows holds where they have none of
    their own; by default the file's."""
    weight: float = Field(1.0, gt=0)
    """Its share of the prompts is this over the weights of all datasets that have one at the time."""
    from_step: int = Field(0, ge=0)
    """Its prompts are handed out from when so many training steps are done."""
    until_step: int | None = Field(None, ge=1)
    """They are handed out until so many are done; null is to the end."""
    split: str | None = None
    """By default `data.split`, and so are those below by the setting of that name."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several."""
    prompt_column: str | None = None
    """Column with the prompt."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template."""

    @property
    def label(self) -> str:
        path = PurePath(self.path)
        return self.name or (path.name if self.path.startswith("hub:") else path.stem)

    def share(self, rows: int = 0) -> Share:
        """Its part in the prompts, with so many rows."""
        return Share(rows, self.weight, self.from_step, self.until_step)


class SftConfig(Section):
    path: str
    """Demonstrations, as `data.path` names a dataset. Their prompts are read by the settings of `data`."""
    split: str = "train"
    """Split, for datasets that have several."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several."""
    prompt_column: str = "prompt"
    """Column with the prompt."""
    response_column: str = "response"
    """Column with the response: a text, or a list with the assistant's message."""
    coef: float = Field(1.0, gt=0)
    """Weight of their mean loss by token, beside that of the samples."""
    choose: Literal["all", "failed"] = "all"
    """`all`: one row after the other, shuffled anew in every epoch. `failed`: those with the prompt of a
    group of the step in which no reward is above 0 (ReLIFT)."""
    rows: int = Field(16, ge=1)
    """Rows in a step; with `failed`, at most."""
    every_steps: int = Field(1, ge=1)
    """Only every so many-th training step has some."""

    def data(self, data: DataConfig) -> DataConfig:
        """What their prompts are read by."""
        own = {key: getattr(self, key) for key in ("path", "split", "subset", "prompt_column")}
        dataset = data.model_copy(update={**own, "mix": []})
        dataset._key = "sft.path"
        return dataset


class DataConfig(Section):
    path: str = ""
    """A `.jsonl` or `.parquet` file, a folder saved by `datasets`, or `hub:OWNER/NAME`."""
    mix: list[DatasetConfig] = Field([])
    """Several datasets instead of `data.path`, each with its share of the prompts."""
    split: str = "train"
    """Split, for datasets that have several."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of messages (`role`, `content`)."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message; makes string prompts conversations."""
    chat_template_kwargs: dict[str, Any] = Field({})
    """Further arguments of the chat template, such as `{enable_thinking: false}`. A row may have its own in a
    column of this name, and `tools` (JSON schemas, as a list or as JSON text)."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are bad rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be used: refuse the run, or report and leave them out."""
    held_out_rows: int = Field(0, ge=0)
    """So many usable rows at the end of each dataset are never trained on: `asyncrl eval` scores models on
    them."""
    shuffle: bool = True
    """Shuffle anew in every epoch, by `run.seed`."""
    drop_last: bool = False
    """Leave out of each epoch the rows at its end that do not fill another batch of `trainer.batch_groups`;
    with `shuffle` these are others in every epoch."""
    _key: str = PrivateAttr("data.path")

    @property
    def key(self) -> str:
        """Where the config names `path`."""
        return self._key

    @property
    def datasets(self) -> list[DataConfig]:
        """What each dataset is read by, with a `path` of its own and no `mix`: itself, where it is the only
        one."""
        if not self.mix:
            return [self]
        datasets = []
        for i, each in enumerate(self.mix):
            own = {key: value for key in _OWN if (value := getattr(each, key)) is not None}
            dataset = self.model_copy(update={**own, "mix": []})
            dataset._key = f"data.mix.{i}.path"
            datasets.append(dataset)
        return datasets

    @property
    def names(self) -> list[str]:
        """Of the datasets in `mix`."""
        return [each.label for each in self.mix]
