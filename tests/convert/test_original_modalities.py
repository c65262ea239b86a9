"""convert/original.py: builders of speech, sound, video and documents equal the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multi_token.convert.original import import_original
from multi_token.convert.original_builders import BUILDERS
from multi_token.data.formats import to_conversation
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.registry import resolve
from multi_token.testing.encoders import (
    tiny_clap,
    tiny_sentence_encoder,
    tiny_video_encoder,
    tiny_whisper,
)
from multi_token.testing.files import noise_frames, tone, write_tone, write_video

REFERENCE = Path(__file__).resolve().parent.parent / "reference" / "original"
WIDTH = 64
"""Hidden size of the reference's language model."""

Feature = Callable[[str, Any], Tensor]


def speech(encoder: str, item: Any) -> Tensor:
    from transformers import AutoFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(encoder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(encoder)
    audio = extractor(item["array"], return_tensors="pt", sampling_rate=item["sampling_rate"])
    start = torch.tensor([[1]]) * model.config.decoder_start_token_id
    return model(audio.input_features, decoder_input_ids=start).last_hidden_state.view(-1, 1, 32)


def sound(encoder: str, item: Any) -> Tensor:
    from transformers import ClapFeatureExtractor, ClapModel

    model = ClapModel.from_pretrained(encoder).eval()
    extractor = ClapFeatureExtractor.from_pretrained(encoder)
    audio = extractor(item["array"], return_tensors="pt", sampling_rate=item["sampling_rate"])
    features: Any = model.get_audio_features(
        input_features=audio["input_features"].float(), is_longer=audio["is_longer"]
    )
    return features.pooler_output[:, None]


def video(encoder: str, item: Any) -> Tensor:
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    model = AutoModel.from_pretrained(encoder).eval()
    pixels = AutoImageProcessor.from_pretrained(encoder)(
        list(item), return_tensors="pt"
    ).pixel_values
    text = {"input_ids": torch.tensor([[0, 5, 1]]), "attention_mask": torch.ones(1, 3).long()}
    return model(pixel_values=pixels.reshape(1, 8, 3, 32, 32), **text).video_embeds[:, None]


def document(encoder: str, item: Any) -> Tensor:
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(encoder)(
        [item], max_length=512, padding=True, truncation=True, return_tensors="pt"
    )
    mask = tokens["attention_mask"]
    hidden = AutoModel.from_pretrained(encoder).eval()(**tokens).last_hidden_state
    hidden = hidden.masked_fill(~mask[..., None].bool(), 0.0)
    return (hidden.sum(dim=1) / mask.sum(dim=1)[..., None])[:, None]


def audio_item(seconds: float, rate: int) -> dict[str, Any]:
    return {"array": tone(seconds, rate), "sampling_rate": rate}


def cases(folder: Path) -> dict[str, tuple[str, Any, Feature]]:
    """Builder -> encoder, an item and the original's feature of it."""
    text = "The crate is blue. It is in the second hall, beside the green door."
    sentence = tiny_sentence_encoder(folder / "sentences", max_tokens=512)
    clap = tiny_clap(folder / "clap", fused=True)
    rate = json.loads((Path(clap) / "preprocessor_config.json").read_text())["sampling_rate"]
    return {
        "audio_whisper": (tiny_whisper(folder / "whisper"), audio_item(0.7, 16_000), speech),
        "audio_clap": (clap, audio_item(0.6, rate), sound),
        "video_xclip": (tiny_video_encoder(folder / "xclip", "xclip"), noise_frames(8), video),
        "document_gte": (sentence, text, document),
        "document_gte_x16": (sentence, text, document),
    }


NAMES = ["audio_whisper", "audio_clap", "video_xclip", "document_gte", "document_gte_x16"]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any, Feature]]:
    return cases(tmp_path_factory.mktemp("encoders"))


def checkpoint(folder: Path, name: str, mlps: list[nn.Sequential]) -> Path:
    """The reference's checkpoint with another builder and the projector of that builder."""
    source = Path(shutil.copytree(REFERENCE / "checkpoint", folder / "source"))
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "modality_builder": name}))
    tensors = {
        f"base_model.model.model.{BUILDERS[name].modality}_lmm_projector.mlps.{i}.{key}": value
        for i, mlp in enumerate(mlps)
        for key, value in mlp.state_dict().items()
    }
    torch.save(tensors, source / "non_lora_trainables.bin")
    return source


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_builder_makes_the_original_s_tokens_of_an_item(
    known: dict[str, tuple[str, Any, Feature]], tmp_path: Path, name: str
) -> None:
    encoder, item, feature = known[name]
    with torch.no_grad():
        value = feature(encoder, item)
    torch.manual_seed(5)
    width = value.shape[-1]
    mlps = [
        nn.Sequential(nn.Linear(width, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        for _ in range(BUILDERS[name].num_tokens)
    ]
    source = checkpoint(tmp_path, name, mlps)
    base = str(REFERENCE / "base_model")
    import_original(source, tmp_path / "run", language_model=base, encoder=encoder)
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    slot = BUILDERS[name].name
    modality = model.modalities[slot]
    inputs = modality.collate([modality.prepare(modality.load(item, Fetch()))])
    with torch.no_grad():
        expected = torch.cat([mlp(value) for mlp in mlps], dim=-2)[0]
        tokens = model.projectors[slot](model.encode(slot, inputs))
    assert tokens.shape == (BUILDERS[name].num_tokens, WIDTH)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_original_are_read_as_they_are(
    known: dict[str, tuple[str, Any, Feature]], tmp_path: Path, name: str
) -> None:
    builder = BUILDERS[name]
    modality = resolve("modality", builder.modality_type)(
        encoder=known[name][0], projector=builder.projector_fields, **(builder.fields or {})
    )
    write_tone(tmp_path / "tone.wav", 0.5, 16_000)
    write_video(tmp_path / "clip.mp4", noise_frames(10))
    given = {
        "speech": {"path": "tone.wav"},  # one of the ways in which the original names audio
        "sound": "tone.wav",
        "video": "clip.mp4",
        "document": "A text of the row's own.",
    }[builder.name]
    row = {
        builder.rows_key: [given],
        "messages": [{"role": "user", "content": f"What is <{builder.name}>?"}],
    }
    (media,) = to_conversation(row, [builder.name], row_id="0").media
    prepared = modality.prepare(modality.load(media.source, Fetch(root=str(tmp_path))))
    assert modality.num_tokens(prepared.num_features) == builder.num_tokens
