"""Claims about media/audio.py: audio of any kind becomes one waveform, or one sentence."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media import audio
from multi_token.media.audio import as_audio, decode_audio, load_audio
from multi_token.media.fetch import Fetch
from multi_token.media.waveform import Excerpt
from multi_token.testing.files import tone

RATE = 16_000
FILES = {
    "wav": ("WAV", "PCM_16"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-8": ("WAV", "PCM_U8"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
}
CONTAINERS = {
    "m4a": ("mp4", "aac", 44_100),
    "aac": ("adts", "aac", 44_100),
    "webm": ("webm", "libopus", 48_000),
    "mkv": ("matroska", "pcm_s16le", 44_100),
}


def encoded(samples: np.ndarray, kind: str = "wav", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    file_format, subtype = FILES[kind]
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


def contained(samples: np.ndarray, kind: str) -> bytes:
    """[samples, channels] in a file that libsndfile does not read."""
    import av

    file_format, codec, rate = CONTAINERS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=file_format) as container:
        track: Any = container.add_stream(codec, rate=rate)
        track.layout = "stereo" if samples.shape[1] == 2 else "mono"
        planar = np.ascontiguousarray(samples.T)
        frame = av.AudioFrame.from_ndarray(planar, format="fltp", layout=track.layout.name)
        frame.rate, frame.pts = rate, 0
        to_codec = av.AudioResampler(
            format=track.codec_context.format, frame_size=track.codec_context.frame_size or 1024
        )
        for ready in [*to_codec.resample(frame), *to_codec.resample(None)]:
            container.mux(track.encode(ready))
        container.mux(track.encode(None))
    return buffer.getvalue()


def noisy(seconds: float) -> np.ndarray:
    """A tone that coders cannot press into next to nothing."""
    noise = np.random.default_rng(0).standard_normal(round(seconds * RATE))
    return tone(seconds, RATE) + 0.1 * noise.astype(np.float32)


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        decode_audio(data, Excerpt(rate=RATE, **options))
    assert caught.value.kind == "undecodable"
    return str(caught.value)


def load(source: Any, **options: Any) -> np.ndarray:
    return load_audio(source, Fetch(), rate=RATE, **options)


def load_refusal(source: Any, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        load(source, **options)
    return str(caught.value)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two waveforms; coders delay and colour, they do not change the sound."""
    length = min(len(one), len(other))
    return float(np.corrcoef(one[:length], other[:length])[0, 1])


@pytest.mark.parametrize("kind", FILES)
def test_files_of_every_kind_hold_the_same_tone(kind: str) -> None:
    sound = tone(1.5, 48_000)
    decoded = decode_audio(encoded(sound, kind, 48_000), Excerpt(rate=48_000))
    assert decoded.dtype == np.float32 and decoded.ndim == 1
    assert len(decoded) == len(sound)
    assert likeness(decoded, sound) > 0.995
    if kind in ("wav", "flac", "aiff", "caf"):
        assert np.abs(decoded - sound).max() < 1e-4


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("num_channels", [1, 2])
def test_containers_of_videos_and_phones_are_known_by_their_content(
    kind: str, num_channels: int
) -> None:
    rate = CONTAINERS[kind][2]
    sound = tone(1.5, rate, num_channels=num_channels).reshape(-1, num_channels)
    decoded = decode_audio(contained(sound, kind), Excerpt(rate=RATE, name="a.txt"))
    # coders of packets fill up the last one, and put silence before the first
    assert abs(len(decoded) / RATE - 1.5) < 0.1
    best = max(likeness(decoded[lag:], tone(1.5, RATE)) for lag in range(0, 1200, 4))
    assert best > 0.95


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_any_rate_and_any_channels_become_one_waveform(rate: int, num_channels: int) -> None:
    sound = tone(1.0, rate, num_channels=num_channels)
    decoded = decode_audio(encoded(sound, "wav-float", rate), Excerpt(rate=RATE))
    assert len(decoded) == RATE
    loudness = 1 - 0.2 * (num_channels - 1) / 2
    assert np.abs(decoded - loudness * tone(1.0, RATE))[1000:-1000].max() < 2e-3


@pytest.mark.parametrize("kind", ["mp3", "vorbis", "flac"])
def test_decoding_piece_by_piece_is_that_of_the_whole(kind: str) -> None:
    data = encoded(tone(4.5, 48_000), kind, 48_000)
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert np.abs(decode_audio(data, Excerpt(rate=48_000)) - whole).max() < 1e-4


def test_resampling_in_pieces_is_that_of_the_whole() -> None:
    import soxr

    sound = tone(3.3, 44_100)
    whole = soxr.resample(sound, 44_100, RATE)
    decoded = decode_audio(encoded(sound, "wav-float", 44_100), Excerpt(rate=RATE))
    assert np.abs(decoded[: len(whole)] - whole).max() < 1e-5 and len(decoded) == len(whole)


@pytest.mark.parametrize("kind", ["wav", "flac", "vorbis", "mp3"])
def test_only_the_part_between_start_and_end_is_decoded(kind: str) -> None:
    data = encoded(noisy(5.0), kind)
    part = load({"bytes": data, "start": 2.0, "end": 2.5})
    whole = decode_audio(data, Excerpt(rate=RATE))
    assert np.abs(part - whole[2 * RATE : 5 * RATE // 2]).max() < 1e-3
    assert np.allclose(load({"bytes": data, "start": 4}), whole[4 * RATE :], atol=1e-3)
    # the limit counts what is taken, and an end may be rounded up
    assert len(load({"bytes": data, "start": 4.5, "end": 5.2})) == RATE // 2
    assert len(load({"bytes": data, "start": 2, "end": 2.5}, max_seconds=0.5)) == RATE // 2


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_part_of_a_container_is_where_it_is_in_the_whole(kind: str) -> None:
    sound = tone(5.0, CONTAINERS[kind][2]).reshape(-1, 1)
    sound = sound * np.linspace(0.1, 1, len(sound), dtype=np.float32)[:, None]
    data = contained(sound, kind)
    whole = decode_audio(data, Excerpt(rate=RATE))
    part = load({"bytes": data, "start": 3.0, "end": 3.5})
    assert len(part) == RATE // 2
    shifts = [
        np.abs(part[100:-100] - whole[3 * RATE + s :][100 : len(part) - 100]).max()
        for s in range(-40, 41)
    ]
    assert min(shifts) < 0.02


def test_a_file_over_the_limit_is_refused_by_its_header() -> None:
    data = bytearray(encoded(tone(1.0, RATE), "flac"))
    # the number of samples is in 36 bits of the stream's information: here, ten hours
    data[21:26] = (10 * 3600 * RATE + (data[21] >> 4 << 36)).to_bytes(5, "big")
    message = refusal(bytes(data), name="long.flac")
    assert message.startswith("long.flac is 36,000.0 s long, and the limit is 600 s; cut it")


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_file_that_does_not_tell_its_length_is_given_up_at_the_limit(kind: str) -> None:
    data = bytearray(encoded(tone(3.0, RATE), kind))
    if kind == "wav":  # as a programme writes that streams it
        data[4:8] = data[40:44] = b"\xff" * 4
    else:
        data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])
    assert len(decode_audio(bytes(data), Excerpt(rate=RATE, max_seconds=3))) == 3 * RATE
    assert "the limit is 2 s" in refusal(bytes(data), max_seconds=2)


def test_decoding_stops_where_the_limit_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = contained(tone(60.0, 44_100).reshape(-1, 1), "aac")
    taken: list[int] = []
    floats = audio._to_float
    monkeypatch.setattr(
        audio, "_to_float", lambda frame: taken.append(frame.samples) or floats(frame)
    )
    assert "more than 5 s long" in refusal(data, max_seconds=5)
    assert sum(taken) < 5.1 * 44_100


def test_the_limit_is_the_callers_and_is_inclusive() -> None:
    data = encoded(tone(2.0, RATE))
    assert len(decode_audio(data, Excerpt(rate=8_000, max_seconds=2))) == 16_000
    assert "is 2.0 s long, and the limit is 1.9 s" in refusal(data, max_seconds=1.9)
    webm = contained(tone(2.0, 48_000).reshape(-1, 1), "webm")
    assert "the limit is 1.5 s" in refusal(webm, max_seconds=1.5)


@pytest.mark.parametrize("kind", [*FILES, "m4a", "webm"])
def test_a_truncated_file_is_refused_with_a_sentence(kind: str) -> None:
    if kind in CONTAINERS:
        data = contained(tone(3.0, CONTAINERS[kind][2]).reshape(-1, 1), kind)
    else:
        data = encoded(tone(3.0, RATE), kind)
    message = refusal(data[: len(data) * 2 // 3], name="a.bin")
    assert message.startswith("a.bin is truncated or damaged (")
    assert message.endswith("copy or download it again")


@pytest.mark.parametrize("kind", ["flac", "mp3", "vorbis"])
def test_damage_in_the_middle_is_refused_with_its_place(kind: str) -> None:
    data = bytearray(encoded(noisy(10.0), kind))
    middle = len(data) // 2
    data[middle : middle + len(data) // 8] = random.Random(0).randbytes(len(data) // 8)
    message = refusal(bytes(data), name="a.bin")
    assert message.startswith("a.bin is truncated or damaged (") and " s" in message


@pytest.mark.parametrize("kind", [*FILES, *CONTAINERS])
def test_damaged_bytes_give_audio_or_a_sentence_and_nothing_else(kind: str) -> None:
    if kind in CONTAINERS:
        whole = contained(tone(0.3, CONTAINERS[kind][2]).reshape(-1, 1), kind)
    else:
        whole = encoded(tone(0.3, RATE), kind)
    chance = random.Random(0)
    num_refused = 0
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        del data[chance.randint(len(data) // 2, 2 * len(data)) :]
        try:
            assert decode_audio(bytes(data), Excerpt(rate=RATE, max_seconds=5)).dtype == np.float32
        except MediaError as error:
            assert error.kind == "undecodable"
            num_refused += 1
    assert num_refused > 0


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (png(), "a PNG image"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"#EXTM3U\nhttp://somewhere/else.ts\n", "a playlist"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"RIFF\x24\x00\x00\x00WEBPVP8 ", "a RIFF file"),
        (b"hello " * 100, "b'hello hello "),
    ],
)
def test_what_is_not_audio_is_named_by_how_it_begins(data: bytes, what: str) -> None:
    message = refusal(data, name="a.wav")
    assert message.startswith("a.wav is not audio") and what in message


def test_an_empty_file_and_one_without_samples_are_refused() -> None:
    assert refusal(b"", name="a.wav").startswith("a.wav is empty (0 bytes)")
    empty = encoded(np.zeros((0, 1), np.float32))
    assert refusal(empty, name="a.wav").startswith("a.wav has a length of zero")
    assert "has a length of zero" in load_refusal({"array": [], "sampling_rate": RATE})


def test_a_video_without_sound_is_refused() -> None:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        track: Any = container.add_stream("mpeg4", rate=10)
        track.width = track.height = 32
        frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32)))
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    assert refusal(buffer.getvalue(), name="a.mp4").startswith("a.mp4 has no audio track")


def test_samples_that_are_not_numbers_are_refused_with_their_place() -> None:
    sound = tone(2.0, RATE)
    sound[20_000] = np.nan
    message = refusal(encoded(sound, "wav-float"), name="a.wav")
    assert message.startswith("a.wav holds nan at sample 20,000 (1.25 s)")
    sound[20_000] = np.inf
    with pytest.raises(MediaError, match="expected -1 to 1"):
        as_audio(sound, RATE, Excerpt(RATE))


def test_silence_is_refused_unless_it_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "nothing.wav"
    path.write_bytes(encoded(np.zeros(RATE, np.float32)))
    message = load_refusal(str(path))
    assert message.startswith(f"{path} is silence (1.00 s") and "allow_silence: true" in message
    assert len(load(str(path), allow_silence=True)) == RATE


def test_the_shape_of_datasets_is_read_with_the_path_as_its_name_only() -> None:
    sound = tone(0.5, 8_000)
    source = {"path": "gone.wav", "array": sound, "sampling_rate": 8_000}
    assert len(load(source)) == RATE // 2
    data = encoded(sound, rate=8_000)
    assert len(load({"path": "gone.wav", "bytes": data})) == RATE // 2
    assert load_refusal({**source, "array": sound * np.nan}).startswith("gone.wav holds nan")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": -1}, "`start` of the audio is -1, expected 0 seconds or more"),
        ({"end": "2"}, "`end` of the audio is '2', expected 0 seconds or more"),
        ({"start": 0.5, "end": 0.5}, "has `end` 0.5 s, which must be after `start`"),
        ({"start": 7}, "is 1.00 s long, but the row asks for 7 s on"),
        ({"start": 0.5, "end": 9}, "is 1.00 s long, but the row asks for 0.5 to 9 s"),
        ({"begin": 1}, "unknown key 'begin'; known keys: array, sampling_rate"),
    ],
)
def test_a_part_that_is_not_there_is_refused(fields: dict[str, Any], message: str) -> None:
    assert message in load_refusal({"bytes": encoded(tone(1.0)), **fields})


@pytest.mark.parametrize(
    ("name", "extra"), [("soundfile", "audio"), ("soxr", "audio"), ("av", "video")]
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    data = encoded(tone(0.1))
    if name == "av":
        data = contained(tone(0.1, 44_100).reshape(-1, 1), "m4a")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MultiTokenError, match=rf'package {name}.*"multi_token\[{extra}\]"'):
        decode_audio(data, Excerpt(rate=RATE))
