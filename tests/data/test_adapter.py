"""data/adapter.py, presets.py and row_source.py: rows with any columns become conversations."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multi_token.data.formats import to_conversation
from multi_token.data.row_source import RowSource, adapter_of, open_rows
from multi_token.data.row_templates import RowCondition, TemplateFault
from multi_token.errors import MultiTokenError, RecipeError, RowError
from multi_token.modalities.base import Modality
from multi_token.recipe.data import DataSource
from multi_token.registry import validate_fields
from multi_token.types import Conversation
from tests.data.row_shapes import IMAGE, TYPES, Shape, shown
from tests.data.row_shapes_columns import SHAPES
from tests.data.row_shapes_more import MORE

PHOTO = {"image": TYPES["image"]}


def read(
    row: dict[str, Any], modalities: dict[str, Modality] | None = None, **keys: Any
) -> Conversation:
    modalities = PHOTO if modalities is None else modalities
    source = validate_fields(DataSource, {"rows": "rows.json", **keys}, where="source")
    adapter, _ = adapter_of(source, modalities, [row])
    return to_conversation(row if adapter is None else adapter(row, "r"), modalities, row_id="r")


def refusal(row: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(MultiTokenError) as caught:
        read(row, **keys)
    return str(caught.value)


@pytest.mark.parametrize("shape", [*SHAPES, *MORE], ids=lambda shape: shape.title)
def test_a_row_of_a_real_data_set_is_read(shape: Shape) -> None:
    source = DataSource(rows="rows.json", **shape.source)
    adapter, note = adapter_of(source, shape.modalities, [shape.row])
    copied = pickle.loads(pickle.dumps(adapter))  # noqa: S301 - ours, as data workers get it
    row = shape.row if copied is None else copied(shape.row, "r")
    assert shown(to_conversation(row, shape.modalities, row_id="r")) == shape.expected
    if shape.format is None:
        assert note is None
    else:
        assert note is not None and f"read as {shape.format}:" in note


def test_a_system_column_is_the_first_message_of_templates_too() -> None:
    row = {"image": "a.png", "caption": "a cat", "system": "Be brief."}
    expected = "system: Be brief. | user: <image 'a.png'>\nDescribe the image. | assistant: a cat"
    assert shown(read(row)) == expected
    turns: list[Any] = [{"user": "<image>?"}, {"assistant": "{{ caption }}"}]
    assert shown(read(row, turns=turns)).startswith("system: Be brief. | user: <image 'a.png'>?")
    own = [{"system": "Speak."}, *turns]
    assert shown(read(row, turns=own)).startswith("system: Speak. | user: ")
    reads = [{"user": "<image>{{ row.system }}"}, {"assistant": "{{ caption }}"}]
    assert shown(read(row, turns=reads)).startswith("user: <image 'a.png'>Be brief. | ")
    assert shown(read({"system": "a.png", "caption": "x"}, media={"image": "system"})).startswith(
        "user: <image 'a.png'>"
    )
    assert "`system` is a number, expected a text" in refusal({**row, "system": 3})
    answers = {"question": "Which?", "chosen": "a", "rejected": "b", "image": "a.png"}
    assert shown(read({**answers, "system": "Be brief."})).startswith("system: Be brief. | user: ")


def test_history_of_alpaca_is_earlier_turns() -> None:
    row = {"instruction": "And two?", "input": "", "output": "Four.", "history": []}
    assert shown(read(row)) == "user: And two? | assistant: Four."
    earlier = {**row, "history": [["One?", "Two."]], "system": "Double."}
    assert shown(read(earlier)) == (
        "system: Double. | user: One? | assistant: Two. | user: And two? | assistant: Four."
    )
    assert "`history` has ['One?'], expected pairs of texts" in refusal(
        {**row, "history": [["One?"]]}
    )


# --- templates ---


def test_turns_are_templates_over_the_columns() -> None:
    found = read(
        {"photo": IMAGE, "q": "What?", "a": ["cat", "cat", "dog"], "meta": '{"lang": "en"}'},
        media={"image": "photo"},
        turns=[
            {"system": "{% if meta %}Answer in {{ (meta | fromjson).lang }}.{% endif %}"},
            {"user": "<image> {{ q | upper }}"},
            {"assistant": "{{ a | common }}"},
        ],
    )
    assert shown(found) == (
        "system: Answer in en. | user: <image b'\\x89PNG'> WHAT? | assistant: cat"
    )


def test_letters_of_a_slot_in_a_value_stay_text_where_the_template_has_the_slot() -> None:
    row = {"image": "a.png", "html": "an <image> tag"}
    turns = [{"user": "<image>{{ html }}"}, {"assistant": "{{ html }}"}]
    assert shown(read(row, turns=turns)) == (
        "user: <image 'a.png'>an <image> tag | assistant: an <image> tag"
    )
    turns = [{"user": "{{ html }}"}, {"assistant": "x"}]
    assert shown(read(row, turns=turns)) == "user: an <image 'a.png'> tag | assistant: x"


def test_a_template_repeats_a_slot_for_each_of_several_items() -> None:
    found = read(
        {"images": ["a.png", "b.png"], "q": "Which?", "a": "b"},
        turns=[{"user": "{{ '<image>' * (images | length) }}{{ q }}"}, {"assistant": "{{ a }}"}],
    )
    assert shown(found) == "user: <image 'a.png'><image 'b.png'>Which? | assistant: b"


def test_a_media_template_makes_a_path_or_a_list_of_paths() -> None:
    turns = [{"user": "{{ '<image>' * n }}Look."}, {"assistant": "Yes."}]
    media = {"image": "{{ ['%03d.png' % id, 'b.png'][:n] }}"}
    assert shown(read({"id": 7, "n": 2}, media=media, turns=turns)) == (
        "user: <image '007.png'><image 'b.png'>Look. | assistant: Yes."
    )
    media = {"image": "frames/{{ '%03d' % id }}.png"}
    assert read({"id": 7, "n": 1}, media=media, turns=turns).media[0].source == "frames/007.png"


def test_another_tools_slot_is_ours() -> None:
    row = {"video": "a.mp4", "clips": 1, "q": "<vid> What?", "a": "A man."}
    found = read(
        row,
        {"video": TYPES["video"]},
        slots={"<vid>": "video"},
        turns=[{"user": "{{ q }}"}, {"assistant": "{{ a }}"}],
    )
    assert shown(found) == "user: <video 'a.mp4'> What? | assistant: A man."


def test_a_question_is_drawn_by_the_seed_and_the_row() -> None:
    source = DataSource(rows="x.json", format="captions", question=["A?", "B?", "C?"])
    row = {"image": IMAGE, "text": "a cat"}

    def asked(seed: int) -> list[str]:
        adapter, _ = adapter_of(source, PHOTO, [row], seed=seed)
        assert adapter is not None
        rows = (adapter(row, f"x.json[{i}]") for i in range(40))
        return [to_conversation(r, PHOTO, row_id="").messages[0].parts[1].text for r in rows]  # type: ignore[union-attr]

    assert asked(0) == asked(0) != asked(1)
    assert set(asked(0)) == {"\nA?", "\nB?", "\nC?"}


def test_media_texts_are_templates_for_the_teacher() -> None:
    found = read(
        {"audio": "a.wav", "text": "TURN IT ON"},
        {"speech": TYPES["speech"]},
        media_texts={"speech": "{{ text | lower }}"},
    )
    assert [item.media_text for item in found.media] == ["turn it on"]


# --- bad input ---


def test_a_missing_column_is_named_with_the_nearest() -> None:
    turns = [{"user": "<image>{{ questoin }}"}, {"assistant": "x"}]
    message = refusal({"image": "a.png", "question": "What?"}, turns=turns)
    assert "row r: no column 'questoin': did you mean 'question'? (it has image, question)" in (
        message
    )
    assert "(`turns.0.user`: <image>{{ questoin }})" in message
    media = {"image": "imgae"}
    assert "no column 'imgae': did you mean 'image'?" in refusal(
        {"image": "a.png"}, media=media, turns=[{"user": "<image>"}, {"assistant": "x"}]
    )


def test_a_null_column_is_no_word_none() -> None:
    turns = [{"user": "<image>What?"}, {"assistant": "It is {{ a }}."}]
    message = refusal({"image": "a.png", "a": None}, turns=turns)
    assert "row r: a column is empty (null) (`turns.1.assistant`: It is {{ a }}.)" in message


def test_an_object_or_a_list_is_no_text() -> None:
    row = {"instruction": "Name two.", "output": ["x", "y"]}
    assert refusal(row) == (
        "row r: a value is a list, which is no text; name the entry that is meant in `turns`, such "
        'as `{assistant: "{{ output[0] }}"}` (`format: alpaca.1.assistant`: {{ output }})'
    )
    answer = {"text": ["Paris"], "answer_start": [3]}
    turns = [{"user": "<image>?"}, {"assistant": "It is {{ answers }}."}]
    message = refusal({"image": "a.png", "answers": answer}, turns=turns)
    assert "a value is an object with the fields text, answer_start, which is no text" in message
    assert '`{assistant: "{{ answers.text[0] }}"}` (`turns.1.assistant`: ' in message
    row = {"image": "a.png", "question": "Where?", "answers": [{"value": "Paris"}]}
    assert '`{assistant: "{{ answers[0].value }}"}`' in refusal(row)
    assert "a value is bytes" in refusal({"image": "a.png", "text": b"a cat"})


def test_presets_read_the_answers_of_squad_and_the_captions_of_coco() -> None:
    row = {"image": "a.png", "question": "Where?", "answers": {"text": ["Paris"], "start": [3]}}
    assert shown(read(row)).endswith("Where? | assistant: Paris")
    for sentences in ({"raw": "A cat.", "tokens": ["a", "cat"]}, [{"raw": "A cat.", "sentid": 1}]):
        found = read({"image": "a.png", "sentences": sentences})
        assert shown(found).endswith("assistant: A cat.")


def test_a_template_that_fails_names_the_row_and_the_expression() -> None:
    turns = [{"user": "<image>What?"}, {"assistant": "{{ (a | fromjson).b }}"}]
    message = refusal({"image": "a.png", "a": "{oops"}, turns=turns)
    assert message.startswith("row r: `turns.1.assistant` cannot be computed (Expecting property")
    assert message.endswith("): {{ (a | fromjson).b }}")


@pytest.mark.parametrize("of", ["q | dictsort", "q | xmlattr", "deep | fromjson"])
def test_a_filter_on_a_value_it_is_not_meant_for_refuses_the_row(of: str) -> None:
    row = {"image": "a.png", "q": "What?", "deep": "[" * 100_000}
    turns = [{"user": "<image>?"}, {"assistant": f"{{{{ {of} }}}}"}]
    assert "row r: `turns.1.assistant` cannot be computed (" in refusal(row, turns=turns)
    with pytest.raises(TemplateFault, match="`where` cannot be computed"):
        RowCondition(of).holds(row)


def test_a_logged_request_of_other_values_than_objects_is_refused() -> None:
    message = {"role": "user", "content": "Hi"}
    assert "row r: `choices` has a text" in refusal({"messages": [message], "choices": ["x"]})
    assert "turn 0 of `messages` is a text" in refusal({"messages": ["x"], "response": "Hi"})


def test_a_template_without_an_end_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match=r"rows of rows.json: `turns.1.assistant` is no template"):
        read({"image": "a"}, turns=[{"user": "<image>"}, {"assistant": "{{ a "}])


@pytest.mark.parametrize(
    "reach",
    [
        "{{ a.__class__.__mro__ }}",
        "{{ row.__init__.__globals__ }}",
        "{{ ''.__class__ }}",
        "{{ image.save('x') }}",
        "{{ row.update({'a': 1}) }}",
    ],
)
def test_a_template_cannot_reach_python(reach: str) -> None:
    from PIL import Image

    row = {"image": Image.new("RGB", (2, 2)), "a": "x"}
    message = refusal(row, turns=[{"user": "<image>?"}, {"assistant": reach}])
    assert "row r: `turns.1.assistant` reaches for Python, which templates may not" in message


def test_slots_and_items_that_differ_are_counted() -> None:
    turns = [{"user": "<image><image> Same?"}, {"assistant": "No."}]
    message = refusal({"image": "a.png"}, turns=turns)
    assert "the turns have 2 slots <image>, but there is 1 in `image`" in message
    turns = [{"user": "Same?"}, {"assistant": "No."}]
    assert "0 slots <image>, but there is 1 in `image`" in refusal({"image": "a.png"}, turns=turns)


def test_an_empty_answer_is_refused() -> None:
    turns = [{"user": "<image>?"}, {"assistant": "{{ a }} "}]
    message = refusal({"image": "a.png", "a": ""}, turns=turns)
    assert "the assistant turn is empty (`turns.1.assistant`: {{ a }} )" in message


def test_an_ambiguous_column_is_asked_for() -> None:
    both = {"left": TYPES["image"], "right": TYPES["image"]}
    with pytest.raises(MultiTokenError) as caught:
        read({"image": IMAGE, "caption": "x"}, both)
    assert str(caught.value) == (
        "rows of rows.json: column 'image' may hold items of 'left' or of 'right'; say which: "
        "`media: {left: image}`"
    )


def test_a_name_of_no_modality_is_refused() -> None:
    with pytest.raises(RecipeError, match="`media` of rows.json names 'imgae'.*did you mean"):
        read({"image": "a"}, media={"imgae": "image"})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"turns": [{"user": "a", "assistant": "b"}]}, "turn 0 has the roles"),
        ({"turns": [{"user": "a"}]}, "expected an assistant turn at the end"),
        ({"format": "qa", "turns": [{"user": "a"}, {"assistant": "b"}]}, "exclude each other"),
        ({"format": "qa", "question": "What?"}, "`question` is for captions"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MultiTokenError, match=sentence):
        validate_fields(DataSource, {"rows": "x.json", **keys}, where="source")


# --- rows of a file ---


def open_file(folder: Path, rows: list[Any], **keys: Any) -> RowSource:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return open_rows(DataSource(rows=str(path), **keys), PHOTO)


def test_where_chooses_rows_which_keep_their_place_in_messages(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "text": "x" if i != 8 else "", "fold": i} for i in range(10)]
    source = open_file(tmp_path, rows, where="fold > 6 and fold != 9")
    assert len(source.rows) == 2
    assert to_conversation(source.rows[0], PHOTO, row_id="").id == "rows.jsonl[7]"
    with pytest.raises(RowError, match=r"row rows.jsonl\[8\]: the assistant turn is empty"):
        source.rows[1]
    with pytest.raises(MultiTokenError, match="no row of .* is left"):
        open_file(tmp_path, rows, where="fold > 70")
    with pytest.raises(RowError, match="no column 'flod': did you mean 'fold'"):
        open_file(tmp_path, rows, where="flod > 6")


def test_media_start_at_root_and_may_not_leave_it(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    (tmp_path / "b.png").write_bytes(b"2")
    rows = [{"image": "a.png", "text": "x"}, {"image": "../b.png", "text": "x"}]
    source = open_file(tmp_path, rows, root=str(folder))
    first, second = (to_conversation(row, PHOTO, row_id="") for row in source.rows)
    assert source.fetch.read(first.media[0].source) == b"1"
    with pytest.raises(MultiTokenError, match=r"../b.png leaves `root` \(.*photos\)"):
        source.fetch.read(second.media[0].source)
    with pytest.raises(MultiTokenError, match="which `root` names"):
        open_file(tmp_path, rows, root=str(tmp_path / "none"))


def test_the_first_rows_choose_the_format_and_say_so(tmp_path: Path) -> None:
    rows = [{"photo": "a.png", "caption": "a cat"}]
    note = open_file(tmp_path, rows).note
    assert note is not None and note.endswith(
        "rows.jsonl read as captions: image <- photo, answer <- caption, question: 'Describe the "
        "image.'; set `format:` or `turns:` to change"
    )


def test_where_reads_the_columns_of_its_condition_alone(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    from multi_token.data.chosen_rows import chosen_rows
    from multi_token.data.files.parquet import ParquetRows

    table = pa.table({"fold": range(3000), "image": [b"x" * 1000] * 3000})
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = ParquetRows(tmp_path / "rows.parquet")
    chosen = chosen_rows(rows, RowCondition("fold % 1000 == 7"), "rows.parquet")
    assert [row["fold"] for row in chosen] == [7, 1007, 2007]
    assert chosen[0]["image"] == b"x" * 1000
    narrow = rows.select_columns(["fold"])
    assert set(narrow[0]) == set(pickle.loads(pickle.dumps(narrow))[0]) == {"fold"}  # noqa: S301


def test_where_leaves_rows_of_a_stream_out_and_is_remembered_by_file(tmp_path: Path) -> None:
    from multi_token.data.row_stream import ChosenRows, open_stream

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"fold": i}) for i in range(10)))
    choose = ChosenRows(RowCondition("fold % 4 == 1"), tmp_path / "where")
    stream = open_stream(str(path), choose=choose)
    found = [stream.row(number) for number in range(4)]
    assert [row.row["fold"] for row in found] == [1, 5, 9, 1]
    assert [row.row_id for row in found[:2]] == ["rows.jsonl[1]", "rows.jsonl[5]"]
    (stored,) = (tmp_path / "where").iterdir()
    stored.write_bytes(stored.read_bytes())
    again = open_stream(str(path), choose=choose)
    assert again.row(1).row["fold"] == 5
    wrong = ChosenRows(RowCondition("flod == 1"), tmp_path / "where")
    with pytest.raises(MultiTokenError, match=r"no column 'flod': did you mean 'fold'"):
        open_stream(str(path), choose=wrong).row(0)


def test_parts_of_one_split_each_remember_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multi_token.data import chosen_rows

    monkeypatch.setattr(chosen_rows, "_WORTH_STORING_S", -1.0)
    rows = [{"image": f"{i}.png", "text": "x", "fold": i % 4 if i < 4 else 0} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = str(tmp_path / "run")
    for _ in range(2):
        for split, expected in (("train[:4]", [0]), ("train[4:]", [4, 5, 6, 7])):
            fields = {"rows": str(tmp_path / "rows.jsonl"), "where": "fold == 0", "split": split}
            source = validate_fields(DataSource, fields, where="source")
            found = open_rows(source, PHOTO, run=run).rows
            ids = [to_conversation(row, PHOTO, row_id="").id for row in found]
            assert ids == [f"rows.jsonl[{i}]" for i in expected]
    assert len(list((tmp_path / "run" / "where").iterdir())) == 2, "both are remembered"


def test_a_choice_of_a_media_folder_is_looked_for_again(tmp_path: Path) -> None:
    from multi_token.data.row_stream import ChosenRows, open_stream
    from multi_token.data.row_templates import RowCondition

    for split, texts in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "photos" / split / f"{number}.jpg").touch()
            (tmp_path / "photos" / split / f"{number}.txt").write_text(text)

    def image(split: str) -> str:
        choose = ChosenRows(RowCondition("text == 'cat'"), tmp_path / "where")
        stream = open_stream(str(tmp_path / "photos"), split=split, choose=choose)
        return stream.row(0).row["image"]

    assert [image("train"), image("test")] == ["train/0.jpg", "test/1.jpg"]
    (tmp_path / "photos" / "train" / "0.txt").write_text("cow")
    (tmp_path / "photos" / "train" / "1.txt").write_text("cat")
    assert image("train") == "train/1.jpg"


def test_a_choice_of_vectors_is_looked_for_again_after_their_labels_changed(
    tmp_path: Path,
) -> None:
    from multi_token.data.row_stream import ChosenRows, open_stream
    from multi_token.data.row_templates import RowCondition

    np.save(tmp_path / "v.npy", np.array([[1.0], [2.0]]))
    choose = ChosenRows(RowCondition("label == 'cat'"), tmp_path / "where")
    for labels, expected in (("cat\ndog\n", 1.0), ("doggy\ncat\n", 2.0)):
        (tmp_path / "v.txt").write_text(labels)
        stream = open_stream(str(tmp_path / "v.npy"), choose=choose)
        assert stream.row(0).row["vector"].tolist() == [expected]


def test_items_that_no_first_row_has_are_named_and_not_left_out() -> None:
    texts = [{"user": "What?", "assistant": "A cat."}]
    rows = [{"images": None, "texts": texts} for _ in range(8)]
    late = {"images": ["a.png"], "texts": texts}
    source = DataSource(rows="x.jsonl", format="pairs")
    adapter, _ = adapter_of(source, PHOTO, rows)
    assert adapter is not None
    assert adapter(rows[0], "0")["messages"]
    with pytest.raises(RowError, match="say so: `media: {image: images}`"):
        adapter(late, "8")
    said = source.model_copy(update={"media": {"image": "images"}})
    adapter, _ = adapter_of(said, PHOTO, rows)
    assert adapter is not None
    assert to_conversation(adapter(late, "8"), PHOTO, row_id="8").media
