"""The documents: what they link to is there, and each can be found from the index."""

import re
from pathlib import Path

import pytest

from asyncrl.config.load import keys

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("**/*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page):
    """Of its headings, as they are made of them by GitHub."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    dead = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_a_recipe_has_a_test_and_names_keys_that_there_are():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| recipe ")]
    tests, known = None, set(keys())
    for row in rows:
        *_, config, shown = row.strip("| ").split(" | ")
        tests = re.findall(r"`(tests/[^`]+)`", shown) or tests
        assert tests and ("the same" in shown or "`tests/" in shown), row
        assert [test for test in tests if not (ROOT / test).exists()] == [], row
        named = re.findall(r"`(([a-z]+)\.[a-z_.]+)[`: ]", config)
        unknown = {key for key, section in named if section in known and key not in known}
        assert unknown == set(), row


def test_the_index_has_every_document():
    linked = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked
