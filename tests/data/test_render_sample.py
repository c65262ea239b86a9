"""`data show`: a sample is rendered by role, with media as one span."""

from __future__ import annotations

from multi_token.cli.data import MEDIA_STYLE, PROMPT_STYLE, SUPERVISED_STYLE, render_sample
from multi_token.types import Sample
from tests.data.letters import Letters, read, row


def sample_of(question: str, image_path: str) -> Sample:
    return read(row(question, image=[image_path] * question.count("<image>")), "r")


def styled(sample: Sample) -> list[tuple[str, str]]:
    text = render_sample(sample, Letters())
    spans = [(text.plain[s.start : s.end], str(s.style)) for s in text.spans]
    return spans[3:]  # after the legend


def test_a_sample_is_shown_by_role_with_media_as_one_span(image_path: str) -> None:
    assert styled(sample_of("Is <image> [bold]red?", image_path)) == [
        ("Is ", PROMPT_STYLE),
        ("[image x 4]", MEDIA_STYLE),
        (" [bold]red?", PROMPT_STYLE),
        ("yes", SUPERVISED_STYLE),
    ]


def test_media_that_touch_are_shown_apart(image_path: str) -> None:
    assert [text for text, _ in styled(sample_of("<image><image>", image_path))] == [
        "[image x 4]",
        "[image x 4]",
        "yes",
    ]


def test_a_legend_names_the_three_colours() -> None:
    legend = render_sample(read(row("a"), "r"), Letters()).plain.splitlines()[0]
    assert legend == "prompt  supervised  [media x tokens]"


def test_without_colour_marks_show_what_is_supervised() -> None:
    text = render_sample(read(row("a", "b"), "r"), Letters(), marks=True).plain
    assert text.endswith("a⟦b⟧")
    assert "⟦supervised⟧" in text
