"""Settings of the engine, `rollout.torch`."""

from __future__ import annotations

from pydantic import Field

from asyncrl.section import Section


class Settings(Section):
    """the embedded engine."""

    cuda_graphs: bool = False
    """Capture decode steps as CUDA graphs, on a GPU: faster steps, and a pause at the first of each shape."""
    kept_contexts: int | None = Field(None, ge=0)
    """Contexts of episodes that wait for something else than the model (a tool), kept beside those in the
    slots, so that a next turn computes only what is new. Each takes as much memory as a slot. null: as many
    as `slots` where `rollout.episode` is set, otherwise none."""
