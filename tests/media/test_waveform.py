"""Claims about media/waveform.py, and how arrays of samples become waveforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from multi_token.errors import MediaError
from multi_token.media.audio import as_audio, load_audio
from multi_token.media.fetch import Fetch
from multi_token.media.waveform import Excerpt
from multi_token.testing.files import tone

RATE = 16_000


def load(source: Any, **options: Any) -> np.ndarray:
    return load_audio(source, Fetch(), rate=RATE, **options)


def load_refusal(source: Any) -> str:
    with pytest.raises(MediaError) as caught:
        load(source)
    assert caught.value.kind == "undecodable"
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint8, np.int16, np.int32])
def test_arrays_of_every_type_are_scaled_to_one(dtype: Any) -> None:
    sound = tone(0.5, RATE)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        array = sound.astype(dtype)
    elif kind == np.uint8:
        array = np.round(sound * 127 + 128).astype(dtype)
    else:
        array = np.round(sound.astype(np.float64) * np.iinfo(kind).max).astype(dtype)
    step = 1e-3 if kind == np.float16 else 1.5 / 2 ** (8 * min(kind.itemsize, 2) - 1)
    assert np.abs(as_audio(array, RATE, Excerpt(RATE)) - sound).max() < step


def test_lists_tensors_and_channels_are_read_as_arrays_are() -> None:
    sound = tone(0.5, RATE, num_channels=2)
    loaded = [
        load({"array": array, "sampling_rate": RATE})
        for array in (sound, torch.tensor(sound), sound.tolist(), sound.mean(axis=1))
    ]
    assert all(np.allclose(loaded[0], other) for other in loaded[1:])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 16_000), np.float32), "16,000 channels; expected .samples, channels., so"),
        (np.zeros((3, 4, 5), np.float32), "has the shape .3, 4, 5., expected .samples. or"),
        (np.float32(0.5), "has the shape .., expected"),
        ([1, 2, 3], "type int64, whose full scale is unknown"),
        (["a", "b"], "values of type <U1"),
        ([[0.1, 0.2], [0.3]], "rows of different lengths"),
        (np.array([0.0, 12_000.0]), "floats up to 12000, expected -1 to 1"),
    ],
)
def test_an_array_of_the_wrong_shape_or_scale_is_refused(array: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load({"array": array, "sampling_rate": RATE})


@pytest.mark.parametrize("source", [[0.1, 0.2], np.zeros(8), torch.zeros(8)])
def test_samples_without_their_rate_are_refused_with_the_mapping_to_write(source: Any) -> None:
    assert '{"array": [...], "sampling_rate": 16000}' in load_refusal(source)
    assert '"sampling_rate": 16000}' in load_refusal({"array": source})


@pytest.mark.parametrize("rate", [16, 0, -1, 44_100.5, True, "16000"])
def test_a_rate_that_cannot_be_is_refused(rate: Any) -> None:
    assert "sampling rate" in load_refusal({"array": tone(0.1), "sampling_rate": rate})
