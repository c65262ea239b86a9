"""modalities/speech.py: speech of any length, and exactly the features that transformers gives."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multi_token.errors import MediaError, MultiTokenError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.speech import SpeechModality
from multi_token.testing.encoders import tiny_clap, tiny_wav2vec2, tiny_whisper
from multi_token.testing.examples import speech_example
from multi_token.testing.files import tone, write_tone

RATE = 16_000
KINDS = ["whisper", "wav2vec2", "hubert", "wavlm"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    waveforms = {kind: tiny_wav2vec2(folder / kind, kind) for kind in KINDS[1:]}  # type: ignore
    return {"whisper": tiny_whisper(folder / "whisper"), **waveforms}


def voices(*seconds: float) -> list[np.ndarray]:
    """Tones under noise, so that no two frames of them are alike."""
    chance = np.random.default_rng(0)
    noise = [0.1 * chance.standard_normal(round(s * RATE)) for s in seconds]
    return [
        tone(s, RATE, hertz=200 + 90 * i) + n.astype(np.float32)
        for i, (s, n) in enumerate(zip(seconds, noise, strict=True))
    ]


def features(modality: Any, encoder: Any, *raw: np.ndarray) -> list[torch.Tensor]:
    """The real features [length, dim] of each waveform, all of them in one batch."""
    with torch.no_grad():
        output = encoder(**modality.collate([modality.prepare(r) for r in raw]))
    if output.mask is None:
        return list(output.values)
    return [values[mask] for values, mask in zip(output.values, output.mask, strict=True)]


CASES = [(kind, taken) for kind in KINDS for taken in ("frames", "mean")] + [("whisper", "start")]


@pytest.mark.parametrize(("kind", "taken"), CASES)
def test_a_batch_equals_one_by_one_and_has_the_promised_number_of_features(
    encoders: dict[str, str], kind: str, taken: Any
) -> None:
    # a small micro_batch and pieces of a second: the batch below passes the encoder in several
    modality = SpeechModality(
        encoder=encoders[kind],
        features=taken,
        micro_batch=2,
        chunk_seconds=None if kind == "whisper" else 1.0,
    )
    encoder = modality.build_encoder()
    waveforms = voices(0.3, 2.6, 1.0, 0.31)
    together = features(modality, encoder, *waveforms)
    for raw, values in zip(waveforms, together, strict=True):
        assert values.shape == (modality.prepare(raw).num_features, encoder.dim)
        torch.testing.assert_close(
            values, features(modality, encoder, raw)[0], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(together[0][0], together[3][0], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(("norm", "num_forwards"), [("layer", 2), ("group", 16)])
def test_waveforms_of_all_lengths_share_a_forward_unless_padding_changes_their_features(
    tmp_path: Path, kind: Any, norm: Any, num_forwards: int
) -> None:
    modality = SpeechModality(encoder=tiny_wav2vec2(tmp_path / "it", kind, norm=norm))
    encoder = modality.build_encoder()
    waveforms = voices(*(0.3 + 0.041 * i for i in range(15)), 0.31)
    forwards: list[int] = []
    encoder.tower.register_forward_hook(lambda *_: forwards.append(1))
    together = features(modality, encoder, *waveforms)
    assert len(forwards) == num_forwards
    for raw, values in zip(waveforms, together, strict=True):
        torch.testing.assert_close(
            values, features(modality, encoder, raw)[0], rtol=1e-4, atol=1e-5
        )


def test_frames_of_whisper_are_those_of_its_own_encoder_without_the_padding(
    encoders: dict[str, str],
) -> None:
    from transformers import AutoFeatureExtractor, WhisperModel

    whisper = WhisperModel.from_pretrained(encoders["whisper"]).eval()
    extractor = AutoFeatureExtractor.from_pretrained(encoders["whisper"])
    modality = SpeechModality(encoder=encoders["whisper"])
    (raw,) = voices(0.33)
    own = extractor(raw, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    with torch.no_grad():
        theirs = whisper.encoder(own["input_features"]).last_hidden_state[0]
    # steps of the window that are not padding, two of them a frame
    num_frames = -(-int(own["attention_mask"].sum()) // 2)
    (ours,) = features(modality, modality.build_encoder(), raw)
    assert num_frames == 17 == len(ours)
    torch.testing.assert_close(ours, theirs[:num_frames], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("layer", [None, 1, -2])
def test_frames_of_waveform_encoders_are_what_the_model_itself_returns(
    encoders: dict[str, str], kind: str, layer: int | None
) -> None:
    from transformers import AutoFeatureExtractor, AutoModel

    model = AutoModel.from_pretrained(encoders[kind]).eval()
    extractor = AutoFeatureExtractor.from_pretrained(encoders[kind])
    modality = SpeechModality(encoder=encoders[kind], layer=layer)
    (raw,) = voices(0.47)
    own = extractor(raw, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        output = model(own["input_values"], output_hidden_states=True)
    theirs = output.last_hidden_state if layer is None else output.hidden_states[layer]
    (ours,) = features(modality, modality.build_encoder(), raw)
    torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-5)


def test_a_hidden_state_of_whisper_is_the_one_that_the_encoder_names(
    encoders: dict[str, str],
) -> None:
    from transformers import WhisperModel

    whisper = WhisperModel.from_pretrained(encoders["whisper"]).eval()
    modality = SpeechModality(encoder=encoders["whisper"], layer=-2)
    (raw,) = voices(1.0)
    mel = modality.prepare(raw).inputs["input_features"]
    with torch.no_grad():
        states = whisper.encoder(mel, output_hidden_states=True).hidden_states
    (ours,) = features(modality, modality.build_encoder(), raw)
    torch.testing.assert_close(ours, states[-2][0])
    assert not torch.allclose(ours, states[-1][0], atol=1e-2)


def test_the_start_token_of_each_chunk_is_what_whispers_decoder_makes_of_it(
    encoders: dict[str, str],
) -> None:
    from transformers import WhisperModel

    whisper = WhisperModel.from_pretrained(encoders["whisper"]).eval()
    modality = SpeechModality(encoder=encoders["whisper"], features="start")
    (raw,) = voices(2.2)
    mel = modality.prepare(raw).inputs["input_features"]
    start = torch.full((3, 1), whisper.config.decoder_start_token_id)
    with torch.no_grad():
        theirs = whisper(mel, decoder_input_ids=start).last_hidden_state[:, 0]
    (ours,) = features(modality, modality.build_encoder(), raw)
    torch.testing.assert_close(ours, theirs)


def test_the_decoder_is_kept_for_the_start_token_only(encoders: dict[str, str]) -> None:
    frames, start = (
        SpeechModality(encoder=encoders["whisper"], features=f).build_encoder()  # type: ignore
        for f in ("frames", "start")
    )
    assert not any("decoder" in name for name, _ in frames.named_modules())
    assert len(frames.layers()) == 3
    # the last layers to learn are those that are used last
    assert [type(layer).__name__ for layer in start.layers()] == [
        *["WhisperEncoderLayer"] * 3,
        *["WhisperDecoderLayer"] * 2,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_ten_minutes_are_read_in_chunks_in_order(encoders: dict[str, str], kind: str) -> None:
    modality = SpeechModality(
        encoder=encoders[kind], chunk_seconds=None if kind == "whisper" else 20
    )
    encoder = modality.build_encoder()
    (raw,) = voices(600)
    prepared = modality.prepare(raw)
    chunk = prepared.inputs["part"]
    assert int(chunk[-1]) + 1 == (600 if kind == "whisper" else 30)
    assert bool((chunk.diff() >= 0).all())
    (values,) = features(modality, encoder, raw)
    assert len(values) == prepared.num_features == (30_000 if kind == "whisper" else 30 * 999)
    # the last chunk alone gives the end of the whole
    piece = raw[-RATE:] if kind == "whisper" else raw[-20 * RATE :]
    (last,) = features(modality, encoder, piece)
    torch.testing.assert_close(values[-len(last) :], last, rtol=1e-4, atol=1e-4)


def test_waveforms_are_cut_evenly_so_that_no_rest_is_left(encoders: dict[str, str]) -> None:
    modality = SpeechModality(encoder=encoders["hubert"], chunk_seconds=1)
    (raw,) = voices(2.001)
    assert modality.prepare(raw).inputs["num_samples"].tolist() == [10672, 10672, 10672]


def test_eight_frames_become_a_token_and_padding_none(encoders: dict[str, str]) -> None:
    modality = SpeechModality(encoder=encoders["whisper"])
    assert modality.projector.type == "stack"
    encoder = modality.build_encoder()
    projector = modality.projector.build(encoder.dim, 24)
    items = [modality.prepare(raw) for raw in voices(0.3, 1.5, 0.05)]
    assert [modality.num_tokens(item.num_features) for item in items] == [2, 10, 1]
    with torch.no_grad():
        together = projector(encoder(**modality.collate(items)))
        alone = [projector(encoder(**modality.collate([item]))) for item in items]
    assert together.shape == (13, 24)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_mean_is_of_the_real_frames(encoders: dict[str, str]) -> None:
    frames, mean = (
        SpeechModality(encoder=encoders["whisper"], features=f)  # type: ignore
        for f in ("frames", "mean")
    )
    raw = voices(0.3, 1.7)
    every = features(frames, frames.build_encoder(), *raw)
    averaged = features(mean, mean.build_encoder(), *raw)
    for values, one in zip(every, averaged, strict=True):
        torch.testing.assert_close(one[0], values.mean(0), rtol=1e-4, atol=1e-5)


def test_files_bytes_and_arrays_are_read_at_the_encoders_rate(
    encoders: dict[str, str], tmp_path: Path
) -> None:
    modality = SpeechModality(encoder=encoders["whisper"])
    path = write_tone(tmp_path / "a.wav", 0.5, RATE, subtype="FLOAT")
    array = {"array": tone(0.5, RATE), "sampling_rate": RATE}
    loaded = [modality.load(s, Fetch()) for s in (path, Path(path).read_bytes(), array)]
    assert np.array_equal(loaded[0], loaded[1]) and np.array_equal(loaded[0], loaded[2])
    stereo = write_tone(tmp_path / "b.flac", 0.5, 44_100, num_channels=2, format="FLAC")
    part = modality.load({"path": stereo, "start": 0.1, "end": 0.3}, Fetch())
    assert len(modality.load(stereo, Fetch())) == RATE // 2 and len(part) == RATE // 5


def test_limits_are_fields_and_silence_is_refused_unless_wanted(encoders: dict[str, str]) -> None:
    array = {"array": np.zeros(RATE, np.float32), "sampling_rate": RATE}
    with pytest.raises(MediaError, match="is silence .1.00 s"):
        SpeechModality(encoder=encoders["whisper"]).load(array, Fetch())
    modality = SpeechModality(encoder=encoders["whisper"], allow_silence=True)
    assert modality.prepare(modality.load(array, Fetch())).num_features == 50
    short = SpeechModality(encoder=encoders["whisper"], max_seconds=0.5)
    with pytest.raises(MediaError, match="1.0 s long, and the limit is 0.5 s"):
        short.load({"array": tone(1.0), "sampling_rate": RATE}, Fetch())


def test_less_than_one_frame_is_refused(encoders: dict[str, str]) -> None:
    modality = SpeechModality(encoder=encoders["wavlm"])
    assert modality.prepare(voices(0.03)[0]).num_features == 1
    with pytest.raises(MediaError, match="160 samples long .*less than one frame"):
        modality.prepare(voices(0.01)[0])


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("whisper", {"chunk_seconds": 5}, "has windows of 1 s of its own"),
        ("hubert", {"features": "start"}, "is an encoder alone"),
        ("clap", {}, "has a ClapFeatureExtractor; `speech` takes encoders of mel windows"),
        ("whisper", {"layer": 7}, "has hidden states 0 to 3 .* asks for layer 7"),
        ("wav2vec2", {"layer": -9}, "has hidden states 0 to 3 .* asks for layer -9"),
    ],
)
def test_a_setting_that_does_not_fit_the_encoder_is_refused(
    encoders: dict[str, str], tmp_path: Path, kind: str, fields: Any, message: str
) -> None:
    encoder = tiny_clap(tmp_path / "clap") if kind == "clap" else encoders[kind]
    modality = SpeechModality(encoder=encoder, **fields)
    with pytest.raises(MultiTokenError, match=message):
        modality.prepare(voices(0.3)[0])
        modality.build_encoder()


def test_an_adapter_that_joins_frames_is_counted_and_refused_below_it(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    folder = tiny_wav2vec2(tmp_path / "plain")
    config = Wav2Vec2Config.from_pretrained(folder, add_adapter=True, num_adapter_layers=1)
    Wav2Vec2Model(config).save_pretrained(tmp_path / "adapter")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "adapter")
    modality = SpeechModality(encoder=str(tmp_path / "adapter"))
    (raw,) = voices(0.5)
    (values,) = features(modality, modality.build_encoder(), raw)
    assert len(values) == modality.prepare(raw).num_features == 12
    with pytest.raises(RecipeError, match="makes 49 frames of a second at layer 1 where"):
        SpeechModality(encoder=str(tmp_path / "adapter"), layer=1).build_encoder()


def test_a_layer_of_the_encoder_has_no_start_token() -> None:
    with pytest.raises(ValueError, match="`layer` is a layer of the encoder"):
        SpeechModality(encoder="any/whisper", features="start", layer=-2)


def test_constructing_and_pickling_load_nothing(tmp_path: Path) -> None:
    modality = SpeechModality(encoder=str(tmp_path / "not there yet"), features="mean", layer=-2)
    assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301
    assert SpeechModality.model_validate(modality.model_dump(mode="json")) == modality


def test_the_example_reads_its_own_sources(tmp_path: Path) -> None:
    fields, sources = speech_example(tmp_path)
    modality = SpeechModality.model_validate(fields)
    lengths = [modality.prepare(modality.load(s, Fetch())).num_features for s in sources]
    assert lengths == [20, 125]
