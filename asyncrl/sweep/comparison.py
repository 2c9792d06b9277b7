"""A comparison as cells: what the section `sweep` of a config asks for, each run resolved and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from asyncrl import config as settings
from asyncrl.config import Config, SweepConfig, presets, yaml_tree
from asyncrl.errors import ConfigError
from asyncrl.sweep.grid import OF_THE_SWEEP, Axis, Cell, Problems
from asyncrl.sweep.record import is_scored
from asyncrl.sweep.report import VARIANT
from asyncrl.sweep.study import Study, Trial


class Comparison:
    """The cells that are needed, as far as known from what others reached.

    Raises `ConfigError` with every problem of every variant at every value.
    """

    thins = True
    """Its cells are too many to keep their weights."""

    def __init__(self, config: Path, overrides: Sequence[str], base: Config, sweep: SweepConfig) -> None:
        # Read once: most cells are made hours later, when the file may say something else.
        self._tree, self._source = yaml_tree.read(presets.find(config)), str(config)
        self._overrides = overrides
        self.settings = sweep
        at, tuned = [yaml_tree.text(v) for v in sweep.across_values], [f"{v:g}" for v in sweep.tune_values]
        self._study = Study(sweep, at, tuned, base.run.seed)
        self._cells: dict[Trial, Cell] = {}
        self._impossible: set[Trial] = set()
        values = {VARIANT: sweep.variants, sweep.across: at, sweep.tune: tuned}
        self.axes = tuple(Axis(key, tuple(of_axis)) for key, of_axis in values.items())
        self._check(base)

    def needed(self, reached: Callable[[Cell], float | None]) -> tuple[list[Cell], int]:
        """The cells in the order in which they are to run, and how many more will follow from their results.

        reached: a cell's `sweep.by`, -inf if it failed, None if it has not ended."""
        while True:
            found = {t: value for t, cell in self._cells.items() if (value := reached(cell)) is not None}
            trials, later = self._study.needed(found | dict.fromkeys(self._impossible, -math.inf))
            new = [trial for trial in trials if trial not in self._cells.keys() | self._impossible]
            for trial in new:
                self._add(trial)
            if not new:
                return [self._cells[trial] for trial in trials if trial in self._cells], later

    def to_check(self, cells: Sequence[Cell]) -> list[Cell]:
        """One of each variant at each value: to the machine they are alike."""
        return [*{cell.point[:2]: cell for cell in reversed(cells)}.values()]

    def _add(self, trial: Trial) -> None:
        """Its cell. A value beyond those that were asked for may be none that the setting can have."""
        try:
            self._cells[trial] = self._cell(trial)
        except ConfigError:
            if trial.tuned in self._study.tuned:
                raise
            self._impossible.add(trial)

    def _cell(self, trial: Trial) -> Cell:
        sweep = self.settings
        own = [f"{key}={yaml_tree.text(value)}" for key, value in sweep.compare[trial.variant].items()]
        texts = [f"{sweep.across}={trial.at}", f"{sweep.tune}={trial.tuned}", f"run.seed={trial.seed}"]
        point = ((VARIANT, trial.variant), (sweep.across, trial.at), (sweep.tune, trial.tuned))
        config = settings.from_tree(self._tree, self._source, [*self._overrides, *own, *texts])
        is_tuning = trial.seed in self._study.tuning_seeds
        return Cell(point, trial.seed, config, "tuning" if is_tuning else "result")

    def _check(self, base: Config) -> None:
        sweep, problems = self.settings, Problems()
        if base.run.dir is not None:
            raise ConfigError(f"run.dir={base.run.dir}: {OF_THE_SWEEP['run.dir']}")
        if sweep.by == "held_out_reward" and not is_scored(base):
            why = "no rows are held out; set data.held_out_rows"
            if base.data.held_out_rows:
                why = (
                    f"rollout.engine={base.rollout.engine} and trainer.backend={base.trainer.backend} give "
                    "no weights that could be scored; use others"
                )
            raise ConfigError(f"sweep.by=held_out_reward: {why}, or sweep.by=final_reward")
        for key in {*OF_THE_SWEEP} & {
            sweep.across,
            sweep.tune,
            *(k for s in sweep.compare.values() for k in s),
        }:
            raise ConfigError(f"sweep: it cannot vary {key}: {OF_THE_SWEEP[key]}")
        for trial in self._study.needed({})[0]:
            try:
                self._cells[trial] = self._cell(trial)
            except ConfigError as error:
                for line in str(error).split("\n"):
                    problems.add(f"variant {trial.variant}, {sweep.across}={trial.at}", line)
        problems.raise_if_any()
