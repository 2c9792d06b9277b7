"""Settings of what is trained on."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from asyncrl.config.own import named
from asyncrl.section import Section

HUB, REASONING_GYM, SUITE = "hub:", "reasoning-gym:", "suite:"
"""What the path of a dataset begins with that is no file."""
_OWN = ("path", "options", "split", "subset", "prompt_column", "system_prompt", "chat_template_kwargs")
"""What a dataset of several may have for itself."""


class NamedDataset(Section):
    """One dataset of several, which may have some of what `data` has for itself."""

    path: str
    """As `data.path`."""
    options: dict[str, Any] | None = None
    """Of a generated dataset; by default `data.options`."""
    name: str | None = None
    """Its name in the metrics, and what the column `dataset` of its rows holds where they have none of
    their own; by default the file's."""
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
        name = path.name if self.path.startswith((HUB, REASONING_GYM)) else path.stem
        return self.name or name.removeprefix(REASONING_GYM)


class DatasetConfig(NamedDataset):
    weight: float = Field(1.0, gt=0)
    """Its share of the prompts is this over the weights of all datasets that have one at the time."""
    from_step: int = Field(0, ge=0)
    """Its prompts are handed out from when so many training steps are done."""
    until_step: int | None = Field(None, ge=1)
    """They are handed out until so many are done; null is to the end."""

    def has_step(self, step: int) -> bool:
        """Whether it has a share of the prompts when so many training steps are done."""
        return self.from_step <= step and (self.until_step is None or step < self.until_step)


SAMPLERS = ("band", "failures", "learnability")


class CurriculumConfig(Section):
    sampler: Annotated[str, named(SAMPLERS)] = "band"
    """In what share of the epochs a row comes whose pass rate p was measured. `band`: in all while p is in
    `band`. `failures`: 1 - p. `learnability`: 4 p (1 - p). Or your own, given `pass_rate` and columns of the
    row by name: `package.module:function` or `path/file.py:function`."""
    band: tuple[float, float] = Field((0.2, 0.8), strict=False)
    """`band`: lowest and highest pass rate that is in it."""
    rest_epochs: int = Field(4, ge=1)
    """Every row comes once in so many epochs at least, to be measured again: the solved ones, and those that
    are out of reach."""
    success_above: float = 0.5
    """A response with a greater reward than this has passed."""
    over_groups: int = Field(1, ge=1)
    """A row's pass rate is that of its newest so many groups."""


class HintsConfig(Section):
    column: str | None = None
    """Column with a row's hint, a text; rows where it is null or missing have none. null is for
    `give: prefix`: the policy's own last success with the row."""
    give: Literal["hint", "prefix"] = "hint"
    """`hint`: the text is put behind the prompt, in the last message of the user. `prefix`: it is a response,
    with the beginning of which every response to the row begins; what follows is trained on (PrefixRL)."""
    share: tuple[float, float] = Field((0.25, 0.75), strict=False)
    """`prefix`: the least and the greatest share of that response that is given, drawn for each group."""
    train: Literal["without", "with"] = "without"
    """`hint`: what was sampled with it is trained on, `without`, as an answer to the prompt alone, which the
    objective's importance ratios correct for, or, `with`, as it was sampled."""
    success_above: float = 0.5
    """A row gets its hint for the group after one in which no response had a greater reward than this."""


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
    loss: Literal["likelihood", "rl_plus"] = "likelihood"
    """`likelihood`: -log pi of each token. `rl_plus`: by their advantage over the samples, and less where a
    token is sure, or hardly possible (docs/objectives.md)."""
    choose: Literal["all", "batch", "failed"] = "all"
    """`all`: one row after the other, shuffled anew in every epoch. `batch`: those with the prompt of a group
    of the step. `failed`: of such a group in which no reward is above 0 (ReLIFT)."""
    rows: int = Field(16, ge=1)
    """Rows in a step; with `batch` and `failed`, at most."""
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
    """A `.jsonl` or `.parquet` file, a folder saved by `datasets`, `hub:OWNER/NAME`, or
    `reasoning-gym:TASK`."""
    options: dict[str, Any] = Field({})
    """Of what `reasoning-gym:TASK` generates: its `size` (by default 500), `seed` (0), and the task's own."""
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
    them, and so does `evaluation`."""
    shuffle: bool = True
    """Shuffle anew in every epoch, by `run.seed`."""
    drop_last: bool = False
    """Leave out of each epoch the rows at its end that do not fill another batch of `trainer.batch_groups`;
    with `shuffle` these are others in every epoch."""
    curriculum: CurriculumConfig | None = None
    """Let rows come by how often the policy succeeds with them (docs/data.md); null is each once per
    epoch."""
    hints: HintsConfig | None = None
    """Help with prompts that a whole group has failed (docs/data.md); null is none."""
    _key: str = PrivateAttr("data.path")
    _mix_key: str = PrivateAttr("data.mix")

    @property
    def key(self) -> str:
        """Where the config names `path`."""
        return self._key

    @property
    def options_key(self) -> str:
        """Where it names `options`."""
        return f"{self._key.removesuffix('path')}options"

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
            dataset._key = f"{self._mix_key}.{i}.path"
            datasets.append(dataset)
        return datasets

    @property
    def names(self) -> list[str]:
        """Of the datasets in `mix`."""
        return [each.label for each in self.mix]
