"""The backend has no settings of its own."""

from __future__ import annotations

from asyncrl.section import Section


class Settings(Section):
    """One rank, in plain torch."""
