"""Values of `datasets`: undecoded features of every kind, and decoded ones given in Python."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import datasets.config
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from multi_token.data.files.open import load_rows
from multi_token.data.row_stream import LanedRows
from multi_token.media.audio import count_samples, load_audio
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import content_bytes, source_stamp
from multi_token.modalities.image import ImageModality
from multi_token.modalities.video import VideoModality

KINDS = ["Image", "Audio", "Video", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure"]


@pytest.mark.parametrize("kind", KINDS)
def test_media_of_every_feature_type_stay_undecoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    if not hasattr(datasets, kind):
        pytest.skip(f"datasets {datasets.__version__} has no {kind}")
    feature = getattr(datasets, kind)()
    value = {"bytes": b"not of this type", "path": None}
    features = datasets.Features({"one": feature, "many": datasets.List(feature)})
    # not `from_dict` with features, which asks for the packages that decode
    table = datasets.Dataset.from_dict({"one": [value], "many": [[value]]}).cast(features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    stream = LanedRows("hub", lambda: table.to_iterable_dataset().decode(False), keep=1)
    found = [load_rows(str(tmp_path / name))[0] for name in ("saved", "rows.parquet")]
    for row in (*found, stream.row(0).row):
        assert row["one"] == row["many"][0] == value


class AudioDecoder:
    """The part of torchcodec's interface that is used: torchcodec loads only with FFmpeg."""

    def __init__(self, samples: np.ndarray, rate: int) -> None:
        self._samples = SimpleNamespace(data=torch.from_numpy(samples), sample_rate=rate)

    def get_all_samples(self) -> Any:
        return self._samples


class VideoDecoder:
    metadata = SimpleNamespace(average_fps=2.0)

    def __init__(self, frames: np.ndarray) -> None:
        self._frames = torch.from_numpy(frames)

    def __len__(self) -> int:
        return len(self._frames)

    def get_frames_in_range(self, start: int, stop: int) -> Any:
        return SimpleNamespace(data=self._frames[start:stop])


def test_a_decoded_audio_is_read_as_its_samples_or_as_the_file_of_datasets() -> None:
    samples = np.sin(np.arange(8000, dtype=np.float32) / 9)
    stereo: Any = AudioDecoder(np.stack([samples, samples * 0.5]), 8000)
    expected = load_audio({"array": samples * 0.75, "sampling_rate": 8000}, Fetch(), rate=16000)
    assert np.allclose(load_audio(stereo, Fetch(), rate=16000), expected, atol=1e-6)
    assert count_samples(stereo, Fetch(), rate=16000, max_seconds=9) == len(expected)
    other: Any = AudioDecoder(np.stack([samples, samples]), 8000)
    assert content_bytes(stereo, Fetch()) != content_bytes(other, Fetch())
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 8000, format="WAV")
    # as datasets.Audio leaves it on the decoders that it makes
    stereo._hf_encoded = {"bytes": buffer.getvalue(), "path": None}
    assert len(load_audio(stereo, Fetch(), rate=16000)) == 16000
    assert source_stamp(stereo, Fetch()) == source_stamp(buffer.getvalue(), Fetch())


def test_a_decoded_video_is_read_as_its_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, 3, 6, 8), np.uint8)
    video = VideoModality(encoder="none", num_frames=4)
    read = video.load(VideoDecoder(frames), Fetch())
    assert [np.asarray(frame).tolist() for frame in read] == frames.transpose(0, 2, 3, 1).tolist()
    assert video.size_from_header(VideoDecoder(frames), Fetch()) == 4


def test_a_decoded_image_is_read_as_it_is() -> None:
    image = Image.new("RGB", (3, 2), "red")
    assert ImageModality(encoder="none").load(image, Fetch()).size == (3, 2)
