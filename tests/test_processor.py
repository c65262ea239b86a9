"""processor.py: a bad row is an error with a kind and the row's id; nothing is cut."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from multi_token.data.formats import to_conversation
from multi_token.errors import MediaError, RowError
from multi_token.processor import build_processor
from multi_token.recipe.recipe import Recipe
from multi_token.testing import TEMPLATES
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Text


def row(content: Any, answer: str = "red", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": "r7", "messages": messages, **fields}


def read(model: Any, data: Path, fields: dict[str, Any], **changes: Any) -> Any:
    processor = replace(
        model.processor, fetch=replace(model.processor.fetch, root=str(data)), **changes
    )
    return processor(to_conversation(fields, list(model.modalities), row_id="r7"))


BAD = [
    (row("What is <image>?", images=["none.png"]), "missing_file", "no file at"),
    (row("What is <image>?", images=["rows.jsonl"]), "undecodable", "rows.jsonl"),
    (row("<vector>", vector=[1.0, 2.0, 3.0, 4.0, float("nan")]), "undecodable", "nan"),
    (row("<image> and <image>", images=["red.png"]), "item_count", "2"),
    (row("<image>", images=["red.png", "blue.png"]), "item_count", "2"),
    ({"id": "r7", "messages": []}, "format", "messages"),
    ({"id": "r7", "messages": [{"role": "robot", "content": "x"}]}, "format", "robot"),
    (
        {"id": "r7", "messages": [{"role": "user", "content": "x"}]},
        "no_target",
        "no assistant turn",
    ),
    (row("x", answer=""), "no_target", "nothing to train on"),
    (row("word " * 400), "too_long", "over max_tokens = 200"),
]


@pytest.mark.parametrize(("fields", "kind", "sentence"), BAD)
def test_a_bad_row_is_a_sentence_with_its_kind_and_id(
    model: Any, data: Path, fields: dict[str, Any], kind: str, sentence: str
) -> None:
    with pytest.raises(RowError, match=sentence) as caught:
        read(model, data, fields, max_tokens=200)
    assert caught.value.kind == kind
    assert str(caught.value).startswith("row r7: ")
    assert "\n" not in str(caught.value)


def test_a_truncated_image_and_a_bomb_are_reported_with_the_row(
    model: Any, data: Path, tmp_path: Path
) -> None:
    whole = (data / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RowError, match=r"row r7: image: .*cut\.png"):
        read(model, tmp_path, row("<image>", images=["cut.png"]))
    small = model.modalities["image"].model_copy(update={"max_pixels": 100})
    with pytest.raises(RowError, match="row r7: image: .*100"):
        read(
            model,
            data,
            row("<image>", images=["red.png"]),
            modalities={**model.modalities, "image": small},
        )


def test_a_row_that_just_fits_is_kept_whole(model: Any, data: Path) -> None:
    fields = row("<image> again <image>", images=["red.png", "blue.png"])
    length = len(read(model, data, fields).input_ids)
    assert len(read(model, data, fields, max_tokens=length).input_ids) == length
    with pytest.raises(RowError, match="6 of them media"):
        read(model, data, fields, max_tokens=length - 1)


def test_an_image_placeholder_in_a_content_part_stays_text(model: Any, data: Path) -> None:
    parts = [{"type": "text", "text": "I wrote <image>"}, {"type": "image", "image": "red.png"}]
    sample = read(model, data, row(parts))
    assert len(sample.media_spans) == 1
    before = sample.input_ids[: sample.media_spans[0].start]
    assert "I wrote <image>" in model.processor.tokenizer.decode(before)


def test_an_item_of_an_unknown_modality_is_refused(model: Any) -> None:
    parts = (Media("smell", "x"), Text("?"))
    conversation = Conversation(
        (Message("user", parts), Message("assistant", (Text("a"),))), id="r7"
    )
    with pytest.raises(RowError, match="'smell', but the recipe has image, vector"):
        model.processor(conversation)


def test_errors_keep_kind_and_id_on_their_way_out_of_a_data_worker() -> None:
    error = pickle.loads(pickle.dumps(RowError("is bad", kind="format", row_id="r1")))  # noqa: S301
    assert (str(error), error.kind, error.row_id) == ("row r1: is bad", "format", "r1")
    media = pickle.loads(pickle.dumps(MediaError("gone", kind="missing_file")))  # noqa: S301
    assert (str(media), media.kind) == ("gone", "missing_file")


def test_a_question_ends_where_the_answer_begins_and_nothing_is_supervised(model: Any) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    conversation = to_conversation({"messages": talk[:1]}, [], row_id="r7")
    asked = model.processor(conversation, prompt_only=True)
    assert (asked.labels == IGNORE_INDEX).all()
    whole = model.processor(to_conversation({"messages": talk}, [], row_id="r7"))
    first = int((whole.labels != IGNORE_INDEX).nonzero()[0])
    assert asked.input_ids.tolist() == whole.input_ids[:first].tolist()


def test_a_processor_is_built_from_the_recipe(
    recipe_fields: Any, data: Path, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path)
    fields["model"] |= {"train_on_turns": "last", "chat_template": TEMPLATES["llama3"]}
    fields["data"]["max_tokens"] = 77
    recipe = Recipe.model_validate(fields)
    processor = build_processor(recipe, root=str(data))
    assert (processor.max_tokens, processor.chat.train_on_turns, processor.preference) == (
        77,
        "last",
        None,
    )
    assert processor.chat.template == TEMPLATES["llama3"]
    assert list(processor.modalities) == ["image"] and processor.fetch.root == str(data)
    assert processor.prepare(Media("image", "red.png")).inputs
    fields["train"]["stages"][0]["dpo"] = {}
    assert build_processor(Recipe.model_validate(fields)).preference == "required"
