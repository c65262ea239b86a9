"""Splice: media embeddings are written at their positions in the text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from multi_token.errors import SpliceError


@dataclass(frozen=True)
class MediaEmbeds:
    """All media embeddings of one modality in a batch."""

    name: str
    """Modality, named by errors."""
    embeds: Tensor
    """[num_embeds, dim]"""
    positions: Tensor
    """int64 [num_embeds], in the flat [batch * time] view of the batch."""


def splice(text: Tensor, media_embeds: Sequence[MediaEmbeds]) -> Tensor:
    """Write media embeddings over text embeddings, at positions that the collator recorded.

    Args:
        text: Embeddings of the ids [batch, time, dim]; filler ids at the positions of media.
        media_embeds: One entry per modality of the batch.

    Returns:
        Embeddings [batch, time, dim], in the dtype of `text`; `text` itself is unchanged.

    Raises:
        SpliceError: If counts or widths disagree: anything else would train on noise.
    """
    batch, time, dim = text.shape
    flat = text.reshape(batch * time, dim)
    for media in media_embeds:
        num_embeds, num_positions = media.embeds.shape[0], media.positions.shape[0]
        if num_embeds != num_positions:
            raise SpliceError(
                f"{media.name}: {num_embeds} media embeddings for {num_positions} positions"
            )
        if media.embeds.ndim != 2 or media.embeds.shape[1] != dim:
            raise SpliceError(
                f"{media.name}: media embeddings are {tuple(media.embeds.shape)}, the language "
                f"model's embeddings are {dim} wide"
            )
        # Positions come from the collator, so nothing is searched for on the device and no host
        # sync happens, as a comparison with a placeholder id would need.
        flat = flat.index_copy(0, media.positions, media.embeds.to(flat.dtype))
    return flat.view(batch, time, dim)
