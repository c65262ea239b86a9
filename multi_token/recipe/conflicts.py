"""Settings of a recipe that exclude each other: one table, checked in one loop.

`docs/conflicts.py` renders the table into docs/recipe.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from multi_token.errors import RecipeError
from multi_token.recipe.data import DataSource, DataSpec
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.train import Stage, TrainSpec


@dataclass(frozen=True)
class Settings:
    """The settings of a recipe that hold in one of its stages."""

    model: ModelSpec
    data: DataSpec
    train: TrainSpec
    stage: Stage

    @property
    def args(self) -> dict[str, Any]:
        """TrainingArguments fields of the stage."""
        return {**self.train.args, **self.stage.args}


@dataclass(frozen=True)
class Conflict:
    """Settings that exclude each other, or one that needs another."""

    settings: tuple[str, ...]
    """Paths in `Settings`. `KEY`: is set, and not off; `KEY: null` and `KEY: false`: the opposite;
    `KEY: A, B`: is one of these values."""
    message: str
    """Reason and, after a semicolon, remedy: a format string over `Settings`, `args`, `found`."""
    when: Callable[[Settings], object] | None = None
    """Decides if a stage has the conflict; a name that it returns is `found`. Default: all of
    `settings` hold."""

    def sentence(self, settings: Settings) -> str | None:
        """Return the message, or None if the stage has no such conflict."""
        found = (self.when or self._all_hold)(settings)
        fields = {**vars(settings), "args": settings.args, "found": found}
        return self.message.format_map(fields) if found else None

    def _all_hold(self, settings: Settings) -> bool:
        return all(_holds(settings, setting) for setting in self.settings)


def check_conflicts(model: ModelSpec, data: DataSpec, train: TrainSpec) -> None:
    """Raise RecipeError with a line for every conflict in the sections of a recipe."""
    # every row sees every stage: `args` of a stage override those of the run, so that a conflict of
    # the run's settings may hold in one stage only
    stages = [Settings(model, data, train, stage) for stage in train.stages]
    sentences = [conflict.sentence(stage) for conflict in CONFLICTS for stage in stages]
    # a conflict of settings outside `stages` is found in every stage
    lines = dict.fromkeys(sentence for sentence in sentences if sentence is not None)
    if lines:
        raise RecipeError("\n".join(lines))


def _holds(settings: Settings, setting: str) -> bool:
    # a misspelled key never holds; the test that makes every row fire finds it
    key, _, values = setting.partition(": ")
    value = reduce(_value_at, key.split("."), settings)
    if values in ("", "null", "false"):
        return bool(value) is (values == "")
    return str(value) in values.split(", ")


def _value_at(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else getattr(section, key, None)


def _with_weight(sources: Sequence[DataSource]) -> str | None:
    return next((source.rows for source in sources if source.weight is not None), None)


def _with_facts(settings: Settings) -> str | None:
    modalities = settings.model.modalities.items()
    return next((name for name, modality in modalities if modality.facts is not None), None)


def _with_layers_and_lora(settings: Settings) -> str | None:
    encoders = settings.stage.learn.encoders.items()
    return next((name for name, e in encoders if e.last_layers and e.lora), None)


def _with_another_lora(settings: Settings) -> str | None:
    """An encoder whose LoRA is not that of the first stage that trains the encoder."""
    for name, encoder in settings.stage.learn.encoders.items():
        first = next(s for s in settings.train.stages if name in s.learn.encoders)
        if first.learn.encoders[name].lora != encoder.lora:
            return name
    return None


def _with_other_process_settings(settings: Settings) -> str | None:
    """An argument of the process, which another stage sets to another value."""
    args = [{**settings.train.args, **stage.args} for stage in settings.train.stages]
    keys = ("use_cpu", "ddp_backend", "ddp_timeout")
    return next((key for key in keys if any(a.get(key) != args[0].get(key) for a in args)), None)


def _adapter_before_full(settings: Settings) -> str | None:
    """A stage that trains an adapter before this stage trains all weights."""
    stages = settings.train.stages
    earlier = stages[: stages.index(settings.stage)] if settings.stage.learn.language_model else ()
    return next((stage.name for stage in earlier if stage.learn.adapter), None)


CONFLICTS = (
    Conflict(
        ("data.lengths: headers", "data.on_bad_row: skip"),
        "`data.lengths: headers` decodes nothing before training, so `data.on_bad_row: skip` "
        "cannot leave out a damaged file; set on_bad_row to raise, or lengths to decode",
    ),
    Conflict(
        ("data.lengths: headers", "data.stream"),
        "`data.lengths: headers` is for rows whose lengths are known before training, and "
        "`data.stream` reads rows during training; leave one of them out",
    ),
    Conflict(
        ("data.train.*.weight", "data.stream: null"),
        "`weight` of {found!r} under `data.train` is a source's part of a stream; set "
        "`data.stream: true`, or leave `weight` out",
        when=lambda s: None if s.data.stream else _with_weight(s.data.train),
    ),
    Conflict(
        ("stage.data", "data.stream"),
        "stage {stage.name!r} has `data` of its own, and `data.stream` is one stream for all "
        "stages; leave one of them out",
    ),
    Conflict(
        ("stage.data.*.weight",),
        "`weight` of {found!r} is a source's part of a stream, and the `data` of stage "
        "{stage.name!r} are no stream; leave `weight` out",
        when=lambda s: _with_weight(s.stage.data),
    ),
    Conflict(
        ("data.eval.*.weight",),
        "`weight` of {found!r} under `data.eval` is for training rows, and all held-out rows are "
        "evaluated; leave `weight` out",
        when=lambda s: _with_weight(s.data.eval),
    ),
    Conflict(
        ("args.eval_strategy: steps, epoch", "data.eval: null"),
        "train args: eval_strategy={args[eval_strategy]} needs rows to evaluate on; name held-out "
        "rows under `data.eval`, or leave eval_strategy out",
    ),
    Conflict(
        ("args.load_best_model_at_end", "data.eval: null"),
        "train args: load_best_model_at_end needs evaluations to compare; name held-out rows under "
        "`data.eval`, or leave load_best_model_at_end out",
    ),
    Conflict(
        ("args.save_strategy: best", "data.eval: null"),
        "train args: save_strategy=best needs evaluations to compare; name held-out rows under "
        "`data.eval`, or leave save_strategy out",
    ),
    # devices and processes are joined once, before the first stage
    Conflict(
        ("args.use_cpu, ddp_backend or ddp_timeout", "another value in another stage"),
        "train args: {found!r} is for all stages, and here they differ in it; set it under "
        "`train.args` alone",
        when=_with_other_process_settings,
    ),
    Conflict(
        ("data.stream", "args.max_steps: null"),
        "stage {stage.name!r} trains on a stream (`data.stream`), which has no end; set "
        "`max_steps` in its `args`",
        when=lambda s: s.data.stream and int(s.args.get("max_steps") or -1) < 1,
    ),
    Conflict(
        ("data.stream", "args.train_sampling_strategy: sequential, group_by_length"),
        "train args: train_sampling_strategy is {args[train_sampling_strategy]!r}, which needs the "
        "lengths of all rows, and `data.stream` reads rows during training; leave one of them out",
    ),
    Conflict(
        ("data.stream", "train.feature_cache.path: null"),
        "train.feature_cache would be filled from all rows, which `data.stream` does not read "
        "before training; fill a folder with `multi-token data encode` and name it as `path`, or "
        "set it to false",
        when=lambda s: (
            s.data.stream
            and (cache := s.train.feature_cache)
            and (cache.path is None or cache.auto)
        ),
    ),
    # the longest row is unknown, so a pack has to hold any row that `max_tokens` allows
    Conflict(
        ("data.stream", "train.packing", "train.pack_tokens < data.max_tokens"),
        "train.pack_tokens is {train.pack_tokens}, but a stream may bring a row of "
        "data.max_tokens ({data.max_tokens}); set pack_tokens to at least that",
        when=lambda s: (
            s.data.stream and s.train.packing and (s.train.pack_tokens or 0) < s.data.max_tokens
        ),
    ),
    Conflict(
        ("train.packing", "args.auto_find_batch_size"),
        "train args: `auto_find_batch_size` changes the rows of a batch, and a batch of "
        "`train.packing` is one pack; set `pack_tokens`, and leave auto_find_batch_size out",
    ),
    Conflict(
        ("train.packing", "args.train_sampling_strategy: sequential, group_by_length"),
        "train args: train_sampling_strategy is {args[train_sampling_strategy]!r}, but "
        "`train.packing` puts rows in packs of its own; leave it out, or set packing to false",
    ),
    Conflict(
        ("train.pack_tokens", "train.packing: null"),
        "`pack_tokens` needs `packing: true`; set that, or leave `pack_tokens` out",
    ),
    Conflict(
        ("train.pack_items", "train.packing: null"),
        "`pack_items` needs `packing: true`; set that, or leave `pack_items` out",
    ),
    # shared prefixes are measured from the texts of the rows, and facts are known from media alone
    Conflict(
        ("train.packing.share", "model.modalities.*.facts"),
        "`share` of packing measures prefixes without media, and `facts` of {found!r} writes text "
        "that only its media tell; set packing to true, or leave `facts` out",
        when=lambda s: (s.train.packing and s.train.packing.share and _with_facts(s)) or None,
    ),
    # FSDP2 shards parameters by `DTensor`, and quantized weights are not parameters of floats
    Conflict(
        ("train.fsdp", "model.quantization"),
        "train.fsdp shards floating-point weights, and model.quantization "
        "({model.quantization.kind}) stores integers; set one of them to null (QLoRA trains with a "
        "copy in each process)",
    ),
    Conflict(
        ("train.fsdp", "args.fsdp"),
        "`train.fsdp` and `fsdp` of `args` exclude each other; keep `train.fsdp`",
    ),
    Conflict(
        ("train.fsdp", "args.deepspeed"),
        "`train.fsdp` and `deepspeed` of `args` exclude each other; keep one",
    ),
    # a sharded forward is a collective: a process that skips it stops all others
    Conflict(
        ("train.fsdp", "stage.distillation.missing: cross_entropy"),
        "with `fsdp` the teacher of stage {stage.name!r} must run in every step of every process, "
        "or the others wait for it; set `distillation.missing` to raise",
    ),
    # DPO has padded batches of pairs alone, and computes the reference before the first step from a
    # complete model and all rows
    Conflict(
        ("stage.dpo", "train.fsdp"),
        "`fsdp` and the `dpo` of stage {stage.name!r} exclude each other; keep one, or give that "
        "stage a recipe of its own with `init_from`",
    ),
    Conflict(
        ("stage.dpo", "train.packing"),
        "`packing` and the `dpo` of stage {stage.name!r} exclude each other; keep one, or give "
        "that stage a recipe of its own with `init_from`",
    ),
    Conflict(
        ("stage.dpo", "data.stream"),
        "`data.stream` and the `dpo` of stage {stage.name!r} exclude each other; keep one",
    ),
    Conflict(
        ("stage.dpo", "stage.distillation"),
        "`distillation` and `dpo` of stage {stage.name!r} exclude each other; keep one",
    ),
    Conflict(
        ("stage.dpo.label_smoothing", "stage.dpo.loss: ipo, hinge"),
        "`label_smoothing` is for the loss sigmoid, not for {stage.dpo.loss}; set it to 0",
    ),
    Conflict(
        ("stage.distillation", "stage.learn.language_model"),
        "stage {stage.name!r} has `distillation` from the language model, so it cannot train all "
        "of it; train an `adapter`, or leave `distillation` out",
    ),
    Conflict(
        ("stage.learn.adapter", "stage.learn.language_model"),
        "`adapter` and `language_model` of stage {stage.name!r} exclude each other: an adapter is "
        "for weights that do not change; keep one",
    ),
    Conflict(
        ("stage.learn.language_model", "an earlier stage's learn.adapter"),
        "stage {stage.name!r} trains `language_model` after stage {found!r}, which trains an "
        "adapter for the weights as they were before; train the language model first, or merge the "
        "adapter (`multi-token export RUN --to merged`) and train that",
        when=_adapter_before_full,
    ),
    Conflict(
        ("stage.learn.language_model", "model.quantization"),
        "stage {stage.name!r} trains `language_model`, whose weights `model.quantization` "
        "({model.quantization.kind}) stores in integers; train an `adapter` on it (QLoRA), or set "
        "model.quantization to null",
    ),
    # DoRA needs the norm of each weight; PEFT dequantizes 4 bits for it, but not LLM.int8
    Conflict(
        ("stage.learn.adapter", "train.adapter.use_dora", "model.quantization.kind: 8bit"),
        "train.adapter: `use_dora` reads complete weights, which 8bit does not keep; use 4bit, or "
        "set `use_dora` to false",
    ),
    Conflict(
        ("stage.learn.projector_biases", "stage.learn.projectors: null"),
        "`projector_biases` of stage {stage.name!r} needs `projectors`; set both, or neither",
    ),
    Conflict(
        ("stage.learn.encoders.*.last_layers", "stage.learn.encoders.*.lora"),
        "`last_layers` and `lora` of the encoder of {found!r} exclude each other; keep one",
        when=_with_layers_and_lora,
    ),
    # the checkpoint holds one state per encoder: LoRA or plain tensors
    Conflict(
        ("stage.learn.encoders.*.lora", "another stage's lora of the same encoder"),
        "the encoder of {found!r} is trained by other means in stage {stage.name!r} than before; "
        "give all stages that name it the same `lora`, or none",
        when=_with_another_lora,
    ),
    Conflict(
        ("stage.learn.encoders", "train.feature_cache: true"),
        "`feature_cache` keeps the features of frozen encoders, but stage {stage.name!r} trains "
        "the encoder of {found!r}; set feature_cache to false",
        when=lambda s: (
            (cache := s.train.feature_cache)
            and not cache.auto
            and next(iter(s.stage.learn.encoders), None)
        ),
    ),
    Conflict(
        ("train.init_from", "the same train.output_dir"),
        "`init_from` is the run's own `output_dir`; choose another folder for one of them",
        when=lambda s: (
            s.train.init_from is not None
            and Path(s.train.init_from).absolute() == Path(s.train.output_dir).absolute()
        ),
    ),
)
