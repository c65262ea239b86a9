"""Lines about a stage: parts of the model, trainable groups, loggers, and the wait for data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainingArguments

from multi_token.language_model.quantization import module_bytes, quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.train.parameter_groups import ParameterGroup

if TYPE_CHECKING:
    from multi_token.recipe.train import TrainSpec
    from multi_token.train.trainer import MultiTokenTrainer

_MAX_WAIT = 0.05
"""Share of a stage spent waiting for data, above which the remedy is printed."""


def describe_parts(model: MultiTokenForConditionalGeneration) -> list[str]:
    """A line for each part (precision, size), and one for each unusual capability.

    Raises LanguageModelError for a language model that takes no embeddings.
    """
    parts: dict[str, nn.Module] = {
        f"language model {model.capabilities.name}": model.language_model
    }
    parts |= {f"encoder of {name}": encoder for name, encoder in model.encoders.items()}
    parts |= {f"projector of {name}": projector for name, projector in model.projectors.items()}
    lines = [
        f"{name}: {_precision(part)}, {_size(module_bytes(part))}" for name, part in parts.items()
    ]
    return [*lines, *(f"  {note}" for note in model.capabilities.notes())]


def _precision(part: nn.Module) -> str:
    """`float32`, or `bfloat16 and quantized` where weights differ."""
    # by identity: the storage dtype of a quantized weight (uint8) says nothing to a user
    quantized = {id(p) for p in quantized_parameters(part)}
    dtypes = {
        "quantized" if id(p) in quantized else str(p.dtype).removeprefix("torch.")
        for p in part.parameters()
    }
    return " and ".join(sorted(dtypes)) or "no weights"


def _size(num: int) -> str:
    return f"{num / 1e6:,.1f} MB" if num >= 1e5 else f"{num:,} bytes"


def describe_groups(groups: Sequence[ParameterGroup]) -> list[str]:
    """A line for each trainable group: parameters, precision, learning rate, weight decay."""
    return [
        f"  {group.name}: {sum(p.numel() for p in group.parameters):,} parameters in "
        f"{' and '.join(sorted({str(p.dtype).removeprefix('torch.') for p in group.parameters}))}, "
        f"learning rate {group.lr:g}"
        + (f", weight decay {group.weight_decay:g}" if group.weight_decay else "")
        for group in groups
    ]


def describe_loggers(args: TrainingArguments) -> str:
    """Loggers that get the metrics, besides the run's own report."""
    if args.report_to:
        return f"  logged to {', '.join(args.report_to)} every {args.logging_steps:g} steps"
    if find_spec("tensorboard") is None:
        return (
            "  logged to report.html alone: tensorboard is not installed (`pip install "
            "tensorboard`, or set train.args.report_to to another)"
        )
    return "  logged to report.html alone (train.args.report_to names others)"


def describe_data_wait(trainer: MultiTokenTrainer, spec: TrainSpec) -> str:
    """Share of a stage that was spent waiting for data, and the remedy in this recipe."""
    encoders = trainer.multi_token_model.encoders.values()
    # a cache spares nothing where encoders have no weights, and is wrong where they are trained
    encoded = any(p.numel() for encoder in encoders for p in encoder.parameters())
    trained = any(stage.learn.encoders for stage in spec.stages)
    return data_wait_line(
        trainer.step_metrics.data_wait,
        num_workers=trainer.args.dataloader_num_workers,
        streamed=trainer.batches.streamed,
        can_cache=encoded and not trained and not spec.feature_cache,
    )


def data_wait_line(
    share: float | None, *, num_workers: int, streamed: bool, can_cache: bool = True
) -> str:
    """The share as a line; `can_cache`: a feature cache would spare the encoders' work."""
    if share is None:
        return "  no step was taken"
    text = f"  {share:.1%} of the time was waiting for data"
    if share <= _MAX_WAIT:
        return text
    reader = f"{num_workers} data workers" if num_workers else "the process that trains"
    cache = "train.feature_cache" + (".path: a folder that is filled" if streamed else ": true")
    return (
        f"{text}: rows are read by {reader}; set train.args.dataloader_num_workers: "
        f"{max(2, 2 * num_workers)} if there are cores to spare" + f", or {cache}" * can_cache
    )
