"""convert/original.py: a checkpoint of the original gives the original's numbers here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multi_token.convert.original import import_original
from multi_token.convert.original_builders import BUILDERS
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration

REFERENCE = Path(__file__).resolve().parent.parent / "reference" / "original"
GOLDEN = json.loads((REFERENCE / "golden.json").read_text(encoding="utf-8"))
BASE, CLIP = str(REFERENCE / "base_model"), str(REFERENCE / "clip")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "run"
    import_original(REFERENCE / "checkpoint", out, language_model=BASE, encoder=CLIP)
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    return MultiTokenForConditionalGeneration.from_pretrained(run)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the original's checkpoint, to be changed."""
    return Path(shutil.copytree(REFERENCE / "checkpoint", tmp_path / "source"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def media(model: Any, row: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The row's images at the negative ids, as the original put them there."""
    modality, fetch = model.modalities["image"], Fetch(root=str(REFERENCE))
    items = [modality.prepare(modality.load(path, fetch)) for path in row["images"]]
    positions = (ids.flatten() < 0).nonzero().flatten()
    return {"image": {"inputs": modality.collate(items), "positions": positions}}


@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_logits_and_greedy_ids_equal_the_original_s(model: Any, index: int) -> None:
    golden = GOLDEN[index]
    ids = torch.tensor(golden["input_ids"])[None]
    with torch.no_grad():
        embeds = model.embed(ids.clamp(min=0), media(model, golden["item"], ids))
        logits = model.language_model(inputs_embeds=embeds).logits[0, -1]
        generated = model.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    expected = load_file(REFERENCE / "golden.safetensors")[f"logits_{index}"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert generated[0].tolist() == golden["generated"]


def test_rows_of_the_original_are_asked_as_they_are(model: Any) -> None:
    row = GOLDEN[0]["item"]
    (answer,) = model.generate([row], root=str(REFERENCE), max_new_tokens=6)
    assert answer == "blue"


def test_an_imported_run_holds_safetensors_and_names_its_frozen_parts(
    run: Path, model: Any
) -> None:
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == {
        "config.json",
        "projectors.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert model.config.model["language_model"] == BASE
    assert model.config.model["modalities"]["image"]["encoder"] == CLIP
    assert torch.equal(model.projector("image").feature_mean, torch.zeros(48))
    assert torch.equal(model.projector("image").feature_scale, torch.ones(48))


def test_the_pooling_builder_becomes_ten_tokens_in_the_original_s_order(
    folder: Path, tmp_path: Path
) -> None:
    edit_config(folder, modality_builder="vision_clip_pool")
    torch.manual_seed(3)
    mlps = [nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(10)]
    tensors = {
        f"base_model.model.model.vision_clip_lmm_projector.mlps.{i}.{key}": value
        for i, mlp in enumerate(mlps)
        for key, value in mlp.state_dict().items()
    }
    torch.save(tensors, folder / "non_lora_trainables.bin")
    import_original(folder, tmp_path / "run", language_model=BASE, encoder=CLIP)
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    ids = torch.full((1, 10), -1)
    inputs = media(model, {"images": ["images/0.png"]}, ids)["image"]["inputs"]
    with torch.no_grad():
        pooled = model.encoders["image"].tower(**inputs).pooler_output.view(-1, 1, 48)
        # as the original joined them: one [items, 1, width] after the other, along the tokens
        expected = torch.cat([mlp(pooled) for mlp in mlps], dim=-2)[0]
        tokens = model.projectors["image"](model.encode("image", inputs))
    torch.testing.assert_close(tokens, expected)


def test_a_projector_that_was_trained_alone_needs_no_adapter(folder: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.bin"):
        (folder / name).unlink()
    edit_config(folder, _name_or_path=BASE)
    tensors = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save(
        {key.removeprefix("base_model.model."): value for key, value in tensors.items()},
        folder / "non_lora_trainables.bin",
    )
    import_original(folder, tmp_path / "run", encoder=CLIP)
    run = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    weight = tensors["base_model.model.model.vision_clip_lmm_projector.2.weight"]
    assert torch.equal(run.projector("image").network[2].weight, weight)


def test_a_language_model_that_was_trained_whole_lies_inside_the_run(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.bin"):
        (folder / name).unlink()
    trained = {key: value + 0.01 for key, value in load_file(f"{BASE}/model.safetensors").items()}
    edit_tensors(folder / "non_lora_trainables.bin", lambda tensors: tensors.update(trained))
    import_original(folder, tmp_path / "run", language_model=BASE, encoder=CLIP)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    model = MultiTokenForConditionalGeneration.from_pretrained(moved)
    assert model.config.model["language_model"] == str(moved / "language_model")
    found = model.language_model.state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[key], trained[key]) for key in trained)


def test_safetensors_of_a_newer_peft_are_read_too(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapter = folder / "adapter_model.bin"
    save_file(torch.load(adapter, weights_only=True), folder / "adapter_model.safetensors")
    adapter.unlink()
    import_original(folder, tmp_path / "run", language_model=BASE, encoder=CLIP)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["adapter"]


def test_the_table_holds_the_original_s_builders() -> None:
    assert set(BUILDERS) == {
        *("vision_clip", "vision_clip_pool", "audio_whisper", "audio_clap", "video_xclip"),
        *("imagebind", "document_gte", "document_gte_x16"),
    }
    assert [name for name, builder in BUILDERS.items() if builder.fields is None] == ["imagebind"]
