"""Samples as coloured text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from asyncrl.core.records import NOT_SAMPLED
from asyncrl.observe.samples import Sample, printable

VERSION = "version"
PLAIN = "nothing"
OF_VERSIONS = ("cyan", "green", "yellow", "magenta", "blue", "red")
FROM_WORST = ("red", "yellow", "green")
SHOWN_STYLE = "dim italic"
"""What no policy sampled."""
SOME = 1e-12


@dataclass(frozen=True, slots=True)
class Colours:
    """by: `version`, `nothing`, or a part of the reward. ranges: the least and the largest value of each
    part."""

    by: str = PLAIN
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def of_version(self, version: int) -> str:
        if version == NOT_SAMPLED:
            return SHOWN_STYLE
        return OF_VERSIONS[version % len(OF_VERSIONS)] if self.by == VERSION else ""

    def legend(self, sample: Sample) -> Text:
        """What the colours are by, and what each means in this sample."""
        text = Text(self.by)
        if self.by == VERSION:
            for version in sorted({version for _, version in sample.pieces()} - {NOT_SAMPLED}):
                text.append(f" {version}", self.of_version(version))
        elif (ends := self.ranges.get(self.by)) is not None:
            for end in sorted({*ends}):
                text.append(f" {end:.3g}", self.of_value(end))
        return text

    def of_value(self, value: float | None) -> str:
        low, high = self.ranges.get(self.by, (0.0, 0.0))
        if value is None or value != value:
            return ""
        share = (value - low) / (high - low + SOME)
        return FROM_WORST[min(len(FROM_WORST) - 1, int(share * len(FROM_WORST)))]


def ranges_of(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Of the reward and each of its parts, as `Colours` takes them."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in {"reward": sample.reward, **sample.parts}.items():
            values.setdefault(name, []).append(value)
    return {name: (min(of), max(of)) for name, of in values.items()}


def as_text(sample: Sample, colours: Colours) -> Text:
    """Prompt and response; where there are several turns, each under a heading of its own."""
    text = Text(printable(sample.prompt).removesuffix("\n") + "\n", style="")
    text.stylize("dim")
    turns = list(_turns(sample))
    several = len(turns) > 1
    earned = sample.turn_parts.get(colours.by, [])
    of_all = {"reward": sample.reward, **sample.parts}.get(colours.by)
    number = 0
    for pieces in turns:
        is_sampled = pieces[0][1] != NOT_SAMPLED
        if several:
            told = ""
            if is_sampled:
                told = "".join(
                    f", {name} {values[number]:.3g}"
                    for name, values in sample.turn_parts.items()
                    if number < len(values)
                )
            text.append(f"\n[turn {number + 1}{told}]\n" if is_sampled else "\n[shown]\n", "bold")
        value = earned[number] if is_sampled and number < len(earned) else of_all
        for piece, version in pieces:
            style = colours.of_version(version)
            if is_sampled and colours.by not in (VERSION, PLAIN):
                style = colours.of_value(value)
            text.append(printable(piece), style)
        number += is_sampled
    return text


def _turns(sample: Sample) -> Iterator[list[tuple[str, int]]]:
    """Pieces of the response: those of a turn, those that were shown after it, and so on."""
    turn: list[tuple[str, int]] = []
    for piece, version in sample.pieces():
        if turn and (turn[0][1] == NOT_SAMPLED) != (version == NOT_SAMPLED):
            yield turn
            turn = []
        turn.append((piece, version))
    if turn:
        yield turn
