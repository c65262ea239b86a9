"""Audio of any kind through CLAP, fused or not: one vector per window, or its frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.modalities.audio_chunks import AudioModality, even_lengths, split_evenly
from multi_token.modalities.base import AnyProjector, Encoder
from multi_token.modalities.parts import gather_features, index_features, run_in_micro_batches
from multi_token.projectors.kinds import Expand
from multi_token.types import Features, Prepared

SoundFeatures = Literal["pooled", "frames"]


class SoundEncoder(Encoder):
    """CLAP's audio half and the features taken from it."""

    def __init__(self, model: Any, modality: SoundModality) -> None:
        super().__init__()
        self.tower = model.audio_model
        self.projection = model.audio_projection
        self.modality = modality
        sizes = self.tower.config
        self.dim = sizes.projection_dim if modality.features == "pooled" else sizes.hidden_size

    def forward(self, **inputs: Tensor) -> Features:
        """Encode the windows of all items: `input_features` [windows, spectrograms, time, mels],
        `is_longer` bool [windows, 1]; `part` and `feature` [items, length] (parts.py).
        """
        part, feature = inputs.pop("part"), inputs.pop("feature")
        values = run_in_micro_batches(self._values, inputs, self.modality.micro_batch)
        return gather_features(values, part, feature)

    def layers(self) -> Sequence[nn.Module]:
        """Return the blocks of all stages; the longest stage alone would not be the last."""
        tower: Any = self.tower
        return [block for stage in tower.audio_encoder.layers for block in stage.blocks]

    def _values(self, **inputs: Tensor) -> Tensor:
        """Features [windows, length, dim]."""
        output = self.tower(**inputs)
        if self.modality.features == "pooled":
            # CLAP compares normalized embeddings.
            projected = self.projection(output.pooler_output)
            return nn.functional.normalize(projected, dim=-1)[:, None]
        # [windows, dim, bands, time] -> time first: the bands of one moment are neighbours, so a
        # projector that joins neighbours joins the same moment.
        return output.last_hidden_state.permute(0, 3, 2, 1).flatten(1, 2)


class SoundModality(AudioModality):
    """Audio of any kind: WAV, FLAC, Ogg, MP3 and more, of any sampling rate, channels and length.

    An item becomes CLAP's embedding of each window (10 s), or the frames of each window
    (`features`), as [length, dim]. Source: CLAP, arXiv:2211.06687.
    """

    kit_example: ClassVar[str] = "multi_token.testing.examples:sound_example"

    type: Literal["sound"] = "sound"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a CLAP (laion/clap-htsat-fused, laion/clap-htsat-unfused, ...)."""
    features: SoundFeatures = "pooled"
    """`pooled`: one feature per window, CLAP's embedding; `frames`: the last hidden state (64
    features per window for the published models), ordered by time, then by frequency band."""
    long_audio: Literal["windows", "fusion"] = "windows"
    """Audio longer than CLAP's window (10 s): `windows` cuts it evenly into several; `fusion` makes
    one window of any length, from the squeezed audio and three crops from the middle of its thirds,
    for encoders trained with it (fused). Shorter audio is repeated to fill a window."""
    projector: AnyProjector = Field(default_factory=lambda: Expand(factor=4))

    def count_features(self, size: int) -> int:
        """Return the number of features of a waveform of `size` samples at the encoder's rate."""
        window = self._window()
        is_fused = self.long_audio == "fusion" and size > window
        return self._num_frames() * (1 if is_fused else len(even_lengths(size, window)))

    def prepare(self, raw: np.ndarray) -> Prepared:
        """Compute CLAP's spectrograms of each window of a waveform [samples].

        Returns:
            `input_features` [windows, spectrograms, time, mels], `is_longer` bool [windows, 1];
            `part`, `feature` int64 [length].

        Raises:
            RecipeError: The encoder is no CLAP, or is not fused where `fusion` needs it.
        """
        extractor, window = self.extractor, self._window()
        fusion = self.long_audio == "fusion"
        if fusion and len(raw) > window:
            spectrograms = [_fused(raw, window, extractor)]
        else:
            spectrograms = [_spectrograms(piece, extractor) for piece in split_evenly(raw, window)]
        num_windows = len(spectrograms)
        inputs = {
            "input_features": torch.stack(spectrograms),
            # Not the extractor's value: in a batch without longer audio it marks one item at
            # random, and so every item that is alone.
            "is_longer": torch.full((num_windows, 1), fusion),
        }
        inputs |= index_features([self._num_frames()] * num_windows)
        return Prepared(inputs, self.count_features(len(raw)), self.facts_from_size(len(raw)))

    def _window(self) -> int:
        """Samples of CLAP's window. Raises RecipeError for an encoder that does not fit."""
        window = getattr(self.extractor, "nb_max_samples", None)
        if window is None:
            raise RecipeError(
                f"{self.encoder} has a {type(self.extractor).__name__}; `sound` takes a CLAP"
            )
        if self.long_audio == "fusion" and self.extractor.truncation != "fusion":
            raise RecipeError(
                f"`long_audio: fusion` needs a fused CLAP, and {self.encoder} is not fused; use "
                "`windows`"
            )
        return window

    def _num_frames(self) -> int:
        """Features of a window."""
        if self.features == "pooled":
            return 1
        return _frames_per_window(self.auto("AutoConfig").audio_config)

    def build_encoder(self) -> SoundEncoder:
        """Return CLAP's audio half; the text half is dropped."""
        model = self.load_tower()
        if not (hasattr(model, "audio_model") and hasattr(model, "audio_projection")):
            raise RecipeError(f"{self.encoder} is a {type(model).__name__}; `sound` takes a CLAP")
        return SoundEncoder(model, self).eval()


def _spectrograms(piece: np.ndarray, extractor: Any, *, length: int | None = None) -> Tensor:
    """Spectrograms [spectrograms, time, mels] of at most `length` samples (default: a window)."""
    processed = extractor(
        piece, sampling_rate=extractor.sampling_rate, max_length=length, return_tensors="pt"
    )
    return processed["input_features"][0].float()


def _fused(raw: np.ndarray, window: int, extractor: Any) -> Tensor:
    """Spectrogram of the audio squeezed into a window, and a crop of each of its thirds."""
    complete = _spectrograms(raw, extractor, length=len(raw))[0]
    num_steps = window // extractor.hop_length + 1
    # No crop is possible in a spectrogram that is exactly a window.
    if len(complete) == num_steps:
        return complete.expand(4, -1, -1).contiguous()
    squeezed = nn.functional.interpolate(
        complete[None, None],
        size=[num_steps, complete.shape[1]],
        mode="bilinear",
        align_corners=False,
    )[0, 0]
    # transformers' ClapFeatureExtractor crops at random places, which would give other features
    # each time; the middle of each third is their mean place.
    thirds = np.array_split(np.arange(len(complete) - num_steps + 1), 3)
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
    return torch.stack([squeezed, *(complete[at : at + num_steps] for at in starts)])


def _frames_per_window(config: Any) -> int:
    """Positions of the last stage of CLAP's hierarchy, which halves both sides between stages."""
    stride = config.patch_stride
    strides = (stride, stride) if isinstance(stride, int) else stride
    # Swin merges 2 x 2 positions between stages.
    side = config.spec_size // 2 ** (len(config.depths) - 1)
    return (side // strides[0]) * (side // strides[1])
