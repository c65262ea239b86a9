"""With train.fsdp no process holds the language model whole, from loading to the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.launchers import launched

pytestmark = pytest.mark.slow
Fields = Callable[..., dict[str, Any]]
SCRIPT = Path(__file__).with_name("memory_in_processes.py")
NUM_LAYERS = 16


@pytest.fixture(scope="module")
def large(parts: Path, tmp_path_factory: Any) -> Path:
    """A language model of about 220 MB in bfloat16, nearly all of it in its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("large") / "language_model"
    config = AutoConfig.from_pretrained(
        parts / "language_model",
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=96,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(parts / "language_model").save_pretrained(folder)
    return folder


def megabytes(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**20


def test_a_process_never_holds_the_language_model_whole(
    recipe_fields: Fields, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # else glibc keeps freed buffers of some megabytes for later, and they would count
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    stages = [{"name": "s", "learn": {"projectors": 1e-2}, "args": {"max_steps": 2, "bf16": True}}]
    fields = recipe_fields(tmp_path / "run", stages=stages, fsdp=True)
    fields["model"]["language_model"] = str(large)
    job, out = tmp_path / "job.json", tmp_path / "seen.json"
    job.write_text(json.dumps({"out": str(out), "fields": fields}))
    launched(2, [str(SCRIPT), str(job)])
    whole = megabytes(large)
    assert whole > 200
    for seen in json.loads(out.read_text()):
        # the layer that runs, and the next one, which is gathered meanwhile
        assert 1 <= seen["layers"] <= 2
        assert seen["peak_mb"] < whole
    assert load_file(tmp_path / "run" / "projectors.safetensors")
