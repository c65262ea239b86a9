"""Starts a command in several processes, as torchrun and `accelerate launch` do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def torchrun(num: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", str(num)]


def accelerate_launch(num: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "--num_processes", str(num), *plain, "--main_process_port", port]


def launched(
    num: int,
    command: list[str],
    *,
    by: Any = torchrun,
    fails: bool = False,
    beside: Sequence[Path] = (),
) -> str:
    """Return the stderr of `num` processes of a command. `beside`: folders of more packages."""
    places = os.pathsep.join(map(str, (ROOT, *beside)))
    done = subprocess.run(
        [*by(num), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return done.stderr
