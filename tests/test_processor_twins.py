"""processor.py: further samples of a row: for the teacher, and of its rejected answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.chat.format import ChatFormat
from multi_token.errors import RowError
from multi_token.processor import Measured
from multi_token.testing import TEMPLATES, tiny_tokenizer
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Prepared, Sample, Text

VECTOR = [0.0, 1.0, 2.0, 3.0, 4.0]


def asked(*parts: Text | Media, answers: tuple[str, ...] = ("red",)) -> Conversation:
    messages = [Message("user", parts)]
    for answer in answers:
        messages += [Message("assistant", (Text(answer),)), Message("user", (Text("And?"),))]
    return Conversation(tuple(messages[:-1]), id="r7")


def paired(rejected: str, **fields: Any) -> Conversation:
    one = asked(Text("What is "), Media("vector", VECTOR), **fields)
    other = replace(one, messages=(*one.messages[:-1], Message("assistant", (Text(rejected),))))
    return replace(one, rejected=other)


def processor(model: Any, **changes: Any) -> Any:
    return replace(model.processor, **changes)


def supervised(model: Any, sample: Sample) -> str:
    ids = sample.labels[sample.labels != IGNORE_INDEX]
    return model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def text(model: Any, sample: Sample) -> str:
    return model.processor.tokenizer.decode(sample.input_ids)


def refusal(refusing: Any, conversation: Conversation) -> RowError:
    with pytest.raises(RowError) as caught:
        refusing(conversation)
    assert caught.value.row_id == "r7"
    return caught.value


# --- pairs ---


@pytest.mark.parametrize("pairs", ["required", "optional"])
def test_both_answers_of_a_pair_are_tokenized_with_the_same_media(model: Any, pairs: Any) -> None:
    sample = processor(model, preference=pairs)(paired("blue", answers=("one", "red")))
    assert supervised(model, sample) == "red", "the last answer alone, in either"
    assert supervised(model, sample.rejected) == "blue"
    assert sample.rejected.media is sample.media and len(sample.media) == 1
    assert sample.rejected.media_spans == sample.media_spans


def test_without_preference_a_pair_is_its_chosen_answer(model: Any) -> None:
    sample = model.processor(paired("blue", answers=("one", "red")))
    assert sample.rejected is None
    assert "one" in supervised(model, sample) and "red" in supervised(model, sample)


def test_a_row_without_a_pair_is_refused_only_where_one_is_required(model: Any) -> None:
    single = asked(Text("What?"))
    assert processor(model, preference="optional")(single).rejected is None
    error = refusal(processor(model, preference="required"), single)
    assert error.kind == "format" and "no `chosen` and `rejected` answers" in str(error)
    question = Conversation(single.messages[:1], id="r7")
    assert processor(model, preference="required")(question, prompt_only=True).rejected is None


def test_a_prompt_of_a_pair_has_no_rejected_answer(model: Any) -> None:
    pair = paired("blue")
    question = replace(pair, messages=pair.messages[:-1])
    assert processor(model, preference="optional")(question, prompt_only=True).rejected is None


def test_an_empty_answer_on_either_side_of_a_pair_is_refused(model: Any) -> None:
    both = processor(model, preference="optional")
    error = refusal(both, paired(" "))
    assert error.kind == "no_target" and "an empty `rejected` answer" in str(error)
    error = refusal(both, paired(" ", answers=("one", "red")))
    assert error.kind == "no_target" and "an empty `rejected` answer" in str(error)
    error = refusal(both, paired("blue", answers=("one", " ")))
    assert error.kind == "no_target" and "its assistant turns are empty" in str(error)
    assert refusal(model.processor, asked(Text("x"), answers=("", " "))).kind == "no_target"
    assert supervised(model, model.processor(asked(Text("x"), answers=("one", "")))) == "one"


def test_the_longer_answer_of_a_pair_has_to_fit(model: Any) -> None:
    pair = paired("blue and a long way further")
    sample = processor(model, preference="optional")(pair)
    length = len(sample.rejected.input_ids)
    assert length > len(sample.input_ids)
    assert processor(model, preference="optional", max_tokens=length)(pair).rejected is not None
    error = refusal(processor(model, preference="optional", max_tokens=length - 1), pair)
    assert error.kind == "too_long" and f"is {length} tokens long (2 of them media)" in str(error)


# --- texts for a teacher ---

SAID = asked(Text("Look: "), Media("vector", VECTOR, "a wave"), Text("!"), answers=("one", "red"))
UNSAID = asked(Text("Look: "), Media("vector", VECTOR))


@pytest.mark.parametrize("teacher", ["required", "optional"])
def test_the_teachers_sample_has_texts_in_place_of_media(model: Any, teacher: Any) -> None:
    sample = processor(model, distillation=teacher)(SAID)
    assert "Look: a wave!" in text(model, sample.teacher)
    assert sample.teacher.media_spans == [] and sample.teacher.media == []
    assert supervised(model, sample.teacher) == supervised(model, sample)
    assert len(sample.media_spans) == 1 and "a wave" not in text(model, sample)


def test_without_distillation_or_in_a_prompt_there_is_no_teachers_sample(model: Any) -> None:
    assert model.processor(SAID).teacher is None
    question = Conversation(SAID.messages[:1], id="r7")
    assert processor(model, distillation="required")(question, prompt_only=True).teacher is None


def test_a_row_without_a_text_is_refused_only_where_one_is_required(model: Any) -> None:
    assert processor(model, distillation="optional")(UNSAID).teacher is None
    error = refusal(processor(model, distillation="required"), UNSAID)
    assert error.kind == "format" and "in place of its vector; give one" in str(error)


def test_a_media_text_that_the_template_refuses_is_an_error_of_its_row(model: Any) -> None:
    refuses = "{% if 'smell' in m['content'] %}{{ raise_exception('no smells') }}{% endif %}"
    template = TEMPLATES["chatml"].replace("%}", "%}" + refuses, 1)
    strict = processor(model, chat=ChatFormat(tiny_tokenizer(), template), distillation="required")
    assert strict(SAID).teacher is not None
    error = refusal(strict, asked(Text("Look: "), Media("vector", VECTOR, "a smell")))
    assert error.kind == "chat_template" and "no smells" in str(error)
    error = refusal(strict, asked(Text("a smell")))
    assert error.kind == "chat_template" and "no smells" in str(error)


def test_a_row_whose_answer_has_other_ids_for_the_teacher_is_refused(model: Any) -> None:
    """A media text inside the answer is supervised, the media themselves are not."""
    parts = (Text("Look: "), Media("vector", VECTOR, "a wave"))
    row = Conversation((Message("user", (Text("Show one"),)), Message("assistant", parts)), id="r7")
    error = refusal(processor(model, distillation="optional"), row)
    assert error.kind == "chat_template" and "tokenized differently" in str(error)


def test_an_empty_text_is_a_text(model: Any) -> None:
    said = asked(Text("Look: "), Media("vector", VECTOR, ""), Text("!"))
    assert "Look: !" in text(model, processor(model, distillation="required")(said).teacher)


def test_a_row_without_media_is_its_own_teachers(model: Any) -> None:
    sample = processor(model, distillation="required")(asked(Text("What?")))
    assert torch.equal(sample.teacher.input_ids, sample.input_ids)


def test_only_the_last_answer_of_a_pair_is_supervised_from_a_teacher(model: Any) -> None:
    both = processor(model, distillation="optional", preference="optional")
    pair = replace(SAID, rejected=replace(SAID, messages=(*SAID.messages[:-1], SAID.messages[1])))
    assert supervised(model, both(pair).teacher) == supervised(model, both(pair)) == "red"


# --- cached features and header lengths ---


class Kept:
    """A cache that has one item."""

    def __init__(self, features: Prepared | None) -> None:
        self.features = features

    def find(self, item: Any, modality: Any, fetch: Any) -> Prepared | None:
        return self.features


def test_cached_features_take_the_place_of_decoding(model: Any) -> None:
    kept = Prepared({"features": torch.ones(3, 5)}, num_features=3)
    unreadable = Media("vector", "not a number")
    assert processor(model, cache=Kept(kept)).prepare(unreadable) is kept
    decoded = processor(model, cache=Kept(None)).prepare(Media("vector", VECTOR))
    assert decoded.num_features == 1 and decoded.inputs


def test_with_lengths_only_an_item_whose_header_has_its_length_is_not_decoded(
    model: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    image = Media("image", "red.png")
    by_header = processor(model, lengths_only=True).prepare(image)
    decoded = model.processor.prepare(image)
    assert by_header.num_features == decoded.num_features
    assert by_header.inputs == {} and decoded.inputs != {}


def test_an_error_of_a_single_item_names_the_processors_own_row(model: Any) -> None:
    bad = Media("vector", [1.0])
    for given, expected in (("", "rows[3]"), ("r9", "r9")):
        with pytest.raises(RowError) as caught:
            processor(model, row_id="rows[3]").prepare(bad, row_id=given)
        assert caught.value.row_id == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preference": "optional"},
        {"preference": "required", "max_tokens": 24},
        {"distillation": "optional", "max_tokens": 45},
        {"distillation": "required", "lengths_only": True},
    ],
)
def test_lengths_and_bad_rows_are_those_of_the_samples(model: Any, fields: dict[str, Any]) -> None:
    dropped = Conversation((Message("tool", (Text("x"),)), *SAID.messages), id="r7")
    rows = [SAID, UNSAID, paired("blue"), paired("a much longer answer in blue " * 3)]
    rows += [asked(Text("Hi")), asked(Text("Hi"), answers=("",)), asked(Text("\n" * 40)), dropped]
    rows.append(paired("one", answers=("word " * 12, "two")))
    refusing = ChatFormat(model.processor.tokenizer, TEMPLATES["mistral"])
    for reading in (processor(model, **fields), processor(model, **fields, chat=refusing)):
        measured = reading.measure(rows)
        for sample, row in zip(reading.many(rows), measured, strict=True):
            if isinstance(sample, RowError):
                assert isinstance(row, RowError)
                assert (row.kind, str(row)) == (sample.kind, str(sample))
            else:
                assert row == Measured.of(sample)
                assert row.length.num_rejected == len(getattr(sample.rejected, "input_ids", ()))
    assert any(isinstance(row, RowError) for row in measured)
