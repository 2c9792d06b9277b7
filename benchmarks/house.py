"""How many lines each room of the package has, and how many are on the narrow path: what you read to know how
the loop, the embedded engine and the torch trainer work.

    python benchmarks/house.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "asyncrl"
NARROW = ("core", "objective", "loop", "rollout", "trainer")
"""Rooms on the narrow path. Of the folders in `CHOICES` it needs one only, `torch`."""
CHOICES = (("rollout", "engines"), ("trainer", "backends"))

BESIDE = (
    *(("rollout", "adapters"), ("rollout", "episodes"), ("rollout", "gateway"), ("rollout", "chat.py")),
    *(("objective", "turns.py"), ("trainer", "turns.py"), ("trainer", "packing", "turns.py")),
    *(("objective", "kl.py"), ("objective", "rejection.py"), ("core", "colocation.py")),
    *(("objective", "gae.py"), ("objective", "otb.py"), ("trainer", "token_advantages.py")),
    *(("loop", "colocation.py"), ("loop", "colocation_desk.py"), ("trainer", "offload.py")),
    *(("trainer", "backends", "torch", "offload.py"), ("episode_guests",)),
    *(("trainer", "averaged.py"), ("trainer", "critic"), ("trainer", "lessons"), ("trainer", "lora")),
    *(("rollout", "engines", "torch", name) for name in ("graphs.py", "row_decoder.py", "sleep.py")),
)
"""What a run needs only where its config has a setting or a section of its own for it, or (`row_decoder.py`)
for models that no slot cache can hold."""


def lines_by_file() -> dict[Path, int]:
    """Of every Python file, by its path in the package."""
    return {
        path.relative_to(PACKAGE): len(path.read_text().splitlines())
        for path in sorted(PACKAGE.rglob("*.py"))
        if "configs" not in path.relative_to(PACKAGE).parts  # what a user copies
    }


def is_narrow(path: Path) -> bool:
    is_a_choice = path.parts[:2] in CHOICES and len(path.parts) > 3
    is_beside = any(path.parts[: len(room)] == room for room in BESIDE) or (
        is_a_choice and path.parts[2] != "torch"
    )
    return path.parts[0] in NARROW and not is_beside


def narrow_path() -> int:
    return sum(n for path, n in lines_by_file().items() if is_narrow(path))


def main() -> None:
    files = lines_by_file()
    rooms: Counter[str] = Counter()
    for path, n in files.items():
        rooms[path.parts[0] if len(path.parts) > 1 else "(root)"] += n
    for name, n in rooms.most_common():
        print(f"{n:7,}  {name}")
    print(f"{sum(files.values()):7,}  the whole package")
    print(f"{narrow_path():7,}  the narrow path: {', '.join(NARROW)}; one engine, one trainer backend")


if __name__ == "__main__":
    main()
