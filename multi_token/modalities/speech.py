"""Speech, by encoders of mel windows (Whisper) or raw waveforms (Wav2Vec2, HuBERT, WavLM)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.media.errors import undecodable
from multi_token.modalities.audio_chunks import AudioModality, even_lengths, split_evenly
from multi_token.modalities.base import AnyProjector, Encoder, load_skeleton
from multi_token.modalities.hidden_states import HiddenStates, layers_up_to
from multi_token.modalities.parts import gather_features, index_features, run_in_micro_batches
from multi_token.projectors.kinds import Stack
from multi_token.types import Features, Prepared

SpeechFeatures = Literal["frames", "mean", "start"]

_DEFAULT_CHUNK_S = 30.0


class SpeechEncoder(Encoder):
    """A speech encoder and the features taken from it."""

    def __init__(self, tower: nn.Module, modality: SpeechModality) -> None:
        super().__init__()
        self.tower = tower
        self.modality = modality
        self.states = HiddenStates(() if modality.layer is None else (modality.layer,))
        self.dim = -1  # known after the first forward, which `build_encoder` runs
        self.masks_padding = False
        """True if an encoder of waveforms gives the same features of a padded chunk."""

    def forward(self, **inputs: Tensor) -> Features:
        """Encode the chunks of all items: `input_features` [chunks, mels, time], or `input_values`
        [chunks, samples] and `num_samples` [chunks]; `part` and `feature` [items, length]
        (parts.py).
        """
        part, feature = inputs.pop("part"), inputs.pop("feature")
        if "num_samples" in inputs:
            values = self._encode_waveforms(inputs["input_values"], inputs["num_samples"])
        else:
            values = run_in_micro_batches(self.encode, inputs, self.modality.micro_batch)
        features = gather_features(values, part, feature)
        if self.modality.features != "mean":
            return features
        assert features.mask is not None
        # Padding is zero, so the sum over all is the sum over the real frames.
        num_real = features.mask.sum(1)[:, None, None]
        return Features(features.values.sum(1, keepdim=True) / num_real)

    def layers(self) -> Sequence[nn.Module]:
        """Return the layers that the features depend on; for `start` encoder, then decoder."""
        if self.modality.features != "start":
            return layers_up_to(super().layers(), self.modality.layer)
        tower: Any = self.tower
        return [*tower.get_encoder().layers, *tower.get_decoder().layers]

    def _encode_waveforms(self, input_values: Tensor, num_samples: Tensor) -> Tensor:
        """Frames [chunks, longest, dim], of chunks of similar length at a time."""
        lengths = num_samples.tolist()
        frames: list[Tensor] = [input_values] * len(lengths)
        for rows in _alike(lengths, self.masks_padding):
            longest = lengths[rows[0]]
            inputs = {"input_values": input_values[rows, :longest]}
            if lengths[rows[-1]] < longest:
                places = torch.arange(longest, device=num_samples.device)
                inputs["attention_mask"] = (places < num_samples[rows, None]).long()
            values = run_in_micro_batches(self.encode, inputs, self.modality.micro_batch)
            for row, value in zip(rows, values, strict=True):
                frames[row] = value
        return nn.utils.rnn.pad_sequence(frames, batch_first=True)

    @torch.no_grad()
    def try_padding(self) -> None:
        """Let chunks of different lengths share a batch if the padding changes no feature."""
        # Families that normalize over time, or join frames after a mask, are noticed here; noise,
        # since silence is what padding looks like.
        chance = torch.Generator().manual_seed(0)
        rate = self.modality.extractor.sampling_rate
        num_samples = torch.tensor([rate, rate * 5 // 8 + 1])
        waveforms = torch.randn(2, rate, generator=chance)
        waveforms[1, num_samples[1] :] = 0
        alone = self._encode_waveforms(waveforms, num_samples)
        self.masks_padding = True
        try:
            padded = self._encode_waveforms(waveforms, num_samples)
        except (TypeError, ValueError, RuntimeError, IndexError):  # it takes no mask
            self.masks_padding = False
            return
        encoder, revision = self.modality.encoder, self.modality.revision
        num_frames = _num_frames(encoder, revision, int(num_samples[1]))
        error = (padded - alone)[1, :num_frames].abs().max()
        self.masks_padding = bool(error <= 1e-4 * alone.abs().max())

    def encode(self, **inputs: Tensor) -> Tensor:
        """Return frames [chunks, frames, dim] of equally long chunks."""
        if self.modality.features == "start":
            tower: Any = self.tower
            first = next(iter(inputs.values()))
            # The decoder has seen the complete chunk after one token (sshh12/multi_token).
            start = torch.full(
                (len(first), 1), tower.config.decoder_start_token_id, device=first.device
            )
            return tower(**inputs, decoder_input_ids=start, use_cache=False).last_hidden_state
        if self.modality.layer is None:
            return self.tower(**inputs).last_hidden_state
        run = functools.partial(self.tower, **inputs)
        return self.states(self.tower, super().layers(), run)[0]


class SpeechModality(AudioModality):
    """Speech: WAV, FLAC, Ogg, MP3 and more, of any sampling rate, channels and length.

    An item becomes one feature per frame, [length, dim], 50 a second for Whisper
    (arXiv:2212.04356) and Wav2Vec2 (arXiv:2006.11477), or one vector per item or chunk
    (`features`). Frames of padding are left out.
    """

    item_text: ClassVar[Literal["caption", "transcript"]] = "transcript"
    kit_example: ClassVar[str] = "multi_token.testing.examples:speech_example"

    type: Literal["speech"] = "speech"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a speech encoder (Whisper, Wav2Vec2, HuBERT, WavLM, ...)."""
    features: SpeechFeatures = "frames"
    """`frames`: one feature per frame (Whisper and Wav2Vec2 make 50 a second), without padding;
    `mean`: one feature per item, the mean of its frames; `start`: one feature per chunk, the
    decoder's last layer at its start token, for encoder-decoder models (sshh12/multi_token)."""
    layer: int | None = None
    """Hidden state of the encoder to take, counted as transformers does (-1 is the last)."""
    chunk_seconds: float | None = Field(None, ge=1.0)
    """Longest chunk, in seconds, that an encoder of raw waveforms gets at once (default 30).
    Longer audio is cut evenly. Whisper has windows of its own: leave this out."""
    projector: AnyProjector = Field(default_factory=lambda: Stack(factor=8))

    @model_validator(mode="after")
    def _check_layer(self) -> SpeechModality:
        if self.features == "start" and self.layer is not None:
            raise ValueError(
                "`layer` is a layer of the encoder, and `features: start` takes the decoder's"
            )
        return self

    def count_features(self, size: int) -> int | None:
        """Return the number of features of a waveform of `size` samples at the encoder's rate.

        None for less than one frame, which `prepare` refuses.
        """
        num_frames = self._frames_of_chunks(size)
        if min(num_frames) < 1:
            return None
        return 1 if self.features == "mean" else sum(num_frames)

    def _frames_of_chunks(self, num_samples: int) -> list[int]:
        """Features of each chunk: all frames that are not padding, or one for `start`.

        A chunk of less than a frame has none.
        """
        extractor = self.extractor
        if extractor.model_input_names[0] == "input_values":
            lengths = even_lengths(num_samples, self._longest(extractor))
        else:
            window, hop = self._window(extractor)
            # Whisper pads a window with silence; only the frames of samples count.
            starts = range(0, num_samples, window)
            lengths = [-(-min(window, num_samples - start) // hop) for start in starts]
        num_frames = [_num_frames(self.encoder, self.revision, length) for length in lengths]
        # One feature per chunk, and none for a chunk of less than a frame.
        return [min(n, 1) for n in num_frames] if self.features == "start" else num_frames

    def prepare(self, raw: np.ndarray) -> Prepared:
        """Run the encoder's own feature extractor on each chunk of a waveform [samples].

        Returns:
            `input_features` [chunks, mels, time], or `input_values` [chunks, samples] and
            `num_samples` [chunks]; `part`, `feature` int64 [length].

        Raises:
            MediaError: The audio is shorter than one frame.
            RecipeError: The encoder takes neither mel windows nor raw waveforms.
        """
        extractor = self.extractor
        num_features = self.count_features(len(raw))
        if num_features is None:
            raise undecodable(
                f"the audio is {len(raw)} samples long ({len(raw) / extractor.sampling_rate:.4f} s)"
                f", less than one frame of {self.encoder}; leave the row out, or record more"
            )
        if extractor.model_input_names[0] == "input_values":
            # One by one: the extractor would pad a batch, and normalize over the padding.
            chunks = [
                torch.as_tensor(
                    extractor(piece, sampling_rate=extractor.sampling_rate)["input_values"][0]
                )
                for piece in split_evenly(raw, self._longest(extractor))
            ]
            inputs = {
                "input_values": nn.utils.rnn.pad_sequence(chunks, batch_first=True).float(),
                "num_samples": torch.tensor([len(chunk) for chunk in chunks]),
            }
        else:
            window, _ = self._window(extractor)
            pieces = [raw[at : at + window] for at in range(0, len(raw), window)]
            mels = extractor(pieces, sampling_rate=extractor.sampling_rate, return_tensors="pt")
            inputs = {"input_features": mels["input_features"]}
        inputs |= index_features(self._frames_of_chunks(len(raw)))
        return Prepared(inputs, num_features=num_features)

    def _longest(self, extractor: Any) -> int:
        return round((self.chunk_seconds or _DEFAULT_CHUNK_S) * extractor.sampling_rate)

    def _window(self, extractor: Any) -> tuple[int, int]:
        """Samples of a mel window, and of one step in it. Raises RecipeError."""
        window, hop = (getattr(extractor, name, None) for name in ("n_samples", "hop_length"))
        if window is None or hop is None:
            raise RecipeError(
                f"{self.encoder} has a {type(extractor).__name__}; `speech` takes encoders of mel "
                "windows, such as Whisper, or of raw waveforms, such as Wav2Vec2, HuBERT and WavLM"
            )
        if self.chunk_seconds is not None:
            raise RecipeError(
                f"{self.encoder} has windows of {window / extractor.sampling_rate:g} s of its own; "
                "remove `chunk_seconds`"
            )
        return window, hop

    def build_encoder(self) -> SpeechEncoder:
        """Return the encoder; an encoder-decoder model keeps its decoder for `start` only.

        Raises:
            RecipeError: `start` without a decoder, or `layer` of an encoder whose layers have
                another number of frames than its convolutions.
        """
        model = self.load_tower()
        # SpecAugment masks random parts in train mode, and refuses short audio.
        model.config.apply_spec_augment = False
        if self.features == "start" and not model.config.is_encoder_decoder:
            raise RecipeError(
                f"`features: start` needs a decoder, and {self.encoder} is an encoder alone; use "
                "`frames` or `mean`"
            )
        tower = model if self.features == "start" else _encoder_half(model)
        encoder = SpeechEncoder(tower, self).eval()
        second = np.zeros(self.extractor.sampling_rate, np.float32)
        inputs = self.collate([self.prepare(second)])
        with torch.no_grad():
            encoder.dim = encoder(**inputs).values.shape[-1]
            if "num_samples" in inputs:
                # Some families (adapters, pooled layers) change the number of frames on the way,
                # which their own length function leaves out.
                num_frames = encoder.encode(input_values=inputs["input_values"]).shape[1]
                if num_frames != inputs["feature"].shape[1]:
                    raise RecipeError(
                        f"{self.encoder} makes {num_frames} frames of a second at layer "
                        f"{self.layer} where its convolutions make {inputs['feature'].shape[1]}; "
                        "remove `layer`"
                    )
                encoder.try_padding()
        return encoder


def _alike(lengths: Sequence[int], masks_padding: bool) -> Iterator[list[int]]:
    """Yield the places of lengths that are encoded together, the longest first.

    They are equal; with a mask at least half as long as the first, so that a batch is never more
    padding than chunks.
    """
    places = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while places:
        longest = lengths[places[0]]
        shortest = -(-longest // 2) if masks_padding else longest
        num = sum(lengths[place] >= shortest for place in places)
        yield places[:num]
        places = places[num:]


def _encoder_half(model: Any) -> nn.Module:
    return model.get_encoder() if model.config.is_encoder_decoder else model


@functools.lru_cache(maxsize=4096)
def _num_frames(encoder: str, revision: str | None, length: int) -> int:
    """Frames that the encoder makes of `length` samples, or steps of its mel window."""
    skeleton = _encoder_half(load_skeleton(encoder, revision))
    count: Any = getattr(skeleton, "_get_feat_extract_output_lengths", None)
    frames = None if count is None else count(torch.tensor(length))
    if not isinstance(frames, Tensor):
        raise RecipeError(
            f"the number of frames that {encoder} makes of an audio is unknown; `speech` takes "
            "encoders such as Whisper, Wav2Vec2, HuBERT and WavLM"
        )
    return int(frames)
