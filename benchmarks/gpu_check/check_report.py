"""The results: kept in one file, shown in a table, and made ready to be sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from check_machine import machine, scrubbed
from check_step import NOT_THERE, OK, Number, Result, Step

TAIL_LINES = 60
BAR = 30


@dataclass(slots=True)
class Results:
    """All steps that have been run, by name, in a file that always holds what is known."""

    path: Path
    device: str
    small: bool
    steps: dict[str, Result]

    @classmethod
    def open(cls, path: Path, device: str, small: bool) -> Results:
        """Those in the file, where there is one; it must be of the same kind of check."""
        if not path.exists():
            return cls(path, device, small, {})
        tree = json.loads(path.read_text())
        if (tree["device"], tree["small"]) != (device, small):
            what = f"device {tree['device']}{', small' * tree['small']}"
            raise SystemExit(f"{path} holds results of another check ({what}); name another file by --out")
        return cls(
            path, device, small, {k: Result.from_json(json.dumps(v)) for k, v in tree["steps"].items()}
        )

    def keep(self, name: str, result: Result) -> None:
        self.steps[name] = result
        steps = {name: asdict(result) for name, result in self.steps.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"device": self.device, "small": self.small, "steps": steps}, indent=1))
        new.replace(self.path)

    def log(self, name: str) -> Path:
        return self.path.with_suffix("") / f"{name}.log"


def show(step: Step, result: Result) -> None:
    """A step's lines of the table."""
    print(f"  {result.verdict}, {result.seconds:.0f} s{f': {result.reason}' if result.reason else ''}")
    for number in result.numbers:
        print(f"  {_line(number)}")
    for what, rows in result.histograms.items():
        print(f"  {what}")
        most = max(count for _, _, count in rows)
        for low, high, count in rows:
            print(f"    {low:10.2e} to {high:8.2e} {count:4} {'#' * round(BAR * count / most)}")


def _line(number: Number) -> str:
    low, high = min(number.values), max(number.values)
    spread = f" ({low:,.4g} to {high:,.4g})" if len(number.values) > 1 else ""
    value = f"{number.middle:,.4g} {number.unit}".strip()
    if number.predicted is None:
        return f"{number.what}: {value}{spread}"
    verdict = "" if number.verdict == OK else f"   <- {number.verdict}"
    return f"{number.what}: {value}{spread}, predicted {_range(*number.predicted)}{verdict}"


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low:,.4g}"
    return f"at most {high:,.4g}" if not low else f"{low:,.4g} to {high:,.4g}"


def write_report(results: Results, steps: Mapping[str, Step]) -> Path:
    """One file with all that is of use to whoever was not there."""
    found = {}
    for name, result in results.steps.items():
        log = results.log(name)
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []
        verdicts = {n.what: n.verdict for n in result.numbers if n.predicted is not None}
        found[name] = {
            "title": steps[name].title,
            **asdict(result),
            "verdicts": verdicts,
            "log": [] if result.verdict == NOT_THERE else lines,
        }
    path = results.path.with_name(f"{results.path.stem}_to_send.json")
    about = {"machine": machine(), "device": results.device, "small": results.small}
    path.write_text(json.dumps(scrubbed(about | {"steps": found}), indent=1))
    return path
