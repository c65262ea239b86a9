"""Trained tensors of a run, to compare two runs bit by bit: for tests of resuming."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(out)}: {key}": tensor
        for file in (
            out / "projectors.safetensors",
            *(out / "adapter").glob("*.safetensors"),
            *(out / "language_model").glob("*.safetensors"),
        )
        for key, tensor in load_file(file).items()
    }


def assert_same_bits(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def run_until(recipe: Path, line: str | None) -> int:
    """The exit code of the command line, which is killed when it has printed `line`."""
    with subprocess.Popen(
        [sys.executable, "-m", "multi_token", "train", str(recipe)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        for printed in process.stderr:
            if line is not None and printed.startswith(line):
                process.kill()
        return process.wait()
