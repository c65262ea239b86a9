"""The commands of docs/serving.md work as described there."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multi_token.serve.openai.protocol import CONTENT_PART_MODELS, IGNORED_FIELDS, ChatRequest
from multi_token.serve.settings import ServeSettings
from tests.serve.running_server import RunningServer, png, running

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def open_server(served_model: Any) -> Iterator[RunningServer]:
    """A server that needs no key, as in the page."""
    with running(served_model, default_max_tokens=8) as server:
        yield server


def here(text: str, server: RunningServer) -> str:
    return text.replace("http://127.0.0.1:8000", server.url).replace('"siglip"', '"tiny-run"')


@pytest.mark.parametrize(
    "block", [text for kind, text in BLOCKS if not kind and text.startswith("curl")]
)
def test_every_curl_line_gets_an_answer(
    block: str, open_server: RunningServer, tmp_path: Path
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "cat.png").write_bytes(png())
    done = subprocess.run(
        ["bash", "-euc", here(block, open_server)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("data: "):
        assert done.stdout.endswith("data: [DONE]\n\n") and '"content"' in done.stdout
    else:
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_lines_for_the_openai_client_get_an_answer(
    open_server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [text for kind, text in BLOCKS if kind == "python"]
    script = tmp_path / "ask.py"
    script.write_text(here(block, open_server), encoding="utf-8")
    found = runpy.run_path(str(script))
    found["client"].close()
    assert "media_tokens={'vector': 2}" in capsys.readouterr().out


def test_the_page_names_every_field_part_and_limit() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in [*ChatRequest.model_fields, *IGNORED_FIELDS]:
        assert f"`{name}" in text, name
    for name in CONTENT_PART_MODELS:
        assert f'"type": "{name}"' in text, name
    settings = ServeSettings()
    for limit in (
        f"| {settings.default_max_tokens}, or what the prompt leaves |",
        str(settings.max_tokens),
        f"{settings.max_body_bytes // 2**20} MiB",
        f"{settings.max_media} items",
        f"{settings.body_timeout_s:g} s",
        f"{settings.send_timeout_s:g} s",
        f"`--media-memory-mb` ({settings.media_memory_bytes // 2**20}, at least 1513)",
    ):
        assert limit in text, limit
