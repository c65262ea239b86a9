"""Audio of any length for encoders that take chunks of a fixed length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from multi_token.media.audio import count_samples, load_audio
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import OpenAIKind, PretrainedModality
from multi_token.modalities.parts import collate_parts
from multi_token.types import Fact, Prepared


class AudioModality(PretrainedModality):
    """Base of the audio modalities: sources, limits, and the batch of all items' chunks."""

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("audio",)
    requires: ClassVar[tuple[str, ...]] = ("soundfile", "soxr")
    install_extra: ClassVar[str] = "multi_token[audio]"

    fact_names: ClassVar[Mapping[str, str]] = {"seconds": "length of the audio that is encoded"}

    max_seconds: float = Field(600.0, gt=0)
    """Longest audio in seconds. Longer audio is refused: before decoding if the header has the
    length, else where decoding reaches the limit."""
    allow_silence: bool = False
    """Accept audio whose samples are all equal, which is nearly always a fault in the data."""

    @property
    def extractor(self) -> Any:
        """The encoder's own feature extractor."""
        return self.auto("AutoFeatureExtractor")

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        """Return the mono waveform at the encoder's sampling rate, float32 [samples].

        Args:
            source: Path, URL, data URI, bytes, or a mapping of `array` and `sampling_rate`, or of
                `path` or `bytes`; a mapping may have `start` and `end` in seconds.
            fetch: Reader of paths and URLs.

        Raises:
            MediaError: The source is no audio, is silent, or is over `max_seconds`.
        """
        return load_audio(
            source,
            fetch,
            rate=self.extractor.sampling_rate,
            max_seconds=self.max_seconds,
            allow_silence=self.allow_silence,
        )

    def size_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the number of samples of the waveform at the encoder's sampling rate.

        Read from an array, or from the header of WAV, FLAC and other formats that count samples;
        None for MP3, Ogg and others whose header is an estimate. Raises MediaError as `load`.
        """
        # The extractor is shared and read once, so a row costs only its header.
        rate = self.extractor.sampling_rate
        return count_samples(source, fetch, rate=rate, max_seconds=self.max_seconds)

    def facts_from_size(self, size: int) -> tuple[Fact, ...]:
        """Return the seconds of a waveform of `size` samples at the encoder's sampling rate."""
        return (Fact({"seconds": size / self.extractor.sampling_rate}),)

    def size_of(self, raw: np.ndarray) -> dict[str, float]:
        """Return the seconds of a waveform [samples] at the encoder's sampling rate."""
        return {"seconds": raw.shape[-1] / self.extractor.sampling_rate}

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into one batch, in which the chunks of all items are encoded together."""
        return collate_parts(items)


def split_evenly(waveform: np.ndarray, longest: int) -> list[np.ndarray]:
    """Split [samples] into the fewest chunks of at most `longest`, equal in length to one sample.

    Even chunks leave no rest of a few samples, which an encoder could make nothing of.
    """
    return np.array_split(waveform, math.ceil(len(waveform) / longest))


def even_lengths(num_samples: int, longest: int) -> list[int]:
    """Return the lengths of the chunks that `split_evenly` makes of `num_samples`."""
    num_pieces = math.ceil(num_samples / longest)
    # As numpy.array_split distributes the remainder: the first chunks get one sample more.
    length, num_longer = divmod(num_samples, num_pieces)
    return [length + 1] * num_longer + [length] * (num_pieces - num_longer)
