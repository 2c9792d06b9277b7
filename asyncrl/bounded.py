"""Types for numbers in messages: NaN, infinity, negative counts and absurd sizes do not decode."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**53)]
"""Of groups, tokens, steps, versions, requests."""
Seconds = Annotated[float, Meta(ge=0, le=1e10)]
