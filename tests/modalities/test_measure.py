"""`Modality.num_features_from_header`: what a header tells is what preparing gives, for sizes,
lengths and formats.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.media.npy import npy_bytes
from multi_token.media.waveform import Excerpt, resampled_length
from multi_token.modalities.base import Modality
from multi_token.modalities.document import DocumentModality
from multi_token.modalities.image import ImageModality
from multi_token.modalities.joint import JointModality
from multi_token.modalities.sound import SoundModality
from multi_token.modalities.speech import SpeechModality
from multi_token.modalities.timeseries import TimeseriesModality
from multi_token.modalities.vector import VectorModality
from multi_token.modalities.video import VideoModality
from multi_token.registry import build
from multi_token.testing import tiny_image_encoder
from multi_token.testing.conformance import ClaimFailed, Subject, _header_length_is_exact
from multi_token.testing.encoders import (
    tiny_clap,
    tiny_joint_clip,
    tiny_patchtst,
    tiny_wav2vec2,
    tiny_whisper,
)
from multi_token.testing.files import noise_frames, tone, write_tone, write_video

FETCH = Fetch()
ORIENTATION = 0x0112
SIZES = [(50, 30), (33, 33), (20, 64), (100, 17), (7, 90), (1, 60), (640, 427)]
GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
TILES = {"tile_grids": GRIDS, "projector": {"type": "linear", "line_break": True}}
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]
TURNING = ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]
"""Formats that may say how an image is to be turned."""
WAYS = [("siglip2", {}), ("clip", TILES), ("clip", {"pad_to_square": True}), ("bare", {})]


class Encoders(dict[str, str]):
    """Tiny encoders by name, each built when it is first asked for.

    `bare`: a DINOv2 whose processor keeps the image's proportions, for want of a crop.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> str:
        folder = self.folder / name
        if name == "whisper":
            self[name] = tiny_whisper(folder)
        elif name == "wav2vec2":
            self[name] = tiny_wav2vec2(folder)
        elif name in ("clap", "fused"):
            self[name] = tiny_clap(folder, fused=name == "fused")
        elif name == "bare":
            from transformers import BitImageProcessorPil

            self[name] = tiny_image_encoder(folder, "dinov2")
            keeping = BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
            keeping.save_pretrained(folder)
        else:
            self[name] = tiny_image_encoder(folder, name)
        return self[name]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: Any) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("encoders"))


def prepared(modality: Modality, source: Any) -> int:
    return modality.prepare(modality.load(source, FETCH)).num_features


def image_bytes(size: tuple[int, int], format: str, *, turn: int | None = None) -> bytes:
    exif = Image.Exif()
    if turn is not None:
        exif[ORIENTATION] = turn
    data = io.BytesIO()
    options = {"exif": exif} if turn is not None else {}
    Image.effect_noise(size, 90).convert("RGB").save(data, format, **options)
    return data.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), WAYS)
def test_an_image_has_the_features_of_its_header_in_every_size_and_format(
    encoders: Encoders, kind: str, fields: dict[str, Any]
) -> None:
    modality = build("modality", {"type": "image", "encoder": encoders[kind], **fields}, Modality)
    numbers = set()
    for index, size in enumerate(SIZES):
        for format in FORMATS if index < 2 else ["PNG"]:
            data = image_bytes(size, format)
            number = modality.num_features_from_header(data, FETCH)
            assert number == prepared(modality, data), (size, format)
            numbers.add(number)
    assert (len(numbers) > 1) == (kind != "clip" or "tile_grids" in fields), "all have as many?"


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", TURNING)
def test_an_image_that_is_turned_is_measured_upright(
    encoders: Encoders, format: str, turn: int
) -> None:
    modality = ImageModality(encoder=encoders["bare"])
    data = image_bytes((80, 33), format, turn=turn)
    assert modality.num_features_from_header(data, FETCH) == prepared(modality, data)
    upright = modality.load(data, FETCH).size
    assert upright == ((80, 33) if turn < 5 else (33, 80)), "or nothing was turned"


def png_with(chunk: bytes, *, after: bool) -> bytes:
    """A PNG of 80 x 33 with one more chunk before or after its pixels."""
    plain = image_bytes((80, 33), "PNG")
    at = plain.index(b"IEND" if after else b"IDAT") - 4
    return plain[:at] + chunk + plain[at:]


def chunk_of(kind: bytes, data: bytes) -> bytes:
    file = io.BytesIO()
    PngImagePlugin.putchunk(file, kind, data)
    return file.getvalue()


def test_a_png_with_metadata_after_its_pixels_is_left_to_decoding(
    encoders: Encoders,
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = chunk_of(b"eXIf", exif.tobytes()[6:])
    modality = ImageModality(encoder=encoders["bare"])
    fixed = ImageModality(encoder=encoders["clip"])
    before, after = png_with(turned, after=False), png_with(turned, after=True)
    assert modality.load(before, FETCH).size == modality.load(after, FETCH).size == (33, 80)
    assert modality.num_features_from_header(before, FETCH) == prepared(modality, after)
    assert modality.num_features_from_header(after, FETCH) is None
    assert modality.num_features_from_header(before[:-40], FETCH) is None, (
        "so is one that is cut off"
    )
    assert fixed.num_features_from_header(after, FETCH) == 16, (
        "the number is the same for all images"
    )
    assert modality.num_features_from_header(Image.new("RGB", (80, 33)), FETCH) is None


def test_what_a_header_shows_to_be_bad_is_refused_at_once(
    encoders: Encoders, tmp_path: Path
) -> None:
    modality = ImageModality(encoder=encoders["clip"], features="pooled", max_pixels=1000)
    for source, words in (
        ("gone.png", "no file at"),
        (b"", "is empty"),
        (b"{}", "begins like JSON text"),
        (image_bytes((50, 30), "PNG"), "the limit is 1,000"),
        (image_bytes((900, 1), "PNG"), "a line rather than an image"),
    ):
        for read in (modality.num_features_from_header, modality.load):
            with pytest.raises(MediaError, match=words):
                read(source, FETCH)


def test_resampling_gives_as_many_samples_as_counted() -> None:
    chance = random.Random(0)
    for given in (8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 16_001):
        for rate in (16_000, 48_000):
            for num in (1, 2, 3, 99, 160, 441, 1001, *chance.sample(range(1, 40_000), 6)):
                samples = np.full(num, 0.1, np.float32)
                blocks = (samples[at : at + given] for at in range(0, num, given))
                try:
                    got = len(Excerpt(rate, max_seconds=60).join(blocks, given))
                except MediaError:
                    got = 0  # nothing comes out of so little
                assert got == resampled_length(num, given, rate), (num, given, rate)


PLAIN = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("FLAC", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
]
PACKED = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("WAV", "IMA_ADPCM")]
HEARD: list[tuple[type[Any], dict[str, Any]]] = [
    (SpeechModality, {"encoder": "whisper"}),
    (SpeechModality, {"encoder": "whisper", "features": "start"}),
    (SpeechModality, {"encoder": "whisper", "features": "mean"}),
    (SpeechModality, {"encoder": "wav2vec2", "chunk_seconds": 1.0}),
    (SoundModality, {"encoder": "clap"}),
    (SoundModality, {"encoder": "clap", "features": "frames"}),
    (SoundModality, {"encoder": "fused", "long_audio": "fusion"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "fields"), HEARD)
def test_audio_has_the_features_that_its_header_tells_in_every_plain_format(
    encoders: Encoders, tmp_path: Path, cls: type[Any], fields: dict[str, Any]
) -> None:
    modality = cls(**{**fields, "encoder": encoders[fields["encoder"]]})
    chance = random.Random(1)
    sources: list[Any] = []
    for number, (format, subtype) in enumerate(PLAIN):
        seconds, rate = chance.uniform(0.1, 3.3), chance.choice([8_000, 16_000, 22_050, 44_100])
        path = tmp_path / f"{number}.{format.lower()}"
        name = write_tone(
            path, seconds, rate, num_channels=1 + number % 2, format=format, subtype=subtype
        )
        start = round(chance.uniform(0.0, 0.05), 3)
        sources += [name, {"path": name, "start": start, "end": round(0.6 * seconds, 3)}]
        sources.append({"bytes": path.read_bytes(), "start": start})
    for seconds in (0.25, 1.0, 2.0001):
        array = {"array": tone(seconds, 11_025), "sampling_rate": 11_025}
        sources += [array, {**array, "array": array["array"].tolist(), "end": 0.21}]
    for source in sources:
        assert modality.num_features_from_header(source, FETCH) == prepared(modality, source), (
            source
        )


def test_audio_whose_header_is_not_exact_is_left_to_decoding(
    encoders: Encoders, tmp_path: Path
) -> None:
    modality = SpeechModality.model_validate({"encoder": encoders["whisper"]})
    for number, (format, subtype) in enumerate(PACKED):
        path = tmp_path / f"{number}"
        write_tone(path, 0.5, 16_000, format=format, subtype=subtype)
        assert modality.num_features_from_header(str(path), FETCH) is None, format
    plain = (tmp_path / "plain.wav", tmp_path / "cut.wav")
    write_tone(plain[0], 0.5)
    plain[1].write_bytes(plain[0].read_bytes()[:-1000])
    assert modality.num_features_from_header(str(plain[1]), FETCH) is None, (
        "decoding says what is wrong with it"
    )
    assert modality.num_features_from_header({"array": [0.1] * 99}, FETCH) is None
    with pytest.raises(MediaError, match="no file at"):
        modality.num_features_from_header("gone.wav", FETCH)
    with pytest.raises(MediaError, match="the row asks for"):
        modality.num_features_from_header({"path": str(plain[0]), "start": 3.0}, FETCH)


def test_vectors_and_series_have_the_features_that_their_headers_tell(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    vector = VectorModality(dim=3)
    own = TimeseriesModality(channels=3, patch_length=4, rate=50.0, hidden_size=8)
    windows = TimeseriesModality(
        channels=3, encoder=tiny_patchtst(tmp_path / "patchtst", channels=3, patch_stride=4)
    )
    for length in (1, 2, 3, 4, 5, 31, 32, 33, 40, 64, 77):
        values = chance.normal(size=(length, 3))
        name = str(tmp_path / f"{length}.npy")
        np.save(name, values.astype(np.float32 if length % 2 else np.int32))
        for source in (name, Path(name).read_bytes(), values, values.tolist()):
            for modality in (vector, own, windows):
                assert modality.num_features_from_header(source, FETCH) == prepared(
                    modality, source
                )
        for rate in (20, 100, 33.3):
            for key, source in (("path", name), ("array", values)):
                asked = {key: source, "sampling_rate": rate}
                assert own.num_features_from_header(asked, FETCH) == prepared(own, asked)
    np.save(tmp_path / "flat.npy", np.ones(3))
    assert vector.num_features_from_header(str(tmp_path / "flat.npy"), FETCH) == 1
    assert own.num_features_from_header(str(tmp_path / "flat.npy"), FETCH) is None, (
        "which is no series of this kind"
    )
    np.save(tmp_path / "wide.npy", np.ones((5, 4)))
    for modality in (vector, own):
        assert modality.num_features_from_header(str(tmp_path / "wide.npy"), FETCH) is None
    with pytest.raises(MediaError, match="holds nan"):
        vector.num_features_from_header([1.0, float("nan"), 2.0], FETCH)
    whole = (tmp_path / "77.npy").read_bytes()
    with pytest.raises(MediaError, match="promises 4 bytes more than there are"):
        vector.num_features_from_header(whole[:-4], FETCH)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"num_frames": 3},
        {"num_frames": 3, "features": "patches"},
        {"fps": 2.0, "features": "patches"},
        {"fps": 3.0, "max_frames": 8},
    ],
)
def test_a_video_has_the_features_that_its_packets_tell(
    encoders: Encoders, tmp_path: Path, fields: dict[str, Any]
) -> None:
    modality = VideoModality(encoder=encoders["clip"], **fields)
    sources: list[Any] = []
    for number in (5, 12, 31, 60):
        name = write_video(tmp_path / f"{number}.mp4", noise_frames(number, height=32))
        sources += [name, {"path": name, "start": 0.1, "end": 0.4}]
        array = noise_frames(number)
        sources += [{"array": array, "fps": 10}, {"array": array, "fps": 10, "end": 0.4}]
    if modality.fps is None:
        sources += [noise_frames(4), [Image.new("RGB", (20, 20))] * 5]
    for source in sources:
        assert modality.num_features_from_header(source, FETCH) == prepared(modality, source)
    numbers = {modality.num_features_from_header(source, FETCH) for source in sources}
    assert (len(numbers) == 1) == (modality.fps is None)


def test_a_video_is_left_to_decoding_where_frames_of_other_shapes_have_other_features(
    encoders: Encoders, tmp_path: Path
) -> None:
    name = write_video(tmp_path / "clip.mp4", noise_frames(5))
    assert (
        VideoModality(encoder=encoders["bare"], features="patches").num_features_from_header(
            name, FETCH
        )
        is None
    )
    assert (
        VideoModality(encoder=encoders["bare"], features="mean").num_features_from_header(
            name, FETCH
        )
        == 8
    )
    with pytest.raises(MediaError, match="no file at"):
        VideoModality(encoder=encoders["clip"]).num_features_from_header("gone.mp4", FETCH)
    with pytest.raises(MediaError, match="no file at"):
        VideoModality(encoder=encoders["clip"]).num_features_from_header(
            [image_bytes((9, 9), "PNG"), "no"], FETCH
        )


def test_an_item_of_a_joint_space_is_one_feature_if_its_first_bytes_fit(tmp_path: Path) -> None:
    modality = JointModality(encoder=tiny_joint_clip(tmp_path / "clip"))
    assert modality.num_features_from_header(image_bytes((30, 40), "JPEG"), FETCH) == 1
    assert modality.num_features_from_header({"text": "a cat"}, FETCH) is None, "a text is read"
    (tmp_path / "note.txt").write_text("a cat " * 2000)
    assert modality.num_features_from_header(str(tmp_path / "note.txt"), FETCH) is None
    with pytest.raises(MediaError, match="is of the kind audio"):
        modality.num_features_from_header(write_tone(tmp_path / "a.wav", 0.1), FETCH)


def test_a_class_that_changes_what_is_prepared_and_not_its_count_is_named() -> None:
    class Doubled(VectorModality):
        def prepare(self, raw: Any) -> Any:
            return super().prepare(np.repeat(np.atleast_2d(raw), 2, axis=0))

    class Silent(Doubled):
        def size_from_header(self, source: Any, fetch: Fetch) -> None:
            return None

    sources = (npy_bytes([1.0, 2.0]), npy_bytes([[1.0, 2.0]] * 3))

    def claim(modality: Modality) -> str:
        return _header_length_is_exact(Subject(modality, sources, FETCH))

    assert claim(VectorModality(dim=2)) == "2 of 2 lengths are known from headers"
    with pytest.raises(ClaimFailed, match="promises 1 features, `prepare` 2; let `count_features`"):
        claim(Doubled(dim=2))
    assert claim(Silent(dim=2)) == "0 of 2 lengths are known from headers"
    document = DocumentModality(encoder="none")
    assert document.num_features_from_header("a.txt", FETCH) is None
