"""`multi-token serve` as people start it: a process, its options, its signals."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from multi_token.cli.serve import KEYS_VARIABLE, _keys
from multi_token.errors import MultiTokenError
from multi_token.serve.settings import ServeSettings
from tests.serve.serve_process import serve_process

pytestmark = pytest.mark.slow

KEY = "sk-test-key-1"
LONG = {
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def run(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that reads vectors."""
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fields = recipe_fields(folder)
    fields["model"]["modalities"] = {"vector": {"type": "vector", "dim": 2}}
    MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(fields).model
    ).save_pretrained(folder)
    return folder


def test_sigterm_lets_answers_end_and_leaves_with_0(run: Path) -> None:
    with serve_process(str(run), "--api-key", KEY, "--name", "mine") as (process, url, printed):
        text = "".join(printed)
        assert "mine listens on" in text and "modalities: vector (vector)" in text
        assert KEY not in text
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            assert httpx.get(f"{url}/ready").status_code == 401
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            with client.stream("POST", "/v1/chat/completions", json=LONG) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                statuses = set()
                for _ in range(200):
                    statuses.add(client.get("/ready").status_code)
                    if 503 in statuses:
                        break
                assert 503 in statuses
                short = {**LONG, "stream": False, "max_tokens": 1}
                refused = client.post("/v1/chat/completions", json=short)
                assert refused.status_code == 503
                assert client.get("/health").status_code == 200
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        assert process.wait(30) == 0


def test_a_second_signal_aborts(run: Path) -> None:
    with (
        serve_process(str(run)) as (process, url, _),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        for _ in range(200):
            if httpx.get(f"{url}/ready").status_code == 503:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 1


LOSES_ITS_DEVICE = """
import os, threading, torch
from multi_token.cli import main

def look(module, inputs):
    if os.path.exists(os.environ["LOST"]):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.nn.modules.module.register_module_forward_pre_hook(look)
main()
"""


def test_a_server_whose_device_is_lost_is_never_healthy_again_and_exits_with_1(
    run: Path, tmp_path: Path
) -> None:
    lost = tmp_path / "lost"
    script = ("-c", LOSES_ITS_DEVICE)
    with serve_process(str(run), env={"LOST": str(lost)}, python=script) as (process, url, printed):
        short = {**LONG, "stream": False, "max_tokens": 1}
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.post("/v1/chat/completions", json=short).status_code == 200
            assert client.get("/health").status_code == 200
            lost.touch()
            assert client.post("/v1/chat/completions", json=short).status_code == 503
            polls: set[int] = set()
            with suppress(httpx.TransportError):  # it listens no more
                for _ in range(20_000):
                    polls.update(client.get(path).status_code for path in ("/health", "/ready"))
        assert polls == {503}
        assert process.wait(60) == 1
    text = "".join(printed)
    assert "3 times without a complete response" in text and "illegal memory access" in text
    assert "error: the engine was restarted" in text


def test_a_server_whose_device_hangs_is_not_healthy_and_exits_with_1(
    run: Path, tmp_path: Path
) -> None:
    lost = tmp_path / "lost"
    script = (
        "-c",
        LOSES_ITS_DEVICE.replace("raise RuntimeError(", "threading.Event().wait() or ("),
    )
    options = (str(run), "--engine-step-timeout", "1")
    with serve_process(*options, env={"LOST": str(lost)}, python=script) as (process, url, printed):
        short = {**LONG, "stream": False, "max_tokens": 1}
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
            assert client.get("/health").status_code == 200
            lost.touch()
            asking = pool.submit(client.post, "/v1/chat/completions", json=short)
            while client.get("/health").status_code == 200:
                pass
            assert asking.result().status_code == 503
        assert process.wait(60) == 1
    assert "the engine has made no progress for 3 s, so this server ends" in "".join(printed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "API key is needed"),
        (["--api-key", "short"], "an API key must have"),
        (["--max-batch", "0"], "max_batch"),
        (["--engine-url", "ftp://a:1"], "should be http://HOST:PORT"),
        (["--api-key-file", "nothing-here"], "expected a file with one API key per line"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(
    options: list[str], words: str, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from multi_token.cli import app

    result = CliRunner().invoke(app, ["serve", str(tmp_path / "no-run"), *options])
    assert isinstance(result.exception, MultiTokenError)
    assert words in str(result.exception) and "\n" not in str(result.exception)


def test_a_port_in_use_is_a_sentence(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "multi_token", "serve", str(run), "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"the server did not start on 127.0.0.1:{port}" in done.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from multi_token.cli import app

    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert isinstance(result.exception, MultiTokenError)
    assert "config.json" in str(result.exception)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from multi_token.cli import app

    # by its name: in the package, the command `serve` hides the module of that name
    module = sys.modules["multi_token.cli.serve"]
    monkeypatch.setattr(module, "_PACKAGES", ("no_such_package",))
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert isinstance(result.exception, MultiTokenError)
    assert 'pip install "multi_token[serve]"' in str(result.exception)


def test_keys_come_from_option_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# two\nsk-file-key-1\n\n sk-file-key-2 \n")
    monkeypatch.setenv(KEYS_VARIABLE, "sk-environment-1, sk-environment-2\nsk-option-1")
    assert _keys(["sk-option-1"], file) == (
        "sk-option-1",
        "sk-file-key-1",
        "sk-file-key-2",
        "sk-environment-1",
        "sk-environment-2",
    )
    file.write_text("\n")
    with pytest.raises(MultiTokenError, match="contains no API key"):
        _keys(None, file)


def test_four_times_the_batch_may_wait_by_default() -> None:
    assert ServeSettings(max_batch=3).max_waiting == 12
    assert ServeSettings(max_batch=3, max_queue=0).max_waiting == 0


def test_an_invalid_setting_is_one_sentence_that_names_the_setting(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from multi_token.cli import app

    for option, value, words in (
        ("--name", "a b", "serve: name 'a b' must have"),
        ("--port", "65536", "serve: 'port': Input should be less than or equal to 65535"),
        ("--host", "0.0.0.0", "serve: host 0.0.0.0 is reachable from other machines"),
    ):
        result = CliRunner().invoke(app, ["serve", str(tmp_path), option, value])
        assert isinstance(result.exception, MultiTokenError)
        assert str(result.exception).startswith(words)
