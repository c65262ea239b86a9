"""convert/original.py: what cannot be mapped is named in a sentence, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.convert.original import import_original
from multi_token.errors import MultiTokenError

REFERENCE = Path(__file__).resolve().parent.parent / "reference" / "original"
BASE, CLIP = str(REFERENCE / "base_model"), str(REFERENCE / "clip")
PROJECTOR = "base_model.model.model.vision_clip_lmm_projector"
TEMPLATE = "{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE / "checkpoint", tmp_path / "source"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(folder: Path, sentence: str, **options: Any) -> None:
    """The import fails with this sentence and leaves neither a run nor a part of one."""
    out = folder.parent / "run"
    options = {"language_model": BASE, "encoder": CLIP, **options}
    with pytest.raises(MultiTokenError, match=sentence):
        import_original(folder, out, **options)
    assert [path.name for path in folder.parent.iterdir() if path != folder] == []


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    if path.suffix == ".json":
        fields = json.loads(path.read_text())
        edit(fields)
        path.write_text(json.dumps(fields))
    else:
        tensors = torch.load(path, weights_only=True)
        edit(tensors)
        torch.save(tensors, path)


def test_imagebind_is_refused_with_the_reason(folder: Path) -> None:
    change(folder / "config.json", lambda c: c.update(modality_builder="imagebind"))
    refused(folder, "builder imagebind, .*neither part of transformers.*CC BY-NC-SA")


def test_an_unknown_builder_is_named_with_the_nearest_known(folder: Path) -> None:
    change(folder / "config.json", lambda c: c.update(modality_builder="vision_clipp"))
    refused(folder, "builder 'vision_clipp': did you mean 'vision_clip'")


def test_missing_unknown_and_misshapen_tensors_are_named_as_they_are_there(folder: Path) -> None:
    path = folder / "non_lora_trainables.bin"
    plain = PROJECTOR.removeprefix("base_model.model.")
    change(path, lambda tensors: tensors.pop(f"{PROJECTOR}.2.bias"))
    refused(folder, f"lacks {plain}.2.bias")
    change(path, lambda tensors: tensors.update({f"{PROJECTOR}.2.bias": torch.zeros(3)}))
    refused(folder, rf"{plain}.2.bias is \(3,\) instead of \(64,\)")
    change(path, lambda tensors: tensors.update({f"{PROJECTOR}.2.bias": torch.zeros(64)}))
    other = "base_model.model.model.audio_clap_lmm_projector.mlps.0.0.bias"
    change(path, lambda tensors: tensors.update({other: torch.zeros(64)}))
    refused(folder, "has unknown model.audio_clap_lmm_projector.mlps.0.0.bias")


def test_a_layer_beside_the_adapter_that_fits_nowhere_is_named(folder: Path) -> None:
    stray = "base_model.model.model.layers.0.input_layernorm.weight"
    change(folder / "non_lora_trainables.bin", lambda t: t.update({stray: torch.ones(64)}))
    refused(folder, "lacks .*model.layers.1.input_layernorm.weight")


def test_a_tensor_of_the_adapter_that_fits_nowhere_is_named(folder: Path) -> None:
    stray = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    change(folder / "adapter_model.bin", lambda tensors: tensors.update({stray: torch.ones(8, 64)}))
    refused(folder, f"has unknown {stray}")


def test_a_checkpoint_without_projector_or_adapter_weights_is_half_written(folder: Path) -> None:
    (folder / "adapter_model.bin").unlink()
    refused(folder, "has adapter_config.json, and neither")
    shutil.copy(REFERENCE / "checkpoint" / "adapter_model.bin", folder)
    (folder / "non_lora_trainables.bin").unlink()
    refused(folder, "holds no tensor of vision_clip_lmm_projector")


def test_a_base_model_that_is_not_in_reach_is_asked_for(folder: Path) -> None:
    refused(
        folder, "trained on 'base', which cannot be loaded.*--language-model", language_model=None
    )
    refused(folder, "loaded from 'no/where'", language_model="no/where")
    change(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=None))
    refused(folder, "names no base model; .*--language-model", language_model=None)


def test_an_encoder_that_is_not_in_reach_is_asked_for(folder: Path) -> None:
    refused(folder, "openai/clip-vit-large-patch14-336, .*--encoder", encoder=None)


def test_another_base_model_than_the_checkpoint_s_is_refused(folder: Path, parts: Path) -> None:
    refused(
        folder,
        "another language model .* hidden_size 32 instead of 64",
        language_model=str(parts / "language_model"),
    )


class _Code:
    """A pickle of this object would run a command when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(
    folder: Path, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mark = tmp_path_factory.mktemp("code") / "ran"
    change(folder / name, lambda tensors: tensors.update(code=_Code(mark)))
    refused(folder, f"{name} is refused, and nothing in it was run: .*system")
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)  # it would have, given the chance
    assert mark.exists()


def test_a_pickle_that_was_cut_off_or_holds_no_tensors_is_refused(folder: Path) -> None:
    path = folder / "non_lora_trainables.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot be read, it may be cut off")
    torch.save([1, 2], path)
    refused(folder, "no mapping of names to tensors")


def test_missing_packages_for_a_slow_tokenizer_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refused(folder, r"needs sentencepiece: pip install 'multi_token\[convert\]'")


def test_a_template_that_cannot_be_masked_is_refused_until_another_is_given(
    folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    change(base / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    (folder.parent / "elsewhere").mkdir()
    source = folder.rename(folder.parent / "elsewhere" / "source")
    refused(source, "chat template cannot be used: .*--chat-template", language_model=str(base))
    good = json.loads(Path(BASE, "tokenizer_config.json").read_text())["chat_template"]
    template = tmp_path / "template.jinja"
    template.write_text(good)
    out = source.parent / "run"
    import_original(
        source, out, language_model=str(base), encoder=CLIP, chat_template=str(template)
    )
    assert json.loads((out / "config.json").read_text())["model"]["chat_template"] == good
