"""transformers' TrainingArguments of a stage: our defaults, and the recipe's fields over them.

Border: what must stay as it is, and what is said of a field that is wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from multi_token.errors import RecipeError
from multi_token.registry import nearest
from multi_token.train.metrics import default_report_to

# what a run needs to be right, whatever the recipe says
_FIXED: dict[str, Any] = {
    "remove_unused_columns": False,  # media are no columns of forward's signature
    "label_names": ["labels"],
    "logging_nan_inf_filter": False,  # it would hide a diverging loss
    "prediction_loss_only": True,  # logits at supervised positions have no common length
    "disable_tqdm": True,  # train/report.py draws the bar
}
_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "logging_steps": 5,
    "save_steps": 200,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_grad_norm": 1.0,
}


def training_arguments(
    output_dir: Path, fields: Mapping[str, Any], *, seed: int, learning_rate: float
) -> TrainingArguments:
    """TrainingArguments of a stage: our defaults, the recipe's fields over them.

    Raises RecipeError for a field that transformers does not have, or that must stay as it is.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in fields:
        if key not in known:
            raise RecipeError(
                f"train args: {key!r} is no field of transformers.TrainingArguments"
                + nearest(key, known)
            )
        if key in _FIXED or key in ("output_dir", "learning_rate", "seed"):
            raise RecipeError(
                f"train args: {key!r} is not set here; learning rates are under `learn`, "
                "`output_dir` and `seed` under `train`, and the rest of "
                f"{sorted(_FIXED)} is needed as it is"
            )
    on_cpu = bool(fields.get("use_cpu")) or not torch.accelerator.is_available()
    ours = {**_DEFAULTS, "dataloader_pin_memory": not on_cpu, "report_to": default_report_to()}
    values = {**ours, **fields, **_FIXED}
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        values.pop("ddp_backend", None)  # transformers would wait for others
    elif on_cpu:
        values.setdefault("ddp_backend", "gloo")
    # rows are read where they are needed: rank 0 must not read for all and cut batches of media
    accelerator = {"dispatch_batches": False, **dict(fields.get("accelerator_config") or {})}
    values["accelerator_config"] = accelerator
    try:
        return TrainingArguments(
            output_dir=str(output_dir), seed=seed, learning_rate=learning_rate, **values
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train args: {error}") from None
