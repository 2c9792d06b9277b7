"""Settings that name one of several functions, or a user's own."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import AfterValidator

from asyncrl.objective.catalogue import is_own


def named(names: Collection[str]) -> AfterValidator:
    """Refuses what is none of the names and does not look like a user's own function."""

    def check(name: str) -> str:
        if not is_own(name) and name not in names:
            there_are = f"there are {', '.join(names)}, and your own" if names else "name your own"
            raise ValueError(f"{there_are} as package.module:function or path/file.py:function")
        return name

    return AfterValidator(check)
