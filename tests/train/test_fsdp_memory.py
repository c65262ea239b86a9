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
SCRIPT = Path(__file__).with_name("in_processes.py")
BF16 = {"max_steps": 2, "bf16": True, "activation_checkpointing": True}
# evaluated and saved after each step; the loss falls, so the highest one is the first
BEST = {
    "max_steps": 3,
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "greater_is_better": True,
}


def language_model(parts: Path, folder: Path, num_layers: int, width: int) -> Path:
    """Write a language model in bfloat16, nearly all of it in its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(
        parts / "language_model",
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=width // 8,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(parts / "language_model").save_pretrained(folder)
    return folder


def megabytes(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**20


@pytest.fixture(scope="module")
def seen(
    parts: Path, recipe_fields: Fields, tmp_path_factory: Any
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of all runs by two processes, and what each process noted."""
    folder = tmp_path_factory.mktemp("memory")
    small = language_model(parts, folder / "small", 4, 512)
    large = language_model(parts, folder / "large", 22, 640)
    full = {"projectors": 1e-2, "language_model": 1e-3}

    def run(name: str, learn: Any, args: Any, model: Path, **more: Any) -> dict[str, Any]:
        stages = [{"name": "s", "learn": learn, "args": args}]
        out = folder / name.removesuffix(" resumed")
        fields = recipe_fields(out, stages=stages, fsdp=True, blind=False, num_samples=0)
        fields["train"]["args"]["per_device_train_batch_size"] = 1
        fields["model"]["language_model"] = str(model)
        if learn is full:
            fields["data"]["eval"] = fields["data"]["train"]
        return {"name": name, "fields": fields, "memory": True, **more}

    runs = [
        run("full", full, BEST, small, stop_at=2),
        run("full resumed", full, BEST, small),
        # last, so that what a process loads once does not count
        run("frozen", {"projectors": 1e-2}, BF16, large),
    ]
    job, out = folder / "job.json", folder / "seen.json"
    job.write_text(json.dumps({"out": str(out), "runs": runs}))
    with pytest.MonkeyPatch.context() as patch:
        # else glibc keeps freed buffers of some megabytes for later, and they would count
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
        patch.setenv("MALLOC_ARENA_MAX", "1")
        launched(2, [str(SCRIPT), str(job)])
    return folder, json.loads(out.read_text())


def test_a_process_never_holds_the_language_model_whole(seen: Any) -> None:
    folder, runs = seen
    whole = megabytes(folder / "large")
    assert whole > 150
    for one in runs["frozen"]:
        # the layer that runs, and the next one, which is gathered meanwhile
        assert 1 <= one["layers"] <= 2
        # half of it, and buffers of about six layers, by which layers are gathered on the CPU
        assert one["peak"] < whole
    assert load_file(folder / "frozen" / "projectors.safetensors")


def test_what_is_loaded_for_a_resume_or_as_the_best_is_never_whole(seen: Any) -> None:
    folder, runs = seen
    weights = megabytes(folder / "full" / "language_model")  # float32
    assert all("stopped at step 2 of 3" in one["error"] for one in runs["full"])
    for one in runs["full resumed"]:
        assert one["steps"] == 1 and 1 <= one["layers"] <= 2
        # mapped from files: read by layer, and cut later
        assert one["_load_from_checkpoint"] < 0.3 * weights
        # two moments for each weight, of which this process has half
        assert one["_load_optimizer_and_scheduler"] < 1.5 * weights
        # shards are overwritten in place
        assert one["load_best"] < 0.5 * weights
