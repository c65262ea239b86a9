"""Kinds of projectors: linear, mlp, expand, stack, pool, pixel_shuffle."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from multi_token.errors import MultiTokenError
from multi_token.projectors.base import ParallelHeads, ProjectorSpec


class Linear(ProjectorSpec):
    """One linear map (LLaVA, arXiv:2304.08485): a media embedding per feature.

    Features [items, length, in_dim] -> embeddings [items * length, out_dim].
    """

    type: Literal["linear"] = "linear"  # type: ignore[reportIncompatibleVariableOverride]

    def num_tokens(self, num_features: int) -> int:
        return num_features

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        return nn.Linear(in_dim, out_dim)


class Mlp(ProjectorSpec):
    """Perceptron with GELU (LLaVA-1.5, arXiv:2310.03744): a media embedding per feature.

    Features [items, length, in_dim] -> embeddings [items * length, out_dim].
    """

    type: Literal["mlp"] = "mlp"  # type: ignore[reportIncompatibleVariableOverride]
    num_layers: int = Field(default=2, ge=1)
    """Linear layers; LLaVA-1.5 has 2."""

    def num_tokens(self, num_features: int) -> int:
        return num_features

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        return mlp(in_dim, out_dim, self.num_layers)


class Expand(ProjectorSpec):
    """`factor` media embeddings per feature, by a perceptron each (github.com/sshh12/multi_token).

    Features [items, length, in_dim] -> embeddings [items * length * factor, out_dim].
    """

    type: Literal["expand"] = "expand"  # type: ignore[reportIncompatibleVariableOverride]
    factor: int = Field(default=4, ge=1)
    """Media embeddings per feature."""
    num_layers: int = Field(default=2, ge=1)
    """Linear layers of each perceptron."""

    def num_tokens(self, num_features: int) -> int:
        return num_features * self.factor

    @property
    def tokens_per_group(self) -> int:
        return self.factor

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        return ParallelHeads([mlp(in_dim, out_dim, self.num_layers) for _ in range(self.factor)])


class Stack(ProjectorSpec):
    """`factor` neighbouring features joined into one media embedding.

    Features [items, length, in_dim] -> embeddings [items * ceil(length / factor), out_dim]; zeros
    fill the last group. Source: Ultravox's stacked frames (github.com/fixie-ai/ultravox).
    """

    type: Literal["stack"] = "stack"  # type: ignore[reportIncompatibleVariableOverride]
    factor: int = Field(default=8, ge=1)
    """Neighbouring features joined into one media embedding."""
    num_layers: int = Field(default=2, ge=1)
    """Linear layers after the joining."""

    def num_tokens(self, num_features: int) -> int:
        return math.ceil(num_features / self.factor)

    def group(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        values, mask = _group(values, mask, self.factor)
        return values.flatten(2), mask.any(-1)

    def group_dim(self, in_dim: int) -> int:
        return in_dim * self.factor

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        return mlp(in_dim, out_dim, self.num_layers)


class Pool(ProjectorSpec):
    """`factor` neighbouring features averaged into one media embedding.

    Features [items, length, in_dim] -> embeddings [items * ceil(length / factor), out_dim]; with
    `grid`, a square of side s becomes one of side ceil(s / factor), as LLaVA-NeXT-Video pools its
    frames (github.com/LLaVA-VL/LLaVA-NeXT).
    """

    type: Literal["pool"] = "pool"  # type: ignore[reportIncompatibleVariableOverride]
    factor: int = Field(default=2, ge=1)
    """Neighbours averaged, along the sequence or along each side of the grid."""
    grid: bool = False
    """Features are a square grid in reading order, as a vision encoder's patches are."""
    num_layers: int = Field(default=2, ge=1)
    """Linear layers after the averaging."""

    def num_tokens(self, num_features: int) -> int:
        if not self.grid:
            return math.ceil(num_features / self.factor)
        return math.ceil(_side(num_features, _POOL_GRID) / self.factor) ** 2

    def group(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid:
            image = _as_grid(values, mask, _POOL_GRID).permute(0, 3, 1, 2)
            # `ceil_mode` averages the real features of a cut square alone, without zeros around it.
            pooled = nn.functional.avg_pool2d(image, self.factor, ceil_mode=True)
            values = pooled.flatten(2).transpose(1, 2)
            return values, mask.new_ones(values.shape[:2])
        values, mask = _group(values, mask, self.factor)
        # A group of padding alone has no real feature; it is masked, but must not divide by zero.
        num_real = mask.sum(-1, keepdim=True).clamp(min=1)
        return values.sum(2) / num_real, mask.any(-1)

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        return mlp(in_dim, out_dim, self.num_layers)


class PixelShuffle(ProjectorSpec):
    """Squares of `factor` x `factor` patches joined into one (InternVL, arXiv:2404.16821).

    Features [items, length, in_dim] -> embeddings [items * length / factor², out_dim]. The patches
    of a square are joined in reading order, as in Idefics3 and SmolVLM.
    """

    type: Literal["pixel_shuffle"] = "pixel_shuffle"  # type: ignore[reportIncompatibleVariableOverride]
    factor: int = Field(default=2, ge=1)
    """Patches joined along each side of the grid, which it must divide."""
    num_layers: int = Field(default=2, ge=1)
    """Linear layers after the joining; InternVL has 2, Idefics3 and SmolVLM 1."""

    def num_tokens(self, num_features: int) -> int:
        side = _side(num_features, self.type)
        if side % self.factor:
            raise MultiTokenError(
                f"pixel_shuffle with factor {self.factor} needs a grid whose side it divides, got "
                f"{side} x {side} features; choose a divisor of {side}"
            )
        return (side // self.factor) ** 2

    def group(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # The mask is all true, see `_as_grid`, so that lengths of single items do not matter here.
        side = math.isqrt(self.num_tokens(values.shape[1]))
        squares = _as_grid(values, mask, self.type).unflatten(2, (side, self.factor))
        squares = squares.unflatten(1, (side, self.factor))  # [items, side, f, side, f, dim]
        joined = squares.transpose(2, 3).flatten(3).flatten(1, 2)
        return joined, mask.new_ones(joined.shape[:2])

    def group_dim(self, in_dim: int) -> int:
        return in_dim * self.factor**2

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        return mlp(in_dim, out_dim, self.num_layers)


def mlp(in_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    """Return linear layers with GELU between them; every hidden layer is `out_dim` wide."""
    # The first layer already has the language model's width, as in LLaVA-1.5.
    layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
    for _ in range(num_layers - 1):
        layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
    return nn.Sequential(*layers)


def _group(values: Tensor, mask: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """[items, length, dim] -> [items, groups, factor, dim] and mask [items, groups, factor]."""
    # Padded as a batch: a short item then ends in masked groups, which make no embedding.
    missing = -values.shape[1] % factor
    values = nn.functional.pad(values, (0, 0, 0, missing))
    mask = nn.functional.pad(mask, (0, missing))
    return values.unflatten(1, (-1, factor)), mask.unflatten(1, (-1, factor))


_POOL_GRID = "pool with grid: true"


def _side(num_features: int, kind: str) -> int:
    side = math.isqrt(num_features)
    if side * side != num_features:
        raise MultiTokenError(f"{kind} needs a square number of features, got {num_features}")
    return side


def _as_grid(values: Tensor, mask: Tensor, kind: str) -> Tensor:
    """[items, side * side, dim] -> [items, side, side, dim]"""
    side = _side(values.shape[1], kind)
    if not bool(mask.all()):
        raise MultiTokenError(
            f"{kind} needs items of one size, got a batch of several; use an encoder that brings "
            "its items to one size, or the projector pool, stack or resample"
        )
    return values.unflatten(1, (side, side))
