"""Pages of reports: as they are written, and as a browser shows them."""

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
LIGHT, DARK = 1, 0
CURVES = {LIGHT: (31, 111, 181), DARK: (108, 179, 240)}
"""The colour of the first run's curves."""
VOID = {"meta", "link"}

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: `apt-get install chromium-headless-shell`)"
)


class Page(HTMLParser):
    """A page: its tags (with attributes), that they close in order, and the exact numbers under each key."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text, self.numbers = [], [], "", {}
        self._key = None
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._key = next((v for k, v in attrs if k in ("data-key", "data-fate", "data-spent")), self._key)
        if tag == "data":
            self.numbers.setdefault(self._key, []).append(float(attributes["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def check_numbers(page, lines):
    """First, last, least and greatest number of each chart over steps are those of the metrics."""
    charts = 0
    for key, shown in page.numbers.items():
        known = [line[key] for line in lines if key in line and math.isfinite(line[key])]
        charts += bool(known)
        assert not known or shown[:4] == [known[0], known[-1], min(known), max(known)], key
    assert charts > 20


@dataclass
class Opened:
    """console: what it complained of. dom: the page as it understood it. colours: of the screenshot, with the
    number of pixels of each."""

    console: list
    dom: str
    colours: dict


def opened(page, scratch, width=1280, height=6000, scheme=LIGHT):
    """The page at a width in pixels."""
    from PIL import Image

    picture = scratch / f"{width}-{scheme}.png"
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}"),
            *(f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr"),
            *("--dump-dom", f"--screenshot={picture}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=800,
        env=os.environ | {"DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )
    with Image.open(picture) as image:
        assert image.size == (width, height)
        colours = {colour: n for n, colour in image.convert("RGB").getcolors(2**24)}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(console, done.stdout, colours)
