"""Browses samples on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group
from rich.text import Text

from asyncrl.observe.sample_text import PLAIN, VERSION, Colours, as_text, ranges_of
from asyncrl.observe.samples import KINDS, Sample, printable

HELP = "←→ sample  ↑↓ space scroll  [ ] step  f kind  c colours  / N search  q quit"
HEAD_LINES, FOOT_LINES = 3, 2
PATIENCE_S = 0.5
"""The size of the terminal is looked at this often."""


class KeySource(Protocol):
    def poll(self, timeout_s: float) -> str | None: ...


@dataclass
class Pager:
    """The state of browsing, and what keys make of it. samples: at least one, by step."""

    samples: Sequence[Sample]
    width: int = 80
    height: int = 24
    place: int = 0
    """Of the shown sample, among `samples`."""
    top: int = 0
    """The first shown line of its text."""
    kind: str | None = None
    """Only samples chosen for this are shown; None for all."""
    colours: Colours = field(default_factory=Colours)
    search: str | None = None
    """What is being typed; None while nothing is."""
    found: str = ""
    """What was searched for last."""
    told: str = ""
    """In place of the keys, until the next one is pressed."""
    found_at: tuple[int, int] | None = None
    """Sample and line."""
    is_done: bool = False

    def __post_init__(self) -> None:
        self._ranges = ranges_of(self.samples)
        self._wrapped: tuple[object, list[Text]] = (None, [])
        self.colours = Colours(VERSION, self._ranges)

    @property
    def sample(self) -> Sample:
        return self.samples[self.place]

    @property
    def room(self) -> int:
        """Lines of text on the screen."""
        return max(1, self.height - HEAD_LINES - FOOT_LINES)

    def press(self, key: str) -> None:
        self.told = ""
        if self.search is not None:
            self._type(key)
        elif key in ("q", "escape"):
            self.is_done = True
        elif (action := self._actions().get(key)) is not None:
            action()

    def _actions(self) -> dict[str, Callable[[], None]]:
        def scroll(lines: int) -> Callable[[], None]:
            return lambda: self._scroll(self.top + lines)

        end = len(self.lines())
        return {
            **dict.fromkeys(("right", "n", "l"), lambda: self._go(1)),
            **dict.fromkeys(("left", "p", "h"), lambda: self._go(-1)),
            **dict.fromkeys(("down", "j", "enter"), scroll(1)),
            **dict.fromkeys(("up", "k"), scroll(-1)),
            "page down": scroll(self.room),
            "page up": scroll(-self.room),
            **dict.fromkeys(("home", "g"), scroll(-end)),
            **dict.fromkeys(("end", "G"), scroll(end)),
            "]": lambda: self._go(1, lambda sample: sample.step > self.sample.step),
            "[": lambda: self._go(-1, lambda sample: sample.step < self.sample.step),
            "f": self._next_kind,
            "c": self._next_colours,
            "/": self._begin_search,
            "N": self._find,
        }

    def lines(self) -> list[Text]:
        """The sample's text in lines of the screen."""
        key = (self.place, self.width, self.colours.by)
        if self._wrapped[0] != key:
            console = Console(width=self.width)
            self._wrapped = key, list(as_text(self.sample, self.colours).wrap(console, self.width))
        return self._wrapped[1]

    def screen(self) -> Group:
        """What fills the terminal."""
        lines = self.lines()
        shown = [line.copy() for line in lines[self.top : self.top + self.room]]
        for line in shown if self.found else ():
            line.highlight_words([self.found], "reverse", case_sensitive=False)
        shown += [Text()] * (self.room - len(shown))
        until = min(len(lines), self.top + self.room)
        meant = [i for i, sample in enumerate(self.samples) if self._is_meant(sample)]
        which = f"{meant.index(self.place) + 1}/{len(meant)}" if self.place in meant else f"-/{len(meant)}"
        told = f"{which} {self.kind or 'all'}   lines {self.top + 1}-{until} of {len(lines)}   "
        foot = Text.assemble((f"{told}colours by ", "dim"), self.colours.legend(self.sample))
        asked = Text(f"/{self.search}█") if self.search is not None else Text(self.told or HELP, "dim")
        heading = Text(printable(self.sample.heading()), "bold")
        facts = Text(printable(self.sample.facts()))
        return Group(*(self._fitted(line) for line in (heading, facts, Text("─" * self.width, "dim"))),
                     *shown, *(self._fitted(line) for line in (foot, asked)))  # fmt: skip

    def _fitted(self, line: Text) -> Text:
        line.truncate(self.width, overflow="ellipsis")
        return line

    def _is_meant(self, sample: Sample) -> bool:
        return self.kind is None or self.kind in sample.chosen

    def _go(self, way: int, wanted: Callable[[Sample], bool] = lambda _: True) -> None:
        """To the next sample in this direction that is wanted, if there is one."""
        places = range(self.place + 1, len(self.samples)) if way > 0 else range(self.place - 1, -1, -1)
        for place in places:
            if self._is_meant(self.samples[place]) and wanted(self.samples[place]):
                self.place, self.top = place, 0
                return

    def _scroll(self, top: int) -> None:
        self.top = max(0, min(top, len(self.lines()) - self.room))

    def _next_kind(self) -> None:
        """That there is; the shown sample is then one of its kind."""
        kinds = [None, *(kind for kind in KINDS if any(kind in sample.chosen for sample in self.samples))]
        self.kind = kinds[(kinds.index(self.kind) + 1) % len(kinds)]
        if not self._is_meant(self.sample):
            before = self.place
            self._go(-1)
            if self.place == before:
                self._go(1)

    def _next_colours(self) -> None:
        ways = [VERSION, *self._ranges, PLAIN]
        self.colours = Colours(ways[(ways.index(self.colours.by) + 1) % len(ways)], self._ranges)

    def _begin_search(self) -> None:
        self.search = ""

    def _type(self, key: str) -> None:
        assert self.search is not None
        if key == "enter":
            self.found, self.search, self.found_at = self.search, None, None
            self._find()
        elif key == "escape":
            self.search = None
        elif key == "backspace":
            self.search = self.search[:-1]
        else:
            self.search += " " if key == "page down" else key if len(key) == 1 else ""

    def _find(self) -> None:
        """Further down, or else in the samples that follow, from the first on after the last."""
        text = self.found.casefold()
        if not text:
            return
        start, at = self.place, self.found_at
        after = at[1] + 1 if at is not None and at[0] == start else self.top
        was = self.place, self.top
        for offset in range(len(self.samples) + 1):
            place = (start + offset) % len(self.samples)
            sample = self.samples[place]
            if not self._is_meant(sample) or text not in f"{sample.prompt}\n{sample.response}".casefold():
                continue
            self.place, self.top = place, self.top if place == start else 0
            lines = self.lines()
            for number in range(after if offset == 0 else 0, len(lines)):
                if text in lines[number].plain.casefold():
                    self.found_at = place, number
                    if not self.top <= number < self.top + self.room:
                        self._scroll(number)
                    return
        self.place, self.top = was
        self.told = f"{printable(self.found)} is in no other line of these samples"


def browse(samples: Sequence[Sample], keys: KeySource, console: Console, place: int = 0) -> None:
    """Show samples until somebody leaves. keys: of the terminal that the console writes to."""
    pager = Pager(samples, place=place)
    with console.screen(hide_cursor=True) as screen:
        while not pager.is_done:
            pager.width, pager.height = console.size
            screen.update(pager.screen())
            if (key := keys.poll(PATIENCE_S)) is not None:
                pager.press(key)
