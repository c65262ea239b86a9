"""modalities/sound.py: CLAP's own features, the same every time and in every batch."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.modalities.sound import SoundModality
from multi_token.testing.encoders import tiny_clap, tiny_whisper
from multi_token.testing.examples import sound_example
from multi_token.testing.files import tone

RATE = 48_000


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "unfused": tiny_clap(folder / "unfused"),
        "fused": tiny_clap(folder / "fused", fused=True),
        "whisper": tiny_whisper(folder / "whisper"),
    }


def sounds(*seconds: float) -> list[np.ndarray]:
    """Tones under noise that grows, so that no two windows of them are alike."""
    chance = np.random.default_rng(0)
    lengths = [round(s * RATE) for s in seconds]
    noise = [np.linspace(0, 0.3, n) * chance.standard_normal(n) for n in lengths]
    return [
        (tone(n / RATE, RATE, hertz=300 + 150 * i) + x).astype(np.float32)
        for i, (n, x) in enumerate(zip(lengths, noise, strict=True))
    ]


def features(modality: Any, encoder: Any, *raw: np.ndarray) -> list[torch.Tensor]:
    """The real features [length, dim] of each sound, all of them in one batch."""
    with torch.no_grad():
        output = encoder(**modality.collate([modality.prepare(r) for r in raw]))
    return [values[mask] for values, mask in zip(output.values, output.mask, strict=True)]


def clap(folder: str) -> Any:
    from transformers import ClapModel

    return ClapModel.from_pretrained(folder).eval()


def embedding(model: Any, spectrograms: Any, *, is_longer: bool) -> torch.Tensor:
    with torch.no_grad():
        output = model.get_audio_features(
            input_features=spectrograms.float(),
            is_longer=torch.full((len(spectrograms), 1), is_longer),
        )
    return output.pooler_output


def spectrograms(folder: str, raw: np.ndarray) -> Any:
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    return extractor(raw, sampling_rate=RATE, return_tensors="pt")["input_features"]


CASES = [
    ("unfused", "pooled", "windows"),
    ("unfused", "frames", "windows"),
    ("fused", "pooled", "windows"),
    ("fused", "frames", "windows"),
    ("fused", "pooled", "fusion"),
    ("fused", "frames", "fusion"),
]


@pytest.mark.parametrize(("kind", "taken", "long_audio"), CASES)
def test_a_batch_equals_one_by_one_and_has_the_promised_number_of_features(
    encoders: dict[str, str], kind: str, taken: Any, long_audio: Any
) -> None:
    modality = SoundModality(
        encoder=encoders[kind], features=taken, long_audio=long_audio, micro_batch=2
    )
    encoder = modality.build_encoder()
    raw = sounds(0.3, 2.6, 1.0, 0.7)
    together = features(modality, encoder, *raw)
    for sound, values in zip(raw, together, strict=True):
        assert values.shape == (modality.prepare(sound).num_features, encoder.dim)
        torch.testing.assert_close(
            values, features(modality, encoder, sound)[0], rtol=1e-4, atol=1e-5
        )
    windows = [1, 3 if long_audio == "windows" else 1, 1, 1]
    each = 64 if taken == "frames" else 1
    assert [len(values) for values in together] == [each * n for n in windows]
    assert not torch.allclose(together[0][0], together[3][0], atol=1e-3)


def test_pooled_is_the_embedding_that_clap_gives_a_window(encoders: dict[str, str]) -> None:
    modality = SoundModality(encoder=encoders["unfused"])
    short, long = sounds(0.4, 2.0)
    model = clap(encoders["unfused"])
    pieces = [spectrograms(encoders["unfused"], p) for p in (short, long[:RATE], long[RATE:])]
    ours = features(modality, modality.build_encoder(), short, long)
    theirs = embedding(model, torch.cat(pieces), is_longer=False)
    torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("long_audio", ["windows", "fusion"])
def test_a_fused_window_is_longer_only_if_the_recipe_says_fusion(
    encoders: dict[str, str], long_audio: Any
) -> None:
    # what transformers' own extractor says of a sound that comes alone is always True
    modality = SoundModality(encoder=encoders["fused"], long_audio=long_audio)
    (short,) = sounds(0.4)
    model, own = clap(encoders["fused"]), spectrograms(encoders["fused"], short)
    (ours,) = features(modality, modality.build_encoder(), short)
    both = [embedding(model, own, is_longer=longer) for longer in (False, True)]
    right = both[long_audio == "fusion"]
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


@pytest.mark.parametrize("extra", [1, 480, 960])
def test_fusion_is_clap_s_own_where_chance_has_no_choice(
    encoders: dict[str, str], extra: int
) -> None:
    # so little longer than a window that each third holds one place for a crop
    modality = SoundModality(encoder=encoders["fused"], long_audio="fusion")
    raw = sounds((RATE + extra) / RATE)[0]
    theirs = spectrograms(encoders["fused"], raw)[0].float()
    ours = modality.prepare(raw).inputs["input_features"][0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fusion_takes_the_middle_of_each_third_every_time(encoders: dict[str, str]) -> None:
    modality = SoundModality(encoder=encoders["fused"], long_audio="fusion")
    (raw,) = sounds(3.0)
    first, again = (modality.prepare(raw).inputs["input_features"][0] for _ in range(2))
    assert first.shape == (4, 101, 64) and torch.equal(first, again)
    # 301 steps, so 201 places for a crop of 101: the thirds begin at 0, 67 and 134
    for crop, start in zip(first[1:], (33, 100, 167), strict=True):
        # away from the ends the spectrum of a crop is that of the same samples alone
        alone = spectrograms(encoders["fused"], raw[start * 480 : start * 480 + RATE])[0, 0]
        torch.testing.assert_close(crop[2:-2], alone[2:-2].float(), rtol=1e-4, atol=1e-3)


def test_frames_are_the_last_hidden_state_in_order_of_time(encoders: dict[str, str]) -> None:
    modality = SoundModality(encoder=encoders["unfused"], features="frames")
    (raw,) = sounds(1.0)
    model = clap(encoders["unfused"])
    with torch.no_grad():
        own = spectrograms(encoders["unfused"], raw).float()
        state = model.audio_model(input_features=own).last_hidden_state[0]  # [dim, bands, time]
    (ours,) = features(modality, modality.build_encoder(), raw)
    torch.testing.assert_close(ours[4 * 5 + 1], state[:, 1, 5], rtol=1e-4, atol=1e-5)
    assert ours.shape == (64, 32) == (state[0].numel(), len(state))


def test_layers_are_the_blocks_of_all_stages_in_order(encoders: dict[str, str]) -> None:
    encoder = SoundModality(encoder=encoders["unfused"]).build_encoder()
    stages = encoder.tower.audio_encoder.layers  # type: ignore
    assert list(encoder.layers()) == [stages[0].blocks[0], *stages[1].blocks]
    assert not any("text" in name for name, _ in encoder.named_modules())


def test_a_minute_is_sixty_windows_in_order(encoders: dict[str, str]) -> None:
    modality = SoundModality(encoder=encoders["unfused"])
    (raw,) = sounds(60)
    (values,) = features(modality, modality.build_encoder(), raw)
    assert len(values) == 60
    (last,) = features(modality, modality.build_encoder(), raw[-RATE:])
    torch.testing.assert_close(values[-1:], last, rtol=1e-4, atol=1e-4)


def test_stacked_and_expanded_tokens_of_a_batch_are_those_of_each(
    encoders: dict[str, str],
) -> None:
    for taken, projector in (("frames", "stack"), ("pooled", "expand")):
        modality = SoundModality.model_validate(
            {
                "encoder": encoders["fused"],
                "features": taken,
                "projector": {"type": projector, "factor": 4},
            }
        )
        encoder = modality.build_encoder()
        module = modality.projector.build(encoder.dim, 24)
        items = [modality.prepare(raw) for raw in sounds(0.3, 1.5)]
        with torch.no_grad():
            together = module(encoder(**modality.collate(items)))
            alone = [module(encoder(**modality.collate([item]))) for item in items]
        assert len(together) == sum(modality.num_tokens(item.num_features) for item in items)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_silence_and_length_are_refused_in_a_sentence(encoders: dict[str, str]) -> None:
    silence = {"array": np.zeros(8_000, np.float32), "sampling_rate": 8_000}
    with pytest.raises(MediaError, match="is silence"):
        SoundModality(encoder=encoders["fused"]).load(silence, Fetch())
    modality = SoundModality(encoder=encoders["fused"], allow_silence=True, max_seconds=2)
    assert modality.prepare(modality.load(silence, Fetch())).num_features == 1
    with pytest.raises(MediaError, match="the limit is 2 s"):
        modality.load({"array": tone(2.5, 8_000), "sampling_rate": 8_000}, Fetch())


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("unfused", {"long_audio": "fusion"}, "needs a fused CLAP"),
        ("whisper", {}, "has a WhisperFeatureExtractor; `sound` takes a CLAP"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    encoders: dict[str, str], kind: str, fields: Any, message: str
) -> None:
    modality = SoundModality(encoder=encoders[kind], **fields)
    with pytest.raises(MultiTokenError, match=message):
        modality.prepare(sounds(0.3)[0])


def test_a_model_without_an_audio_half_is_refused(encoders: dict[str, str]) -> None:
    with pytest.raises(MultiTokenError, match="is a WhisperModel; `sound` takes a CLAP"):
        SoundModality(encoder=encoders["whisper"]).build_encoder()


def test_constructing_and_pickling_load_nothing(tmp_path: Path) -> None:
    modality = SoundModality(encoder=str(tmp_path / "not there yet"), features="frames")
    assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301
    assert SoundModality.model_validate(modality.model_dump(mode="json")) == modality


def test_the_example_reads_its_own_sources(tmp_path: Path) -> None:
    fields, sources = sound_example(tmp_path)
    modality = SoundModality.model_validate(fields)
    lengths = [modality.prepare(modality.load(s, Fetch())).num_features for s in sources]
    assert lengths == [1, 3]
