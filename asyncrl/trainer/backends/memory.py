"""What training a model keeps and takes of a rank's memory, beside what the passes compute. Pure."""

from __future__ import annotations

from dataclasses import dataclass

ADAM_BYTES = 8
"""Two float32 moments a parameter."""


@dataclass(frozen=True, slots=True)
class TrainedMemory:
    """In plain torch: all of it on the one rank. Backends that share out derive theirs. In bytes."""

    value_bytes: int
    """Of a weight that is computed with, and of a gradient as it leaves the backward pass."""
    bucket: int = 0
    """Elements of gradients that go to other ranks together."""

    def weights(self, parameters: int) -> tuple[dict[str, int], dict[str, int]]:
        """What stays of a model of so many parameters that only computes: there, and in host memory."""
        return {"weights": self.value_bytes * parameters}, {}

    def kept(self, parameters: int) -> tuple[dict[str, int], dict[str, int]]:
        """The same of one that is trained."""
        parts, _ = self.weights(parameters)
        parts["float32 weights"] = 0 if self.value_bytes == 4 else 4 * parameters
        parts["gradients"] = 4 * parameters  # summed in float32
        parts["optimizer"] = ADAM_BYTES * parameters
        return parts, {}

    def arriving(self, parameters: int) -> int:
        """Gradients of a micro-batch that wait for the end of its backward pass to be added to the sum."""
        return 0

    def sending(self, elements: int) -> int:
        """Copies that are made of so many elements of gradients to send them."""
        return 0

    def updating(self, parameters: int, largest: int) -> int:
        """What an update takes beside what stays, of a model whose largest parameter has so many elements.
        Torch's fused AdamW takes nothing."""
        return 0
