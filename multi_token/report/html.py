"""The skeleton of every page, and the pieces that all of them have: tiles and small tables.

Border: words and pieces of HTML in, one self-contained page out; it counts and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from multi_token.report import style


@dataclass(frozen=True)
class Tile:
    """A key number and what it means."""

    label: str
    value: str
    note: str = ""
    part: float | None = None
    """Of a whole, 0 to 1: drawn as a bar."""


def page(
    kind: str, *, title: str, claim: str, body: Sequence[str], footer: str, own_style: str = ""
) -> str:
    """A page that needs no other file. `claim` and the pieces of `body` are HTML.

    `kind`: what of multi_token it is of, above the title. `own_style`: CSS behind everybody's.
    """
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        kind=escape(kind),
        title=escape(title),
        style=style() + own_style,
        claim=claim,
        body="\n".join(body),
        footer=escape(footer),
    )


def tile_list(tiles: Sequence[Tile]) -> str:
    """Tiles side by side."""
    drawn = "\n".join(map(_tile, tiles))
    return f'<ul class="tiles">\n{drawn}\n</ul>'


def _tile(tile: Tile) -> str:
    step_metrics = ""
    if tile.part is not None:
        width = 100 * min(1.0, max(0.0, tile.part))
        step_metrics = (
            f'<span class="meter" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'
        )
    return (
        f'<li class="tile"><span class="label">{escape(tile.label)}</span>'
        f'<span class="value">{escape(tile.value)}</span>{step_metrics}'
        f'<span class="note">{escape(tile.note)}</span></li>'
    )


def facts_table(title: str, facts: Mapping[str, object]) -> str:
    """Names and values under a heading."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<section class="facts"><h2>{escape(title)}</h2><table>{rows}</table></section>'


def columns(tables: Sequence[str]) -> str:
    """Small tables beside each other, at the end of a page."""
    joined = "\n".join(tables)
    return f'<div class="columns">\n{joined}\n</div>'
