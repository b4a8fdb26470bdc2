"""HTML of our pages: the frame, one file with its style and script inside, and what is in it."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path


def frame(file: Path) -> tuple[str, str]:
    """The page in a file, with our style and common script, and the Content-Security-Policy by
    which a browser runs the page's own script and nothing else, and loads nothing."""
    html = file.read_text(encoding="utf-8")
    for part in ("style.css", "frame.js"):
        text = Path(__file__).with_name(part).read_text(encoding="utf-8")
        html = html.replace(f"{{{{{part}}}}}", text)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return html, f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def missing(text: str) -> str:
    """A note instead of something."""
    return f'<p class="missing">{escape(text)}</p>'


def link(state: str, text: str) -> str:
    """HTML that leads to a state of the page."""
    return f'<a href="#{escape(state)}">{text}</a>'


def figure(title: str, drawn: str, note: str = "") -> str:
    """A framed picture or table, in HTML."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{drawn}{caption}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML, those of the first column headers."""
    lines = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    for name, *cells in rows:
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines += f'</tr><tr><th scope="row">{name}</th>{row}'
    return f'<div class="scroll"><table><tr>{lines}</tr></table></div>'


def tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Numbers large enough to be read first: name, number, note."""
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        + (f'<dd class="quiet">{escape(note)}</dd>' if note else "")
        + "</div>"
        for name, value, note in tiles
    )
