"""Audio of any length for encoders that take a piece of it at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from multi_token.media.audio import count_samples, load_audio
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import OpenAIKind, PretrainedModality, stack_padded
from multi_token.types import Features, Prepared

NOTHING = -1
"""In place of a chunk's number: padding behind a shorter item."""


class AudioModality(PretrainedModality):
    """Base of the audio modalities: source, longest length, and chunks."""

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("audio",)
    requires: ClassVar[tuple[str, ...]] = ("soundfile", "soxr")
    install_extra: ClassVar[str] = "multi_token[audio]"

    max_seconds: float = Field(600.0, gt=0)
    """Longer audio is refused: from its header if that tells, else where decoding gets there."""
    allow_silence: bool = False
    """Accept audio whose samples are all equal, which is nearly always a fault in the data."""

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        """Path, address, data URI, bytes or mapping -> float32 [samples] at the encoder's rate.

        A mapping has `array` and `sampling_rate`, or `path` or `bytes`, and may have `start` and
        `end` in seconds. Raises MediaError.
        """
        return load_audio(
            source,
            fetch,
            rate=feature_extractor(self.encoder, self.revision).sampling_rate,
            max_seconds=self.max_seconds,
            allow_silence=self.allow_silence,
        )

    def size_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the samples of the waveform at the encoder's rate.

        From the header of WAV, FLAC and other plain formats, or from the array; None for MP3, Ogg
        and others whose header is an estimate. Raises MediaError.
        """
        rate = feature_extractor(self.encoder, self.revision).sampling_rate
        return count_samples(source, fetch, rate=rate, max_seconds=self.max_seconds)

    def size_of(self, raw: np.ndarray) -> dict[str, float]:
        """Return the seconds of a waveform [samples] at the encoder's rate."""
        rate = feature_extractor(self.encoder, self.revision).sampling_rate
        return {"seconds": raw.shape[-1] / rate}

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """All chunks of all items in one batch, and which feature is which.

        The encoder's inputs [chunks, ...]; chunk, frame int64 [items, longest].
        """
        batch = {
            key: stack_padded([part for item in items for part in item.inputs[key]])
            for key in items[0].inputs
            if key not in ("chunk", "frame")
        }
        chunks, num_before = [], 0
        for item in items:
            chunks.append(item.inputs["chunk"] + num_before)
            num_before += int(item.inputs["chunk"][-1]) + 1
        frames = [item.inputs["frame"] for item in items]
        pad = nn.utils.rnn.pad_sequence
        return {
            **batch,
            "chunk": pad(chunks, batch_first=True, padding_value=NOTHING),
            "frame": pad(frames, batch_first=True),
        }


@functools.lru_cache(maxsize=8)
def feature_extractor(encoder: str, revision: str | None) -> Any:
    """The encoder's own feature extractor; do not change it."""
    from transformers import AutoFeatureExtractor

    return AutoFeatureExtractor.from_pretrained(encoder, revision=revision)


def split_evenly(waveform: np.ndarray, longest: int) -> list[np.ndarray]:
    """As few consecutive pieces as `longest` allows, equally long to a sample.

    So that no piece is a rest of a few samples, from which an encoder hears nothing.
    """
    return np.array_split(waveform, math.ceil(len(waveform) / longest))


def even_lengths(num_samples: int, longest: int) -> list[int]:
    """The lengths of the pieces that `split_evenly` makes of so many samples."""
    num_pieces = math.ceil(num_samples / longest)
    length, num_longer = divmod(num_samples, num_pieces)
    return [length + 1] * num_longer + [length] * (num_pieces - num_longer)


def enumerate_frames(num_frames: Sequence[int]) -> dict[str, Tensor]:
    """Frames of each chunk -> chunk and frame of each feature, int64 [length], in order."""
    return {
        "chunk": torch.cat([torch.full((n,), chunk) for chunk, n in enumerate(num_frames)]),
        "frame": torch.cat([torch.arange(n) for n in num_frames]),
    }


def arrange_frames(values: Tensor, chunk: Tensor, frame: Tensor) -> Features:
    """Frames of all chunks [chunks, frames, dim] -> Features of the items, in order."""
    index = chunk.clamp(min=0) * values.shape[1] + frame
    mask = chunk != NOTHING
    return Features(values.flatten(0, 1)[index] * mask[..., None], mask=mask)
