"""A hub that accepts connections and never answers ends in one sentence, after one limit in all."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import close_session
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from multi_token import hub
from multi_token.checkpoint.hub import local_folder
from multi_token.data.files.hub import load_hub, stream_hub
from multi_token.errors import MultiTokenError
from multi_token.hub import HubSilence, limited_hub_waits
from multi_token.language_model.loading import load_language_model, load_tokenizer
from multi_token.modalities.base import load_auto


class SilentHub:
    """A server on a free port that reads requests and never answers; counts connections."""

    def __init__(self) -> None:
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self._open.append(connection)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        for each in (self._listener, *self._open):
            each.close()


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SilentHub]:
    """A silent hub that all libraries ask, an empty cache, and a limit of 0.2 s."""
    server = SilentHub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", server.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SILENCE", HubSilence(0.2))
    yield server
    server.stop()
    close_session()


@pytest.mark.parametrize(
    "load",
    [
        load_tokenizer,
        load_language_model,
        local_folder,
        load_auto.__wrapped__,
        lambda name: load_hub(name, "train"),
        stream_hub,
    ],
    ids=["tokenizer", "language model", "run", "encoder", "data set", "stream"],
)
def test_a_hub_that_never_answers_is_asked_once_and_named(
    load: Callable[..., Any], silent_hub: SilentHub
) -> None:
    options = ("AutoConfig", "ada/seer", None) if load is load_auto.__wrapped__ else ("ada/seer",)
    sentence = f"{silent_hub.url} has not answered for .* s, and ada/seer is not complete in this"
    with pytest.raises(MultiTokenError, match=sentence) as caught:
        load(*options)
    assert "HF_ENDPOINT" in str(caught.value) and "HF_HUB_OFFLINE=1" in str(caught.value)
    assert silent_hub.num_connections == 1, "huggingface_hub asks six times by itself"
    # the next name does not wait again
    with pytest.raises(MultiTokenError, match="ada/other is not complete"):
        local_folder("ada/other")
    assert silent_hub.num_connections == 1


def test_a_cached_repository_is_used_when_the_hub_does_not_answer(
    silent_hub: SilentHub, tmp_path: Path
) -> None:
    repository = tmp_path / "cache" / "models--ada--seer"
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert local_folder("ada/seer") == repository / "snapshots" / ("0" * 40)
    assert silent_hub.num_connections == 1


def test_the_wait_counts_once_in_many_threads_and_ends_with_an_answer() -> None:
    silence = HubSilence(60.0)
    began = time.monotonic() - 10
    silence.add(began)
    silence.add(began)
    assert silence.waited_s == pytest.approx(10, abs=1)
    silence.end()
    assert silence.left_s() == 60.0


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        ValueError("Unrecognized model in /local/folder"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["memory", "unknown model", "full disk"],
)
def test_a_fault_that_is_not_of_the_hub_stays_as_it_is_while_the_hub_is_silent(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SILENCE", HubSilence(0.0))
    with pytest.raises(type(fault)) as caught, limited_hub_waits("/local/folder"):
        raise fault
    assert caught.value is fault


@pytest.mark.parametrize(
    "cause",
    [
        OfflineModeIsEnabled("hub does not answer"),
        LocalEntryNotFoundError("not in the cache"),
        TimeoutError("timed out"),
        ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    ],
)
def test_a_fault_that_a_silent_hub_caused_names_the_hub(
    cause: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SILENCE", HubSilence(0.0))
    sentence = "ada/seer is not complete"
    with pytest.raises(MultiTokenError, match=sentence), limited_hub_waits("ada/seer"):
        raise OSError("cannot load the tokenizer") from cause


@pytest.mark.slow
def test_train_ends_with_one_sentence_when_the_hub_does_not_answer(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run")
    fields["model"]["language_model"] = "ada/seer"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    server = SilentHub()
    code = (
        "from multi_token import hub; hub.SILENCE.limit_s = 1.0\n"
        "from multi_token.cli import main; main()"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", code, "train", str(tmp_path / "recipe.yaml")]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    server.stop()
    assert result.returncode == 1, result.stderr
    assert "has not answered for 1 s" in " ".join(result.stderr.split()), result.stderr
    assert "Traceback" not in result.stderr
    assert server.num_connections == 1
