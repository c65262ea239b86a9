"""`multi-token export`, then `multi-token serve --engine-url URL`, as users start them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from multi_token.cli import app
from multi_token.cli.serve import ENGINE_KEY_VARIABLE
from multi_token.errors import MultiTokenError
from multi_token.types import Conversation, Media, Message, Text
from tests.serve.asking import IMAGE, QUESTION, RED, asked, content_of, post
from tests.serve.serve_process import serve_process
from tests.serve.vllm_stand_in import StandIn

pytestmark = pytest.mark.slow
KEY = "sk-of-the-engines"


def gateway(
    *arguments: str,
) -> AbstractContextManager[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its URL, and its output."""
    return serve_process(*arguments, env={ENGINE_KEY_VARIABLE: KEY})


def test_an_exported_run_is_served_with_two_replicas(
    served_run: Path, served_model: Any, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    out = tmp_path / "out"
    arguments = ["export", str(served_run), "--to", "language-model", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    engines = [StandIn(served_model.language_model, key=KEY) for _ in range(2)]
    urls = [part for engine in engines for part in ("--engine-url", engine.url)]
    (tmp_path / "red.png").write_bytes(RED)
    parts = (Media("image", str(tmp_path / "red.png")), Text("What is this?"))
    question = Conversation((Message("user", parts),))
    expected = served_model.generate([question], max_new_tokens=8)[0]
    with (
        gateway(str(out), *urls) as (process, url, printed),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for _ in range(4):
            found = content_of(post(http, asked(IMAGE, QUESTION), temperature=0))
            assert found.strip() == expected
        assert sum(len(engine.bodies) for engine in engines) == 4
        assert http.get("/health").status_code == 200
        for engine in engines:
            engine.die()
        assert engines[0].wait_until(lambda: http.get("/health").status_code == 503)
        lost = post(http, asked(IMAGE, QUESTION))
        assert lost.status_code == 503 and lost.json()["error"]["code"] == "no_engine"
        engines[1].start()
        assert engines[1].wait_until(lambda: http.get("/health").status_code == 200)
        assert content_of(post(http, asked(IMAGE, QUESTION))).strip() == expected
        assert KEY not in "".join(printed)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    engines[1].die()
    # a failed start is reported in the last line alone
    command = [sys.executable, "-m", "multi_token", "serve", str(out), "--port", "0"]
    done_early = subprocess.run(
        [*command, "--engine-url", engines[1].url],
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done_early.stdout + done_early.stderr
    assert done_early.returncode == 1 and "Traceback" not in output, output
    assert "no engine can be used" in output and engines[1].url in output, output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine-url", "127.0.0.1:9"], "should be http://HOST:PORT"),
        (
            ["--engine-url", "http://127.0.0.1:9", "--prefix-cache-tokens", "8"],
            "leave out --prefix-cache-tokens",
        ),
        (
            ["--engine-url", "http://127.0.0.1:9"],
            "has no manifest.json.*multi-token export RUN --to language-model --out",
        ),
    ],
)
def test_invalid_options_are_refused_before_anything_is_loaded(
    options: list[str], words: str, served_run: Path
) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["serve", str(served_run), *options])
    assert isinstance(result.exception, MultiTokenError)
    assert re.search(words, str(result.exception)) and "\n" not in str(result.exception)
