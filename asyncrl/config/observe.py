"""Settings of what shows a run beside its own files."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator, Field

from asyncrl.resolve import quoted
from asyncrl.section import Section

TRACKERS = {
    "tensorboard": "asyncrl.observe.trackers.tensorboard:TensorBoard",
    "trackio": "asyncrl.observe.trackers.services:Trackio",
    "wandb": "asyncrl.observe.trackers.services:WeightsAndBiases",
}
"""By their names in `observe.trackers`. Each needs the package of its name."""


def _check_tracker(name: str) -> str:
    if name not in TRACKERS and ":" not in name:
        near = difflib.get_close_matches(name, TRACKERS, n=1)
        meant = f"did you mean {quoted(near)}? There" if near else "there"
        raise ValueError(
            f"{meant} are {quoted(list(TRACKERS))}, and your own as package.module:name or path/file.py:name"
        )
    return name


TrackerName = Annotated[str, AfterValidator(_check_tracker)]


class ObserveConfig(Section):
    trackers: list[TrackerName] = Field(["tensorboard"])
    """Where metrics, histograms, samples and settings go besides the run directory's own files, while the run
    goes on: `tensorboard` (event files in `tensorboard/` of the run directory), `wandb`, `trackio`, or your
    own: `package.module:name` or `path/file.py:name` (`asyncrl.observe.trackers.base`). Each is a process of
    its own, which the run neither waits for nor depends on."""
    project: str = "asyncrl"
    """The project that a run belongs to with Weights & Biases and trackio."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Serve the newest numbers at `http://127.0.0.1:PORT/metrics`, as text for Prometheus; 0 takes any free
    port. null serves nothing."""

    trace: bool = False
    """Record what every process does, for https://ui.perfetto.dev: written to `trace.json.gz` in the run
    directory at the end of the run, and by `asyncrl trace RUN_DIR` at any time (docs/operations.md)."""

    @property
    def factories(self) -> dict[str, str]:
        """What makes each tracker, as `package.module:name` or `path/file.py:name`, by its name."""
        return {name: TRACKERS.get(name, name) for name in self.trackers}
