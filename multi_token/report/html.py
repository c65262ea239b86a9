"""Self-contained HTML pages: skeleton, style, tiles and small tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template


def style() -> str:
    """Return the style sheet of every page."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Tile:
    """Key number with its meaning."""

    label: str
    value: str
    note: str = ""
    part: float | None = None
    """Share from 0 to 1, drawn as a bar."""


def page(
    kind: str, *, title: str, claim: str, body: Sequence[str], footer: str, own_style: str = ""
) -> str:
    """Return a page that needs no other file. `claim` and the items of `body` are HTML.

    `kind`: type of the page, shown above the title. `own_style`: CSS after the common style.
    """
    # Template, not format: braces in style sheets and content would be fields.
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
    """Return tiles side by side."""
    drawn = "\n".join(map(_tile, tiles))
    return f'<ul class="tiles">\n{drawn}\n</ul>'


def _tile(tile: Tile) -> str:
    meter = ""
    if tile.part is not None:
        # Clipped: a part above 1 would be drawn outside of the tile.
        width = 100 * min(1.0, max(0.0, tile.part))
        meter = f'<span class="meter" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'
    return (
        f'<li class="tile"><span class="label">{escape(tile.label)}</span>'
        f'<span class="value">{escape(tile.value)}</span>{meter}'
        f'<span class="note">{escape(tile.note)}</span></li>'
    )


def facts_table(title: str, facts: Mapping[str, object]) -> str:
    """Return a table of names and values under a heading."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<section class="facts"><h2>{escape(title)}</h2><table>{rows}</table></section>'


def columns(tables: Sequence[str]) -> str:
    """Return small tables side by side."""
    joined = "\n".join(tables)
    return f'<div class="columns">\n{joined}\n</div>'
