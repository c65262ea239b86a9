"""A real vLLM in its own process, with the flags of deploy/compose.yaml."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose.yaml"
PYTHON = os.environ.get("MULTI_TOKEN_VLLM")
"""Python executable with vLLM; set by `make test-vllm`."""
KEY = "sk-engine-key-1"
# For the tiny model: full precision, little memory, and no compiler.
TINY = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-num-seqs",
    "4",
    "--max-num-queued-reqs",
    "4",
]
START_S = 900.0
"""Takes about 100 s on two idle cores: three processes import vLLM one after another."""


def composed_flags() -> list[str]:
    """Flags after `vllm serve MODEL` in deploy/compose.yaml, without address and size."""
    service: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["x-engine"]
    words = [str(word) for word in service["command"]][1:]
    for option in ("--host", "--port", "--max-num-seqs", "--max-num-queued-reqs"):
        at = words.index(option)
        del words[at : at + 2]
    return words


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Return True as soon as a condition holds, False if it does not in time."""
    end = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if holds():
            return True
        end.wait(0.05)
    return False


class Engine:
    """One running vLLM server."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.process, self.log = url, process, log
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False
        )

    @property
    def is_healthy(self) -> bool:
        code = self.process.poll()
        assert code is None, f"vLLM has ended with {code}:\n{self.tail()}"
        try:
            return self.http.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        text = self.http.get("/metrics").text
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"vLLM has no metric {name}"
        return sum(map(float, found))

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]


@contextmanager
def engine(language_model: Path, log: Path, *, name: str | None = None) -> Iterator[Engine]:
    """Start vLLM on the folder of a language model, and end it after the context."""
    assert PYTHON is not None
    port = free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", str(language_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *composed_flags(), *TINY]
    command += [] if name is None else ["--served-model-name", name]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_API_KEY": KEY,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as file:
        # a new session: its workers end with it, even if their parent has died
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    running = Engine(f"http://127.0.0.1:{port}", process, log)
    try:
        healthy = wait_until(lambda: running.is_healthy, START_S)
        assert healthy, f"vLLM is not healthy after {START_S:g} s:\n{running.tail()}"
        yield running
    finally:
        running.http.close()
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            continue
    process.wait(20)
