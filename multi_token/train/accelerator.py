"""Defaults of a run on an accelerator: the fast ones, each turned off by a key of the recipe.

| default | off by |
|---|---|
| autocast to bfloat16 | `train.args.bf16: false`, or `fp16: true` |
| TF32 for products that stay in float32 | `train.args.tf32: false` |
| data workers: min(8, cores of a process) | `train.args.dataloader_num_workers: 0` |
| batches copied from pinned memory while the device computes | `train.args.accelerator_config` |
| frozen encoders in bfloat16 | `dtype: float32` of the modality, or `train.args.bf16: false` |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from multi_token.encoders import cast_encoder
from multi_token.modalities.base import PretrainedModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import TrainSpec
from multi_token.report.machine import num_cores

_MAX_WORKERS = 8


@dataclass(frozen=True)
class Accelerator:
    """Facts of this machine that decide the defaults.

    Attributes:
        has_bf16: Products of bfloat16 are computed by the hardware.
        has_tf32: So are those of TF32.
        num_cores: Cores of the CPU that this process may use, with the others of the machine.
        num_processes: Processes of the run on this machine.
        forks: Data workers are forked, so that a worker costs no second start.
    """

    has_bf16: bool
    has_tf32: bool
    num_cores: int
    num_processes: int = 1
    forks: bool = True


def find_accelerator(fields: Mapping[str, Any]) -> Accelerator | None:
    """Return the accelerator that a stage with these `args` runs on; None for all but CUDA."""
    if fields.get("use_cpu") or not torch.cuda.is_available():
        return None
    return Accelerator(
        has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        has_tf32=is_torch_tf32_available(),
        num_cores=num_cores(),
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        forks=sys.platform == "linux",
    )


def accelerator_defaults(
    fields: Mapping[str, Any], accelerator: Accelerator | None
) -> dict[str, Any]:
    """Return TrainingArguments fields for those that `fields` leaves open; {} without one."""
    if accelerator is None:
        return {}
    defaults: dict[str, Any] = {}
    # DeepSpeed's own file says which precision it uses, and transformers refuses another
    if accelerator.has_bf16 and not fields.get("fp16") and not fields.get("deepspeed"):
        defaults["bf16"] = True
    if accelerator.has_tf32:
        defaults["tf32"] = True
    workers = min(_MAX_WORKERS, accelerator.num_cores // accelerator.num_processes)
    # one core is left to the process that trains
    if accelerator.forks and workers > 1:
        defaults["dataloader_num_workers"] = workers
    return {key: value for key, value in defaults.items() if key not in fields}


def cast_frozen_encoders(
    model: MultiTokenForConditionalGeneration, spec: TrainSpec, args: TrainingArguments
) -> None:
    """Cast encoders that were never trained and will not be to bfloat16, if the run computes in it.

    Encoders with a `dtype` in the recipe, and runs on the CPU, are left alone: there bfloat16 is
    slower on most machines.
    """
    if args.device.type == "cpu" or not args.bf16:
        return
    trained = {name for stage in spec.stages for name in stage.learn.encoders}
    # those of `init_from` are saved with the run, and would be rounded
    trained |= set(model.trained_encoders)
    for name in set(_without_dtype(model)) - trained:
        cast_encoder(model.encoder(name), torch.bfloat16)


def _without_dtype(model: MultiTokenForConditionalGeneration) -> list[str]:
    return [
        name
        for name, modality in model.modalities.items()
        if isinstance(modality, PretrainedModality) and modality.dtype is None
    ]


def describe_defaults(
    fields: Mapping[str, Any],
    accelerator: Accelerator | None,
    model: MultiTokenForConditionalGeneration,
) -> list[str]:
    """Return the line that names the defaults of this run and the key that turns each off."""
    chosen = accelerator_defaults(fields, accelerator)
    cast = [
        name
        for name in _without_dtype(model)
        if any(p.dtype == torch.bfloat16 for p in model.encoder(name).parameters())
    ]
    parts = [
        f"{key} {value}" if key == "dataloader_num_workers" else key
        for key, value in chosen.items()
    ]
    parts += [f"encoder of {name} in bfloat16" for name in cast]
    if not parts:
        return []
    off = [f"{key}: {0 if key == 'dataloader_num_workers' else 'false'}" for key in chosen]
    keys = [f"train.args {', '.join(off)}"] if off else []
    keys += [f"model.modalities.{name}.dtype: float32" for name in cast]
    return [f"on this device by default: {', '.join(parts)} (off by {'; '.join(keys)})"]
