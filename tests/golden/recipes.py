"""Recipes of the golden runs, by name: each trains the tiny material for a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROJECTORS = {"projectors": 1e-2}
ADAPTER = {"projectors": 1e-2, "adapter": 1e-2}
FULL = {"projectors": 1e-2, "language_model": 2e-3}

ARGS: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": 6,
    "logging_steps": 1,
    "per_device_train_batch_size": 3,
    # Adam divides by the gradient's size: of one near zero it would take another CPU's rounding
    # for a direction
    "adam_epsilon": 1e-4,
    "report_to": [],
}


def _recipe(
    material: Path,
    out: Path,
    learn: dict[str, Any],
    *,
    rows: str = "naming",
    args: dict[str, Any] | None = None,
    stage: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **train: Any,
) -> dict[str, Any]:
    """Fields of a recipe with one stage; what is not named is as a user gets it by default."""
    return {
        "model": {
            "language_model": str(material / "language_model"),
            "modalities": {
                "image": {
                    "type": "image",
                    "encoder": str(material / "clip"),
                    "features": "pooled",
                    "projector": {"type": "expand", "factor": 3},
                },
                "vector": {
                    "type": "vector",
                    "dim": 5,
                    "projector": {"type": "expand", "factor": 2},
                },
            },
        },
        "data": {"train": [{"rows": str(material / f"{rows}.jsonl")}], **(data or {})},
        "train": {
            "output_dir": str(out),
            "stages": [{"name": "only", "learn": learn, **(stage or {})}],
            "args": {**ARGS, **(args or {})},
            "adapter": {"r": 4},
            **train,
        },
    }


def fields_of(name: str, material: Path, out: Path) -> dict[str, Any]:
    """Fields of one of `RUNS`, whose folder will be `out`."""
    learn, more = RUNS[name]
    more = dict(more)
    if more.pop("evaluates", False):
        more["data"] = {"eval": [{"rows": str(material / "naming.jsonl")}]}
    return _recipe(material, out, learn, **more)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded": (PROJECTORS, {}),
    "packed": (PROJECTORS, {"packing": True}),
    "packed_shared_media": (
        ADAPTER,
        {"rows": "one_image", "packing": {"share": True}},
    ),
    "adapter": (
        ADAPTER,
        {"evaluates": True, "args": {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}},
    ),
    "full": (FULL, {}),
    "dpo": (ADAPTER, {"rows": "pairs", "stage": {"dpo": {}}}),
    "distillation": (
        PROJECTORS,
        {"rows": "media_texts", "stage": {"distillation": {"weight": 0.5}}},
    ),
    "stream": (
        ADAPTER,
        {"data": {"stream": {"window": 4}, "max_tokens": 120}, "calibration_items": 8},
    ),
    "two_processes": (
        ADAPTER,
        {"args": {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}},
    ),
    "taught": (
        FULL,
        {"args": {"max_steps": 60, "per_device_train_batch_size": 8, "logging_steps": 20}},
    ),
}
"""Name -> `learn` of the stage, and other lines of the recipe. Questions are put to `taught`."""

LOSSES = [name for name in RUNS if name not in ("two_processes", "taught")]
"""Runs of one process whose losses are recorded."""
