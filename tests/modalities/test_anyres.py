"""anyres.py: images read in tiles, line by line, from the recipe to what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.errors import RecipeError
from multi_token.language_model.loading import embedding_rms
from multi_token.media.fetch import Fetch
from multi_token.modalities.anyres import best_grid, reading_order
from multi_token.modalities.image import ImageModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.projectors.kinds import Linear
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import ClosedFormSpec
from multi_token.registry import validate_fields
from multi_token.testing import tiny_image_encoder
from multi_token.train.run import train
from multi_token.types import Conversation, Media, Message, Text
from tests.train.fitting import calibrate, captioned_items, fit_closed_form

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
LINES = {"type": "linear", "line_break": True}
SIZES = [(50, 30), (33, 33), (20, 64), (100, 17), (7, 90), (64, 32), (32, 64), (1, 300), (640, 427)]


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def tiled(parts: Path, **fields: Any) -> ImageModality:
    fields = {"encoder": str(parts / "clip"), "tile_grids": GRIDS, "projector": LINES} | fields
    return validate_fields(ImageModality, fields, where="the recipe")


def test_tiles_are_the_pixels_that_llava_next_makes(parts: Path) -> None:
    from transformers import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[rows * 32, columns * 32] for rows, columns in GRIDS],
    )
    modality = tiled(parts)
    for size in SIZES:
        raw = noise(*size)
        ours = modality.prepare(raw)
        theirs = processor(images=[raw], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours.inputs["pixel_values"], theirs), size
        assert ours.num_features == len(ours.inputs["part"]) == len(ours.inputs["feature"])


def test_the_order_of_reading_is_the_small_whole_and_then_line_by_line() -> None:
    tile, patch = reading_order(height=20, width=40, grid=(1, 2), patches=2)
    assert tile.tolist() == [0, 0, 0, 0, *[1, 1, 2, 2, -1] * 2]
    assert patch.tolist() == [0, 1, 2, 3, *[0, 1, 0, 1, 0], *[2, 3, 2, 3, 0]]


def test_lines_and_columns_of_nothing_but_padding_are_left_out() -> None:
    flat, _ = reading_order(height=10, width=40, grid=(1, 1), patches=4)
    assert flat[16:].tolist() == [1, 1, 1, 1, -1] * 2  # the second and third of four lines
    _, patch = reading_order(height=40, width=20, grid=(1, 1), patches=4)
    assert patch[16:].view(4, 3)[:, :2].tolist() == [[1, 2], [5, 6], [9, 10], [13, 14]]


def test_the_grid_that_keeps_most_of_an_image_is_chosen() -> None:
    assert best_grid(100, 200, GRIDS, 100) == (1, 2)
    assert best_grid(200, 100, GRIDS, 100) == (2, 1)
    assert best_grid(300, 300, GRIDS, 100) == (2, 2)
    assert best_grid(50, 600, GRIDS, 100) == (1, 3)
    # all keep all of a small image, so the one with the least empty space
    assert best_grid(40, 40, ((2, 2), (1, 1), (2, 1)), 100) == (1, 1)


def test_a_batch_of_different_grids_equals_one_by_one(parts: Path) -> None:
    modality = tiled(parts, layer=-2)
    encoder = modality.build_encoder()
    items = [modality.prepare(noise(*size)) for size in SIZES]
    assert len({len(item.inputs["pixel_values"]) for item in items}) > 1
    with torch.no_grad():
        together = encoder(**modality.collate(items))
        assert together.mask is not None and together.newlines is not None
        for row, item in enumerate(items):
            alone = encoder(**modality.collate([item]))
            real = together.mask[row]
            assert int(real.sum()) == item.num_features
            torch.testing.assert_close(together.values[row][real], alone.values[0])
            assert alone.newlines is not None
            assert torch.equal(together.newlines[row][real], alone.newlines[0])
            assert not together.newlines[row][~real].any()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"projector": {"type": "mlp"}}, "set `line_break: true` in it"),
        ({"features": "pooled"}, "`tile_grids` needs `features: patches`, not pooled"),
        ({"pad_to_square": True}, "remove `pad_to_square`"),
        ({"tile_grids": None}, "`line_break` in the projector is for `tile_grids`"),
        ({"tile_grids": [[0, 1]]}, "greater than 0"),
        ({"tile_grids": []}, "at least 1 item"),
        ({"projector": {"type": "pool", "line_break": True}}, "one embedding per feature"),
    ],
)
def test_a_recipe_whose_tiles_cannot_be_says_why(
    parts: Path, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        tiled(parts, **fields)


def test_an_encoder_that_takes_no_squares_is_refused(tmp_path: Path) -> None:
    encoder = tiny_image_encoder(tmp_path, "siglip2")
    modality = ImageModality(encoder=encoder, tile_grids=GRIDS, projector=Linear(line_break=True))
    with pytest.raises(RecipeError, match="needs an encoder of square images"):
        modality.prepare(noise(40, 40))


@pytest.fixture
def fields(recipe_fields: Callable[..., dict[str, Any]], parts: Path) -> Callable[..., Any]:
    """A recipe with tiles; its rows hold images of one colour, which choose one grid."""

    def tiles(folder: Path, **train_fields: Any) -> dict[str, Any]:
        recipe = recipe_fields(folder, **train_fields)
        recipe["model"]["modalities"]["image"] = {
            "type": "image",
            "encoder": str(parts / "clip"),
            "tile_grids": GRIDS,
            "projector": {"type": "mlp", "line_break": True},
        }
        return recipe

    return tiles


def test_the_statistics_and_the_closed_form_see_features_and_no_line_ends(
    fields: Callable[..., Any], tmp_path: Path
) -> None:
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(fields(tmp_path)).model
    )
    processor = model.processor
    assert processor is not None
    rows = [
        Conversation(
            (
                Message("user", (Media("image", noise(*size)),)),
                Message("assistant", (Text("cat"),)),
            )
        )
        for size in SIZES[:4]
    ]
    items = [(row.media[0], processor) for row in rows]
    batch = model.modalities["image"].collate([processor.prepare(item) for item, _ in items])
    features = model.encode("image", batch)
    assert features.mask is not None and features.newlines is not None
    real = features.values[features.mask & ~features.newlines]
    assert calibrate(model, "image", items) == len(real) < int(features.mask.sum())
    projector = model.projector("image")
    torch.testing.assert_close(projector.feature_mean, real.mean(0), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        tokens = projector(features)
        rms = embedding_rms(model.language_model)
        ends = features.newlines[features.mask]
        for kind in (tokens[ends], tokens[~ends]):
            assert float(kind.square().mean().sqrt()) == pytest.approx(rms, rel=1e-4)

        captions = list(captioned_items((row, processor) for row in rows))
        assert fit_closed_form(model, "image", captions, spec=ClosedFormSpec(penalty=1.0)) == len(
            rows
        )
        closed_form = projector.closed_form
        assert closed_form is not None
        # all captions are alike: the fit is that caption's embedding, wherever there is a feature
        embedding: Any = model.get_input_embeddings()
        ids = processor.tokenizer(" cat").input_ids
        target = embedding(torch.tensor(ids)).mean(0)
        torch.testing.assert_close(projector(features)[~ends][0], target, rtol=1e-3, atol=1e-4)
        assert projector.line_break is not None
        assert torch.equal(projector(features)[ends][0], projector.line_break)


def test_line_ends_are_learned_saved_and_kept_in_the_cache(
    fields: Callable[..., Any], tmp_path: Path
) -> None:
    lasts = {}
    for name, cached in (("plain", False), ("cached", True)):
        train(Recipe.model_validate(fields(tmp_path / name, feature_cache=cached)))
        start = load_file(tmp_path / name / "stages" / "0-closed-form" / "projectors.safetensors")
        lasts[name] = load_file(tmp_path / name / "projectors.safetensors")
        moved = (lasts[name]["image.line_break"] - start["image.line_break"]).abs()
        assert float(moved.max()) > 1e-3
    for key, value in lasts["plain"].items():
        torch.testing.assert_close(value, lasts["cached"][key], rtol=1e-3, atol=1e-4)
    line_break = (
        MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "cached")
        .projector("image")
        .line_break
    )
    assert torch.equal(line_break, lasts["cached"]["image.line_break"])  # type: ignore[arg-type]


def test_the_cache_gives_back_features_and_line_ends_from_its_file(
    parts: Path, data: Path, tmp_path: Path
) -> None:
    modality = tiled(parts)
    encoder = modality.build_encoder()
    item, fetch = Media("image", str(data / "red.png")), Fetch()
    path = tmp_path / "features"
    FeatureCache(path).fill([(item, fetch)], {"image": modality}, {"image": encoder})
    again = FeatureCache(path)
    again.register_encoder("image", modality, encoder)
    assert len(again) == 1
    found = again.find(item, modality, fetch)
    prepared = modality.prepare(modality.load(item.source, fetch))
    with torch.no_grad():
        fresh = encoder(**modality.collate([prepared]))
    assert found is not None and found.num_features == prepared.num_features
    assert torch.equal(found.inputs["features"], fresh.values[0])
    assert fresh.newlines is not None
    assert torch.equal(found.inputs["newlines"], fresh.newlines[0])
