"""data/formats.py: three row shapes become one Conversation; other rows are one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multi_token.data.formats import to_conversation
from multi_token.errors import RowError, RowKind
from multi_token.types import Conversation, Media, Message, Text

NAMES = ("image", "vector", "left_camera", "image_left")


def read(row: Any, names: tuple[str, ...] = NAMES) -> Conversation:
    return to_conversation(row, names, row_id="rows.jsonl[7]")


def refusal(row: Any, kind: RowKind = "format", names: tuple[str, ...] = NAMES) -> str:
    with pytest.raises(RowError) as caught:
        read(row, names)
    assert caught.value.kind == kind
    return str(caught.value)


def turns(content: Any, answer: Any = "A cat.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def parts(row: dict[str, Any]) -> tuple[Text | Media, ...]:
    return read(row).messages[0].parts


# --- the three shapes ---


def test_the_originals_rows_fill_slots_in_the_text() -> None:
    assert read({"id": 3, "images": ["a.png"], "messages": turns("What is <image>?")}) == (
        Conversation(
            (
                Message("user", (Text("What is "), Media("image", "a.png"), Text("?"))),
                Message("assistant", (Text("A cat."),)),
            ),
            id="3",
        )
    )


def test_the_originals_speech_has_a_field_of_another_name() -> None:
    names = ("speech", "image")
    row = {"speech_audios": [{"path": "a.mp3"}, "b.wav"], "messages": turns("<speech> or <speech>")}
    assert [m.source for m in read(row, names).media] == ["a.mp3", "b.wav"]
    both = {"speech": "a.mp3", **row}
    assert "both `speech` and `speech_audios` are given" in refusal(both, names=names)
    assert read({"speech_audios": ["a"], "messages": turns("Hear")}, ("image",)).media == ()


def test_llavas_rows_become_the_same() -> None:
    row = {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    assert read(row).messages == (
        Message("user", (Media("image", "a.png"), Text("\nWhat is it?"))),
        Message("assistant", (Text("A cat."),)),
    )


def test_content_parts_become_the_same() -> None:
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "What is it?"},
        {"type": "vector", "source": [1.0, 2.0]},
    ]
    assert parts({"messages": turns(content)}) == (
        Media("image", "a.png"),
        Text("What is it?"),
        Media("vector", [1.0, 2.0]),
    )


def test_null_columns_of_a_table_are_absent() -> None:
    content = [
        {"type": "text", "text": "Look: ", "image": None, "source": None},
        {"type": "image", "text": None, "image": "a.png", "source": None},
    ]
    row = {"id": None, "conversations": None, "images": None, "messages": turns(content)}
    assert parts(row) == (Text("Look: "), Media("image", "a.png"))
    assert read(row).id == "rows.jsonl[7]"


def test_parts_without_a_source_are_filled_from_the_rows_field() -> None:
    content = [{"type": "image"}, {"type": "image", "image": "own.png"}, {"type": "image"}]
    assert [p.source for p in read({"images": ["a", "b"], "messages": turns(content)}).media] == [
        "a",
        "own.png",
        "b",
    ]


def test_text_without_media_is_a_conversation_in_either_shape() -> None:
    assert parts({"messages": turns("Hello")}) == (Text("Hello"),)
    row = {"conversations": [{"from": "human", "value": "Hello"}]}
    assert parts(row) == (Text("Hello"),)


# --- slots and items ---


def test_items_fill_slots_in_reading_order_over_turns_and_modalities() -> None:
    row = {
        "images": ["1", "2", "3"],
        "left_camera": "front",
        "messages": [
            {"role": "system", "content": "Like <image>."},
            {"role": "user", "content": "<left_camera><image> or <image>?"},
            {"role": "assistant", "content": "The first."},
            {"role": "tool", "content": "done"},
        ],
    }
    conversation = read(row)
    assert [(m.modality, m.source) for m in conversation.media] == [
        ("image", "1"),
        ("left_camera", "front"),
        ("image", "2"),
        ("image", "3"),
    ]
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "tool"]


def test_a_name_that_begins_another_is_not_confused_with_it() -> None:
    row = {"image": "a", "image_left": "b", "messages": turns("<image_left><image>")}
    assert parts(row) == (Media("image_left", "b"), Media("image", "a"))


def test_an_instance_with_a_plural_name_owns_its_field() -> None:
    row = {"image": "a", "images": "b", "messages": turns("<images><image>")}
    conversation = read(row, ("image", "images"))
    assert conversation.messages[0].parts == (Media("images", "b"), Media("image", "a"))


@pytest.mark.parametrize(
    ("field", "value", "sources"),
    [
        ("vector", [1.0, 2.0], [[1.0, 2.0]]),
        ("vectors", [1, 2], [[1, 2]]),
        ("vectors", [[1.0], [2.0]], [[1.0], [2.0]]),
        ("vector", [[1.0], [2.0]], [[1.0], [2.0]]),
        ("image", "a.png", ["a.png"]),
        ("image", ["a.png", "b.png"], ["a.png", "b.png"]),
        ("images", "a.png", ["a.png"]),
        ("images", b"bytes", [b"bytes"]),
        ("image", {"bytes": b"x", "path": "a.png"}, [b"x"]),
        ("images", [{"bytes": None, "path": "a.png"}], ["a.png"]),
        ("image", {"bytes": b"x"}, [b"x"]),
        ("image", Path("a.png"), [Path("a.png")]),
    ],
)
def test_a_field_holds_one_item_or_many(field: str, value: Any, sources: list[Any]) -> None:
    name = field.removesuffix("s")
    row = {field: value, "messages": turns(f"<{name}>" * len(sources))}
    assert [m.source for m in read(row).media] == sources


def test_an_array_is_one_item_alone_and_many_along_its_first_axis_in_the_plural() -> None:
    for array in (np.ones((2, 3)), torch.ones(2, 3)):
        one = read({"vector": array, "messages": turns("<vector>")}).media
        assert one[0].source is array
        two = read({"vectors": array, "messages": turns("<vector><vector>")}).media
        assert [m.source.shape for m in two] == [(3,), (3,)]
        flat = read({"vectors": array[0], "messages": turns("<vector>")}).media
        assert flat[0].source.shape == (3,)


def test_an_open_image_is_one_item() -> None:
    image = Image.new("RGB", (2, 2))
    assert read({"image": image, "messages": turns("<image>")}).media[0].source is image


def test_in_a_row_of_content_parts_no_text_is_a_slot_in_any_message() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Write <image> for images."},
            {"role": "user", "content": [{"type": "text", "text": "What does <image> mean?"}]},
            {"role": "assistant", "content": "<image> means an image."},
        ]
    }
    conversation = read(row)
    assert conversation.media == ()
    assert conversation.messages[2].parts == (Text("<image> means an image."),)


def test_a_slot_of_no_modality_of_the_recipe_is_text() -> None:
    assert parts({"messages": turns("<audio> and <b>bold</b>")}) == (
        Text("<audio> and <b>bold</b>"),
    )
    row = {"images": ["a"], "messages": turns("<image>")}
    assert read(row, ()).messages[0].parts == (Text("<image>"),)
    assert read({"messages": turns("a <> b")}, ()).messages[0].parts == (Text("a <> b"),)


@pytest.mark.parametrize(
    ("fields", "content", "counts"),
    [
        ({"images": ["a"]}, "<image> <image>", "2 slots <image> but 1 in `images`"),
        ({"image": ["a", "b"]}, "<image>", "1 slot <image> but 2 in `image`"),
        ({}, "<image>", "1 slot <image> but no field `image` or `images`"),
        ({"images": []}, "<image>", "1 slot <image> but 0 in `images`"),
        ({"images": ["a"]}, "no slot", "0 slots <image> but 1 in `images`"),
        ({}, [{"type": "image"}], '1 slot {"type": "image"} without a source but no field'),
        (
            {"images": ["b"]},
            [{"type": "image", "image": "a"}],
            '0 slots {"type": "image"} without a source but 1 in `images`',
        ),
    ],
)
def test_slots_and_items_that_differ_are_counted(
    fields: dict[str, Any], content: Any, counts: str
) -> None:
    message = refusal({**fields, "messages": turns(content)}, "item_count")
    assert message.startswith("row rows.jsonl[7]: ")
    assert counts in message


def test_each_modality_is_counted_alone_and_all_differences_are_reported() -> None:
    row = {"images": ["a", "b"], "messages": turns("<image><vector>")}
    message = refusal(row, "item_count")
    assert "1 slot <image> but 2 in `images`" in message
    assert "1 slot <vector> but no field" in message
    even = {"images": ["a"], "vectors": [[1.0], [2.0]], "messages": turns("<image><vector>")}
    assert "<image>" not in refusal(even, "item_count")


def test_a_sequence_of_vectors_is_one_item_inside_a_list() -> None:
    sequence = [[1.0, 2.0], [3.0, 4.0]]
    message = refusal({"vector": sequence, "messages": turns("<vector>")}, "item_count")
    assert "1 slot <vector> but 2 in `vector`" in message
    assert "needs a list of its own" in message
    row = {"vector": [sequence], "messages": turns("<vector>")}
    assert read(row).media == (Media("vector", sequence),)


# --- texts that say the same as the media ---


def test_each_item_gets_its_media_text_in_reading_order() -> None:
    row = {
        "images": ["a", "b"],
        "left_camera": "c",
        "media_texts": {"vector": None, "image": ["first", None], "left_camera": "front"},
        "messages": turns("<image><left_camera><image>"),
    }
    assert read(row).media == (
        Media("image", "a", "first"),
        Media("left_camera", "c", "front"),
        Media("image", "b"),
    )


def test_a_row_without_media_texts_or_with_a_null_column_has_none() -> None:
    row = {"images": ["a"], "media_texts": None, "messages": turns("<image>")}
    assert read(row).media == (Media("image", "a"),)


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "b", "c"], "a"])
def test_one_media_text_for_each_item_is_required(texts: Any) -> None:
    row = {"images": ["1", "2"], "media_texts": {"image": texts}, "messages": turns("<image>" * 2)}
    message = refusal(row, "item_count")
    assert f"{len(texts)} texts under 'image', but the row has 2 items" in message


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["a"], "`media_texts` is a list, expected an object"),
        ({"image": 3}, "a number under 'image', expected a list of texts"),
        ({"image": [3]}, "a list under 'image', expected a list of texts"),
        ({"audio": ["a"]}, "under one of image, image_left, left_camera, vector"),
    ],
)
def test_media_texts_of_another_type_are_refused(given: Any, sentence: str) -> None:
    row = {"images": ["1"], "media_texts": given, "messages": turns("<image>")}
    assert sentence in refusal(row)


# --- roles, names, and rows that are none ---


@pytest.mark.parametrize(
    ("given", "role"),
    [("human", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant")],
)
def test_other_names_of_roles_are_translated(given: str, role: str) -> None:
    assert read({"messages": [{"role": given, "content": "a"}]}).messages[0].role == role
    assert read({"conversations": [{"from": given, "value": "a"}]}).messages[0].role == role


def test_an_unknown_role_is_named_with_its_turn_and_the_accepted_ones() -> None:
    message = refusal({"messages": [*turns("a"), {"role": "User", "content": "b"}]})
    assert "turn 2 has the unknown role 'User'" in message
    assert "system, user, assistant, tool, human, gpt, bot, model" in message


@pytest.mark.parametrize("answer", ["<image>", [{"type": "image", "image": "b.png"}]])
def test_media_in_an_assistant_turn_are_refused(answer: Any) -> None:
    row = {"messages": turns([{"type": "text", "text": "a"}], answer)}
    if isinstance(answer, str):
        row = {"image": "a.png", "messages": turns("a", answer)}
    assert "turn 1 is the assistant's and has a <image>" in refusal(row)


def test_an_unknown_part_type_suggests_the_nearest() -> None:
    message = refusal({"messages": turns([{"type": "imago", "imago": "a"}])})
    assert "part 0 of turn 0 has the unknown type 'imago' (did you mean 'image" in message
    assert "this recipe has text, image, image_left, left_camera, vector" in message
    assert "did you mean" not in refusal({"messages": turns([{"type": "zzz"}])})


def test_a_row_of_no_shape_names_its_fields_and_the_three_shapes() -> None:
    message = refusal({"question": "a", "answer": "b"})
    assert "its fields are question, answer" in message
    for shape in ("What is <image>?", '"conversations": [{"from"', '"type": "image"'):
        assert shape in message


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([], "expected an object with fields, got a list"),
        ({}, "its fields are none"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "hi"}, "`messages` is a text, expected a list"),
        ({"messages": ["hi"]}, "turn 0 of `messages` is a text"),
        ({"messages": [{"content": "a"}]}, "turn 0 of `messages` has no `role`"),
        ({"messages": [{"role": "user"}]}, "has no `content`; its fields are role"),
        ({"messages": [{"from": "human", "value": "a"}]}, "its fields are from, value"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "has no `from`"),
        ({"messages": turns("a"), "conversations": turns("a")}, "both `messages` and"),
        ({"messages": turns(None)}, "`content` of turn 0 is empty (null)"),
        (
            {"messages": turns(3)},
            "`content` of turn 0 is a number, expected a text or a list of parts",
        ),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            "`value` of turn 0 is a number, expected a text",
        ),
        ({"messages": turns({"type": "text"})}, "is an object with the fields type"),
        ({"conversations": [{"from": "human", "value": []}]}, "is a list, expected a text"),
        ({"messages": turns(["hi"])}, "part 0 of turn 0 is a text"),
        ({"messages": turns([{"text": "a"}])}, "part 0 of turn 0 is an object"),
        ({"messages": turns([{"type": "text"}])}, "empty (null) under `text`"),
        (
            {"messages": turns([{"type": "image", "image": "a", "source": "b"}])},
            "both `image` and `source`",
        ),
        ({"image": "a", "images": ["b"], "messages": turns("<image>")}, "both `image` and"),
        ({"images": [None], "messages": turns("<image>")}, "item 0 of `images` is empty"),
        ({"surrogates": {}, "messages": turns("x")}, "`surrogates` is now called `media_texts`"),
        (
            {"image": {"bytes": None, "path": None}, "messages": turns("<image>")},
            "item 0 of `image` is empty",
        ),
    ],
)
def test_a_bad_row_is_an_error_with_the_reason(row: Any, sentence: str) -> None:
    message = refusal(row)
    assert sentence in message
    assert "  " not in message


def test_the_rows_own_id_names_it_in_messages() -> None:
    assert refusal({"id": "cat-1", "messages": []}).startswith("row cat-1: ")
