"""The same weights give the same numbers as transformers' LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multi_token import MultiTokenForConditionalGeneration
from multi_token.collate import Collator
from multi_token.convert.llava import import_llava
from multi_token.generate import drop_last_answer, eos_token_ids
from multi_token.recipe.recipe import parse_recipe
from multi_token.testing import tiny_llava
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Text

KINDS: dict[str, dict[str, Any]] = {
    "1.5": {},
    "1.5 full, two layers": {
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-2, 1],
    },
    "next": {"anyres": True},
    "next two layers": {"anyres": True, "vision_feature_layer": [-2, -3]},
}
# shapes that choose every grid of the tiny NeXT, and two that leave almost nothing after unpadding
SIZES = [(50, 30), (33, 33), (20, 64), (100, 17), (7, 90), (64, 32), (200, 150), (1, 300)]


def image(index: int) -> Image.Image:
    noise = torch.Generator().manual_seed(index)
    width, height = SIZES[index]
    pixels = torch.randint(0, 256, (height, width, 3), generator=noise, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


QUESTIONS = [
    ([0], "What is this?", "a red square"),
    ([1, 2], "Which of these is a fruit?", "the second"),
    ([], "Look and say what you see.", "no image at all"),
    ([3, 4, 5], "yes or no?", "yes"),
    ([6, 7], "one two", "three four five"),
]


@dataclass
class Pair:
    """The same weights twice."""

    ours: Any
    theirs: Any
    processor: Any

    def sample(self, row: Any, *, ask: bool = False) -> Any:
        if ask:
            prompt = drop_last_answer(conversation(row), self.ours)
            return self.ours.processor(prompt, prompt_only=True)
        return self.ours.processor(conversation(row))

    def batch(self, rows: list[Any]) -> Any:
        collate = Collator(self.ours.modalities, self.ours.processor.chat.filler_id)
        return collate([self.sample(row) for row in rows])

    def inputs(self, rows: list[Any], *, ask: bool = False) -> dict[str, Any]:
        """Return the rows as transformers' processor makes them, padded as a batch of ours is."""
        turns = [messages(row)[: 1 if ask else 2] for row in rows]
        texts = self.processor.apply_chat_template(turns, add_generation_prompt=ask)
        images = [image(i) for numbers, _, _ in rows for i in numbers]
        return self.processor(
            images=images or None,
            text=texts,
            padding=True,
            padding_side="left" if ask else "right",
            return_tensors="pt",
        )


def conversation(row: Any) -> Conversation:
    numbers, question, answer = row
    parts = [part for i in numbers for part in (Media("image", image(i)), Text("\n"))]
    user = Message("user", (*parts, Text(question)))
    return Conversation((user, Message("assistant", (Text(answer),))), id=question)


def messages(row: Any) -> list[dict[str, Any]]:
    numbers, question, answer = row
    slots = [{"type": "image"} for _ in numbers]
    return [
        {"role": "user", "content": [*slots, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Pair:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder: Path = tmp_path_factory.mktemp("llava")
    tiny_llava(folder / "source", **KINDS[request.param])
    import_llava(folder / "source", folder / "run")
    return Pair(
        MultiTokenForConditionalGeneration.from_pretrained(folder / "run"),
        AutoModelForImageTextToText.from_pretrained(folder / "source").eval(),
        AutoProcessor.from_pretrained(folder / "source"),
    )


def test_ids_are_the_processors_and_every_image_takes_as_many_positions(pair: Pair) -> None:
    image_id = pair.theirs.config.image_token_id
    for row, ask in [(row, ask) for row in QUESTIONS for ask in (False, True)]:
        sample = pair.sample(row, ask=ask)
        ids = sample.input_ids.clone()
        for place in sample.media_spans:
            ids[place.start : place.start + place.length] = image_id
        assert ids.tolist() == pair.inputs([row], ask=ask)["input_ids"][0].tolist()


@torch.no_grad()
def test_logits_and_loss_are_the_references_single_and_batched(pair: Pair) -> None:
    for rows in [*([row] for row in QUESTIONS), QUESTIONS]:
        batch, inputs = pair.batch(rows), pair.inputs(rows)
        assert torch.equal(batch["attention_mask"], inputs["attention_mask"])
        theirs = pair.theirs(**inputs, labels=batch["labels"])
        ours = pair.ours(
            input_ids=batch["input_ids"],
            media=batch["media"],
            attention_mask=batch["attention_mask"],
        ).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(ours[real], theirs.logits[real], rtol=1e-5, atol=1e-5)
        assert (batch["labels"] != IGNORE_INDEX).any(1).all()
        torch.testing.assert_close(pair.ours(**batch).loss, theirs.loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_image_gives_other_logits(pair: Pair) -> None:
    """Or the equality above would say nothing of encoder and projector."""
    logits = []
    for index in (2, 4):
        batch = pair.batch([([index], "What is this?", "a red square")])
        logits.append(pair.ours(input_ids=batch["input_ids"], media=batch["media"]).logits[0, -1])
    assert float((logits[0] - logits[1]).abs().max()) > 0.01


@torch.no_grad()
def test_greedy_text_is_the_references_single_and_batched(pair: Pair) -> None:
    answers = pair.ours.generate([conversation(r) for r in QUESTIONS], max_new_tokens=8)
    assert answers == [
        pair.ours.generate([conversation(r)], max_new_tokens=8)[0] for r in QUESTIONS
    ]
    inputs = pair.inputs(QUESTIONS, ask=True)
    ids = pair.theirs.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos_token_ids(pair.ours)
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    texts = pair.processor.batch_decode(new, skip_special_tokens=True)
    assert answers == [text.strip() for text in texts]
    assert len(set(answers)) > 1


RECIPE = """
model:
  language_model: vicuna
  modalities:
    llava_1_5:
      {type: image, encoder: clip, layer: -2, projector: {type: mlp, standardize: false}}
    llava_next:
      type: image
      encoder: clip
      layer: -2
      tile_grids: [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
      projector: {type: mlp, standardize: false, line_break: true}
data: {train: [{rows: rows.jsonl}]}
train: {output_dir: run, stages: [{name: projector, learn: {projectors: 1.0e-3}}]}
"""


@pytest.mark.parametrize(("name", "anyres"), [("llava_1_5", False), ("llava_next", True)])
def test_a_recipe_says_the_layout_that_an_import_writes(
    tmp_path: Path, name: str, anyres: bool
) -> None:
    tiny_llava(tmp_path / "source", anyres=anyres)
    import_llava(tmp_path / "source", tmp_path / "run")
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    written = model.modalities["image"].model_copy(update={"encoder": "clip"})
    assert written == parse_recipe(RECIPE).model.modalities[name]
