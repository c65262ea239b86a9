"""Training of golden runs: each once, by the command that a user types."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.golden import material
from tests.golden.recipes import fields_of
from tests.train.launchers import launched


class Bench:
    """A folder with the material, and the runs that were trained so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[str, Any] = {}
        self.material = folder / "material"
        torch.set_num_threads(1)
        material.build(self.material)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value that is computed when it is first asked for."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def run(self, name: str) -> Path:
        """The folder of a golden run, which is trained when it is first asked for."""
        out = self.folder / name
        if out.exists():
            return out
        recipe = self.folder / f"{name}.yaml"
        fields = fields_of(name, self.material, out)
        recipe.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        if name == "two_processes":
            launched(2, ["-m", "multi_token", "train", str(recipe)])
        else:
            invoked("train", str(recipe))
        return out


def invoked(*words: str, **options: Any) -> str:
    """Return the output of the command line for these arguments, run in this process."""
    from multi_token.cli import app

    done = CliRunner().invoke(app, list(words), **options)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def log_of(run: Path) -> list[dict[str, Any]]:
    """The log of a run's one stage."""
    (done,) = (run / "stages").glob("1-*/done.json")
    return json.loads(done.read_text(encoding="utf-8"))["log_history"]


def losses_of(run: Path) -> list[float]:
    """The loss of every logged step."""
    return [entry["loss"] for entry in log_of(run) if "loss" in entry]


NO_RESULT = {"stages", "lengths", "cache", "shared-prefixes.safetensors"}
"""Folders and files of a run that hold what training needed on its way."""


def sums_of(run: Path) -> dict[str, list[float]]:
    """File and name of every saved tensor of the result -> its sum and the sum of its sizes."""
    files = [f for f in sorted(run.rglob("*.safetensors")) if not NO_RESULT & set(f.parts)]
    return {
        f"{file.relative_to(run).as_posix()}: {key}": [
            float(tensor.double().sum()),
            float(tensor.double().abs().sum()),
        ]
        for file in files
        for key, tensor in sorted(load_file(file).items())
    }


def files_of(run: Path) -> list[str]:
    """Every file in a run's folder, by its path in it; a hash in a name is written as `<hash>`."""
    names = [f.relative_to(run).as_posix() for f in run.rglob("*") if f.is_file()]
    return sorted(re.sub(r"[0-9a-f]{32,}", "<hash>", name) for name in names)


def keys_of(tree: Any, at: str = "") -> list[str]:
    """The dotted keys of nested mappings and lists, without their values; of a list its items'."""
    if isinstance(tree, dict):
        inside = [keys_of(value, f"{at}.{key}" if at else str(key)) for key, value in tree.items()]
    elif isinstance(tree, list):
        inside = [keys_of(value, f"{at}[]") for value in tree]
    else:
        return [at]
    return sorted({at, *(key for keys in inside for key in keys)} - {""})
