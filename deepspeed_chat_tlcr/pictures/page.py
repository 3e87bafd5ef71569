"""One-file HTML pages without network access, light and dark, for laptop and phone, and their parts."""

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from deepspeed_chat_tlcr.pictures.colors import DARK, LIGHT
from deepspeed_chat_tlcr.pictures.text import Html, escape, join
from deepspeed_chat_tlcr.records import replace_file


def theme_style() -> str:
    """The colours of both themes as CSS variables: --paper, --ink, --pos, --neg, --s0 to --s7."""
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK.css_variables()} }} }}\n"
    return f":root {{ {LIGHT.css_variables()} }}\n{dark}"


_STYLE = theme_style() + (resources.files(__package__) / "page.css").read_text("utf-8")
_SCRIPT = (resources.files(__package__) / "page.js").read_text("utf-8")


def page(title: str, sections: Sequence[tuple[str, object]], lead: object = "") -> str:
    """A whole HTML document: ``lead`` under the title, then one ``(heading, body)`` after another, with links to them.

    Strings are escaped, ``Html`` is taken as it is. The content security policy lets only the page's own script run,
    which shows values on hover, and loads nothing: a flaw in escaping would not run a model's output.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    sources = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    policy = f"default-src 'none'; {sources}; base-uri 'none'"
    links = [Html(f'<a href="#s{number}">{escape(heading)}</a>') for number, (heading, _) in enumerate(sections)]
    parts = [
        Html(f'<section id="s{number}"><h2>{escape(heading)}</h2>\n{escape(body)}</section>')
        for number, (heading, body) in enumerate(sections)
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1>\n{escape(lead)}\n"
        f"{Html('<nav>' + join(links) + '</nav>') if len(links) > 1 else ''}</header>\n<main>\n"
        f"{join(parts, chr(10))}\n</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def write_page(path: str | Path, title: str, sections: Sequence[tuple[str, object]], lead: object = "") -> Path:
    """Write ``page`` to a file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [page(title, sections, lead)])
    return path


def paragraph(text: object, kind: str = "") -> Html:
    """``<p>``; ``kind`` is "", "lead", "note" or "quiet"."""
    return Html(f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")


def columns(*blocks: object, kind: str = "columns") -> Html:
    """Blocks side by side where the screen is wide enough; ``kind`` "charts" for up to three in a row."""
    return Html(f'<div class="{escape(kind)}">{join(blocks)}</div>')


def cards(items: Sequence[tuple[str, str]]) -> Html:
    """A few large figures: ``(value, what it is)``."""
    card = '<div class="card"><b>{}</b><span>{}</span></div>'
    inner = [Html(card.format(escape(value), escape(what))) for value, what in items]
    return Html(f'<div class="cards">{join(inner)}</div>')


def origin(made: Mapping[str, str]) -> Html:
    """A table of where a page's numbers come from (``provenance.provenance``)."""
    note = "Seconds, memory and, by rounding, scores differ from machine to machine."
    return table_html(["made", ""], [[name, value] for name, value in made.items()], note)


def number(value: object, digits: int = 2) -> str:
    """A cell's text: floats with ``digits`` decimals, integers with separators, a dash for None and NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "—"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}").replace("-", "−")


def is_number(cell: object) -> bool:
    """A number, or a string that spells one: "84.1 %"."""
    return isinstance(cell, int | float) or bool(isinstance(cell, str) and re.fullmatch(r"[+−-]?\d[\d.,]*( ?%)?", cell))


def table_html(
    header: Sequence[object], rows: Sequence[Sequence[object]], caption: object = "", digits: int = 2
) -> Html:
    """A table whose first column names the row. A column with a number in it is aligned right; None is "—"."""
    numeric = [any(is_number(row[column]) for row in rows) for column in range(len(header))]

    def cell(tag: str, value: object, column: int, scope: str) -> Html:
        kind = ' class="num"' if numeric[column] and column else ""
        content = value if isinstance(value, Html) else number(value, digits)
        return Html(f"<{tag}{scope}{kind}>{escape(content)}</{tag}>")

    head = join([cell("th", name, column, ' scope="col"') for column, name in enumerate(header)])
    body = [
        join([cell("td" if i else "th", value, i, "" if i else ' scope="row"') for i, value in enumerate(row)])
        for row in rows
    ]
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    lines = join([Html(f"<tr>{line}</tr>") for line in body], "\n")
    table = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table>"
    return Html(f'<div class="table">{table}</div>')
