"""docs/objectives.md says of every objective what its code says."""

import inspect
import re
from pathlib import Path

import pytest

from asyncrl.objective.catalogue import (
    ADVANTAGES,
    AGGREGATIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    PROXIMALS,
)
from asyncrl.objective.kl import ESTIMATORS
from asyncrl.resolve import resolve

PAGE = (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8")
ENTRIES = {**POLICY_LOSSES, **ADVANTAGES}


def section(name):
    found = re.search(rf"^### `{name}`\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    assert found, f"docs/objectives.md has no section ### `{name}`"
    return found[1]


def indented(function):
    """The lines of the formula in the docstring."""
    return [line.strip() for line in inspect.getdoc(function).split("\n") if line.startswith("    ")]


@pytest.mark.parametrize("name", ENTRIES)
def test_formula_defaults_use_and_source_are_there(name):
    entry, text = ENTRIES[name], section(name)
    function = resolve(entry.function)
    formula = indented(function)
    assert formula
    block = re.search(r"```\n(.*?)```", text, re.S)[1]
    assert [line.strip() for line in block.strip().split("\n")] == formula
    for spec in filter(None, (entry.function, entry.batch_mask)):
        for p in inspect.signature(resolve(spec)).parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                default = p.default if isinstance(p.default, str) else f"{p.default:g}".replace("inf", ".inf")
                assert f"`{p.name}: {default}`" in text
    assert "**When**: " in text
    for paper in re.findall(r"arXiv \d{4}\.\d{5}", inspect.getdoc(function).split("Source:")[1]):
        assert paper in text
    if name in POLICY_LOSSES:
        assert f"aggregation: `{entry.aggregation}`" in text


def test_no_section_is_of_something_that_is_not_there():
    named = set(re.findall(r"^### `(\w+)`$", PAGE, re.M))
    assert named == {*ENTRIES, *KL_ESTIMATORS}


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_the_value_and_slope_of_an_estimator_are_there(name):
    first = inspect.getdoc(ESTIMATORS[name]).split("\n")[0].rstrip(".")
    assert f"```\n{first}\n```" in section(name)


def test_every_aggregation_and_proximal_policy_has_its_row():
    for name in (*AGGREGATIONS, *PROXIMALS):
        assert f"\n| `{name}` | " in PAGE
