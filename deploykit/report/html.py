"""The parts that report pages are made of: one HTML file that needs neither network nor scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from deploykit.artifacts import new_file

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --soft: #5b6675; --faint: #dfe4ea; --page: #f6f8fa; --card: #fff;
  --warn: #fff4dd; --warn-ink: #6b4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --faint: #39424e; --page: #12161c;
  --card: #1b2129; --warn: #3a2e10; --warn-ink: #f3d89a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; }
h2.part { margin: 3rem 0 1rem; font-size: 1.5rem; }
nav, a { color: var(--soft); }
h2 { margin: 0 0 .25rem; font-size: 1.15rem; }
p { margin: 0 0 .75rem; color: var(--soft); max-width: 75ch; }
section { background: var(--card); border: 1px solid var(--faint); border-radius: 12px; padding: 1.25rem; margin-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
th:first-child, td:first-child { min-width: 9rem; }
.words th, .words td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
.words th { width: 11rem; vertical-align: top; font-weight: 500; color: var(--soft); }
thead th { color: var(--soft); font-weight: 600; }
small { display: block; color: var(--soft); font-size: .8em; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; margin: 0 auto; }
svg text { font-family: system-ui, sans-serif !important; }
.warning { background: var(--warn); color: var(--warn-ink); border-color: transparent; }
.warning ul { margin: 0; padding-left: 1.2rem; }
code { overflow-wrap: anywhere; }
"""


def write_page(out: Path, page: str) -> None:
    with new_file(out) as file:
        file.write_bytes(page.encode("utf-8", "replace"))  # a label may contain half a surrogate pair


def page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    note = f"<p>{escape(note)}</p>" if note else ""
    return f'<section><h2>{escape(title)}</h2>{note}<div class="wide">{body}</div></section>'


def figure(title: str, note: str, svg: str | None) -> str:
    if svg is None:
        return ""
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(f"{title}. {note}")}"', 1)
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p><figure>{svg}</figure></section>"


def warning_box(warnings: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<section class="warning"><h2>Read with care</h2><ul>{items}</ul></section>' if items else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """Render a table; ``rows`` contain HTML: numbers on the right, or ``words`` on the left with their line breaks."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="words"' if words else ""
    return f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def word_table(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in pairs)
    return f'<table class="words"><tbody>{rows}</tbody></table>'
