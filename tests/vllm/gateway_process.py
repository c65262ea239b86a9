"""Our server in front of vLLM, as users start it: `multi-token serve OUT --engine-url URL`."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.vllm.engine_process import KEY as ENGINE_KEY

KEY = "sk-gateway-key-1"
ENGINE_KEY_VARIABLE = "MULTI_TOKEN_ENGINE_KEY"
START_S = 180.0


def command(exported: Path, *urls: str, options: tuple[str, ...] = ()) -> list[str]:
    engines = [word for url in urls for word in ("--engine-url", url)]
    words = [sys.executable, "-m", "multi_token", "serve", str(exported), "--port", "0"]
    return [*words, "--workers", "1", *engines, *options]


def environment(**changed: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MULTI_TOKEN_API_KEYS": KEY,
        ENGINE_KEY_VARIABLE: ENGINE_KEY,
        **changed,
    }


@contextmanager
def gateway(exported: Path, *urls: str, options: tuple[str, ...] = ()) -> Iterator[httpx.Client]:
    """A client of a gateway that has started with these engines."""
    process = subprocess.Popen(
        command(exported, *urls, options=("--name", "tiny", *options)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env=environment(),
    )
    printed: list[str] = []
    listens, has_ended = threading.Event(), threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if "curl " in line:
                listens.set()
        has_ended.set()
        listens.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert listens.wait(START_S) and not has_ended.is_set(), "".join(printed)
        url = re.search(r"listens on (\S+);", "".join(printed))
        assert url is not None, "".join(printed)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=url[1], headers=headers, timeout=60, trust_env=False) as client:
            yield client
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()


def content(*parts: tuple[str, Any] | str) -> list[dict[str, Any]]:
    """Content of a user message: texts, and pairs of a modality and its item."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else _item(*part) for part in parts
    ]


def _item(modality: str, item: Any) -> dict[str, Any]:
    if modality == "image":
        url = f"data:image/png;base64,{_base64(item)}"
        return {"type": "image_url", "image_url": {"url": url}}
    if modality == "sound":
        return {"type": "input_audio", "input_audio": {"data": _base64(item), "format": "wav"}}
    return {"type": "media", "modality": modality, "data": item}


def _base64(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def body(*parts: tuple[str, Any] | str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """Body of a chat completion request."""
    messages = [{"role": "user", "content": content(*parts)}]
    return {"model": "tiny", "messages": messages, "max_tokens": max_tokens, **fields}


def text_of(lines: list[str]) -> str:
    """Text of a stream's lines, concatenated."""
    assert lines[-1] == "data: [DONE]", lines[-1]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    return "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )
