"""Preparation of a run: model, rows, feature cache and held-out rows, before any stage begins.

`train.run` and `train.plan.run_plan` are the two consumers of a `Run`.

    RUN/recipe.yaml, config.json, *.safetensors, adapter/            the result
    RUN/cache/*.safetensors, *.json                                  features of frozen encoders
    RUN/stages/0-closed-form, 1-<name>, ...                                state of each stage
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from multi_token.checkpoint.atomic import atomic_file
from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.load import load_trained, read_config
from multi_token.checkpoint.references import absolutize, resolve_references
from multi_token.checkpoint.save import CONFIG
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.policy import choose_feature_cache, fill_cache
from multi_token.data.shared_prefix import SharedPrefixGroup
from multi_token.data.sources import (
    TrainingSource,
    build_dataset,
    check_has_items,
    check_stage_data,
    good_rows,
    open_source,
    sources_of_stage,
    training_sources,
)
from multi_token.data.streaming import StreamDataset, open_streams
from multi_token.distributed import broadcast_from_main, num_processes
from multi_token.encoders import build_encoders
from multi_token.errors import RecipeError
from multi_token.language_model.capabilities import Capabilities, LazyCapability
from multi_token.language_model.loading import load_language_model
from multi_token.language_model.probe import check_trainable, probe
from multi_token.modalities.base import Encoder
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.data import DataSource
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.recipe import Recipe, differences
from multi_token.recipe.train import Stage, TrainSpec
from multi_token.registry import validate_fields
from multi_token.train.accelerator import (
    cast_frozen_encoders,
    describe_defaults,
    find_accelerator,
)
from multi_token.train.compile import apply_kernels
from multi_token.train.dpo import DpoLoss
from multi_token.train.evaluation import EvaluationCallback
from multi_token.train.fsdp import check_hooks_of_trainer, is_sharded, run_in_shards
from multi_token.train.parameter_groups import trainable_encoders
from multi_token.train.progress import describe_parts
from multi_token.train.run_report import RunReport
from multi_token.train.training_args import (
    check_metric,
    data_seed,
    mixed_precision,
    training_arguments,
    visible_devices_line,
)

_DONE = "done.json"


@dataclass(frozen=True)
class StageRun:
    """One stage of a run: its section of the recipe, its folder, its arguments."""

    spec: Stage
    folder: Path
    args: TrainingArguments


@dataclass
class Run:
    """All that the stages of a run share."""

    recipe: Recipe
    stages: Sequence[StageRun]
    model: MultiTokenForConditionalGeneration
    """Replaced after a stage with FSDP, whose shards cannot be put together in place."""
    sources: Sequence[TrainingSource]
    """Training rows of all stages; of a stream the first ones, for statistics and the plan."""
    stream: StreamDataset | None
    """The stream that all stages train on; None where each has a dataset of its sources."""
    evaluation: EvaluationCallback
    cache: FeatureCache | None
    initialized: Sequence[str]
    """Modalities that come from another run (`train.init_from`)."""
    console: Console
    shared_prefixes: dict[tuple[int, ...], Sequence[SharedPrefixGroup]] = field(
        default_factory=dict
    )
    """Sources, by the ids of their rows -> rows that begin with the same media, once a stage has
    asked for them."""

    def rows_of(self, stage: Stage) -> tuple[list[TrainingSource], Dataset[Any]]:
        """Return the training rows of a stage, as sources and as a dataset."""
        if self.stream is not None:
            return list(self.sources), self.stream
        own = sources_of_stage(self.recipe, stage, self.sources)
        return own, build_dataset(own, self.model.modalities)


def closed_form_folder(recipe: Recipe) -> Path:
    """Folder of the closed-form stage, which comes before the recipe's own."""
    return Path(recipe.train.output_dir) / "stages" / "0-closed-form"


def open_stages(recipe: Recipe) -> list[StageRun]:
    """Return the stages of a recipe; processes that were started together meet here."""
    train = recipe.train
    defaults = {"eval_strategy": "steps", "eval_steps": 200} if recipe.data.eval else {}
    stages = []
    for number, stage in enumerate(train.stages, 1):
        folder = Path(train.output_dir) / "stages" / f"{number}-{stage.name}"
        fields = {**defaults, **train.args, **stage.args}
        args = training_arguments(
            folder, fields, seed=train.seed, learning_rate=stage.learn.logged_lr
        )
        check_metric(args, ("loss",) if stage.dpo is None else DpoLoss.METRICS)
        stages.append(StageRun(stage, folder, args))
    stages[0].args.device  # noqa: B018 - transformers joins the process group when it is asked
    if is_sharded(train):
        check_hooks_of_trainer()
    return stages


def mark_done(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a stage as done; from now on the run takes its result instead of training it."""
    # by rename: a stage that is killed here must not count as done
    with atomic_file(folder / _DONE) as partial:
        partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def is_done(folder: Path) -> bool:
    """True in all processes if a stage's folder has the mark."""
    # the main process decides: on shared storage a file may appear later for others
    return broadcast_from_main((folder / _DONE).is_file)


def compose_model(
    recipe: Recipe, args: TrainingArguments, capabilities: Capabilities | None = None
) -> MultiTokenForConditionalGeneration:
    """Compose the recipe's model on the device of this process, with the kernels it asks for.

    A language model that several processes shard stays on the host, mapped from its files, except
    for its input embeddings. `capabilities`: those that an earlier model of the run has.
    """
    model = MultiTokenForConditionalGeneration.from_spec(
        recipe.model, max_tokens=recipe.data.max_tokens
    )
    if is_sharded(recipe.train):
        embeddings = model.language_model.get_input_embeddings()
        for part in (model.encoders, model.projectors, embeddings):
            part.to(args.device)
        model.capabilities = capabilities or _probe_in_shards(recipe, args)
    else:
        nn.Module.to(model, args.device)  # transformers' own hides its arguments
    apply_kernels(model.language_model, recipe.train, args.device)
    with mixed_precision(args):
        model.capabilities  # noqa: B018 - probed as it trains, and then cached
    return model


def _probe_in_shards(recipe: Recipe, args: TrainingArguments) -> Capabilities:
    """Probe a language model that no device holds whole; it is dropped afterwards. Collective."""
    spec = recipe.model
    language_model = load_language_model(
        spec.language_model,
        revision=spec.revision,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        quantization=spec.quantization,
    )
    apply_kernels(language_model, recipe.train, args.device)
    run_in_shards(language_model, args.device, bf16=args.mixed_precision == "bf16")
    with mixed_precision(args):
        capabilities = probe(language_model)
        if recipe.train.packing is not None:
            # found now: later only the model that is dropped could answer
            for name in get_args(LazyCapability):
                getattr(capabilities, name)
        check_trainable(language_model)
    capabilities.probe = None  # it refers to the model that is dropped
    del language_model
    gc.collect()  # FSDP2's units refer to each other
    return capabilities


def prepare(recipe: Recipe, stages: Sequence[StageRun], console: Console) -> Run:
    """Compose the model, open its rows, and read them once to know which are good.

    Raises RecipeError for a recipe that cannot be run, RowError for bad rows unless the recipe
    skips them.
    """
    spec, args = recipe.train, stages[0].args
    if (line := visible_devices_line(args)) is not None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    # before the model: projectors and encoders without weights draw theirs here
    set_seed(spec.seed)
    model = compose_model(recipe, args)
    initialized: Sequence[str] = ()
    start = closed_form_folder(recipe)
    if is_done(start):
        load_trained(model, start)
    elif spec.init_from is not None:
        initialized = init_from_run(model, spec)
        console.print(
            f"{', '.join(initialized)}: initialized from {spec.init_from}", highlight=False
        )
    cast_frozen_encoders(model, spec, args)
    parts = describe_parts(model)
    fields = {**spec.args, **stages[0].spec.args}
    defaults = describe_defaults(fields, find_accelerator(fields), model)
    console.print(*parts, *defaults, sep="\n", highlight=False)
    if spec.fsdp is not None and num_processes() == 1:
        console.print("train.fsdp: one process trains, which shards nothing; start several")
    # after the model is described: the description says why packing is refused
    if spec.packing is not None:
        model.capabilities.require("supports_packing")
        if spec.packing.share:
            model.capabilities.require("supports_shared_prefix")
    streams = None
    if recipe.data.stream is None:
        sources = [
            open_source(source, model.processor, recipe, None)
            for source in training_sources(recipe)
        ]
    else:
        streams = open_streams(model.require_processor(), recipe, seed=data_seed(args))
        sources = streams.first_rows(max(recipe.data.stream.window, spec.calibration_items))
        console.print("data.stream: its first rows are read for statistics and the plan")
    encoders = {name: model.encoder(name) for name in model.modalities}
    cache = choose_feature_cache(
        recipe,
        model.modalities,
        encoders,
        sources,
        trained=[trainable_encoders(model, stage.learn) for stage in spec.stages],
        arguments=[s.args for s in stages],
        console=console,
    )
    if cache is not None:
        sources = [source.with_processor(cache=cache) for source in sources]
        if streams is None:
            fill_cache(recipe, model.modalities, encoders, sources, cache, console)
        else:
            # nothing is filled: rows of a stream are not known before
            cache.register_encoders(model.modalities, encoders)
    # Rows are scanned with all that any stage reads of them, so that a row without a text or a
    # rejected answer is found now and not in the middle of a later stage.
    sources = [
        source.with_processor(
            distillation=of_source.distillation_mode, preference=of_source.preference_mode
        )
        for source, of_source in zip(sources, _stages_by_source(recipe), strict=True)
    ]
    sources = [s.with_processor(preference=None) for s in good_rows(sources, recipe, console)]
    check_has_items(sources, recipe)
    for stage in spec.stages:
        if stage.data:
            own = sources_of_stage(recipe, stage, sources)
            check_stage_data(recipe, stage, own)
    held_out = _held_out(model, recipe, cache, console)
    print_fn = partial(console.print, highlight=False, soft_wrap=True)
    report = RunReport(Path(spec.output_dir), recipe, parts, print_fn=print_fn)
    return Run(
        recipe,
        stages,
        model,
        sources,
        None if streams is None else streams.with_sources(sources),
        EvaluationCallback(model, held_out, spec, report, console),
        cache,
        initialized,
        console,
    )


def _stages_by_source(recipe: Recipe) -> list[TrainSpec]:
    """Return the `train` section with the stages of each of the training sources alone."""
    spec = recipe.train
    return [
        spec.model_copy(
            update={"stages": [s for s in spec.stages if source in (s.data or recipe.data.train)]}
        )
        for source in training_sources(recipe)
    ]


def open_rows(
    model: MultiTokenForConditionalGeneration,
    recipe: Recipe,
    specs: Sequence[DataSource],
    cache: FeatureCache | None,
    console: Console,
) -> list[TrainingSource]:
    """Open sources beside the training rows; their media are added to the feature cache."""
    sources = [open_source(source, model.processor, recipe, cache) for source in specs]
    if cache is not None:
        encoders = {name: model.encoder(name) for name in model.modalities}
        fill_cache(recipe, model.modalities, encoders, sources, cache, console)
    return sources


def _held_out(
    model: MultiTokenForConditionalGeneration,
    recipe: Recipe,
    cache: FeatureCache | None,
    console: Console,
) -> list[TrainingSource]:
    if not recipe.data.eval:
        return []
    sources = open_rows(model, recipe, recipe.data.eval, cache, console)
    # a held-out row without a rejected answer is no fault: it is evaluated by cross entropy
    mode = recipe.train.preference_mode and "optional"
    sources = [source.with_processor(preference=mode) for source in sources]
    return [s.with_processor(preference=None) for s in good_rows(sources, recipe, console)]


def initial_encoders(recipe: Recipe) -> dict[str, Encoder]:
    """Return the encoders that a run of the recipe starts with."""
    if recipe.train.init_from is None:
        return build_encoders(recipe.model.modalities)
    # a run that trained encoders holds them in its checkpoint, which loads as one model
    model = MultiTokenForConditionalGeneration.from_spec(recipe.model)
    init_from_run(model, recipe.train)
    return {name: model.encoder(name) for name in model.modalities}


def init_from_run(model: MultiTokenForConditionalGeneration, spec: TrainSpec) -> list[str]:
    """Load the trained parts of a run: projectors, encoders, adapter, language model.

    Returns the names of the run's modalities. Raises RecipeError for a run with modalities that the
    recipe lacks or whose settings differ, CheckpointError for another language model.
    """
    run = spec.init_from
    assert run is not None
    fields = read_config(run)
    folder = local_folder(run)
    theirs = validate_fields(
        ModelSpec, resolve_references(fields["model"], folder), where=str(folder / CONFIG)
    )
    names = list(theirs.modalities)
    lacking = [name for name in names if name not in model.modalities]
    if lacking:
        raise RecipeError(
            f"train.init_from: {run} has {', '.join(lacking)}, which the recipe lacks; add "
            "them to `model.modalities` under the same names"
        )
    described = absolutize(theirs.model_dump(mode="json"))["modalities"]
    for name in names:
        changed = [
            change
            for change in differences(described[name], model.config.model["modalities"][name])
            # neither changes what the modality computes
            if change[0] not in ("dtype", "facts")
        ]
        # `type` first: modalities of different types differ in nearly every other field too
        for key, before, now in sorted(changed, key=lambda change: change[0] != "type")[:1]:
            raise RecipeError(
                f"train.init_from: {name}.{key} is {before!r} in {run} and {now!r} in the recipe; "
                "the settings of its modalities have to stay the same"
            )
    in_full = [stage.name for stage in spec.stages if stage.learn.language_model is not None]
    if fields["adapter"] and in_full:
        raise RecipeError(
            f"stage {in_full[0]!r} trains `language_model`, but {run} has an adapter, which fits "
            f"only the weights it was trained with; merge it (`multi-token export {run} --to "
            "merged`) and name that folder"
        )
    load_trained(model, folder, fields)
    # after loading, which attaches the adapter of the run
    adapters: Any = getattr(model.language_model, "peft_config", None)
    if adapters and any(stage.learn.adapter is not None for stage in spec.stages):
        for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora"):
            before, now = getattr(adapters["default"], key), getattr(spec.adapter, key)
            if before != now:
                raise RecipeError(
                    f"train.adapter.{key} is {now}, but the adapter of {run} has {before}, which "
                    "cannot change; set it to that"
                )
    return names
