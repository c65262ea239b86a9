"""Golden runs: training gives the losses, weights, files and log keys that are recorded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden.bench import Bench
from tests.golden.recipes import LOSSES
from tests.golden.record import folder, log_keys, read, run_record

TOLERANCE = 1e-4
EVERY_RUN = [*LOSSES, pytest.param("two_processes", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", EVERY_RUN)
def test_a_run_has_the_losses_recorded(bench: Bench, name: str) -> None:
    found, recorded = run_record(bench, name)["losses"], read(f"runs/{name}")["losses"]
    assert found == pytest.approx(recorded, rel=TOLERANCE)


@pytest.mark.parametrize("name", EVERY_RUN)
def test_a_run_saves_the_tensors_recorded(bench: Bench, name: str) -> None:
    found, recorded = run_record(bench, name)["sums"], read(f"runs/{name}")["sums"]
    assert found.keys() == recorded.keys()
    off = {
        key: (found[key], [total, size])
        for key, (total, size) in recorded.items()
        if max(abs(found[key][0] - total), abs(found[key][1] - size)) > TOLERANCE * size + 1e-9
    }
    assert off == {}, "tensor: (sum and sum of sizes as found, as recorded)"


@pytest.mark.parametrize("kind", ["files", "config.json", "recipe.yaml"])
def test_a_run_with_adapter_and_evaluation_leaves_the_files_and_keys_recorded(
    bench: Bench, kind: str
) -> None:
    assert folder(bench)[kind] == read("folder")[kind]


def test_every_run_logs_the_keys_recorded(bench: Bench) -> None:
    found, recorded = log_keys(bench), read("log_keys")
    differing: dict[str, Any] = {
        name: sorted(set(keys) ^ set(recorded.get(name, ())))
        for name, keys in found.items()
        if keys != recorded.get(name)
    }
    assert differing == {}, "run: keys that only one of the two has"
