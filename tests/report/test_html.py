"""report/html.py: one skeleton for every page, and text that cannot break out of it."""

from __future__ import annotations

import re

from multi_token.report.html import Tile, columns, facts_table, page, style, tile_list


def test_a_page_has_its_pieces_in_order_and_names_are_escaped() -> None:
    drawn = page(
        "a < b",
        title="<i>Seeing</i> & $hearing",
        claim="It <b>learned</b>.",
        body=["<p>one</p>", "<p>$two</p>"],
        footer="</footer> & more",
        own_style="em { color: red; }",
    )
    assert drawn.count("&lt;i&gt;Seeing&lt;/i&gt; &amp; $hearing") == 2, "in the tab and on top"
    assert "multi_token a &lt; b" in drawn and "&lt;/footer&gt; &amp; more" in drawn
    order = [drawn.index(t) for t in ("<b>learned", "<p>one</p>\n<p>$two</p>", "&amp; more")]
    assert order == sorted(order)
    (found,) = re.findall(r"<style>\n(.*?)</style>", drawn, re.DOTALL)
    assert found == style() + "em { color: red; }"


def test_a_tile_has_a_bar_only_where_it_is_a_part_and_never_beyond_its_frame() -> None:
    drawn = tile_list([Tile("half", "50 %", "of <all>", 0.5), Tile("more", "2", part=1.5)])
    assert re.findall(r"width:([\d.]+)%", drawn) == ["50.0", "100.0"]
    assert "of &lt;all&gt;" in drawn and drawn.count("<li") == 2
    assert "meter" not in tile_list([Tile("plain", "3")])


def test_facts_stand_in_tables_beside_each_other() -> None:
    first = facts_table("A & b", {"<k>": "<v>", "n": 3})
    assert "<h2>A &amp; b</h2>" in first
    assert '<th scope="row">&lt;k&gt;</th><td>&lt;v&gt;</td>' in first and "<td>3</td>" in first
    assert columns([first, first]).count(first) == 2
