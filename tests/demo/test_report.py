"""The demo's report: complete, self-contained, readable without colours, its answers escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multi_token.demo.report import Example, draw_sheet, write_report
from multi_token.report.chart import chart
from multi_token.report.html import style as page_style
from multi_token.report.machine import machine_facts

NUMBERS: dict[str, Any] = {
    "num_names": 100,
    "held_out_accuracy": 0.985,
    "closed_form_accuracy": 0.47,
    "shuffled_accuracy": 0.01,
    "two_image_accuracy": 0.83,
    "text_logits_identical": True,
    "train_seconds": 191.3,
    "total_seconds": 287.0,
    "recipe": {"projector": "mlp & more"},
    "machine": machine_facts(),
}
LOSSES = [(step, 6.0 / step) for step in range(1, 61)]
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """The elements of a page; fails on a tag that is closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    (tmp_path / "images").mkdir()
    for name, color in (("dog", "brown"), ("owl", "grey")):
        Image.new("RGB", (224, 224), color).save(tmp_path / "images" / f"{name}.png")
    dog, owl = "images/dog.png", "images/owl.png"
    which = "Which of <image> and <image> is an animal?"
    return [
        Example("<image>\nWhat is this?", "dog", "dog", True, (dog,)),
        Example("<image>\nWhat is this?", "<script>cat</script>", "owl", False, (owl,)),
        Example(which, "dog", "dog", True, (dog, owl), group="Two images"),
        Example("What is <image>?", "", "owl", False, (owl,), group="Silence & more"),
    ]


@pytest.fixture
def page(tmp_path: Path, examples: list[Example]) -> Page:
    write_report(tmp_path, NUMBERS, examples, LOSSES)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_json_has_the_numbers_the_examples_and_the_machine(
    tmp_path: Path, examples: list[Example]
) -> None:
    write_report(tmp_path, NUMBERS, examples, LOSSES)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {key: report[key] for key in NUMBERS} == NUMBERS
    assert report["examples"][1] == {
        "question": "<image>\nWhat is this?",
        "answer": "<script>cat</script>",
        "truth": "owl",
        "right": False,
        "images": ["images/owl.png"],
        "audio": [],
        "group": "Renderings it was not trained on",
    }
    assert report["losses"][0] == [1, 6.0] and len(report["losses"]) == 60


def test_the_page_loads_nothing_from_outside(page: Page) -> None:
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_every_image_is_described(page: Page) -> None:
    images = page.attributes("img")
    assert len(images) == 5 and all(image["alt"] for image in images)
    charts = [svg for svg in page.attributes("svg") if svg.get("role") == "img"]
    assert len(charts) == 1 and all(svg["aria-label"] for svg in charts)


def test_right_and_wrong_differ_in_words_and_not_only_in_colour(page: Page) -> None:
    assert page.text.count("Right") == 2
    assert page.text.count("Wrong. Truth: owl") == 2


def test_an_answer_cannot_become_markup(page: Page) -> None:
    assert "<script>cat</script>" in page.text
    assert "mlp & more" in page.text and "Silence & more" in page.text


def test_slots_become_words_and_an_empty_answer_is_named(page: Page) -> None:
    assert "<image>" not in page.text
    assert "Which of the first and the second is an animal?" in page.text
    assert "What is this?" in page.text and "(no answer)" in page.text


@pytest.mark.parametrize("value", ["98.5 %", "1 %", "47 %", "83 %", "identical", "3:11 min"])
def test_the_key_numbers_are_in_tiles(page: Page, value: str) -> None:
    assert value in page.text


def test_changed_text_ability_is_not_hidden(tmp_path: Path) -> None:
    write_report(tmp_path, {**NUMBERS, "text_logits_identical": False}, [], LOSSES)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "changed" in page.text and "identical" not in page.text.replace("logits identical", "")


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "ground"),
    [
        ("ink", "ground"),
        ("soft", "ground"),
        ("soft", "card"),
        ("accent", "ground"),
        ("right", "right-ground"),
        ("wrong", "wrong-ground"),
    ],
)
def test_text_has_enough_contrast(scheme: int, ink: str, ground: str) -> None:

    style = page_style()
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    low, high = sorted((luminance(colors[ink]), luminance(colors[ground])))
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 0.0), (5, 1.0)],
        [(step, 10.0 ** (-step / 10)) for step in range(1, 101)],
        [(step, 1.0) for step in range(50)],
    ],
    ids=["one point", "not finite", "ten decades", "flat"],
)
@pytest.mark.parametrize("log", [True, False])
def test_any_curve_can_be_drawn(points: list[tuple[int, float]], log: bool) -> None:
    drawn = chart(points, label="loss", log=log)
    Page(drawn)
    assert drawn.startswith("<svg") and "nan" not in drawn and "inf" not in drawn


def test_no_point_is_no_curve() -> None:
    assert "nothing to draw" in chart([(1, float("nan"))], label="loss", log=True)


def test_the_sheet_is_an_image_with_a_card_for_each_example(
    tmp_path: Path, examples: list[Example]
) -> None:
    draw_sheet((examples * 4)[:15], tmp_path / "docs" / "sheet.png", folder=tmp_path)
    draw_sheet(examples, tmp_path / "small.png", folder=tmp_path)
    with Image.open(tmp_path / "docs" / "sheet.png") as large:
        assert large.format == "PNG" and large.width > 1000 and large.height > 900
        colors = {color for _, color in large.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x14, 0x71, 0x3F), (0xB3, 0x26, 0x1E)} <= colors  # ticks and crosses
    with Image.open(tmp_path / "small.png") as small:
        assert small.width > 1000 and small.height < 500


def test_the_machine_is_named() -> None:
    facts = machine_facts()
    assert facts["cpu"] and int(facts["cores"]) >= 1 and facts["torch"] and facts["date"]
