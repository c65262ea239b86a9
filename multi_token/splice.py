"""Writes projected tokens over their places in the text embeddings, or refuses.

Border: tensors and counts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from multi_token.errors import SpliceError


@dataclass(frozen=True)
class MediaEmbeds:
    """All tokens of one modality in a batch.

    `embeds` [num_tokens, dim]; `positions` int64 [num_tokens], in the flat [batch * time] view.
    """

    name: str
    embeds: Tensor
    positions: Tensor


def splice(text: Tensor, media_embeds: Sequence[MediaEmbeds]) -> Tensor:
    """text [batch, time, dim] -> the same with each piece's tokens at its positions.

    One `index_copy` a modality: no search, no sync with the device. Raises SpliceError where
    counts or widths disagree, since writing anyway would train on noise.
    """
    batch, time, dim = text.shape
    flat = text.reshape(batch * time, dim)
    for piece in media_embeds:
        num_tokens, num_places = piece.embeds.shape[0], piece.positions.shape[0]
        if num_tokens != num_places:
            raise SpliceError(f"{piece.name}: {num_tokens} tokens for {num_places} places")
        if piece.embeds.ndim != 2 or piece.embeds.shape[1] != dim:
            raise SpliceError(
                f"{piece.name}: tokens are {tuple(piece.embeds.shape)}, the language model's "
                f"embeddings are {dim} wide"
            )
        flat = flat.index_copy(0, piece.positions, piece.embeds.to(flat.dtype))
    return flat.view(batch, time, dim)
