"""Golden surfaces: help texts, the OpenAPI document and metrics are as recorded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden.bench import Bench
from tests.golden.record import FOLDER, RECORDS, helps, read, served, vllm_metrics

HELPS = sorted(file.stem for file in (FOLDER / "help").glob("*.txt"))


def _flat(tree: Any, at: str = "") -> dict[str, Any]:
    """Dotted place in nested mappings and lists -> the value there."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, Any] = {}
    for key, value in inside:
        here = f"{at}.{key}" if at else str(key)
        is_inner = isinstance(value, (dict, list)) and value
        found |= _flat(value, here) if is_inner else {here: value}
    return found


def _assert_same(found: Any, recorded: Any) -> None:
    ours, theirs = _flat(found), _flat(recorded)
    places = sorted(ours.keys() | theirs.keys())
    differing = {p: (ours.get(p), theirs.get(p)) for p in places if ours.get(p) != theirs.get(p)}
    assert differing == {}, "place: (as found, as recorded)"
    assert found == recorded


def test_the_commands_are_those_recorded(bench: Bench) -> None:
    assert sorted(helps(bench)) == HELPS


@pytest.mark.parametrize("command", HELPS)
def test_a_command_has_the_help_recorded(bench: Bench, command: str) -> None:
    assert helps(bench)[command] == (FOLDER / "help" / f"{command}.txt").read_text(encoding="utf-8")


def test_the_server_describes_the_routes_and_schemas_recorded(bench: Bench) -> None:
    _assert_same(served(bench)["openapi"], read("openapi"))


def test_the_server_counts_the_metrics_recorded(bench: Bench) -> None:
    _assert_same(served(bench)["metrics"], read("metrics"))


@pytest.mark.slow
def test_a_server_before_vllm_counts_the_metrics_recorded(bench: Bench) -> None:
    _assert_same(vllm_metrics(bench), read("metrics_vllm"))


def test_every_record_is_computed_by_something() -> None:
    files = {f.relative_to(FOLDER).with_suffix("").as_posix() for f in FOLDER.rglob("*.json")}
    assert files == set(RECORDS)
