"""Every path runs on a device that is not the CPU: nothing mixes devices, and no step waits for it.

One process runs all cases (program.py); a test reads one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODES = ("padded", "packed", "shared", "streamed", "cached")
STAGES = ("projector", "lora", "full", "teacher")
STEPS = [f"{mode}-{stage}" for mode in MODES for stage in STAGES] + ["padded-dpo", "cached-dpo"]
"""Packing and streams exclude `dpo`."""
USED = ["closed form", "generate", "items of requests", "local engine", "sampled answer"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> what was logged, of all cases."""
    from tests.golden.material import build

    folder = tmp_path_factory.mktemp("device")
    build(folder / "material")
    program, out = Path(__file__).with_name("program.py"), folder / "out.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(folder / "material"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", [*STEPS, *USED])
def test_a_path_runs_on_a_device_and_mixes_it_with_nothing(found: Any, case: str) -> None:
    assert found[case]["error"] == ""
    assert found[case]["num_operators"] > 0, "nothing ran on the device"
    assert found[case]["mixes"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_a_micro_batch_waits_for_the_device_by_nothing_of_ours(found: Any, case: str) -> None:
    """One check a step reads the losses of the step before, which a GPU has computed by then."""
    ours, num_batches = found[case]["ours"], found[case]["num_batches"]
    assert sum(ours.values()) <= num_batches / 2, ours
    assert all("distributed.py" in line for line in ours)
    uploads = found[case]["uploads"]
    assert not any("blocking" in line for line in uploads), uploads


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", ["packed", "shared"])
def test_libraries_look_for_no_segments_on_the_device(found: Any, mode: str, stage: str) -> None:
    assert found[f"{mode}-{stage}"]["libraries"] == {}


@pytest.mark.slow
def test_a_decode_step_of_the_local_engine_waits_for_its_new_tokens_alone(found: Any) -> None:
    case = found["local engine"]
    (line,) = case["ours"]
    assert "tolist at serve/engines/sampler.py" in line, "one line, reached once a step"
    blocking = [line for line in case["uploads"] if "ours: blocking" in line]
    assert blocking == []


@pytest.mark.slow
def test_a_sampled_token_is_one_read_more(found: Any) -> None:
    case = found["sampled answer"]
    assert sum(case["ours"].values()) == 2 * case["num_batches"], case["ours"]
