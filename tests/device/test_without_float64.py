"""Stage zero on a device without float64 (MPS) fits what it fits on a CPU.

As a program, with MATERIAL and a folder for the run: stage zero on the simulated accelerator, which
refuses float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FITTED = Path("stages") / "0-closed-form" / "projectors.safetensors"


@pytest.mark.slow
def test_stage_zero_on_a_device_without_float64_fits_what_it_fits_on_a_cpu(
    tmp_path: Path,
) -> None:
    import torch
    from rich.console import Console
    from safetensors.torch import load_file

    from multi_token.recipe.recipe import Recipe
    from multi_token.train.prepare import open_stages, prepare
    from multi_token.train.run import closed_form_stage
    from tests.golden.material import build
    from tests.golden.recipes import fields_of

    build(tmp_path / "material")
    folders = [str(tmp_path / "material"), str(tmp_path / "device")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = Recipe.model_validate(fields_of("padded", tmp_path / "material", tmp_path / "cpu"))
    closed_form_stage(prepare(recipe, open_stages(recipe), Console(quiet=True)))
    found, expected = load_file(tmp_path / "device" / FITTED), load_file(tmp_path / "cpu" / FITTED)
    assert found.keys() == expected.keys() and "image.closed_form.weight" in found
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def main(material: Path, out: Path) -> None:
    from tests.device import simulated  # isort: skip - before multi_token

    run = simulated._run

    def without_float64(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        import torch

        found = run(func, args, kwargs)
        for tensor in simulated._tensors([found]):
            if isinstance(tensor, simulated.DeviceTensor) and tensor.dtype == torch.float64:
                raise TypeError("this device has no float64")
        return found

    simulated._run = without_float64
    from rich.console import Console

    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe
    from multi_token.train.prepare import open_stages, prepare
    from multi_token.train.run import closed_form_stage
    from tests.golden.recipes import fields_of

    from_spec = MultiTokenForConditionalGeneration.from_spec

    def from_spec_on_cpu(*args: Any, **options: Any) -> Any:
        with simulated.unsimulated():
            return from_spec(*args, **options)

    MultiTokenForConditionalGeneration.from_spec = from_spec_on_cpu  # type: ignore[method-assign]
    fields = fields_of("padded", material, out)
    fields["train"]["args"] |= {
        "use_cpu": False,
        "bf16": False,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch",
    }
    with simulated.simulated():
        recipe = Recipe.model_validate(fields)
        stages = open_stages(recipe)
        assert stages[0].args.device == simulated.DEVICE
        closed_form_stage(prepare(recipe, stages, Console(quiet=True)))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*map(Path, sys.argv[1:]))
