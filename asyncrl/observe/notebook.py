"""Output in the cells of a notebook."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

from rich.console import Console, RenderableType

NOTEBOOK_WIDTH = 100
"""Characters."""
_FORMAT = (
    '<pre style="white-space: pre; overflow-x: auto; line-height: 1.2; font-family: monospace">'
    "<code>{code}</code></pre>"
)


def display_in_notebook() -> Callable[[str], Callable[[str], None]] | None:
    """Shows HTML in the cell that runs, and returns what replaces it; None outside of notebooks."""
    module = sys.modules.get("IPython")
    if module is None or not hasattr(module.get_ipython(), "kernel"):
        return None
    from IPython.display import HTML, display

    def show(html: str) -> Callable[[str], None]:
        handle = display(HTML(html), display_id=True)
        return lambda html: handle.update(HTML(html))

    return show


def as_html(content: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=True, force_jupyter=False)
    console.print(content)
    return console.export_html(inline_styles=True, code_format=_FORMAT)
