"""Reports as people open them: the Markdown that a report writes, and the same as one HTML file with its figures in it,
which needs no server and no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from exlm_dist.utils.files import write_atomic

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h2, h1 { border-bottom: 1px solid #ddd; padding-bottom: .25rem; } h3 { font-size: 1.05rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; margin: .6rem 0; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; }
th { background: #f5f6f8; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; display: block; margin: 1rem 0; }
code { background: #f1f2f4; padding: 0 .25em; font-size: .9em; }
"""
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)$")
_INLINE = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<b>\1</b>"),
    (re.compile(r"(?<![*\w])\*([^*]+)\*(?![*\w])"), r"<i>\1</i>"),
    (re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)"), r'<a href="\2">\1</a>'),
)


def write_page(path: Path, text: str) -> None:
    """Write a page of Markdown, and `NAME.html` beside it with the figures that it names, from its folder."""
    write_atomic(path, text)
    write_atomic(path.with_suffix(".html"), as_html(text, path.parent))


def as_html(text: str, folder: Path) -> str:
    """One HTML document from what reports use of Markdown: headings, paragraphs, tables, lists, images on lines of
    their own, bold, code and links. folder: that from which images are named; of one that is missing the name stays."""
    lines = text.splitlines()
    title = next((line.lstrip("# ") for line in lines if line.startswith("# ")), "report")
    body = "\n".join(_blocks(lines, folder))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _blocks(lines: Sequence[str], folder: Path) -> Iterator[str]:
    start = 0
    while start < len(lines):
        line = lines[start]
        kind = _kind(line)
        end = start + 1
        while kind in ("table", "list", "text") and end < len(lines) and _kind(lines[end]) == kind:
            end += 1
        own, start = lines[start:end], end
        if kind == "heading":
            level = len(line) - len(line.lstrip("#"))
            yield f"<h{level}>{_inline(line.lstrip('# '))}</h{level}>"
        elif kind == "image":
            yield _image(line.strip(), folder)
        elif kind == "table":
            yield _table(own)
        elif kind == "list":
            yield _list(own)
        elif kind == "text":
            yield f"<p>{_inline(' '.join(own))}</p>"


def _kind(line: str) -> str:
    if not line.strip():
        return "empty"
    if line.startswith("#"):
        return "heading"
    if line.startswith("|"):
        return "table"
    if line.lstrip().startswith("- "):
        return "list"
    return "image" if _IMAGE.match(line.strip()) else "text"


def _inline(text: str) -> str:
    text = escape(text, quote=False)
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text


def _image(line: str, folder: Path) -> str:
    match = _IMAGE.match(line)
    assert match is not None
    name, path = escape(match[1]), folder / match[2]
    if not path.is_file():
        return f"<p>{name}</p>"
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{name}" src="data:{_TYPES[path.suffix]};base64,{content}">'


def _table(lines: Sequence[str]) -> str:
    head, rule, *rows = [_cells(line) for line in lines]
    numeric = [cell.endswith(":") for cell in rule]

    def row(cells: Sequence[str], tag: str) -> str:
        made = [
            f"<{tag}{' class=number' if right else ''}>{_inline(cell)}</{tag}>" for cell, right in zip(cells, numeric)
        ]
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>\n{row(head, "th")}\n{body}\n</table></div>'


def _cells(line: str) -> list[str]:
    """A `|` within a cell is written `\\|`."""
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _list(lines: Sequence[str]) -> str:
    """Items, and those below them, which are indented."""
    made, depth = ["<ul>"], 0
    for line in lines:
        own = 1 if line.startswith(" ") else 0
        made += ["<ul>"] * (own - depth) + ["</ul>"] * (depth - own)
        depth = own
        made.append(f"<li>{_inline(line.strip()[2:])}</li>")
    return "\n".join([*made, "</ul>" * (depth + 1)])
