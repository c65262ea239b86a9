"""Surfaces that users and tools see: help texts, the server's OpenAPI document, its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.golden.bench import invoked

TERMINAL = {"COLUMNS": "140", "LINES": "50", "NO_COLOR": "1", "TERM": "xterm"}


def helps() -> dict[str, str]:
    """Command, its words joined by `-` -> what `--help` prints."""
    import typer

    from multi_token.cli import app

    found = {}
    for words in _commands(typer.main.get_command(app)):
        said = click.unstyle(invoked(*words, "--help", env=TERMINAL))
        lines = [line.rstrip() for line in said.strip("\n").splitlines()]
        found["-".join(("multi-token", *words))] = "\n".join(lines) + "\n"
    return found


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*words, name))


def openapi(url: str) -> dict[str, Any]:
    """The document of a server's routes, without the version of the package."""
    document = httpx.get(f"{url}/openapi.json", timeout=60).json()
    document["info"].pop("version")
    return document


def metrics(server: Any) -> dict[str, dict[str, Any]]:
    """Metric -> its type and the names of its labels, of a running server.

    Labels of a metric that has counted nothing yet are not in what the server says, so they are
    read from its registry.
    """
    said = httpx.get(f"{server.url}/metrics", timeout=60).text
    collectors = server.service.metrics.registry._collector_to_names
    declared = {
        name: collector._labelnames
        for collector, names in collectors.items()
        for name in names
        if hasattr(collector, "_labelnames")
    }
    found = {}
    for family in text_string_to_metric_families(said):
        if family.name.endswith("_created"):
            continue  # when it was made: the library's own, for each that counts
        labels = {label for sample in family.samples for label in sample.labels}
        labels |= set(declared.get(family.name, ()))
        found[family.name] = {"type": family.type, "labels": sorted(labels - {"le"})}
    return found
