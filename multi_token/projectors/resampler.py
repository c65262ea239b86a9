"""The projector kind `resample`: trained queries attend to all features of an item."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.projectors.base import ProjectorSpec


class Resample(ProjectorSpec):
    """`num_queries` media embeddings per item (Flamingo's perceiver resampler, arXiv:2204.14198).

    Features [items, length, in_dim] -> embeddings [items * num_queries, out_dim]. Queries see a
    set: features must carry their position themselves, as most encoders' do. The closed-form part
    is fitted to the mean of an item's features.
    """

    cross_attends: ClassVar[bool] = True

    type: Literal["resample"] = "resample"  # type: ignore[reportIncompatibleVariableOverride]
    num_queries: int = Field(default=64, ge=1)
    """Media embeddings per item, of any length."""
    depth: int = Field(default=2, ge=1)
    """Layers of cross-attention and perceptron; Flamingo has 6."""
    num_heads: int = Field(default=8, ge=1)
    """Heads of attention, which must divide the width of the queries."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Width of the queries; by default that of the features."""

    @model_validator(mode="after")
    def _check_num_heads(self) -> Resample:
        if self.hidden_size is not None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} cannot be divided among {self.num_heads} heads"
            )
        return self

    def num_tokens(self, num_features: int) -> int:
        return self.num_queries

    def group(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # An item may be all padding (a rank without this modality); it must not divide by zero.
        num_real = mask.sum(1, keepdim=True).clamp(min=1)  # [items, 1]
        return (values.sum(1) / num_real)[:, None], torch.ones_like(num_real, dtype=torch.bool)

    @property
    def tokens_per_group(self) -> int:
        return self.num_queries

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        width = self.hidden_size or in_dim
        if width % self.num_heads:
            raise RecipeError(
                f"resample with {self.num_heads} heads cannot divide features of width {in_dim}; "
                "set `num_heads` to a divisor of it, or a `hidden_size`"
            )
        return Perceiver(self, in_dim, width, out_dim)


class Perceiver(nn.Module):
    """Trained queries, layers of cross-attention to the features, and a map to embeddings."""

    def __init__(self, spec: Resample, in_dim: int, width: int, out_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, width)
        self.queries = nn.Parameter(torch.randn(spec.num_queries, width))
        layers = (PerceiverLayer(width, spec.num_heads) for _ in range(spec.depth))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.to_tokens = nn.Linear(width, out_dim)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """values [items, length, in_dim], mask [items, length] -> [items, 1, queries * out_dim]"""
        # One group per item, as `Resample.group` makes, so that the closed form can be added.
        features = self.embed(values)
        queries = self.queries.expand(len(values), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features, mask)
        return self.to_tokens(self.norm(queries)).flatten(1)[:, None]


class PerceiverLayer(nn.Module):
    """Cross-attention to features and to the other queries, then a perceptron."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_features = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """queries [items, queries, width], features [items, length, width] -> queries"""
        asking = self.norm_queries(queries)
        # As in Flamingo, the queries are among the keys, so that they can divide the features.
        seen = torch.cat([self.norm_features(features), asking], dim=1)
        # torch's mask is True for keys to leave out; queries are never left out.
        hidden = nn.functional.pad(~mask, (0, queries.shape[1]))
        attended, _ = self.attention(
            asking, seen, seen, key_padding_mask=hidden, need_weights=False
        )
        queries = queries + attended
        return queries + self.perceptron(queries)
