"""Samples as trackers show them."""

from __future__ import annotations

from asyncrl.observe.samples import Sample, printable, shortened

MOST_CHARACTERS = 20_000
"""Of a prompt or a response; the middle of a longer one is left out."""
SAMPLE_COLUMNS = ("sample", "facts", "prompt", "response")


def sample_row(sample: Sample) -> list[str]:
    """Of a table with `SAMPLE_COLUMNS`."""
    texts = (sample.prompt, sample.response)
    return [sample.heading(), sample.facts(), *(shortened(text, MOST_CHARACTERS) for text in texts)]


def as_markdown(sample: Sample) -> str:
    """A line of facts and two blocks of code, so that nothing in them is taken for Markdown."""
    _, facts, *texts = map(printable, sample_row(sample))
    blocks = ("\n".join(f"    {line}" for line in text.split("\n")) for text in texts)
    return "\n\n".join((facts, *blocks))
