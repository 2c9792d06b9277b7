"""Charts as numbers for SVG: scales, ticks and paths of curves. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

LEFT, RIGHT, TOP, BOTTOM = 50, 382, 22, 166
"""The edges of the area of the curves in a view box of 400 by 200; ticks and names are around it."""
TICKS = 5
DOTTED = 30
"""A curve of no more points than this shows each of them."""
FLATTEST = 1e-4
"""A chart shows at least this share of its largest value, so that rounding looks like nothing."""
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Curve:
    """x, y, low, high: float64[points], x rising. NaN is a gap. low, high: the edges of its band, or the ends
    of its `bars`, or None. place: its place among the runs, which chooses its colour."""

    place: int
    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    bars: bool = False

    @property
    def known(self) -> np.ndarray:
        values: np.ndarray = self.y[np.isfinite(self.y)]
        return values


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """line, band, bars, dots: what a path's `d` has. first, least, most, last: of its values, unthinned."""

    place: int
    name: str
    line: str
    band: str
    bars: str
    dots: str
    first: float
    least: float
    most: float
    last: float


@dataclass(frozen=True, slots=True)
class Chart:
    """title, band: in words. x_name, y_name: with units."""

    title: str
    key: str
    x_name: str
    y_name: str
    band: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    curves: Sequence[Drawn]


def draw(
    curves: Sequence[Curve], *, title: str, key: str, x_name: str, y_name: str, points: int, band: str = ""
) -> Chart | None:
    """None if no curve has a value. points: about how many of each curve to draw."""
    curves = [curve for curve in curves if curve.known.size]
    if not curves:
        return None
    x_axis = _axis([curve.x for curve in curves], LEFT, RIGHT)
    edges = [e for curve in curves for e in (curve.y, curve.low, curve.high) if e is not None]
    y_axis = _axis(edges, BOTTOM, TOP)
    return Chart(
        title=title,
        key=key,
        x_name=x_name,
        y_name=y_name,
        band=band if any(curve.low is not None for curve in curves) else "",
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        curves=[_drawn(thinned(curve, points), curve, x_axis, y_axis) for curve in curves],
    )


def thinned(curve: Curve, points: int) -> Curve:
    """The curve with about `points` points: of every stretch of it those with the smallest and the largest
    value, of the band's edges, too; and the first and the last. A stretch without a value stays a gap."""
    rows = [(curve.y, np.inf), (curve.y, -np.inf)]
    if curve.low is not None and curve.high is not None:
        rows += [(curve.low, np.inf), (curve.high, -np.inf)]
    n, stretches = len(curve.x), max(1, points // len(rows))
    if n <= points:
        return curve
    width = -(-n // stretches)
    starts = np.arange(0, n, width)
    kept = {0, n - 1}
    for values, worst in rows:
        padded = np.full(len(starts) * width, worst)
        padded[:n] = np.where(np.isfinite(values), values, worst)
        best = padded.reshape(-1, width)
        kept |= set((starts + (best.argmin(1) if worst > 0 else best.argmax(1))).tolist())
    at = np.array(sorted(kept))
    low, high = (None if edge is None else edge[at] for edge in (curve.low, curve.high))
    return replace(curve, x=curve.x[at], y=curve.y[at], low=low, high=high)


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values between low and high to places between start and end. is_whole: all values are integers."""

    low: float
    high: float
    start: float
    end: float
    is_whole: bool

    def at(self, values: np.ndarray) -> np.ndarray:
        return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[Tick]:
        step = _round_step(max((self.high - self.low) / TICKS, 1.0 if self.is_whole else 0.0))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [i * step for i in range(first, last + 1)]
        places = self.at(np.array(values))
        largest = max(abs(self.low), abs(self.high))
        return [
            Tick(round(float(p), 1), _text(v, step, largest)) for v, p in zip(values, places, strict=True)
        ]


def _axis(values: Sequence[np.ndarray], start: float, end: float) -> _Axis:
    known = np.concatenate([each[np.isfinite(each)] for each in values])
    low, high = float(known.min()), float(known.max())
    least = FLATTEST * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        middle = (low + high) / 2
        low, high = (low, low + least) if middle == 0 else (middle - least / 2, middle + least / 2)
    return _Axis(low, high, start, end, bool((known == np.round(known)).all()))


def _round_step(least: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _text(value: float, step: float, largest: float) -> str:
    """A tick's text, with the digits that tell it from its neighbours. largest: of the axis."""
    if value == 0:
        return "0"
    if not 1e-3 <= largest < 1e16:
        return f"{value:.3g}"
    scale, suffix = next(((s, t) for s, t in _SUFFIXES if largest >= 10 * s), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    return f"{value / scale:.{digits}f}{suffix}"


def _drawn(curve: Curve, whole: Curve, x_axis: _Axis, y_axis: _Axis) -> Drawn:
    x, y = x_axis.at(curve.x), y_axis.at(curve.y)
    pieces = list(_pieces(curve.y))
    line = "".join(_path(x[piece], y[piece]) for piece in pieces)
    dots = "".join(f"M{a:.1f},{b:.1f}h0" for piece in pieces for a, b in zip(x[piece], y[piece], strict=True))
    band = bars = ""
    if curve.low is not None and curve.high is not None:
        low, high = y_axis.at(curve.low), y_axis.at(curve.high)
        for piece in _pieces(curve.low + curve.high):
            if curve.bars:
                ends = zip(x[piece], low[piece], high[piece], strict=True)
                bars += "".join(f"M{at:.1f},{least:.1f}V{most:.1f}" for at, least, most in ends)
                continue
            there_and_back = np.concatenate([x[piece], x[piece][::-1]])
            band += _path(there_and_back, np.concatenate([low[piece], high[piece][::-1]])) + "Z"
    known = whole.known
    return Drawn(
        place=curve.place,
        name=curve.name,
        line=line,
        band=band,
        bars=bars,
        dots=dots if len(curve.x) <= DOTTED else "",
        first=float(known[0]),
        least=float(known.min()),
        most=float(known.max()),
        last=float(known[-1]),
    )


def _pieces(values: np.ndarray) -> list[slice]:
    """The stretches without a gap."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1])
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A single point is a line of no length, which round ends make a dot."""
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    return f"M{points}" if len(x) > 1 else f"M{points}h0"
