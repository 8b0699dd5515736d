"""The demo's page: one HTML file with the table and every picture inside."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import NamedTuple

from torchmargin.demo.compare import HEADER, Comparison, cells, sentences

__all__ = ["Picture", "write_report"]


class Picture(NamedTuple):
    title: str
    path: Path
    caption: str


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .note { color: #555; }
img { max-width: 100%; border: 1px solid #ddd; } figcaption { color: #444; } figure { margin: 1rem 0; }
table { border-collapse: collapse; } th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; } th { background: #f4f4f4; }
td.small { font-size: .85rem; color: #555; } code { background: #f4f4f4; padding: 0 .25rem; }
"""


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in [*HEADER, "parameters"])
    rows = ""
    for row in comparison.rows:
        numbers = "".join(f"<td>{escape(text)}</td>" for text in cells(row))
        rows += f'<tr>{numbers}<td class="small">{escape(row.parameters)}</td></tr>\n'
    return f"<table>\n<tr>{head}</tr>\n{rows}</table>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<h2>{escape(picture.title)}</h2>\n<figure><img alt="{escape(picture.title)}" '
        f'src="data:image/png;base64,{data}">\n<figcaption>{escape(picture.caption)}</figcaption></figure>'
    )


def write_report(path: Path, comparison: Comparison, pictures: list[Picture], about: list[str]) -> Path:
    """`about`: lines on the data, the run and the versions."""
    said = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences(comparison))
    notes = "".join(f'<p class="note">{escape(line)}</p>\n' for line in about)
    body = "\n".join(_figure(picture) for picture in pictures)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>torchmargin: what margin losses learn'
        f"</title><style>{STYLE}</style></head>\n<body>\n<h1>What margin losses learn</h1>\n{notes}"
        f"<h2>Verification of classes never trained on</h2>\n{_table(comparison)}\n{said}{body}\n</body></html>\n",
        encoding="utf-8",
    )
    return path
