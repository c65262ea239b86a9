"""resampler.py: any item becomes the same number of media embeddings, in training and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multi_token.checkpoint.save import save
from multi_token.collate import Collator
from multi_token.errors import RecipeError
from multi_token.language_model.loading import embedding_rms
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.projectors.base import ProjectorSpec
from multi_token.projectors.resampler import Resample
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import ClosedFormSpec
from multi_token.registry import build
from multi_token.types import Conversation, Features, Media, Message, Text
from tests.train.fitting import calibrate, captioned_items, fit_closed_form

SMALL = Resample(num_queries=3, depth=2, num_heads=2)


def model_with(recipe_fields: Any, folder: Path, modality: dict[str, Any]) -> Any:
    fields = recipe_fields(folder)
    spec = {"projector": SMALL.model_dump(), **modality}
    fields["model"]["modalities"] = {"signal": spec}
    torch.manual_seed(0)
    return MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)


def vectors(lengths: list[int]) -> list[torch.Tensor]:
    return [torch.randn(n, 6) * 7 + 3 for n in lengths]


def padded(items: list[torch.Tensor]) -> Features:
    longest = max(map(len, items))
    values = torch.full((len(items), longest, 6), 9.0)  # padding after an item must not matter
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, item in enumerate(items):
        values[row, : len(item)] = item
        mask[row, : len(item)] = True
    return Features(values, mask)


def test_resample_is_registered() -> None:
    spec = build("projector", {"type": "resample", "num_queries": 5}, ProjectorSpec)
    assert isinstance(spec, Resample) and spec.num_tokens(1) == spec.num_tokens(99) == 5


@pytest.mark.parametrize("length", range(1, 8))
@pytest.mark.parametrize("hidden_size", [None, 4])
def test_an_item_of_any_length_becomes_num_queries_embeddings(
    length: int, hidden_size: int | None
) -> None:
    spec = Resample(num_queries=3, num_heads=2, hidden_size=hidden_size)
    tokens = spec.build(6, 8)(Features(torch.randn(2, length, 6)))
    assert tokens.shape == (2 * spec.num_tokens(length), 8)
    assert len({tuple(token.tolist()) for token in tokens}) == 6  # each query asks something else


@pytest.mark.parametrize("closed_form", [False, True])
def test_items_of_mixed_lengths_equal_one_by_one(closed_form: bool) -> None:
    projector = SMALL.build(6, 8)
    projector.feature_mean.normal_()
    if closed_form:
        torch.nn.init.normal_(projector.add_closed_form().weight)
        torch.nn.init.normal_(projector.final_layers()[0].weight)
    items = vectors([5, 1, 8])
    alone = torch.cat([projector(Features(item[None])) for item in items])
    torch.testing.assert_close(projector(padded(items)), alone)


def test_every_feature_of_an_item_counts_and_their_order_does_not() -> None:
    projector = SMALL.build(6, 8)
    item = torch.randn(1, 5, 6)
    tokens = projector(Features(item))
    torch.testing.assert_close(projector(Features(item.flip(1))), tokens)
    for place in range(5):
        other = item.clone()
        other[0, place] += 1
        assert not torch.allclose(projector(Features(other)), tokens, atol=1e-4)


def test_the_gradient_reaches_the_queries_and_every_layer() -> None:
    projector = SMALL.build(6, 8)
    projector(padded(vectors([4, 2]))).square().sum().backward()
    without = [
        name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert without == []


def test_the_closed_form_of_a_resampler_is_frozen_and_its_network_starts_at_zero() -> None:
    projector = SMALL.build(6, 8)
    closed_form = projector.add_closed_form()
    items = vectors([4, 2])
    projector.feature_mean.copy_(torch.cat(items).mean(0))
    tokens = projector(padded(items))
    pooled = torch.stack([(item - projector.feature_mean).mean(0) for item in items])
    torch.testing.assert_close(tokens, closed_form(pooled).reshape(-1, 8))
    tokens.sum().backward()
    assert closed_form.weight.grad is None
    assert projector.final_layers()[0].weight.grad.any()


def test_the_output_can_be_scaled_to_any_root_mean_square() -> None:
    projector = SMALL.build(6, 8)
    features = padded(vectors([9, 4, 1]))
    projector.scale_output(float(projector(features).detach().square().mean().sqrt()), 0.125)
    rms = projector(features).square().mean().sqrt()
    torch.testing.assert_close(rms, torch.tensor(0.125))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="`hidden_size` 10 cannot be divided among 4 heads"):
        Resample(hidden_size=10, num_heads=4)
    with pytest.raises(RecipeError, match="4 heads cannot divide features of width 6; set"):
        Resample(num_heads=4).build(6, 8)


def test_resample_has_no_line_break() -> None:
    with pytest.raises(ValueError, match="one embedding per feature"):
        Resample(line_break=True)


def test_the_closed_form_fits_its_embeddings_to_the_captions(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = model_with(recipe_fields, tmp_path, {"type": "vector", "dim": 6})
    words = ["red", "blue square", "cat", "dog"]
    numbers = np.random.default_rng(0)
    centres = numbers.normal(size=(4, 6)) * 5
    rows = []
    for i in range(40):
        values = centres[i % 4] + numbers.normal(size=(1 + i % 3, 6)) * 0.01
        user = Message("user", (Text("What is "), Media("signal", values)))
        answer = Message("assistant", (Text(words[i % 4]),))
        rows.append((Conversation((user, answer), id=str(i)), model.processor))
    items = list(captioned_items(rows))
    projector = model.projector("signal")
    calibrate(model, "signal", [(item, processor) for item, _, processor in items], batch_size=40)
    values = [torch.tensor(item.source).float() for item, _, _ in items]
    rms = float(projector(padded(values)).detach().square().mean().sqrt())
    assert rms == pytest.approx(embedding_rms(model.language_model), rel=1e-4)

    fit_closed_form(model, "signal", items, spec=ClosedFormSpec(penalty=1e-4))
    embed, tokenizer = model.get_input_embeddings(), model.processor.tokenizer
    space = tokenizer(" ").input_ids[-1:]
    for word, value in zip(words, values[:4], strict=True):
        ids = (tokenizer(" " + word).input_ids + space * 3)[:3]
        expected = embed(torch.tensor(ids))
        torch.testing.assert_close(projector(Features(value[None])), expected, atol=0.02, rtol=0)


def test_a_resampler_of_patches_is_loaded_bit_for_bit_from_a_checkpoint(
    recipe_fields: Callable[..., dict[str, Any]], parts: Path, data: Path, tmp_path: Path
) -> None:
    image = {"type": "image", "encoder": str(parts / "clip")}
    model = model_with(recipe_fields, tmp_path, image)
    model.projector("signal").add_closed_form()
    with torch.no_grad():
        for parameter in model.projectors.parameters():
            parameter.normal_(std=0.1)
    save(model, tmp_path / "run")
    again = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")

    items = [
        again.processor.prepare(Media("signal", str(data / f"{c}.png"))) for c in ("red", "blue")
    ]
    assert items[0].num_features == 16
    inputs = Collator(model.modalities, pad_id=0).inputs("signal", items)
    tokens = again.projectors["signal"](again.encode("signal", inputs))
    assert tokens.shape == (6, 32)
    assert torch.equal(tokens, model.projectors["signal"](model.encode("signal", inputs)))
