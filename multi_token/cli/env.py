"""`multi-token env`: versions, devices and extras for a bug report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

_DISTRIBUTION = "multi_token"
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE")
"""Environment variables that change what a run does; none of them is a secret."""


def env(
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Print versions, devices and installed extras: the facts of a bug report."""
    facts = environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    console = Console(highlight=False)
    for title, values in facts.items():
        table = Table("", "", title=title, title_justify="left", show_header=False)
        for name, value in values.items():
            table.add_row(name, Text(str(value), overflow="fold"))
        if values:
            console.print(table)


def environment() -> dict[str, dict[str, Any]]:
    """Return versions, devices, extras and variables; nothing of them is sent anywhere."""
    from multi_token import __version__
    from multi_token.report.machine import machine_facts

    facts: dict[str, Any] = {"multi_token": __version__, **machine_facts()}
    facts.pop("date")
    facts["executable"] = sys.executable
    return {
        "machine": facts,
        "devices": _devices(),
        "packages": _packages(),
        "extras": _extras(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _devices() -> dict[str, str]:
    import torch

    if not torch.accelerator.is_available():
        return {"accelerator": "none that torch sees"}
    kind = torch.accelerator.current_accelerator()
    found: dict[str, str] = {"accelerator": str(kind)}
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    for index in range(torch.accelerator.device_count()):
        found[str(index)] = _name_of(torch.get_device_module(kind), index)
    return found


def _name_of(module: Any, index: int) -> str:
    # backends differ in what they tell about a device
    properties = getattr(module, "get_device_properties", lambda _: None)(index)
    name = str(getattr(properties, "name", "device"))
    memory = getattr(properties, "total_memory", None)
    return f"{name}, {memory / 2**30:.0f} GiB" if memory else name


def _requirements() -> dict[str, list[str]]:
    """Extra -> names of its packages; "" has those of a plain installation."""
    found: dict[str, list[str]] = {"": []}
    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return found
    for line in lines:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([^'\"]+)", line)
        found.setdefault(extra[1] if extra else "", []).append(name)
    return found


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> dict[str, str]:
    return {name: _version_of(name) or "missing" for name in sorted(_requirements()[""])}


def _extras() -> dict[str, str]:
    """Extra -> `ready`, or its packages that are missing."""
    found = {}
    for extra, packages in sorted(_requirements().items()):
        missing = [name for name in packages if _version_of(name) is None]
        if extra:
            found[extra] = f"missing: {', '.join(missing)}" if missing else "ready"
    return found
