"""Structures of tensors that move to a device whole."""

from __future__ import annotations

from dataclasses import fields
from typing import Self

import torch
from torch import Tensor


class OnDevice:
    """A dataclass whose tensors lie on one device, those of its fields that are such structures too."""

    __slots__ = ()

    def to(self, device: torch.device) -> Self:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self)(*(v.to(device) if isinstance(v, Tensor | OnDevice) else v for v in values))
