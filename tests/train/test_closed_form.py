"""train/closed_form.py: the closed form is ridge regression; tokens start in the right size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.normalizers import Prepend
from tokenizers.processors import TemplateProcessing

from multi_token.language_model.loading import embedding_rms
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import ClosedFormSpec
from multi_token.train.closed_form import encode_items
from multi_token.types import Conversation, Features, Media, Message, Text
from tests.train.fitting import calibrate, captioned_items, fit_closed_form

KINDS: list[dict[str, Any]] = [
    {"type": "linear"},
    {"type": "mlp"},
    {"type": "expand", "factor": 3},
    {"type": "stack", "factor": 2},
    {"type": "pool", "factor": 2},
]


def model_with(recipe_fields: Any, tmp_path: Path, projector: dict[str, Any]) -> Any:
    fields = recipe_fields(tmp_path)
    fields["model"]["modalities"] = {"vector": {"type": "vector", "dim": 5, "projector": projector}}
    torch.manual_seed(0)
    return MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)


def examples(model: Any, length: int = 1) -> list[Any]:
    numbers = np.random.default_rng(0)
    words = ["red", "blue square", "cat", "dog"]
    conversations = []
    for i in range(40):
        values = numbers.normal(loc=3.0, scale=7.0, size=(length, 5))
        user = Message("user", (Text("What is "), Media("vector", values)))
        answer = Message("assistant", (Text(words[i % 4]),))
        conversations.append((Conversation((user, answer), id=str(i)), model.processor))
    return conversations


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_closed_form_is_the_ridge_solution_of_its_targets(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path, calibrated: bool
) -> None:
    model = model_with(recipe_fields, tmp_path, {"type": "expand", "factor": 3})
    conversations = examples(model)
    items = list(captioned_items(conversations))
    if calibrated:
        calibrate(model, "vector", [(item, processor) for item, _, processor in items])
    assert (
        fit_closed_form(model, "vector", items, spec=ClosedFormSpec(penalty=2.0), batch_size=7)
        == 40
    )

    values = torch.tensor(np.concatenate([item.source for item, _, _ in items]))
    mean = values.mean(0)
    x = (values - mean) / values.std(0, correction=0) if calibrated else values - mean
    embed, tokenizer = model.get_input_embeddings(), model.processor.tokenizer
    space = embed(torch.tensor(tokenizer(" ").input_ids))[-1:]
    targets = [
        torch.cat([embed(torch.tensor(tokenizer(" " + caption).input_ids)), space, space, space])[
            :3
        ]
        for _, caption, _ in items
    ]
    y = torch.stack([t.flatten() for t in targets]).double().detach()
    weight = torch.linalg.solve(x.T @ x + 2.0 * torch.eye(5).double(), x.T @ (y - y.mean(0)))
    closed_form = model.projector("vector").closed_form
    torch.testing.assert_close(closed_form.weight.double(), weight.T, rtol=1e-4, atol=1e-5)
    bias = y.mean(0) if calibrated else y.mean(0) - mean @ weight
    torch.testing.assert_close(closed_form.bias.double(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["type"])
def test_every_kind_can_be_aligned_and_its_network_starts_silent(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path, kind: dict[str, Any]
) -> None:
    model = model_with(recipe_fields, tmp_path, kind)
    items = list(captioned_items(examples(model, length=4)))
    calibrate(model, "vector", [(item, processor) for item, _, processor in items])
    fit_closed_form(model, "vector", items, spec=ClosedFormSpec(penalty=1.0))
    projector = model.projector("vector")
    groups, _ = projector.arrange(Features(torch.randn(2, 4, 5)))
    assert not projector.network(groups).any()
    assert projector.closed_form.weight.any()


@pytest.mark.parametrize("targets", ["mean", "by_position"])
def test_many_features_aim_at_the_mean_of_the_caption_or_go_through_it_in_order(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path, targets: Any
) -> None:
    model = model_with(recipe_fields, tmp_path, {"type": "stack", "factor": 2})
    # four features become two tokens, the second of which comes of other numbers than the first
    values = np.array([[1.0, 0, 0, 0, 0]] * 2 + [[0, 1.0, 0, 0, 0]] * 2)
    user = Message("user", (Text("What is "), Media("vector", values)))
    answer = Message("assistant", (Text("cat dog"),))
    items = list(captioned_items([(Conversation((user, answer)), model.processor)] * 8))
    fit_closed_form(model, "vector", items, spec=ClosedFormSpec(penalty=1e-6, targets=targets))
    embed, tokenizer = model.get_input_embeddings(), model.processor.tokenizer
    expected = embed(torch.tensor(tokenizer(" cat dog").input_ids)).detach()
    assert len(expected) == 3
    halves = expected[[0, 2]] if targets == "by_position" else expected.mean(0)
    tokens = model.projector("vector")(Features(torch.tensor(values)[None].float()))
    torch.testing.assert_close(tokens, halves.expand(2, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["type"])
def test_tokens_start_with_the_root_mean_square_of_the_input_embeddings(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path, kind: dict[str, Any]
) -> None:
    model = model_with(recipe_fields, tmp_path, kind)
    items = [(c.media[0], processor) for c, processor in examples(model, length=4)]
    calibrate(model, "vector", items, batch_size=40)
    values = torch.tensor(np.stack([i.source for i, _ in items])).float()
    tokens = model.projectors["vector"](Features(values))
    rms = float(tokens.detach().square().mean().sqrt())
    assert rms == pytest.approx(embedding_rms(model.language_model), rel=1e-4)


def test_a_value_that_never_changes_stays_finite(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = model_with(recipe_fields, tmp_path, {"type": "linear"})
    items = [(Media("vector", [float(i), 7.0, 7.0, 7.0, 7.0]), model.processor) for i in range(9)]
    calibrate(model, "vector", items)
    tokens = model.projectors["vector"](Features(torch.tensor([[[1.0, 7.0, 7.0, 7.0, 7.0]]])))
    assert torch.isfinite(tokens).all()
    assert model.projector("vector").feature_scale[1:].tolist() == [1.0] * 4


def test_only_conversations_with_one_item_and_one_answer_are_captions(model: Any) -> None:
    item, answer = Media("image", "x"), Message("assistant", (Text("cat"),))
    one = Conversation((Message("user", (item,)), answer))
    two = Conversation((Message("user", (item, item)), answer))
    longer = replace(one, messages=one.messages * 2)
    found = list(captioned_items((c, model.processor) for c in (one, two, longer)))
    assert [caption for _, caption, _ in found] == ["cat"]


@pytest.mark.parametrize("lengths", [[3] * 20, [1, 5, 2, 3] * 5], ids=["equal", "mixed"])
def test_statistics_are_those_of_all_real_features_however_they_are_batched(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path, lengths: list[int]
) -> None:
    model = model_with(recipe_fields, tmp_path, {"type": "linear"})
    numbers = np.random.default_rng(0)
    scale = np.array([7.0, 7.0, 0.01, 7.0, 7.0])  # one of them varies little
    values = [numbers.normal(loc=3.0, scale=scale, size=(length, 5)) for length in lengths]
    items = [(Media("vector", value), model.processor) for value in values]
    assert calibrate(model, "vector", items, batch_size=7) == sum(lengths)
    projector, every = model.projector("vector"), torch.tensor(np.concatenate(values)).float()
    torch.testing.assert_close(projector.feature_mean, every.mean(0))
    torch.testing.assert_close(
        projector.feature_scale, (1 / every.double().std(0, correction=0)).float()
    )


def test_nothing_is_fitted_to_nothing(model: Any) -> None:
    before = {k: v.clone() for k, v in model.projector("vector").state_dict().items()}
    assert calibrate(model, "vector", []) == 0
    assert fit_closed_form(model, "vector", [], spec=ClosedFormSpec()) == 0
    after = model.projector("vector").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_one_item_is_brought_to_its_caption_without_special_tokens(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = model_with(recipe_fields, tmp_path, {"type": "expand", "factor": 2})
    tokenizer = model.processor.tokenizer
    expected = tokenizer(" cat", add_special_tokens=False).input_ids
    first = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = first
    assert tokenizer(" cat").input_ids == [tokenizer.bos_token_id, *expected]
    item = Media("vector", [1.0, 2.0, 3.0, 4.0, 5.0])
    captions = [(item, "cat", model.processor)]
    assert fit_closed_form(model, "vector", captions, spec=ClosedFormSpec()) == 1
    tokens = model.projector("vector")(Features(torch.tensor([[item.source]])))
    space = tokenizer(" ", add_special_tokens=False).input_ids[-1:]
    aimed = model.get_input_embeddings()(torch.tensor((expected + space)[:2]))
    torch.testing.assert_close(tokens, aimed)


def test_a_short_caption_is_filled_with_spaces_alone_where_a_space_has_several_ids(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = model_with(recipe_fields, tmp_path, {"type": "expand", "factor": 9})
    tokenizer = model.processor.tokenizer
    tokenizer.backend_tokenizer.normalizer = Prepend("#")  # as SentencePiece's blank before a text
    first, space = tokenizer(" ", add_special_tokens=False).input_ids
    assert first != space
    captions = [(Media("vector", [1.0] * 5), "cat", model.processor)]
    fit_closed_form(model, "vector", captions, spec=ClosedFormSpec())
    tokens = model.projector("vector")(Features(torch.ones(1, 1, 5)))
    caption = tokenizer(" cat", add_special_tokens=False).input_ids
    aimed = (caption + [space] * 9)[:9]
    torch.testing.assert_close(tokens, model.get_input_embeddings()(torch.tensor(aimed)))


def test_features_without_a_mask_are_all_counted(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path)
    fields["model"]["modalities"]["image"]["features"] = "patches"
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    items = [(Media("image", image), model.require_processor()) for image in images]
    num_features = calibrate(model, "image", items)
    features = [next(encode_items(model, "image", [item], batch_size=1)) for item in items]
    assert all(f.mask is None for f in features)
    every = torch.cat([f.values[0] for f in features])
    assert num_features == len(every)
    torch.testing.assert_close(model.projector("image").feature_mean, every.mean(0))


def test_a_caption_is_the_words_of_the_answer_and_not_its_blanks(model: Any) -> None:
    def said(*texts: str) -> Conversation:
        answer = Message("assistant", tuple(Text(text) for text in texts))
        return Conversation((Message("user", (Media("image", "x"),)), answer))

    found = captioned_items((c, model.processor) for c in (said(" a ", "cat\n"), said(" "), said()))
    assert [caption for _, caption, _ in found] == ["a cat"]
