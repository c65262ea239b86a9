"""`multi-token import`, `export` and `push`: what is typed is done, and a fault is a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from multi_token.checkpoint.load import read_config
from multi_token.cli import app
from multi_token.errors import MultiTokenError
from multi_token.model import MultiTokenForConditionalGeneration

REFERENCE = Path(__file__).resolve().parent.parent / "reference" / "original"
PARTS = ("--language-model", REFERENCE / "base_model", "--encoder", REFERENCE / "clip")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def typed(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})


def test_from_the_original_s_folder_to_a_repository(tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    done = typed("import", REFERENCE / "checkpoint", "--out", run, *PARTS)
    assert done.exit_code == 0, done.output
    assert "<image>; projectors and an adapter" in done.output
    assert read_config(run)["adapter"]
    asked = typed("ask", run, "What color?", "--image", REFERENCE / "images/0.png", "--device=cpu")
    assert asked.exit_code == 0 and asked.output.strip()

    done = typed("export", run, "--to", "merged", "--out", merged)
    assert done.exit_code == 0, done.output
    assert "merged, 1." in done.output and "MB" in done.output
    assert MultiTokenForConditionalGeneration.from_pretrained(merged).config.base_model is None

    done = typed("push", merged, "ada/seer", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "kB  projectors.safetensors" in done.output and "nothing was uploaded" in done.output
    assert (merged / "README.md").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("import", "{tmp}/none", "--out", "{tmp}/run"), "there is no folder"),
        (("import", "ada/x", "--out", "{tmp}/run"), "no folder ada/x here"),
        (("export", "{tmp}/none", "--to", "merged", "--out", "{tmp}/run"), "found nothing at"),
        (("push", "{tmp}/none", "ada/seer"), "found nothing at"),
        (("ask", "ada/run", "?"), "no folder ada/run here"),
    ],
)
def test_bad_input_is_one_of_our_errors_and_writes_nothing(
    words: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    done = typed(*(word.format(tmp=tmp_path) for word in words))
    assert done.exit_code == 1
    # `main` prints it as one sentence; a fault that is not ours would be a traceback
    assert isinstance(done.exception, MultiTokenError)
    assert sentence in str(done.exception) and "\n" not in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = typed("export", tmp_path, "--to", "onnx", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "language-model" in done.output
