"""projectors/: each kind makes exactly `num_tokens` embeddings, alone or in a mixed batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from multi_token.errors import MultiTokenError
from multi_token.projectors.base import EmbedCount, ProjectorSpec, mask_without_newlines
from multi_token.projectors.kinds import Expand, Linear, Mlp, PixelShuffle, Pool, Stack
from multi_token.types import Features

SPECS: list[ProjectorSpec] = [
    Linear(),
    Mlp(),
    Mlp(num_layers=1),
    Expand(factor=3),
    Stack(factor=4),
    Pool(factor=2),
    Pool(factor=2, grid=True),
    PixelShuffle(factor=1),
    PixelShuffle(factor=3),
]
SEQUENCES = [s for s in SPECS if s.type != "pixel_shuffle" and not getattr(s, "grid", False)]


def test_the_defaults_of_a_projector_are_fixed() -> None:
    given = [Linear(), Mlp(), Expand(), Stack(), Pool(), PixelShuffle()]
    assert all(spec.standardize and not spec.line_break for spec in given)
    numbers = [(getattr(s, "factor", None), getattr(s, "num_layers", None)) for s in given]
    assert numbers == [(None, None), (None, 2), (4, 2), (8, 2), (2, 2), (2, 2)]
    assert not Pool().grid


def test_a_kind_accepts_only_its_own_fields_and_is_frozen() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Linear.model_validate({"factor": 2})
    with pytest.raises(ValidationError, match="frozen"):
        Mlp().num_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", [Mlp, Expand, Stack, Pool, PixelShuffle])
def test_a_projector_has_at_least_one_layer_and_joins_or_makes_at_least_one(kind: Any) -> None:
    for field in {"factor", "num_layers"} & kind.model_fields.keys():
        assert getattr(kind(**{field: 1}), field) == 1
        with pytest.raises(ValidationError, match="greater than or equal to 1"):
            kind(**{field: 0})


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("num_features", [1, 4, 9, 16, 36])
def test_a_projector_makes_num_tokens_embeddings_per_item(
    spec: ProjectorSpec, num_features: int
) -> None:
    if spec == PixelShuffle(factor=3) and num_features not in (9, 36):
        with pytest.raises(MultiTokenError, match="needs a grid whose side it divides"):
            spec.num_tokens(num_features)
        return
    projector: Any = spec.build(6, 8)
    tokens = projector(Features(torch.randn(3, num_features, 6)))
    assert tokens.shape == (3 * spec.num_tokens(num_features), 8)


@pytest.mark.parametrize("spec", SEQUENCES, ids=repr)
@pytest.mark.parametrize("closed_form", [False, True])
def test_items_of_mixed_lengths_equal_one_by_one(spec: ProjectorSpec, closed_form: bool) -> None:
    projector = spec.build(6, 8)
    projector.feature_mean.normal_()
    if closed_form:
        projector.add_closed_form()
    lengths = [5, 1, 8]
    items = [torch.randn(n, 6) for n in lengths]
    padded = torch.full((3, 8, 6), 7.0)  # padding after an item must not matter
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for row, item in enumerate(items):
        padded[row, : len(item)] = item
        mask[row, : len(item)] = True
    together = projector(Features(padded, mask))
    alone = torch.cat([projector(Features(item[None])) for item in items])
    assert len(together) == sum(spec.num_tokens(n) for n in lengths)
    torch.testing.assert_close(together, alone)


def test_stack_joins_neighbours_in_order_and_fills_the_last_with_zeros() -> None:
    groups, mask = Stack(factor=2).group(
        torch.tensor([[[1.0], [2.0], [3.0]]]), torch.ones(1, 3, dtype=torch.bool)
    )
    assert groups.tolist() == [[[1.0, 2.0], [3.0, 0.0]]]
    assert mask.tolist() == [[True, True]]


def test_pool_averages_only_real_features() -> None:
    groups, _ = Pool(factor=2).group(
        torch.tensor([[[1.0], [2.0], [3.0]]]), torch.ones(1, 3, dtype=torch.bool)
    )
    assert groups.flatten().tolist() == [1.5, 3.0]


def test_a_grid_is_pooled_by_squares() -> None:
    values = torch.arange(16.0).view(1, 16, 1)
    groups, _ = Pool(factor=2, grid=True).group(values, torch.ones(1, 16, dtype=torch.bool))
    assert groups.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_joins_as_idefics3_does(factor: int) -> None:
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    config = Idefics3Config(text_config={"model_type": "llama"}, scale_factor=factor)
    values = torch.randn(2, 36, 5)
    expected = Idefics3Connector(config).pixel_shuffle(values, factor)
    groups, mask = PixelShuffle(factor=factor).group(values, torch.ones(2, 36, dtype=torch.bool))
    assert torch.equal(groups, expected)
    assert mask.shape == groups.shape[:2] and bool(mask.all())


@pytest.mark.parametrize("spec", [Pool(grid=True), PixelShuffle(factor=1)], ids=repr)
def test_a_number_of_features_that_is_no_square_is_refused(spec: ProjectorSpec) -> None:
    with pytest.raises(MultiTokenError, match="needs a square number of features, got 5"):
        spec.num_tokens(5)


@pytest.mark.parametrize("spec", [Pool(grid=True), PixelShuffle(factor=1)], ids=repr)
def test_grids_of_several_sizes_in_a_batch_are_refused(spec: ProjectorSpec) -> None:
    mask = torch.arange(16) < torch.tensor([[16], [9]])
    with pytest.raises(MultiTokenError, match="needs items of one size"):
        spec.build(6, 8)(Features(torch.randn(2, 16, 6), mask))


def test_pixel_shuffle_names_the_factors_that_a_grid_takes() -> None:
    with pytest.raises(MultiTokenError, match="got 27 x 27 features; choose a divisor of 27"):
        PixelShuffle(factor=2).num_tokens(27 * 27)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_closed_form_is_frozen_and_the_network_starts_at_zero(
    spec: ProjectorSpec,
) -> None:
    projector = spec.build(6, 8)
    closed_form = projector.add_closed_form()
    features = Features(torch.randn(2, 9, 6))
    groups, _ = projector.arrange(features)
    torch.testing.assert_close(projector(features), closed_form(groups).reshape(-1, 8))
    projector(features).sum().backward()
    assert closed_form.weight.grad is None
    assert any(p.grad is not None and p.grad.any() for p in projector.network.parameters())


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_output_can_be_scaled_to_any_root_mean_square(spec: ProjectorSpec) -> None:
    projector = spec.build(6, 8)
    features = Features(torch.randn(4, 9, 6) * 30)
    projector.scale_output(float(projector(features).detach().square().mean().sqrt()), 0.125)
    rms = projector(features).square().mean().sqrt()
    torch.testing.assert_close(rms, torch.tensor(0.125))


@pytest.mark.parametrize("spec", [Linear(line_break=True), Mlp(line_break=True)], ids=repr)
@pytest.mark.parametrize("closed_form", [False, True])
def test_each_line_end_has_one_trained_embedding(spec: ProjectorSpec, closed_form: bool) -> None:
    projector = spec.build(6, 8)
    if closed_form:
        projector.add_closed_form()
    values = torch.randn(2, 4, 6)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    breaks = torch.tensor([[False, True, False, True], [False, False, True, False]])
    tokens = projector(Features(values, mask, breaks))
    plain = projector(Features(values, mask))
    ends = breaks[mask]
    assert torch.equal(tokens[~ends], plain[~ends])
    assert torch.equal(tokens[ends], projector.line_break.expand(3, 8))
    tokens.sum().backward()
    assert projector.line_break.grad.tolist() == [3.0] * 8


def test_a_projector_with_a_line_break_takes_features_without_lines() -> None:
    projector = Linear(line_break=True).build(6, 8)
    projector(Features(torch.randn(2, 3, 6))).sum().backward()
    # a zero and not nothing, which would hang other ranks in the gradient's all-reduce
    assert projector.line_break.grad.tolist() == [0.0] * 8


def test_line_ends_without_a_token_for_them_are_refused() -> None:
    features = Features(torch.randn(1, 2, 6), None, torch.tensor([[False, True]]))
    with pytest.raises(MultiTokenError, match="set `line_break: true` in the projector"):
        Linear().build(6, 8)(features)


@pytest.mark.parametrize("kind", [Expand, Stack, Pool, PixelShuffle])
def test_a_projector_that_joins_or_splits_features_has_no_line_break(kind: Any) -> None:
    with pytest.raises(ValueError, match="one embedding per feature"):
        kind(line_break=True)


def test_scaling_gives_line_ends_the_same_root_mean_square() -> None:
    projector = Mlp(line_break=True).build(6, 8)
    breaks = torch.zeros(4, 9, dtype=torch.bool)
    breaks[:, ::3] = True
    features = Features(torch.randn(4, 9, 6) * 30, None, breaks)
    measured = float(projector(features)[~breaks.flatten()].detach().square().mean().sqrt())
    projector.scale_output(measured, 0.125)
    for tokens in projector(features)[breaks.flatten()], projector(features)[~breaks.flatten()]:
        torch.testing.assert_close(tokens.square().mean().sqrt(), torch.tensor(0.125))


def test_features_are_standardized_and_their_padding_stays_zero() -> None:
    projector = Linear().build(2, 8)
    projector.feature_mean.copy_(torch.tensor([1.0, 2.0]))
    projector.feature_scale.copy_(torch.tensor([4.0, 0.5]))
    features = Features(torch.tensor([[[2.0, 4.0], [9.0, 9.0]]]), torch.tensor([[True, False]]))
    values, mask = projector.standardize_features(features)
    assert values.tolist() == [[[4.0, 1.0], [0.0, 0.0]]]
    assert mask.tolist() == [[True, False]]


def test_line_ends_and_padding_are_no_features() -> None:
    values = torch.zeros(1, 4, 2)
    mask = torch.tensor([[True, True, True, False]])
    breaks = torch.tensor([[False, True, False, False]])
    assert mask_without_newlines(Features(values)) is None
    assert mask_without_newlines(Features(values, mask)) is mask
    of_breaks = mask_without_newlines(Features(values, None, breaks))
    assert of_breaks is not None and of_breaks.tolist() == [[True, False, True, True]]
    both = mask_without_newlines(Features(values, mask, breaks))
    assert both is not None and both.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_perceptron_has_num_layers_linear_layers(num_layers: int) -> None:
    network = Mlp(num_layers=num_layers).build(6, 8).network
    widths = [m.in_features for m in network.modules() if isinstance(m, nn.Linear)]
    assert widths == [6, 8, 8][:num_layers]


@pytest.mark.parametrize("spec", SEQUENCES, ids=repr)
def test_embeddings_that_are_counted_before_are_those_that_are_counted_after(
    spec: ProjectorSpec,
) -> None:
    """With the number of the collator the host need not wait for the device to count them."""
    torch.manual_seed(0)
    projector = spec.build(6, 5)
    values = torch.randn(3, 7, 6)
    mask = torch.tensor([[True] * 7, [True] * 2 + [False] * 5, [True] * 5 + [False] * 2])
    # padding between real features, as items in tiles have it
    mask[2, 1] = spec.type == "pool" or spec.type == "stack"
    for features in (Features(values), Features(values, mask)):
        expected = projector(features)
        count = EmbedCount(len(expected))
        found = projector(features, count)
        assert torch.equal(found, expected)
        assert (count.is_wrong is None) == (features.mask is None)
        assert count.is_wrong is None or not bool(count.is_wrong)
        one = torch.autograd.grad(expected.square().sum(), list(projector.network.parameters()))
        other = torch.autograd.grad(found.square().sum(), list(projector.network.parameters()))
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("off_by", [-1, 1, 30])
def test_a_wrong_number_of_embeddings_is_marked_or_left_to_the_splice(off_by: int) -> None:
    projector = Linear().build(6, 5)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    count = EmbedCount(6 + off_by)
    embeds = projector(Features(torch.randn(2, 4, 6), mask), count)
    # more than the shapes hold are found at once, by `splice`
    assert len(embeds) == 6 if off_by == 30 else bool(count.is_wrong)
