"""cli/convert.py: the files of a source decide its format; any other source is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from multi_token.checkpoint.load import read_config
from multi_token.cli.convert import import_source
from multi_token.errors import MultiTokenError

REFERENCE = Path(__file__).resolve().parent.parent / "reference" / "original"
BASE, CLIP = str(REFERENCE / "base_model"), str(REFERENCE / "clip")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_folder_s_name_says_nothing(tmp_path: Path) -> None:
    source = shutil.copytree(REFERENCE / "checkpoint", tmp_path / "llava-v1.5-mm_projector")
    import_source(source, tmp_path / "run", language_model=BASE, encoder=CLIP)
    assert read_config(tmp_path / "run")["model"]["modalities"]["image"]["features"] == "patches"


def test_a_hub_name_is_fetched_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # laid out as the hub's cache keeps what was fetched before
    repository = tmp_path / "models--ada--checkpoint"
    shutil.copytree(REFERENCE / "checkpoint", repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    out = tmp_path / "run"
    import_source("ada/checkpoint", out, revision="v1", language_model=BASE, encoder=CLIP)
    assert read_config(out)["adapter"]
    with pytest.raises(MultiTokenError, match="no folder ada/checkpoint here, .* revision v2"):
        import_source("ada/checkpoint", tmp_path / "other", revision="v2")


def test_an_unknown_format_is_refused_with_what_was_found_and_expected(
    parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(MultiTokenError, match="holds .*model.safetensors.* is of type 'llama'"):
        import_source(parts / "language_model", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MultiTokenError, match="holds nothing; expected one of"):
        import_source(tmp_path / "empty", out)
    with pytest.raises(MultiTokenError, match="there is no folder"):
        import_source(tmp_path / "nowhere", out)
    with pytest.raises(MultiTokenError, match="no folder none/nothing here, and the hub's"):
        import_source("none/nothing", out)
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(MultiTokenError, match="config.json is not JSON"):
        import_source(tmp_path / "empty", out)
    assert not out.exists()


def test_llava_s_own_folders_go_to_their_importer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "lab/eye"}')
    with pytest.raises(MultiTokenError, match="LLaVA's own, but holds neither mm_projector.bin"):
        import_source(source, tmp_path / "run")
    (source / "config.json").unlink()
    (source / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(MultiTokenError, match="is not LLaVA: expected a config.json"):
        import_source(source, tmp_path / "run")
    with pytest.raises(MultiTokenError, match="--chat-template is for folders of sshh12"):
        import_source(source, tmp_path / "run", chat_template="{{ messages }}")


def test_a_run_of_ours_needs_no_import_and_a_full_folder_is_no_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_source(REFERENCE / "checkpoint", run, language_model=BASE, encoder=CLIP)
    with pytest.raises(MultiTokenError, match="is a run of multi_token already"):
        import_source(run, tmp_path / "other")
    before = read_config(run)
    with pytest.raises(MultiTokenError, match="not empty; choose another --out"):
        import_source(REFERENCE / "checkpoint", run, language_model=BASE, encoder=CLIP)
    assert read_config(run) == before
