"""HTML pages that need nothing beside them: tables, pictures, and the style of all."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
td { border-bottom: 1px solid #ddd; } img { max-width: 100%; }
pre { background: #f5f5f5; padding: 1em; overflow: auto; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of parts in HTML; the title is plain text."""
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def image(title: str, content: bytes) -> str:
    """A picture in PNG inside the page."""
    source = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{source}">'
