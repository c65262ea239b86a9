"""Contract of projectors, and the steps that all kinds share.

features [items, length, in_dim]
  -> standardize -> group [items, groups, group_dim]
  -> network (+ closed form) [items, groups, embeds per group x out_dim]
  -> media embeddings of real groups [num_embeds, out_dim], item by item
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from multi_token.errors import MultiTokenError
from multi_token.types import Features


class ProjectorSpec(BaseModel, ABC):
    """Kind of projector: its fields are its config, its checkpoint entry and its help text.

    A kind overrides `num_tokens` and `build_network`; one that joins features also `group` and
    `group_dim`, one that makes several embeddings of a group also `tokens_per_group`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cross_attends: ClassVar[bool] = False
    """True for a network that attends to all features of an item instead of working on groups;
    groups are then for the closed-form part alone."""
    type: str
    """The registered name of the class."""
    standardize: bool = True
    """Scale features to zero mean and unit variance, with statistics of the training rows."""
    line_break: bool = False
    """Train an embedding that ends each line of an image in tiles (LLaVA-NeXT's newline)."""

    @model_validator(mode="after")
    def _check_line_break(self) -> ProjectorSpec:
        # A line end is one feature; joined with others, it would have no embedding of its own.
        grouped = type(self).group is not ProjectorSpec.group or self.tokens_per_group != 1
        if self.line_break and grouped:
            raise ValueError(
                "`line_break` needs a projector with one embedding per feature (linear, mlp)"
            )
        return self

    @abstractmethod
    def num_tokens(self, num_features: int) -> int:
        """Return the number of media embeddings of an item: the only place that decides it.

        Args:
            num_features: Features of the item, without padding and line ends.

        Raises:
            MultiTokenError: For a number of features that this kind cannot take.
        """

    def group(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Arrange features before the network, without parameters.

        Linear in `values`, item by item, each output from features of its own place in the width.
        The closed form of any other arrangement is fitted too, but encodes its items twice.

        Args:
            values: Standardized features [items, length, dim], zero where masked.
            mask: bool [items, length], True for real features.

        Returns:
            Groups [items, groups, group_dim] and their mask [items, groups].
        """
        return values, mask

    def group_dim(self, in_dim: int) -> int:
        """Return the width of a group; `in_dim`: width of a feature."""
        return in_dim

    @property
    def tokens_per_group(self) -> int:
        """Number of media embeddings that the network makes of one group."""
        return 1

    @abstractmethod
    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        """Build the trained network, without the steps that all kinds share.

        Args:
            in_dim: Width of a group; with `cross_attends`, of a feature.
            out_dim: Width of the language model's embeddings.

        Returns:
            A module [..., group_dim] -> [..., tokens_per_group * out_dim]. With `cross_attends`,
            it takes values [items, length, in_dim] and mask [items, length], and returns
            [items, groups, tokens_per_group * out_dim].

        Raises:
            RecipeError: For fields that do not fit `in_dim`.
        """

    def build(self, in_dim: int, out_dim: int) -> Projector:
        """Return the projector for features of width `in_dim` and embeddings of `out_dim`."""
        return Projector(self, in_dim, out_dim)


@dataclass
class EmbedCount:
    """Number of media embeddings of a batch, known on the host.

    Attributes:
        num_embeds: Number of them, which the collator counted.
        is_wrong: bool [], set by `Projector.forward`: True on the device if the features have
            another number of them. None where the shapes alone decide.
    """

    num_embeds: int
    is_wrong: Tensor | None = None


class ParallelHeads(nn.Module):
    """Several networks with the same input, outputs side by side."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., branches * out]"""
        return torch.cat([branch(x) for branch in self.branches], dim=-1)


class Projector(nn.Module):
    """Projector: features are standardized, grouped, and mapped by network and closed form.

    The closed-form part (train/closed_form.py) is fitted by ridge regression, then frozen; the
    network trains the difference to it.
    """

    def __init__(self, spec: ProjectorSpec, in_dim: int, out_dim: int) -> None:
        """Build the module with random weights.

        Args:
            spec: Kind of projector with its fields.
            in_dim: Width of the encoder's features.
            out_dim: Width of the language model's embeddings.
        """
        super().__init__()
        self.spec = spec
        self.out_dim = out_dim
        self.group_dim = spec.group_dim(in_dim)
        self.tokens_per_group = spec.tokens_per_group
        self.network = spec.build_network(self.group_dim, out_dim)
        # Buffers: saved with the weights, but no optimizer or weight decay may change them.
        self.register_buffer("feature_mean", torch.zeros(in_dim))
        self.register_buffer("feature_scale", torch.ones(in_dim))
        self.closed_form: nn.Linear | None = None
        # About unit length, as LLaVA-NeXT starts `image_newline`.
        self.line_break = (
            nn.Parameter(torch.randn(out_dim) / math.sqrt(out_dim)) if spec.line_break else None
        )

    feature_mean: Tensor
    feature_scale: Tensor

    def standardize_features(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return values [items, length, in_dim], zero where masked, and mask [items, length]."""
        # In float32: bfloat16 features lose digits when a large mean is subtracted.
        values = (features.values.float() - self.feature_mean) * self.feature_scale
        mask = features.mask
        if mask is None:
            mask = values.new_ones(values.shape[:2], dtype=torch.bool)
        else:
            # Standardizing turns zero padding into -mean / std; `stack` and `pool` would see it.
            values = values * mask[..., None]
        return values, mask

    def arrange(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return groups [items, groups, group_dim] and their mask [items, groups]."""
        return self.spec.group(*self.standardize_features(features))

    def forward(self, features: Features, count: EmbedCount | None = None) -> Tensor:
        """Map features to media embeddings.

        Args:
            features: Values [items, length, in_dim], with a mask if lengths differ.
            count: Number of embeddings that is expected; without it the host counts them, for which
                it waits for the device.

        Returns:
            Embeddings [num_embeds, out_dim] of the real (unmasked) groups, item by item; as many
            for each item as `spec.num_tokens` says.

        Raises:
            MultiTokenError: For features with line ends, if the spec has no `line_break`.
        """
        values, present = self.standardize_features(features)
        groups, mask = self.spec.group(values, present)
        # The closed form is added to each group, so both parts make the same number of embeddings.
        tokens = self.network(values, present) if self.spec.cross_attends else self.network(groups)
        if self.closed_form is not None:
            tokens = tokens + self.closed_form(groups)
        if self.line_break is not None:
            # Also without any line end: DDP waits for a gradient of every parameter on each rank.
            breaks = torch.zeros_like(mask) if features.newlines is None else features.newlines
            tokens = torch.where(breaks[..., None], self.line_break, tokens)
        elif features.newlines is not None:
            raise MultiTokenError(
                "the encoder marks line ends, but the projector has no embedding for them; set "
                "`line_break: true` in the projector"
            )
        if count is not None and count.num_embeds % self.tokens_per_group == 0:
            num_groups = count.num_embeds // self.tokens_per_group
            if features.mask is None and mask.numel() == num_groups:
                return tokens.reshape(-1, self.out_dim)
            if num_groups <= mask.numel():
                index, num_real = _first_true(mask.flatten(), num_groups)
                count.is_wrong = num_real != num_groups
                return tokens.flatten(0, 1).index_select(0, index).reshape(-1, self.out_dim)
        return tokens[mask].reshape(-1, self.out_dim)

    def add_closed_form(self) -> nn.Linear:
        """Add a frozen linear map beside the network, and set the network's output to zero.

        Returns:
            The map [group_dim -> tokens_per_group * out_dim], to be filled with the solution.
        """
        # On the network's device: this is called after the model was moved.
        like = next(self.network.parameters())
        self.closed_form = nn.Linear(
            self.group_dim, self.tokens_per_group * self.out_dim, device=like.device
        ).requires_grad_(False)
        # Only the last layers: with all weights at zero, no gradient would reach any of them.
        for layer in self.final_layers():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return self.closed_form

    def final_layers(self) -> list[nn.Linear]:
        """Return the linear layers whose outputs are the media embeddings."""
        network = self.network
        branches = network.branches if isinstance(network, ParallelHeads) else [network]
        return [[m for m in b.modules() if isinstance(m, nn.Linear)][-1] for b in branches]

    @torch.no_grad()
    def scale_output(self, measured: float, rms: float) -> None:
        """Scale the last layers, so that embeddings start in the size of the text's.

        Embeddings far larger or smaller than the text's stall the first steps of training.

        Args:
            measured: Root mean square of the embeddings of some items, without line ends.
            rms: Root mean square of the language model's input embeddings.
        """
        # The line-break embedding is scaled by itself: its size must not depend on their number.
        if self.line_break is not None:
            self.line_break.mul_(rms / self.line_break.square().mean().sqrt())
        for layer in self.final_layers():
            layer.weight.mul_(rms / measured)
            layer.bias.mul_(rms / measured)


def _first_true(mask: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the first `num` true elements [num], and the number of all [].

    As `nonzero`, without a host sync: the host knows `num`. Missing ones are position 0.
    """
    rank = mask.cumsum(0)
    # each true element writes its position at its rank, all others at an extra last place
    place = torch.where(mask, rank - 1, num).clamp(max=num)
    index = torch.zeros(num + 1, dtype=torch.long, device=mask.device)
    index.scatter_(0, place, torch.arange(len(mask), device=mask.device))
    return index[:num], rank[-1]


def mask_without_newlines(features: Features) -> Tensor | None:
    """Return the mask [items, length] of encoded features: no padding and no line ends."""
    if features.newlines is None:
        return features.mask
    return ~features.newlines if features.mask is None else features.mask & ~features.newlines
