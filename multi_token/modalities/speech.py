"""Speech through encoders of mel windows (Whisper) or of raw waveforms (Wav2Vec2, HuBERT, WavLM).

Border: waveforms to features. Which kind an encoder is, is told by its feature extractor; how many
features come out, by the arithmetic of its own convolutions. No list of model names is kept here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.audio_chunks import (
    AudioModality,
    arrange_frames,
    enumerate_frames,
    even_lengths,
    feature_extractor,
    split_evenly,
)
from multi_token.modalities.base import AnyProjector, Encoder, layers_up_to, run_in_micro_batches
from multi_token.modalities.hidden_states import HiddenStates
from multi_token.projectors.kinds import Stack
from multi_token.types import Features, Prepared

SpeechFeatures = Literal["frames", "mean", "start"]

_DEFAULT_CHUNK_S = 30.0


class SpeechEncoder(Encoder):
    """A speech encoder and the choice of what to take from it."""

    def __init__(
        self, tower: nn.Module, *, features: SpeechFeatures, layer: int | None, micro_batch: int
    ) -> None:
        super().__init__()
        self.tower = tower
        self.features: SpeechFeatures = features
        self.layer = layer
        self.states = HiddenStates(() if layer is None else (layer,))
        self.micro_batch = micro_batch
        self.dim = -1  # known after the first forward; `build_encoder` runs one

    def forward(self, **inputs: Tensor) -> Features:
        """`input_features` [chunks, mels, time], or `input_values` [chunks, samples] and their
        `num_samples` [chunks]; `chunk` and `frame` [items, length] (see chunks.py) -> Features.
        """
        chunk, frame = inputs.pop("chunk"), inputs.pop("frame")
        if "num_samples" in inputs:
            values = self._waveforms(inputs["input_values"], inputs["num_samples"])
        else:
            values = run_in_micro_batches(self.encode, inputs, self.micro_batch)
        features = arrange_frames(values, chunk, frame)
        if self.features != "mean":
            return features
        assert features.mask is not None
        num_real = features.mask.sum(1)[:, None, None]
        return Features(features.values.sum(1, keepdim=True) / num_real)

    def layers(self) -> Sequence[nn.Module]:
        """Those that the features come through; for `start` the decoder's behind the encoder's."""
        if self.features != "start":
            return layers_up_to(super().layers(), self.layer)
        tower: Any = self.tower
        return [*tower.get_encoder().layers, *tower.get_decoder().layers]

    def _waveforms(self, input_values: Tensor, num_samples: Tensor) -> Tensor:
        """Chunks of one length together, without padding -> [chunks, longest, dim].

        Padding would change the numbers: many of these encoders normalise over time, and were
        trained without a mask.
        """
        lengths = num_samples.tolist()
        frames: list[Tensor] = [input_values] * len(lengths)
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            equal = {"input_values": input_values[rows, :length]}
            values = run_in_micro_batches(self.encode, equal, self.micro_batch)
            for row, value in zip(rows, values, strict=True):
                frames[row] = value
        return nn.utils.rnn.pad_sequence(frames, batch_first=True)

    def encode(self, **inputs: Tensor) -> Tensor:
        """Inputs of chunks, equally long -> [chunks, frames, dim]."""
        if self.features == "start":
            tower: Any = self.tower
            first = next(iter(inputs.values()))
            start = torch.full(
                (len(first), 1), tower.config.decoder_start_token_id, device=first.device
            )
            return tower(**inputs, decoder_input_ids=start, use_cache=False).last_hidden_state
        if self.layer is None:
            return self.tower(**inputs).last_hidden_state
        run = functools.partial(self.tower, **inputs)
        return self.states(self.tower, super().layers(), run)[0]


class SpeechModality(AudioModality):
    """Somebody speaking: WAV, FLAC, Ogg, MP3 and more, of any rate, channels and length."""

    kit_example: ClassVar[str] = "multi_token.testing.audio:speech_example"

    type: Literal["speech"] = "speech"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a speech encoder (Whisper, Wav2Vec2, HuBERT, WavLM, ...)."""
    features: SpeechFeatures = "frames"
    """`frames`: one feature a frame (Whisper and Wav2Vec2 make 50 of a second), those of padding
    left out; `mean`: one feature an item, their mean; `start`: one feature a chunk, the decoder's
    last layer at its start token, for encoder-decoder models (sshh12/multi_token)."""
    layer: int | None = None
    """Hidden state of the encoder to take, counted as transformers does (-1 the last)."""
    chunk_seconds: float | None = Field(None, ge=1.0)
    """Longest piece that an encoder of raw waveforms hears at once (default 30); longer audio is
    cut evenly. Whisper has windows of its own."""
    projector: AnyProjector = Field(default_factory=lambda: Stack(factor=8))

    @model_validator(mode="after")
    def _check_layer(self) -> SpeechModality:
        if self.features == "start" and self.layer is not None:
            raise ValueError("`layer` is one of the encoder's, and `features: start` the decoder's")
        return self

    def num_features_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """From the number of samples in the header of WAV, FLAC and other plain formats."""
        num_samples = self.count_samples(source, fetch)
        if num_samples is None:
            return None
        extractor = feature_extractor(self.encoder, self.revision)
        if extractor.model_input_names[0] == "input_values":
            lengths = even_lengths(num_samples, self._longest(extractor))
        else:
            window, hop = self._window(extractor)
            starts = range(0, num_samples, window)
            lengths = [-(-min(window, num_samples - start) // hop) for start in starts]
        num_frames = [_num_frames(self.encoder, self.revision, length) for length in lengths]
        if min(num_frames) < 1:
            return None
        counts = {"mean": 1, "start": len(num_frames), "frames": sum(num_frames)}
        return counts[self.features]

    def prepare(self, raw: np.ndarray) -> Prepared:
        """float32 [samples] -> what the encoder's feature extractor makes of each chunk.

        `input_features` [chunks, mels, time], or `input_values` [chunks, samples] and `num_samples`
        [chunks]; `chunk`, `frame` int64 [length]. Raises MediaError for audio of less than a frame
        and RecipeError for an encoder that is of neither kind.
        """
        extractor = feature_extractor(self.encoder, self.revision)
        if extractor.model_input_names[0] == "input_values":
            inputs = self._waveforms(raw, extractor)
            lengths = inputs["num_samples"].tolist()
        else:
            inputs, lengths = self._mel_windows(raw, extractor)
        num_frames = [_num_frames(self.encoder, self.revision, length) for length in lengths]
        if min(num_frames) < 1:
            raise MediaError(
                f"the audio is {len(raw)} samples long ({len(raw) / extractor.sampling_rate:.4f} s)"
                f", less than one frame of {self.encoder}; leave the row out, or record more",
                kind="undecodable",
            )
        if self.features == "start":
            num_frames = [1] * len(num_frames)
        inputs |= enumerate_frames(num_frames)
        return Prepared(inputs, num_features=1 if self.features == "mean" else sum(num_frames))

    def _longest(self, extractor: Any) -> int:
        """Samples that an encoder of raw waveforms hears at once."""
        return round((self.chunk_seconds or _DEFAULT_CHUNK_S) * extractor.sampling_rate)

    def _waveforms(self, raw: np.ndarray, extractor: Any) -> dict[str, Tensor]:
        rate = extractor.sampling_rate
        # one by one: together they would be padded
        chunks = [
            torch.as_tensor(extractor(piece, sampling_rate=rate)["input_values"][0])
            for piece in split_evenly(raw, self._longest(extractor))
        ]
        return {
            "input_values": nn.utils.rnn.pad_sequence(chunks, batch_first=True).float(),
            "num_samples": torch.tensor([len(chunk) for chunk in chunks]),
        }

    def _window(self, extractor: Any) -> tuple[int, int]:
        """Samples of a mel window, and of a step in it. Raises RecipeError."""
        window, hop = (getattr(extractor, name, None) for name in ("n_samples", "hop_length"))
        if window is None or hop is None:
            raise RecipeError(
                f"{self.encoder} has a {type(extractor).__name__}; `speech` takes encoders of mel "
                "windows as Whisper is, or of raw waveforms as Wav2Vec2, HuBERT and WavLM are"
            )
        if self.chunk_seconds is not None:
            raise RecipeError(
                f"{self.encoder} has windows of {window / extractor.sampling_rate:g} s by itself; "
                "leave out `chunk_seconds`"
            )
        return window, hop

    def _mel_windows(self, raw: np.ndarray, extractor: Any) -> tuple[dict[str, Tensor], list[int]]:
        """Inputs of all windows, and how many steps of each are not padding."""
        window, hop = self._window(extractor)
        pieces = [raw[at : at + window] for at in range(0, len(raw), window)]
        processed = extractor(pieces, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return (
            {"input_features": processed["input_features"]},
            [-(-len(piece) // hop) for piece in pieces],
        )

    def build_encoder(self) -> SpeechEncoder:
        """The encoder; of an encoder-decoder model the decoder is kept for `start` only."""
        from transformers import AutoModel

        model = AutoModel.from_pretrained(self.encoder, revision=self.revision, dtype=torch.float32)
        # SpecAugment hides random parts from an encoder that learns, and refuses short audio
        model.config.apply_spec_augment = False
        if self.features == "start" and not model.config.is_encoder_decoder:
            raise RecipeError(
                f"`features: start` needs a decoder, and {self.encoder} is an encoder alone; use "
                "`frames` or `mean`"
            )
        tower = model if self.features == "start" else _encoder_half(model)
        encoder = SpeechEncoder(
            tower, features=self.features, layer=self.layer, micro_batch=self.micro_batch
        ).eval()
        second = np.zeros(feature_extractor(self.encoder, self.revision).sampling_rate, np.float32)
        inputs = self.collate([self.prepare(second)])
        with torch.no_grad():
            encoder.dim = encoder(**inputs).values.shape[-1]
            if "num_samples" in inputs:
                num_frames = encoder.encode(input_values=inputs["input_values"]).shape[1]
                if num_frames != inputs["frame"].shape[1]:
                    raise RecipeError(
                        f"{self.encoder} makes {num_frames} frames of a second at layer "
                        f"{self.layer} where its convolutions make {inputs['frame'].shape[1]}; "
                        "leave out `layer`"
                    )
        return encoder


def _encoder_half(model: Any) -> nn.Module:
    return model.get_encoder() if model.config.is_encoder_decoder else model


@functools.lru_cache(maxsize=4)
def _skeleton(encoder: str, revision: str | None) -> Any:
    """The encoder's architecture without weights: it is asked for lengths only."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(encoder, revision=revision)
    with torch.device("meta"):
        return _encoder_half(AutoModel.from_config(config))


@functools.lru_cache(maxsize=4096)
def _num_frames(encoder: str, revision: str | None, length: int) -> int:
    """Frames that the encoder makes of so many samples, or steps of its mel window."""
    count = getattr(_skeleton(encoder, revision), "_get_feat_extract_output_lengths", None)
    frames = None if count is None else count(torch.tensor(length))
    if not isinstance(frames, Tensor):
        raise RecipeError(
            f"{encoder} does not tell how many frames it makes of a length; `speech` takes "
            "encoders as Whisper, Wav2Vec2, HuBERT and WavLM are"
        )
    return int(frames)
