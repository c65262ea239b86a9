"""Claims about data/scan.py: every problem is found, counted and named; samples can be seen."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multi_token.data.dataset import row_to_sample
from multi_token.data.files.open import load_rows
from multi_token.data.formats import to_conversation
from multi_token.data.scan import (
    MEDIA_STYLE,
    PROMPT_STYLE,
    SUPERVISED_STYLE,
    Bin,
    Length,
    first_relative_path,
    histogram,
    render_sample,
    scan,
    write_clean,
)
from multi_token.errors import ChatTemplateError, RowError
from multi_token.media import Fetch, decode_image
from multi_token.modalities.base import Modality
from multi_token.modalities.document import DocumentModality
from multi_token.modalities.image import ImageModality
from multi_token.modalities.video import VideoModality
from multi_token.types import IGNORE_INDEX, Conversation, Media, MediaSpan, Sample

FETCH = Fetch()


def processor(conversation: Conversation, *, fetch: Fetch = FETCH) -> Sample:
    """A small reader: a token for each letter, four for each picture; answers are learned."""
    ids: list[int] = []
    labels: list[int] = []
    places: list[MediaSpan] = []
    for message in conversation.messages:
        for part in message.parts:
            if isinstance(part, Media):
                decode_image(fetch.read(part.source))
                places.append(MediaSpan(part.modality, len(ids), 4))
                new = [0] * 4
            else:
                new = [ord(letter) for letter in part.text]
            ids += new
            labels += new if message.role == "assistant" else [IGNORE_INDEX] * len(new)
    if "{{" in str(conversation):
        raise ChatTemplateError("the template stumbles")
    if not any(label != IGNORE_INDEX for label in labels):
        raise RowError("nothing to learn", kind="no_target", row_id=conversation.id)
    return Sample(torch.tensor(ids), torch.tensor(labels), places, id=conversation.id)


read = partial(row_to_sample, processor=processor, modalities=("image",))


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(map(chr, token_ids))


def row(question: str, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**fields, "messages": turns}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    return str(path)


# --- scan ---


def test_a_scan_never_stops_and_names_every_problem_by_kind(tmp_path: Path, picture: str) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"hello")
    lines = [
        json.dumps(row("<image>?", images=[picture])),
        json.dumps(row("<image>?", images=[str(tmp_path / "none.png")], id="lost")),
        json.dumps(row("<image>?", images=[str(damaged)])),
        json.dumps(row("<image>?", images=[picture, picture])),
        "{broken",
        json.dumps({"text": "hello"}),
        json.dumps(row("{{", id="jinja")),
        json.dumps(row("hm?", "", id="mute")),
        json.dumps(row("hello")),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    report = scan(load_rows(str(file)), read, source=str(file), progress=False)
    assert (report.num_rows, report.good_indices) == (9, [0, 8])
    found = {kind: [p.row_id for p in problems] for kind, problems in report.by_kind.items()}
    assert found == {
        "format": ["rows.jsonl[4]", "rows.jsonl[5]"],
        "item_count": ["rows.jsonl[3]"],
        "missing_file": ["lost"],
        "undecodable": ["rows.jsonl[2]"],
        "chat_template": ["jinja"],
        "no_target": ["mute"],
    }
    assert [p.index for p in report.problems] == [1, 2, 3, 4, 5, 6, 7]
    assert report.problems[3].message.startswith("line 5 of ")


def test_a_scan_measures_good_rows(picture: str) -> None:
    report = scan([row("<image>ab", image=picture), row("abc", "no")], read, progress=False)
    assert report.lengths == [Length(9, 3, 4), Length(5, 2, 0)]
    assert (report.num_tokens, report.num_supervised, report.num_media) == (14, 5, 4)


def test_a_scan_with_workers_finds_the_same() -> None:
    rows = [row("a" * i) if i % 3 else {"id": i} for i in range(9)]
    alone, shared = (scan(rows, read, num_workers=n, progress=False) for n in (0, 2))
    assert alone == shared
    assert alone.good_indices == [1, 2, 4, 5, 7, 8]


def test_a_bug_in_the_reader_is_raised_and_not_counted_as_a_bad_row() -> None:
    def broken(row: Any, row_id: str) -> Sample:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        scan([row("a")], broken, progress=False)


def test_a_scan_leaves_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scan([row("a")], read, progress=False)
    assert torch.equal(torch.rand(1), expected)


def test_a_scan_prints_nothing_where_there_is_no_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    scan([row("a"), {}], read)
    assert capfd.readouterr() == ("", "")


def test_a_scan_of_no_rows_is_an_empty_report() -> None:
    report = scan([], read, progress=False)
    assert (report.num_rows, report.good_indices, report.by_kind) == (0, [], {})


# --- histogram ---


def test_a_histogram_counts_every_length_once() -> None:
    lengths = [3, 17, 17, 90, 44, 3, 102]
    bins = histogram(lengths, num_bins=4)
    assert bins == [Bin(3, 27, 4), Bin(28, 52, 1), Bin(53, 77, 0), Bin(78, 102, 2)]
    assert sum(b.count for b in bins) == len(lengths)


def test_a_histogram_has_no_more_bins_than_there_are_lengths_between() -> None:
    assert histogram([]) == []
    assert histogram([5, 5]) == [Bin(5, 5, 2)]
    assert histogram([5, 7]) == [Bin(5, 5, 1), Bin(6, 6, 0), Bin(7, 7, 1)]
    assert len(histogram(list(range(1000)))) == 10


# --- write_clean ---


def test_the_clean_file_holds_the_good_rows_and_reads_like_them(
    tmp_path: Path, picture: str
) -> None:
    content = Path(picture).read_bytes()
    rows: list[Any] = [
        row("<image>?", image={"bytes": content, "path": None}, id="ä"),
        {"id": "bad"},
        row("<image>?", images=[Image.open(picture)]),
        row("<image>?", images=[Path(picture)], weights=np.array([1.5, 2.0])),
    ]
    out = tmp_path / "clean.jsonl"
    write_clean(rows, [0, 2, 3], out)
    assert '"ä"' in out.read_text(encoding="utf-8")
    written = load_rows(str(out))
    assert [r.get("id") for r in written] == ["ä", None, None]
    assert written[2]["weights"] == [1.5, 2.0]
    assert scan(written, read, progress=False).good_indices == [0, 1, 2]
    source = to_conversation(written[0], ["image"], row_id="").media[0].source
    assert FETCH.read(source) == content


def test_the_clean_file_may_replace_the_one_it_is_made_from(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row("a" * i)) for i in range(4)))
    rows = load_rows(str(file))
    write_clean(rows, [1, 3], file)
    assert [len(r["messages"][0]["content"]) for r in load_rows(str(file))] == [1, 3]
    assert list(tmp_path.iterdir()) == [file]


def test_a_row_that_json_cannot_hold_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="row x: holds a object"):
        write_clean([row("a", id="x", thing=object())], [0], tmp_path / "clean.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_is_found_before_it_is_lost() -> None:
    image: dict[str, Modality] = {"image": ImageModality(encoder="an/encoder")}
    rows = [row("<image>", image="/a.png"), row("<image>", image="b.png")]
    assert first_relative_path(rows, [0, 1], modalities=image) == "b.png"
    assert first_relative_path(rows, [0], modalities=image) is None
    urls = [row("<image>", image=url) for url in ("https://a/b.png", "data:,a", "file:///a")]
    assert first_relative_path(urls, [0, 1, 2], modalities=image) is None


def test_a_relative_path_is_found_inside_a_mapping_and_not_in_a_text_of_the_row() -> None:
    part = [row("<film>", film={"path": "a.mp4", "start": 2})]
    film: dict[str, Modality] = {"film": VideoModality(encoder="an/encoder")}
    assert first_relative_path(part, [0], modalities=film) == "a.mp4"
    text = [row("<page>", page="A text."), row("<page>", page={"text": "Another."})]
    for strings, found in (("path", "A text."), ("text", None)):
        page = DocumentModality(encoder="an/encoder", strings=strings)  # type: ignore[arg-type]
        assert first_relative_path(text, [0, 1], modalities={"page": page}) == found


# --- render_sample ---


def sample_of(question: str, picture: str) -> Sample:
    return read(row(question, image=[picture] * question.count("<image>")), "r")


def styled(sample: Sample) -> list[tuple[str, str]]:
    text = render_sample(sample, Letters())
    spans = [(text.plain[s.start : s.end], str(s.style)) for s in text.spans]
    return spans[3:]  # after the legend


def test_a_sample_is_shown_by_role_with_media_as_one_span(picture: str) -> None:
    assert styled(sample_of("Is <image> [bold]red?", picture)) == [
        ("Is ", PROMPT_STYLE),
        ("[image x 4]", MEDIA_STYLE),
        (" [bold]red?", PROMPT_STYLE),
        ("yes", SUPERVISED_STYLE),
    ]


def test_media_that_touch_are_shown_apart(picture: str) -> None:
    assert [text for text, _ in styled(sample_of("<image><image>", picture))] == [
        "[image x 4]",
        "[image x 4]",
        "yes",
    ]


def test_a_legend_names_the_three_colours() -> None:
    legend = render_sample(read(row("a"), "r"), Letters()).plain.splitlines()[0]
    assert legend == "prompt  learned  [media x tokens]"


def test_without_colour_marks_show_what_is_learned() -> None:
    text = render_sample(read(row("a", "b"), "r"), Letters(), marks=True).plain
    assert text.endswith("a⟦b⟧")
    assert "⟦learned⟧" in text
