"""What a notebook shows of an object: names and values as a small table.

Knows HTML; does not know what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

SHORT = 400


def table(title: str, rows: Mapping[str, object]) -> str:
    """Rows of a name and a value under a title. Values are shown as text, the middle of long ones left out."""
    shown = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left;white-space:pre-wrap">{escape(shortened(str(value)))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{shown}</table>"


def shortened(text: str, most: int = SHORT) -> str:
    """A text without its middle where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
