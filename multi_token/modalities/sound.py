"""Sounds of any kind through CLAP, fused or not: a vector of a window, or its frames.

Border: waveforms to features. CLAP (arXiv:2211.06687) picks windows of long audio at random; here
they lie at fixed places, so that the same sound always gives the same features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.audio_chunks import (
    AudioModality,
    arrange_frames,
    enumerate_frames,
    even_lengths,
    feature_extractor,
    split_evenly,
)
from multi_token.modalities.base import AnyProjector, Encoder, run_in_micro_batches
from multi_token.projectors.kinds import Expand
from multi_token.types import Features, Prepared

SoundFeatures = Literal["pooled", "frames"]


class SoundEncoder(Encoder):
    """CLAP's audio half and the choice of what to take from it."""

    def __init__(
        self,
        tower: nn.Module,
        projection: nn.Module,
        *,
        features: SoundFeatures,
        micro_batch: int,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.projection = projection
        self.features: SoundFeatures = features
        self.micro_batch = micro_batch
        config: Any = tower.config
        self.dim = config.projection_dim if features == "pooled" else config.hidden_size

    def forward(self, **inputs: Tensor) -> Features:
        """`input_features` [windows, spectrograms, time, mels], `is_longer` bool [windows, 1];
        `chunk` and `frame` [items, length] (see chunks.py) -> Features.
        """
        chunk, frame = inputs.pop("chunk"), inputs.pop("frame")
        values = run_in_micro_batches(self._values, inputs, self.micro_batch)
        return arrange_frames(values, chunk, frame)

    def layers(self) -> Sequence[nn.Module]:
        """The blocks of all stages: the longest stage alone would not be the last."""
        tower: Any = self.tower
        return [block for stage in tower.audio_encoder.layers for block in stage.blocks]

    def _values(self, **inputs: Tensor) -> Tensor:
        """[windows, length, dim]"""
        output = self.tower(**inputs)
        if self.features == "pooled":
            projected = self.projection(output.pooler_output)
            return nn.functional.normalize(projected, dim=-1)[:, None]
        # [windows, dim, bands, time]: bands of one time side by side, so that neighbours are near
        return output.last_hidden_state.permute(0, 3, 2, 1).flatten(1, 2)


class SoundModality(AudioModality):
    """A sound: WAV, FLAC, Ogg, MP3 and more, of any rate, channels and length."""

    kit_example: ClassVar[str] = "multi_token.testing.audio:sound_example"

    type: Literal["sound"] = "sound"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a CLAP (laion/clap-htsat-fused, laion/clap-htsat-unfused, ...)."""
    features: SoundFeatures = "pooled"
    """`pooled`: one feature a window, CLAP's embedding of it; `frames`: the last hidden state (64
    features a window of the published ones), by time and within it by frequency band."""
    long_audio: Literal["windows", "fusion"] = "windows"
    """Of audio longer than CLAP's window (10 s): `windows` cuts it evenly into several; `fusion`
    makes one window of any length, the whole squeezed and three crops from the middle of its
    thirds, for encoders trained with it (fused). Shorter audio is repeated to fill a window."""
    projector: AnyProjector = Field(default_factory=lambda: Expand(factor=4))

    def num_features_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """From the number of samples in the header of WAV, FLAC and other plain formats."""
        num_samples = self.count_samples(source, fetch)
        if num_samples is None:
            return None
        window = self._window()
        is_fused = self.long_audio == "fusion" and num_samples > window
        return self._num_frames() * (1 if is_fused else len(even_lengths(num_samples, window)))

    def prepare(self, raw: np.ndarray) -> Prepared:
        """float32 [samples] -> CLAP's spectrograms of each window.

        `input_features` [windows, spectrograms, time, mels], `is_longer` bool [windows, 1];
        `chunk`, `frame` int64 [length]. Raises RecipeError for what is not a CLAP.
        """
        extractor, window = feature_extractor(self.encoder, self.revision), self._window()
        fusion = self.long_audio == "fusion"
        if fusion and len(raw) > window:
            spectrograms = [_fused(raw, window, extractor)]
        else:
            spectrograms = [_spectrograms(piece, extractor) for piece in split_evenly(raw, window)]
        num_windows = len(spectrograms)
        inputs = {
            "input_features": torch.stack(spectrograms),
            # not the extractor's: of a batch in which no audio is longer it marks one at random,
            # and so every audio that comes alone
            "is_longer": torch.full((num_windows, 1), fusion),
        }
        num_frames = self._num_frames()
        inputs |= enumerate_frames([num_frames] * num_windows)
        return Prepared(inputs, num_features=num_windows * num_frames)

    def _window(self) -> int:
        """Samples of CLAP's window. Raises RecipeError for what is no CLAP, or not of that kind."""
        extractor = feature_extractor(self.encoder, self.revision)
        window = getattr(extractor, "nb_max_samples", None)
        if window is None:
            raise RecipeError(
                f"{self.encoder} has a {type(extractor).__name__}; `sound` takes a CLAP"
            )
        if self.long_audio == "fusion" and extractor.truncation != "fusion":
            raise RecipeError(
                f"`long_audio: fusion` needs a fused CLAP, and {self.encoder} is none; use "
                "`windows`"
            )
        return window

    def _num_frames(self) -> int:
        """Features of a window."""
        if self.features == "pooled":
            return 1
        return _frames_per_window(self.encoder, self.revision)

    def build_encoder(self) -> SoundEncoder:
        """CLAP's audio half; the text half is dropped."""
        from transformers import AutoModel

        model = AutoModel.from_pretrained(self.encoder, revision=self.revision, dtype=torch.float32)
        if not (hasattr(model, "audio_model") and hasattr(model, "audio_projection")):
            raise RecipeError(f"{self.encoder} is a {type(model).__name__}; `sound` takes a CLAP")
        return SoundEncoder(
            model.audio_model,
            model.audio_projection,
            features=self.features,
            micro_batch=self.micro_batch,
        ).eval()


def _spectrograms(piece: np.ndarray, extractor: Any, *, length: int | None = None) -> Tensor:
    """[spectrograms, time, mels] of at most `length` samples (default: a window)."""
    processed = extractor(
        piece, sampling_rate=extractor.sampling_rate, max_length=length, return_tensors="pt"
    )
    return processed["input_features"][0].float()


def _fused(raw: np.ndarray, window: int, extractor: Any) -> Tensor:
    """The whole squeezed into a window, and a crop from the middle of each third of it.

    transformers' ClapFeatureExtractor takes the crops from anywhere in their thirds.
    """
    whole = _spectrograms(raw, extractor, length=len(raw))[0]
    num_steps = window // extractor.hop_length + 1
    if len(whole) == num_steps:
        return whole.expand(4, -1, -1).contiguous()
    squeezed = nn.functional.interpolate(
        whole[None, None], size=[num_steps, whole.shape[1]], mode="bilinear", align_corners=False
    )[0, 0]
    thirds = np.array_split(np.arange(len(whole) - num_steps + 1), 3)
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
    return torch.stack([squeezed, *(whole[at : at + num_steps] for at in starts)])


@functools.lru_cache(maxsize=8)
def _frames_per_window(encoder: str, revision: str | None) -> int:
    """Positions of the last stage of CLAP's hierarchy, which halves both sides between stages."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(encoder, revision=revision).audio_config
    stride = config.patch_stride
    strides = (stride, stride) if isinstance(stride, int) else stride
    side = config.spec_size // 2 ** (len(config.depths) - 1)
    return (side // strides[0]) * (side // strides[1])
