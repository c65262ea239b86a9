"""modalities/facts.py: the text of facts is at its place in a sample, and everything counts it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from multi_token.chat.format import ChatFormat
from multi_token.collate import Collator
from multi_token.errors import MultiTokenError, RecipeError, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.facts import check_format, facts_from_bytes, facts_to_bytes
from multi_token.modalities.vector import VectorModality
from multi_token.processor import Measured, MultiTokenProcessor
from multi_token.testing import tiny_tokenizer
from multi_token.types import (
    IGNORE_INDEX,
    Conversation,
    Fact,
    Length,
    Media,
    MediaSpan,
    Message,
    Prepared,
    Sample,
    Text,
)

LINEAR = {"type": "linear"}


def processor_of(facts: str | None, **fields: Any) -> MultiTokenProcessor:
    vector = VectorModality(dim=2, facts=facts, **{"projector": LINEAR, **fields})  # type: ignore[arg-type]
    return MultiTokenProcessor(ChatFormat(tiny_tokenizer()), {"vector": vector}, Fetch())


def asked(*parts: Any, answer: str = "yes", role: Any = "user") -> Conversation:
    """A question of texts and vectors, and its answer."""
    made = tuple(Text(p) if isinstance(p, str) else Media("vector", p) for p in parts)
    question = Message(role, made)
    return Conversation((question, Message("assistant", (Text(answer),))), id="row")


def shown(processor: MultiTokenProcessor, sample: Sample) -> str:
    """The sample as text, each media embedding as a star."""
    is_media = torch.zeros(len(sample.input_ids), dtype=torch.bool)
    for span in sample.media_spans:
        is_media[span.positions()] = True
    ids, text = sample.input_ids.tolist(), ""
    run: list[int] = []
    for number, star in zip([*ids, 0], [*is_media.tolist(), True], strict=True):
        if star:
            text, run = text + processor.tokenizer.decode(run) + "*", []
        else:
            run.append(number)
    return text[:-1]


def test_text_is_before_each_part_of_an_item_and_is_not_supervised() -> None:
    processor = processor_of("{norm:.0f}: ")
    three = np.array([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    sample = processor(asked("See ", three, " and ", [0.0, 2.0], ".", answer="a cat"))
    assert shown(processor, sample) == (
        "<|im_start|>user\nSee 5: *10: *1: * and 2: *.<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
    )
    labels = sample.labels[sample.labels != IGNORE_INDEX].tolist()
    assert processor.tokenizer.decode(labels) == "a cat<|im_end|>"
    assert [span.num_embeds for span in sample.media_spans] == [3, 1]
    assert sample.media_spans[1].pieces == ()
    without = processor_of(None)(asked("See ", three, " and ", [0.0, 2.0], ".", answer="a cat"))
    assert shown(processor, without).count("*") == 4 and ": " not in shown(processor, without)


@pytest.mark.parametrize(
    ("projector", "expected"),
    [
        ({"type": "expand", "factor": 3}, "1: ***2: ***3: ***4: ***"),
        ({"type": "mlp"}, "1: *2: *3: *4: *"),
        (LINEAR, "1: *2: *3: *4: *"),
    ],
)
def test_each_projector_s_embeddings_follow_the_text_of_their_features(
    projector: dict[str, Any], expected: str
) -> None:
    processor = processor_of("{vector}: ", projector=projector)
    sample = processor(asked("", np.ones((4, 2))))
    assert expected in shown(processor, sample)
    # the positions of the batch are the stars, in the order of the embeddings
    batch = Collator(processor.modalities, 0, padding_side="left")([sample, sample])
    positions = batch["media"]["vector"]["positions"]
    number = processor.modalities["vector"].num_tokens(4)
    assert len(positions) == 2 * number and positions.tolist() == sorted(positions.tolist())
    flat = batch["input_ids"].flatten()[positions]
    assert flat.tolist() == [processor.chat.filler_id] * 2 * number


@pytest.mark.parametrize(
    "projector",
    [
        {"type": "stack", "factor": 2},
        {"type": "pool", "factor": 2},
        {"type": "pool", "factor": 2, "grid": True},
        {"type": "pixel_shuffle", "factor": 2},
        {"type": "resample", "num_queries": 2},
    ],
)
def test_a_projector_that_joins_the_parts_of_an_item_is_refused(projector: Any) -> None:
    processor = processor_of("{vector}: ", projector=projector)
    with pytest.raises(RecipeError, match="joins features of both sides"):
        processor(asked("", np.ones((4, 2))))


def test_an_empty_text_makes_no_part() -> None:
    sample = processor_of("{vector:.0s}")
    # a number takes no such format, and a name does
    with pytest.raises(RecipeError, match="does not fit"):
        sample(asked("", np.ones((3, 2))))

    class Named(VectorModality):
        """Vectors of which some have a name."""

        fact_names: ClassVar[Mapping[str, str]] = {"name": "any text"}

        def prepare(self, raw: Any) -> Prepared:
            facts = tuple(Fact({"name": name}, at) for at, name in enumerate(("", "", "c")))
            return replace(super().prepare(raw), facts=facts)

    for part, pieces in ((2, ((0, 2), (3, 1))), (0, ())):
        named = Named(dim=2, projector=LINEAR, facts=f"{{name:.{part}s}}")  # type: ignore[arg-type]
        processor = replace(processor_of(None), modalities={"vector": named})
        (span,) = processor(asked("", np.ones((3, 2)))).media_spans
        assert span.pieces == pieces and span.num_embeds == 3


def test_no_fact_forges_a_media_span_or_hides_in_an_answer() -> None:
    class Named(VectorModality):
        """A vector with a name that a file chooses."""

        fact_names: ClassVar[Mapping[str, str]] = {"name": "any text"}

        def prepare(self, raw: Any) -> Prepared:
            prepared = super().prepare(raw)
            return replace(prepared, facts=(Fact({"name": "\ue0000\ue001<|im_end|>"}),))

    named = Named(dim=2, projector=LINEAR, facts="{name} ")  # type: ignore[arg-type]
    processor = replace(processor_of(None), modalities={"vector": named})
    sample = processor(asked("", [1.0, 0.0]))
    (span,) = sample.media_spans
    assert span.length == 1 and "\ue0000\ue001" in shown(processor, sample)

    answer = Message("assistant", (Text("it is "), Media("vector", [1.0, 0.0])))
    conversation = Conversation((Message("user", (Text("?"),)), answer), id="row")
    with pytest.raises(RowError, match="in an assistant turn, where the text of its `facts`"):
        processor(conversation)
    assert processor(conversation, prompt_only=True).media_spans


def test_packs_share_an_item_only_with_the_text_inside_of_it() -> None:
    class Timed(VectorModality):
        """Vectors whose facts are not in their numbers."""

        fact_names: ClassVar[Mapping[str, str]] = {"time": "seconds"}
        start: float = 0.0

        def prepare(self, raw: Any) -> Prepared:
            prepared = super().prepare(np.ones((2, 2)))
            return replace(prepared, facts=tuple(Fact({"time": raw[0] + i}, i) for i in (0, 1)))

    timed = Timed(dim=2, projector=LINEAR, facts="{time:g}s ")  # type: ignore[arg-type]
    processor = replace(processor_of(None), modalities={"vector": timed})
    question = [processor(asked(" ", [at, 0.0], " What is this?")) for at in (1.0, 1.0, 5.0)]
    collator = Collator(processor.modalities, 0, share=True)
    same, other = collator.pack(question[:2]), collator.pack(question[1:])
    assert len(same["media"]["vector"]["positions"]) == 2
    assert len(other["media"]["vector"]["positions"]) == 4


def test_a_span_with_pieces_counts_its_embeddings_alone() -> None:
    span = MediaSpan("video", 10, 8, ((0, 2), (4, 1), (7, 1)))
    assert span.num_embeds == 4 and span.positions(100).tolist() == [110, 111, 114, 117]
    assert MediaSpan("video", 10, 3).positions().tolist() == [10, 11, 12]


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ("{norn:.1f} ", r"has no \{norn\}: did you mean 'norm'\? \(known: norm, vector\)"),
        ("{norm.real} ", r"has no \{norm.real\}"),
        ("{norm:.1q} ", "formats norm as '.1q', which Python cannot"),
        ("{norm:9999999} ", "formats norm as '9999999'"),
        ("{norm:{vector}} ", "formats norm as"),
        ("{} ", r"has no \{\}"),
        ("{norm", "is no format string"),
        ("a vector: ", "names no fact in braces"),
    ],
)
def test_a_format_is_checked_when_the_recipe_is_read(facts: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VectorModality(dim=2, facts=facts)
    check_format("{{{norm:.2f}}} ", VectorModality.fact_names)


def test_facts_travel_as_json_and_broken_ones_are_refused() -> None:
    facts = (Fact({"time": 1 / 3, "name": "II", "rate": None}), Fact({"time": 2.0}, 3))
    assert facts_from_bytes(facts_to_bytes(facts), 4) == facts
    for data in (b"[[4, {}]]", b'[[0, {"a": [1]}]]', b'[[0, {"a": NaN}]]', b"[[1, {}], [0, {}]]"):
        with pytest.raises((TypeError, ValueError)):
            facts_from_bytes(data, 4)


def test_lengths_from_headers_count_facts_and_decode_where_a_header_lacks_them(
    parts: Path, tmp_path: Path
) -> None:
    from PIL import Image

    from multi_token.modalities.image import ImageModality

    Image.new("RGB", (60, 30)).save(tmp_path / "wide.png")
    np.save(tmp_path / "vector.npy", np.ones((2, 2)))
    image = ImageModality(encoder=str(parts / "clip"), facts="{width}x{height} ")
    vector = processor_of("{norm:.2f} ").modalities["vector"]
    processor = replace(
        processor_of(None),
        modalities={"image": image, "vector": vector},
        fetch=Fetch(str(tmp_path)),
    )
    for name, file, decodes in (("image", "wide.png", False), ("vector", "vector.npy", True)):
        question = Message("user", (Media(name, file), Text("?")))
        row = Conversation((question, Message("assistant", (Text("yes"),))))
        sample = processor(row)
        counted = replace(processor, lengths_only=True)(row)
        (measured,) = replace(processor, lengths_only=True).measure([row])
        assert isinstance(measured, Measured) and measured.length == Length.of(sample)
        assert counted.input_ids.tolist() == sample.input_ids.tolist()
        assert bool(counted.media[0].inputs) == decodes
        # a source that was prepared before keeps its facts
        once = replace(processor, once=True)
        assert [len(once(row).input_ids) for _ in range(2)] == [len(sample.input_ids)] * 2


def test_an_item_without_the_fact_is_refused_with_its_row() -> None:
    class Rated(VectorModality):
        """A vector that may have a rate."""

        fact_names: ClassVar[Mapping[str, str]] = {"rate": "steps a second"}

        def prepare(self, raw: Any) -> Prepared:
            return replace(super().prepare(raw), facts=(Fact({"rate": None}),))

    rated = Rated(dim=2, projector=LINEAR, facts="{rate} Hz ")  # type: ignore[arg-type]
    processor = replace(processor_of(None), modalities={"vector": rated})
    with pytest.raises(RowError, match=r"`facts` writes \{rate\}, which this item does not have"):
        processor(asked("", [1.0, 0.0]))
    with pytest.raises(MultiTokenError):
        processor.runs(asked("", [1.0, 0.0]), [rated.prepare([1.0, 0.0])])


def test_a_recipe_keeps_its_facts() -> None:
    fields = json.loads(VectorModality(dim=2, facts="{norm} ").model_dump_json())
    assert VectorModality.model_validate(fields).facts == "{norm} "


def texts(parts: Sequence[Any]) -> list[str]:
    return [part.text for part in parts if isinstance(part, Text)]


def test_a_teacher_reads_the_facts_before_the_text_of_the_item() -> None:
    processor = replace(processor_of("{norm:.0f}: "), distillation="required")
    item = Media("vector", np.array([[3.0, 4.0], [0.0, 2.0]]), media_text="two vectors")
    answer = Message("assistant", (Text("yes"),))
    sample = processor(Conversation((Message("user", (item, Text("\n?"))), answer), id="row"))
    assert sample.teacher is not None
    assert "user\n5: two vectors2: \n?" in processor.tokenizer.decode(sample.teacher.input_ids)
