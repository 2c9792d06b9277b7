"""Settings of the engine, `rollout.torch`."""

from __future__ import annotations

from asyncrl.section import Section


class Settings(Section):
    """the embedded engine."""

    cuda_graphs: bool = False
    """Capture decode steps as CUDA graphs, on a GPU: faster steps, and a pause at the first of each shape."""
