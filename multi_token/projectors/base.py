"""Features -> tokens of the language model's width. Each kind knows how many tokens it makes.

Border: a projector sees features and their mask; it knows nothing of modalities, ids or places.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from multi_token.errors import MultiTokenError
from multi_token.types import Features


class ProjectorSpec(BaseModel, ABC):
    """A kind of projector: its fields are its config.

    A plug-in overrides the three small methods below, or `num_tokens` and `build` as a whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cross_attends: ClassVar[bool] = False
    """True for a network that looks at all features of an item at once instead of at its groups,
    which then are for the closed-form part alone."""
    type: str
    """The registered name of the class."""
    standardize: bool = True
    """Bring features to zero mean and unit variance, with statistics of the training rows."""
    line_break: bool = False
    """Learn a token that ends each line of a picture read in tiles (LLaVA-NeXT's newline)."""

    @model_validator(mode="after")
    def _check_line_break(self) -> ProjectorSpec:
        grouped = type(self).group is not ProjectorSpec.group or self.tokens_per_group != 1
        if self.line_break and grouped:
            raise ValueError(
                "`line_break` needs a projector that makes one token of each feature (linear, mlp)"
            )
        return self

    @abstractmethod
    def num_tokens(self, num_features: int) -> int:
        """Tokens made of an item with so many features."""

    def group(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Arrange features before the network, without parameters.

        values [items, length, dim] and mask [items, length] -> the same with groups, group_dim
        """
        return values, mask

    def group_dim(self, in_dim: int) -> int:
        """Width of what `group` returns."""
        return in_dim

    @property
    def tokens_per_group(self) -> int:
        """Tokens that the network makes of one group."""
        return 1

    @abstractmethod
    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        """[..., group_dim] -> [..., tokens_per_group * out_dim].

        If it `cross_attends`: values [items, length, in_dim] and mask [items, length] -> [items,
        groups,
        tokens_per_group * out_dim].
        """

    def build(self, in_dim: int, out_dim: int) -> Projector:
        """The module that is trained."""
        return Projector(self, in_dim, out_dim)


class ParallelHeads(nn.Module):
    """The same input through several networks, outputs side by side."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., branches * out]"""
        return torch.cat([branch(x) for branch in self.branches], dim=-1)


class Projector(nn.Module):
    """standardize -> group -> network (+ closed form) -> tokens [num_tokens, out_dim], in order.

    The closed-form part (see train/closed_form.py) is fitted, then frozen; the network learns the
    difference beside it.
    """

    def __init__(self, spec: ProjectorSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.out_dim = out_dim
        self.group_dim = spec.group_dim(in_dim)
        self.tokens_per_group = spec.tokens_per_group
        self.network = spec.build_network(self.group_dim, out_dim)
        self.register_buffer("feature_mean", torch.zeros(in_dim))
        self.register_buffer("feature_scale", torch.ones(in_dim))
        self.closed_form: nn.Linear | None = None
        self.line_break = (
            nn.Parameter(torch.randn(out_dim) / math.sqrt(out_dim)) if spec.line_break else None
        )

    feature_mean: Tensor
    feature_scale: Tensor

    def standardize_features(self, features: Features) -> tuple[Tensor, Tensor]:
        """Features -> values [items, length, in_dim], mask [items, length]; zero where masked."""
        values = (features.values.float() - self.feature_mean) * self.feature_scale
        mask = features.mask
        if mask is None:
            mask = values.new_ones(values.shape[:2], dtype=torch.bool)
        else:
            # padding must be zero after standardizing too, or `stack` and `pool` would see it
            values = values * mask[..., None]
        return values, mask

    def arrange(self, features: Features) -> tuple[Tensor, Tensor]:
        """Features -> groups [items, groups, group_dim], mask [items, groups]."""
        return self.spec.group(*self.standardize_features(features))

    def forward(self, features: Features) -> Tensor:
        """Features of all items -> tokens [num_tokens, out_dim] of the real (unmasked) groups.

        Raises MultiTokenError for features with line ends if the spec has no `line_break`.
        """
        values, present = self.standardize_features(features)
        groups, mask = self.spec.group(values, present)
        tokens = self.network(values, present) if self.spec.cross_attends else self.network(groups)
        if self.closed_form is not None:
            tokens = tokens + self.closed_form(groups)
        if self.line_break is not None:
            # also where no line ends, so that no rank's gradient lacks it
            breaks = torch.zeros_like(mask) if features.newlines is None else features.newlines
            tokens = torch.where(breaks[..., None], self.line_break, tokens)
        elif features.newlines is not None:
            raise MultiTokenError(
                "the encoder marks where lines end, but the projector has no token for it; set "
                "`line_break: true` in the projector"
            )
        return tokens[mask].reshape(-1, self.out_dim)

    def add_closed_form(self) -> nn.Linear:
        """A frozen linear map beside the network, whose own output is set to zero."""
        like = next(self.network.parameters())
        self.closed_form = nn.Linear(
            self.group_dim, self.tokens_per_group * self.out_dim, device=like.device
        ).requires_grad_(False)
        for layer in self.final_layers():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return self.closed_form

    def final_layers(self) -> list[nn.Linear]:
        """The linear layers whose outputs are the tokens."""
        branches = (
            list(self.network.branches)
            if isinstance(self.network, ParallelHeads)
            else [self.network]
        )
        return [
            [m for m in branch.modules() if isinstance(m, nn.Linear)][-1] for branch in branches
        ]

    @torch.no_grad()
    def scale_output(self, features: Features, rms: float) -> None:
        """Scale the last layers so that the tokens of these features have this root mean square.

        A token that ends lines gets it by itself, so that its size does not hang on their number.
        """
        if self.line_break is not None:
            self.line_break.mul_(rms / self.line_break.square().mean().sqrt())
        tokens = self(Features(features.values, mask_without_newlines(features)))
        now = tokens.square().mean().sqrt()
        for layer in self.final_layers():
            layer.weight.mul_(rms / now)
            layer.bias.mul_(rms / now)


def mask_without_newlines(features: Features) -> Tensor | None:
    """The mask [items, length] of what the encoder saw: no padding and no line ends."""
    if features.newlines is None:
        return features.mask
    return ~features.newlines if features.mask is None else features.mask & ~features.newlines
