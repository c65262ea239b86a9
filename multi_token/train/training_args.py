"""TrainingArguments of a stage: our defaults, the recipe's fields over them, and fixed fields."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from multi_token.errors import RecipeError
from multi_token.registry import did_you_mean
from multi_token.train.accelerator import accelerator_defaults, find_accelerator

# a run is wrong without these, so a recipe cannot set them
_FIXED: dict[str, Any] = {
    "remove_unused_columns": False,  # media are not in forward's signature
    "label_names": ["labels"],
    "logging_nan_inf_filter": False,  # it would hide a diverging loss
    "prediction_loss_only": True,  # logits at supervised positions have no common length
    "disable_tqdm": True,  # train/progress.py draws the bar
}
_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "logging_steps": 5,
    "save_steps": 200,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    # below 1 it is a share of all steps (transformers 5)
    "warmup_steps": 0.03,
    "max_grad_norm": 1.0,
}
_LOWEST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
# what transformers would apply to the whole model, or cannot do with batches and folders of ours
# -> what to do in its place
_ELSEWHERE: dict[str, str] = {
    "fsdp": "set `train.fsdp: true`, which shards the language model",
    "fsdp_config": "set `train.fsdp`, which has all settings of FSDP",
    "torch_compile": "set `train.compile_layers: true`, which compiles the language model's layers",
    "torch_compile_backend": "set `train.compile_layers: true`, whose backend is inductor",
    "torch_compile_mode": "set `train.compile_layers: true`, whose mode is torch's default",
    "use_liger_kernel": "set `train.liger: true`, which is for the language model's layers",
    "liger_kernel_config": "set `train.liger: true`, which chooses them",
    "label_smoothing_factor": "leave it out: logits are computed at supervised positions alone, "
    "and transformers would compare them with the labels of all",
    "optim_target_modules": "name the trained parts under `learn`",
    "parallelism_config": "set `train.fsdp`, or leave it out",
    "bf16_full_eval": "set `bf16: true`, which is for evaluations too",
    "fp16_full_eval": "set `bf16: true`, which is for evaluations too",
    "push_to_hub": "run `multi-token push RUN` on the trained run",
    "enable_jit_checkpoint": "leave it out: SIGTERM always saves a checkpoint first",
    "save_on_each_node": "leave it out: all machines share `train.output_dir`",
    "resume_from_checkpoint": "leave it out: the same command continues from the last checkpoint",
}
# rows of a step are processes x per_device_train_batch_size x gradient_accumulation_steps, and all
# processes take as many steps; these values would break one of the two
_ACCELERATOR = {"split_batches": False, "dispatch_batches": False, "even_batches": True}


def training_arguments(
    output_dir: Path, fields: Mapping[str, Any], *, seed: int, learning_rate: float
) -> TrainingArguments:
    """Return the TrainingArguments of a stage.

    Raises RecipeError for a field that transformers does not have, and for one that is fixed or set
    elsewhere in a recipe. A DeepSpeed configuration that cannot be used raises it too.
    """
    _check_reserved_fields(fields)
    _check_deepspeed(fields.get("deepspeed"))
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in fields:
        if key not in known:
            raise RecipeError(
                f"train args: {key!r} is not a field of transformers.TrainingArguments"
                + did_you_mean(key, known)
            )
        if key in _FIXED or key in ("output_dir", "learning_rate", "seed"):
            raise RecipeError(
                f"train args: {key!r} is not set here; learning rates are under `learn`, "
                "`output_dir` and `seed` under `train`, and "
                f"{sorted(_FIXED)} are fixed"
            )
    _check_field_types(fields)
    on_cpu = bool(fields.get("use_cpu")) or not torch.accelerator.is_available()
    report_to = ["tensorboard"] if find_spec("tensorboard") is not None else []
    ours = {**_DEFAULTS, "dataloader_pin_memory": not on_cpu, "report_to": report_to}
    ours |= accelerator_defaults(fields, find_accelerator(fields))
    values = {**ours, **fields, **_FIXED}
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        values.pop("ddp_backend", None)  # transformers would wait for other processes
    elif on_cpu:
        values.setdefault("ddp_backend", "gloo")
    values["accelerator_config"] = {
        # a copy to the device would wait for all that was queued before it
        "non_blocking": not on_cpu,
        **(fields.get("accelerator_config") or {}),
        # each rank reads its own rows: dispatching, rank 0 would read all and slice media
        **_ACCELERATOR,
    }
    if values.get("save_strategy") == "best":
        values.setdefault("metric_for_best_model", "loss")
    try:
        args = TrainingArguments(
            output_dir=str(output_dir), seed=seed, learning_rate=learning_rate, **values
        )
        get_reporting_integration_callbacks(args.report_to)  # raises for an unknown logger
        _check_optimizer(args)
    except (ImportError, TypeError, ValueError) as error:
        raise RecipeError(f"train args: {error}") from None
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(args, key) and not args.dataloader_num_workers:
            raise RecipeError(
                f"train args: {key!r} is for data workers; set dataloader_num_workers, or leave it "
                "out"
            )
    if args.fp16 and args.device.type == "cpu":
        raise RecipeError("train args: `fp16` needs a GPU; set `bf16: true`")
    if args.auto_find_batch_size and args.world_size > 1:
        raise RecipeError(
            "train args: with `auto_find_batch_size` each process would choose a batch size of its "
            "own; leave it out (`multi-token train --plan` finds the largest that fits)"
        )
    # with more, transformers wraps the model in nn.DataParallel, which cuts every tensor of a batch
    # along its first dimension: positions of media are no rows
    args._n_gpu = min(args.n_gpu, 1)
    return args


def check_metric(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """Raise RecipeError if checkpoints are compared by another metric than these."""
    chosen = args.metric_for_best_model
    if chosen is not None and chosen.removeprefix("eval_") not in metrics:
        raise RecipeError(
            f"train args: no evaluation computes {chosen!r}; set metric_for_best_model to one of "
            f"{', '.join(metrics)}"
        )


def data_seed(args: TrainingArguments) -> int:
    """Return the seed of the order of rows: `data_seed`, which may be 0, or else `seed`."""
    return args.seed if args.data_seed is None else args.data_seed


def visible_devices_line(args: TrainingArguments) -> str | None:
    """Return the command that trains on all devices, if one process sees more than its own."""
    num = torch.accelerator.device_count()
    if args.use_cpu or args.world_size > 1 or num < 2:
        return None
    return (
        f"{num} devices are visible, and this process trains on one; to train on all of them, "
        f"start `torchrun --nproc-per-node {num} -m multi_token train RECIPE`"
    )


def _check_optimizer(args: TrainingArguments) -> None:
    """Raise ImportError, TypeError or ValueError for an optimizer or schedule that cannot start."""
    name = OptimizerNames(args.optim).value
    if any(kind in name for kind in ("galore", "apollo", "lomo")):
        raise ValueError(
            f"optim: {name} takes all parameters as one, and each part that is trained has a "
            "learning rate of its own; choose another `optim`"
        )
    Trainer.get_optimizer_cls_and_kwargs(args)
    # as the trainer builds it after all rows are read, here of one number
    num_steps = args.max_steps if args.max_steps > 0 else 100
    options: Any = args.lr_scheduler_kwargs  # a mapping: transformers has parsed a text by now
    get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=options,
    )


def mixed_precision(args: TrainingArguments) -> AbstractContextManager[Any]:
    """Autocast of a stage, for all that runs its model beside the training step.

    Probes, trials, samples, the blind test, the teacher and the reference then have the precision
    of training. Leave it before weights change: autocast keeps their casts until its end.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    # as accelerate: DeepSpeed casts by itself, and the CPU has no loss scaling
    if dtype is None or args.deepspeed or (args.device.type == "cpu" and dtype == torch.float16):
        return nullcontext()
    return torch.autocast(args.device.type, dtype=dtype)


def checkpointing_options(args: TrainingArguments) -> dict[str, Any] | None:
    """Return the options of activation checkpointing, or None where it is off."""
    # transformers 5.17 knows it as gradient checkpointing alone
    name = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    if not getattr(args, f"{name}_checkpointing"):
        return None
    return dict(getattr(args, f"{name}_checkpointing_kwargs") or {})


def _check_field_types(fields: Mapping[str, Any]) -> None:
    # TrainingArguments accepts any value for a number, and fails much later
    hints = get_type_hints(TrainingArguments)
    for key, value in fields.items():
        kinds = {hints[key], *get_args(hints[key])}
        numeric = kinds & {int, float, bool} and not kinds & {str, list}
        if not numeric or (value is None and type(None) in kinds):
            continue
        if bool in kinds:
            fits, expected = isinstance(value, bool), "true or false"
        elif float in kinds or isinstance(value, bool):
            # to Python, true is the number 1
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            expected = "a number"
        else:
            lowest = _LOWEST.get(key)
            fits = isinstance(value, int) and (lowest is None or value >= lowest)
            expected = "a whole number" + ("" if lowest is None else f" from {lowest} on")
        if not fits:
            raise RecipeError(f"train args: expected {expected} for {key!r}, got {value!r}")


def _check_reserved_fields(fields: Mapping[str, Any]) -> None:
    for key, remedy in _ELSEWHERE.items():
        if fields.get(key) not in (None, False, "", []):
            raise RecipeError(f"train args: {key!r} is not set here; {remedy}")
    if fields.get("train_sampling_strategy") == "batch_rebalance":
        raise RecipeError(
            "train args: train_sampling_strategy 'batch_rebalance' would decode all media for "
            "lengths; set it to group_by_length, or set `train.packing: true`"
        )
    config = fields.get("accelerator_config") or {}
    if not isinstance(config, Mapping):
        raise RecipeError(
            f"train args: expected a mapping for 'accelerator_config', got {config!r}"
        )
    for key, value in _ACCELERATOR.items():
        if config.get(key) not in (None, value):
            raise RecipeError(
                f"train args: 'accelerator_config.{key}' has to be {str(value).lower()}, since "
                "each process reads rows of its own, and as many as the others; leave it out"
            )
    for variable, what, remedy in (
        ("ACCELERATE_USE_FSDP", "FSDP", _ELSEWHERE["fsdp"]),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", "name its file as `train.args.deepspeed`"),
    ):
        if os.environ.get(variable, "").lower() in ("1", "true") and not fields.get("deepspeed"):
            raise RecipeError(
                f"{variable} makes accelerate use {what}, which this recipe does not configure; "
                f"start plain processes (torchrun), and {remedy}"
            )


def _check_deepspeed(given: Any) -> None:
    """Raise RecipeError for a DeepSpeed configuration that a run cannot use."""
    if not given:
        return
    where = "train.args.deepspeed"
    config = given
    if not isinstance(given, dict):
        where = f"{where} {str(given)!r}"
        try:
            config = json.loads(Path(given).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{where} could not be read: {error.strerror}") from None
        except ValueError as error:
            raise RecipeError(f"{where} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{where} should hold a mapping, got {type(config).__name__}")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise RecipeError(
                f"{where} has a section {key!r}, which would give all trainable parameters one "
                "learning rate; remove it: learning rates are set under `learn`, the rest by "
                "`optim` and `lr_scheduler_type` of `args`"
            )
    if dict(config.get("zero_optimization") or {}).get("stage") == 3:
        raise RecipeError(
            f"{where} asks for ZeRO stage 3, which shards weights that a run saves and loads as "
            "one; use stage 1 or 2, or `train.fsdp: true`, which shards and gathers them"
        )
    if find_spec("deepspeed") is None:
        raise RecipeError(
            f"{where} needs the package deepspeed, which is not installed; install it, or set "
            "`train.fsdp: true`, which needs nothing more"
        )
