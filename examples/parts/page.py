"""The page of an example: title, claim, tiles and sections in one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from multi_token.report.chart import chart
from multi_token.report.html import Tile, columns, facts_table, page, tile_list

_STYLE = """thead th { width: auto; font-weight: 600; }
div.facts th { width: auto; overflow-wrap: normal; }
div.facts td, thead th + th { padding-left: 14px; text-align: right; }
video { display: block; width: 100%; max-width: 720px; height: auto; border-radius: 8px; }
"""


@dataclass(frozen=True)
class ReportSection:
    """Heading, sentence and content of a section."""

    title: str
    note: str
    html: str


def write_page(
    path: Path,
    *,
    title: str,
    claim: str,
    tiles: Sequence[Tile],
    sections: Sequence[ReportSection],
    facts: Mapping[str, Mapping[str, object]],
    footer: str = "The same numbers are in report.json beside this file.",
) -> None:
    """Write a page that needs no other file. `claim` and the sections' `html` are HTML.

    `facts`: small tables at the end, by their titles.
    """
    whole = page(
        "example",
        title=title,
        claim=claim,
        body=[
            tile_list(tiles),
            *map(_section, sections),
            columns([facts_table(name, rows) for name, rows in facts.items()]),
        ],
        footer=footer,
        own_style=_STYLE,
    )
    path.write_text(whole, encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(value))}</td>" for value in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="facts"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def loss_figure(losses: Sequence[tuple[int, float]]) -> str:
    """Return (step, loss) pairs as a curve, on a logarithmic scale."""
    return loss_figures({"Loss": losses})


def loss_figures(losses: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Return a curve for each name with its (step, loss) pairs, on a logarithmic scale."""
    figures = (
        f"<figure><figcaption><b>{escape(name)}</b>Cross entropy of supervised tokens, from "
        f"{points[0][1]:.3g} to {points[-1][1]:.3g} (log scale)</figcaption>"
        f"{chart(points, label='loss', log=True)}</figure>"
        for name, points in losses.items()
        if points
    )
    return f'<div class="charts">{"".join(figures)}</div>'


def video_figure(path: Path, caption: str) -> str:
    """Return an .mp4 as a figure, within the page."""
    # Within the page, so that it can be moved or sent as one file.
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        "<video controls autoplay loop muted playsinline "
        f'src="data:video/mp4;base64,{data}"></video></figure>'
    )


def _section(section: ReportSection) -> str:
    return f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.note)}</p>\n{section.html}"
