"""A recipe -> a trained model in the run's folder. The same recipe again goes on where it stopped.

    RUN/recipe.yaml, config.json, *.safetensors, adapter/            the result (checkpoint/load.py)
    RUN/cache/*.safetensors, *.json                                  features of frozen encoders
    RUN/stages/0-closed-form, 1-<name>, ...                                each stage's own state

Border: the order of the stages. Each step is somebody else's: data/, align.py, trainer.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, set_seed

from multi_token.checkpoint.load import CONFIG, compose, load, load_trained, move_to_device, save
from multi_token.collate import Collator
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.policy import (
    choose_feature_cache,
    fill_cache,
    register_encoders,
)
from multi_token.data.packing import packing_plan, shared_prefix_groups
from multi_token.data.sources import TrainingSource, check_has_items, good_rows, open_source
from multi_token.data.streaming import StreamDataset, open_streams
from multi_token.distributed import (
    all_gather,
    barrier,
    broadcast_from_main,
    is_main_process,
    num_processes,
    peer_errors,
)
from multi_token.encoders import attach_lora, check_gradients_reach
from multi_token.errors import Interrupted, RecipeError
from multi_token.language_model.lora import attach_adapter
from multi_token.language_model.probe import check_trainable
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import Stage, TrainSpec
from multi_token.train.closed_form import calibrate, captioned_items, encode_items, fit_closed_form
from multi_token.train.compile import apply_kernels
from multi_token.train.consistency import check_same_recipe
from multi_token.train.distillation import DistillationCollator
from multi_token.train.dpo import PreferenceCollator, PreferenceDataset
from multi_token.train.dpo_reference import (
    held_out_preference_dataset,
    load_or_compute_reference,
    preference_dataset,
)
from multi_token.train.evaluation import EvaluationCallback, build_dataset, evaluation_defaults
from multi_token.train.init_from import init_from_run
from multi_token.train.parameter_groups import parameter_groups, trainable_encoders
from multi_token.train.plan.estimate import print_plan
from multi_token.train.plan.oom import explain_oom
from multi_token.train.plan.preparation import estimate_encodings
from multi_token.train.progress import (
    ProgressBarCallback,
    StopOnInterrupt,
    describe_data_wait,
    describe_groups,
    describe_loggers,
    describe_parts,
)
from multi_token.train.resume import RECIPE, claim_run_folder, last_checkpoint, raise_on_write_error
from multi_token.train.run_report import RunReport
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import training_arguments

_DONE = "done.json"


def plan(recipe: Recipe, *, console: Console | None = None) -> None:
    """Say of every stage what it will do, need and take, from a few steps that are only tried.

    Nothing is written where the run would be. Raises RecipeError in one of several processes.
    """
    if num_processes() > 1:
        raise RecipeError("a plan is made by one process; start `--plan` without torchrun")
    with tempfile.TemporaryDirectory() as folder:
        fields = recipe.model_dump(mode="json")
        fields["train"] |= {"output_dir": folder, "feature_cache": False}
        train(Recipe.model_validate(fields), console=console, planned=recipe)


@peer_errors()
def train(
    recipe: Recipe, *, console: Console | None = None, planned: Recipe | None = None
) -> MultiTokenForConditionalGeneration:
    """Run every stage of a recipe that is not done yet, and return the trained model.

    `planned`: build each stage, and say its plan instead of running it (see `plan`); it is the
    recipe as it was given, `recipe` the one that can be tried.

    Raises RecipeError for a recipe that cannot be run, RowError for bad rows (unless the recipe
    skips them), Interrupted after Ctrl-C.
    """
    console = console or Console(stderr=True)
    out = Path(recipe.train.output_dir)
    stage_folders = [
        out / "stages" / f"{i}-{stage.name}" for i, stage in enumerate(recipe.train.stages, 1)
    ]
    arguments = [
        training_arguments(
            folder,
            {**evaluation_defaults(bool(recipe.data.eval)), **recipe.train.args, **stage.args},
            seed=recipe.train.seed,
            learning_rate=stage.learn.logged_lr,
        )
        for folder, stage in zip(stage_folders, recipe.train.stages, strict=True)
    ]
    arguments[0].device  # noqa: B018 - processes that were started together meet when it is asked
    if not is_main_process():
        console = Console(quiet=True)
    _prepare_output_dir(out, recipe)
    if broadcast_from_main(
        lambda: (out / CONFIG).is_file() and all((f / _DONE).is_file() for f in stage_folders)
    ):
        console.print(f"{out} is trained already")
        return load(out)

    set_seed(recipe.train.seed)
    model = compose(recipe.model, max_tokens=recipe.data.max_tokens)
    move_to_device(model, arguments[0].device)
    apply_kernels(model.language_model, recipe.train, arguments[0].device)
    start, taken = out / "stages" / "0-closed-form", ()
    begun = broadcast_from_main((start / _DONE).is_file)
    if begun:
        load_trained(model, start)
    elif recipe.train.init_from is not None:
        taken = init_from_run(model, recipe.train)
        console.print(
            f"{', '.join(taken)}: taken over from {recipe.train.init_from}", highlight=False
        )
    console.print(*describe_parts(model), sep="\n", highlight=False)
    if recipe.train.fsdp is not None and num_processes() == 1:
        console.print("train.fsdp: one process trains, which cuts nothing; start several")
    if recipe.train.packing is not None:
        model.capabilities.require("supports_packing")
        if recipe.train.packing.share:
            model.capabilities.require("supports_shared_prefix")
    streams = None
    if recipe.data.stream is None:
        sources = [open_source(source, model, recipe, None) for source in recipe.data.train]
    else:
        assert model.processor is not None
        streams = open_streams(
            model.processor, recipe, seed=arguments[0].data_seed or recipe.train.seed
        )
        sources = streams.first_rows(max(recipe.data.stream.window, recipe.train.calibration_items))
        console.print("data.stream: its first rows are read for statistics and the plan")
    cache = choose_feature_cache(model, recipe, sources, arguments, console)
    if cache is not None:
        sources = [source.with_feature_cache(cache) for source in sources]
        if streams is None:
            fill_cache(model, sources, cache, console)
        else:
            register_encoders(cache, model)
    sources = [source.with_distillation(recipe.train.distillation_mode) for source in sources]
    sources = [source.with_preference(recipe.train.preference_mode) for source in sources]
    sources = [source.with_preference(None) for source in good_rows(sources, recipe, console)]
    check_has_items(sources, recipe)
    dataset = build_dataset(sources, model) if streams is None else streams.with_sources(sources)
    held_out = [open_source(source, model, recipe, cache) for source in recipe.data.eval]
    if held_out:
        if cache is not None:
            fill_cache(model, held_out, cache, console)
        held_out = [
            source.with_preference(recipe.train.preference_mode and "optional")
            for source in held_out
        ]
        held_out = [source.with_preference(None) for source in good_rows(held_out, recipe, console)]
    watch = EvaluationCallback(
        model, held_out, recipe.train, RunReport(out, recipe, describe_parts(model)), console
    )
    only_plan = planned is not None
    if planned is not None:
        for one in estimate_encodings(model, sources, planned, initialized=taken):
            console.print(str(one), highlight=False)
    if not begun and not only_plan:
        _closed_form_stage(model, sources, recipe, cache, console, initialized=taken)
        if is_main_process():
            with raise_on_write_error(start):
                save(model, start)
                _mark_done(start, {})
        barrier()
        if not is_main_process():
            load_trained(model, start)  # where sums are rounded otherwise, projectors would be too
    for stage, folder, args in zip(recipe.train.stages, stage_folders, arguments, strict=True):
        if stage.learn.adapter is not None and not hasattr(model.language_model, "peft_config"):
            # a seed of its own, so that a resumed run draws the same adapter
            set_seed(recipe.train.seed)
            model.language_model = attach_adapter(model.language_model, recipe.train.adapter)
        for name, learner in stage.learn.encoders.items():
            if learner.lora is not None and model.encoder(name).pretrained:
                set_seed(recipe.train.seed)
                attach_lora(name, model.encoder(name), learner.lora)
        if broadcast_from_main((folder / _DONE).is_file):
            load_trained(model, folder / "result")
            continue
        _run_stage(
            model,
            dataset,
            stage,
            folder,
            args,
            console,
            sources=sources,
            spec=recipe.train,
            watch=watch,
            only_plan=only_plan,
        )
        if recipe.train.fsdp is not None and num_processes() > 1:
            # what was cut into pieces stays so: the next stage needs it whole
            model = compose(recipe.model, max_tokens=recipe.data.max_tokens)
            move_to_device(model, args.device)
            apply_kernels(model.language_model, recipe.train, args.device)
            load_trained(model, folder / "result")
    if only_plan:
        return model
    if is_main_process():
        with raise_on_write_error(out):
            save(model, out)
    barrier()
    watch.finish(model)
    console.print(f"saved to {out}")
    return model.eval()


def _prepare_output_dir(out: Path, recipe: Recipe) -> None:
    """Make the folder this recipe's, once for all processes."""
    check_same_recipe(recipe)
    if is_main_process():
        claim_run_folder(out, recipe)
    barrier()
    if not all(all_gather((out / RECIPE).is_file())):
        raise RecipeError(
            f"train.output_dir {out.absolute()} is not the same folder for all processes; name one "
            "on storage that all machines share"
        )


def _closed_form_stage(
    model: MultiTokenForConditionalGeneration,
    sources: Sequence[TrainingSource],
    recipe: Recipe,
    cache: FeatureCache | None,
    console: Console,
    *,
    initialized: Collection[str],
) -> None:
    """Stage zero: feature statistics of every modality, then the closed-form start.

    Those that were `taken` over are left as they are.
    """
    pairs = [pair for source in sources for pair in source.conversations()]
    spec = recipe.train.closed_form
    if spec is not None and spec.rows is not None:
        aligned = [open_source(source, model, recipe, cache) for source in spec.rows]
        if cache is not None:
            fill_cache(model, aligned, cache, console)
        aligned = good_rows(aligned, recipe, console)
        captions = [c for source in aligned for c in captioned_items(source.conversations())]
    else:
        captions = list(captioned_items(pairs))
    for name in model.modalities:
        if name in initialized:
            continue
        items = [(item, r) for c, r in pairs for item in c.media if item.modality == name]
        step = max(1, -(-len(items) // recipe.train.calibration_items))
        if calibrate(model, name, items[::step]) == 0:
            console.print(f"{name}: no item in the training rows; its projector starts as it is")
            continue
        if spec is None:
            continue
        if not model.encoder(name).pretrained:
            console.print(
                f"{name}: no closed-form start, since its encoder starts from random weights",
                highlight=False,
            )
            continue
        chosen = [c for c in captions if c.item.modality == name]
        num_aligned = fit_closed_form(model, name, chosen, spec=spec)
        console.print(
            f"{name}: closed-form start from {num_aligned} captioned items"
            if num_aligned
            else f"{name}: no captioned rows (one item, one answer), so it starts from random",
            highlight=False,
        )


def _run_stage(
    model: MultiTokenForConditionalGeneration,
    dataset: ConcatDataset[Any] | StreamDataset,
    stage: Stage,
    folder: Path,
    args: Any,
    console: Console,
    *,
    sources: Sequence[TrainingSource],
    spec: TrainSpec,
    watch: EvaluationCallback,
    only_plan: bool,
) -> None:
    assert model.processor is not None
    pairs: PreferenceDataset | None = None
    held_out: Any = watch.dataset if args.eval_strategy != "no" else None
    if stage.dpo is not None:
        sources, pairs = preference_dataset(sources, stage, model)
        if held_out is not None:
            held_out = held_out_preference_dataset(watch.held_out, model, console) or held_out
    lengths = [length for source in sources for length in source.lengths]
    num_items: list[int] = []
    if spec.pack_items is not None:
        num_items = [len(c.media) for source in sources for c, _ in source.conversations()]
    share = spec.packing is not None and spec.packing.share
    # the rows of a stream are not known before; those of a pack share what they happen to share
    look_for_groups = share and not isinstance(dataset, StreamDataset)
    packing = packing_plan(
        spec,
        lengths,
        num_items,
        num_rows=args.per_device_train_batch_size,
        groups=shared_prefix_groups(sources, dataset) if look_for_groups else (),
    )
    collator = Collator(model.modalities, model.processor.chat.filler_id, share=share)
    trainer = MultiTokenTrainer(
        model,
        learn=stage.learn,
        lengths=lengths if pairs is None else pairs.num_tokens,
        packing=packing,
        fsdp=spec.fsdp,
        compile_layers=spec.compile_layers,
        args=args,
        train_dataset=dataset if pairs is None else pairs,
        eval_dataset=held_out,
        peak_tflops=spec.peak_tflops,
        teacher=stage.distillation,
        dpo=stage.dpo,
        print_fn=partial(console.print, highlight=False, markup=False),
        data_collator=_build_collator(collator, stage, packed=packing is not None),
    )
    for name, learner in trainable_encoders(model, stage.learn).items():
        one = next((pair for s in sources for pair in s.items() if pair[0].modality == name), None)
        if one is not None:
            (features,) = encode_items(model, name, [one], batch_size=1)
            check_gradients_reach(name, model.encoder(name), learner, features)
    num_learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_all = sum(p.numel() for p in model.parameters())
    learns = describe_groups(parameter_groups(model, stage.learn, weight_decay=args.weight_decay))
    console.print(
        f"stage {stage.name}: {num_learned:,} of {num_all:,} parameters learn",
        *learns,
        describe_loggers(args),
        sep="\n",
        highlight=False,
    )
    print_plan(trainer, stage.name, console, at_length=only_plan)
    if only_plan:
        return
    watch.attach(trainer, stage.name, learns)
    check_trainable(model.language_model)
    trainer.remove_callback(PrinterCallback)
    stop = StopOnInterrupt(console)
    trainer.add_callback(ProgressBarCallback(trainer, console, stage.name))
    trainer.add_callback(stop)
    if pairs is not None:
        # before a checkpoint is loaded: the model is still what it was when the stage began
        load_or_compute_reference(trainer, folder, console)
    resume = broadcast_from_main(lambda: last_checkpoint(folder, console.print))
    if resume is not None:
        console.print(f"going on from {resume}")
    try:
        with explain_oom(trainer.oom_facts, stage.name):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        stop.restore()
    if stop.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage "
            f"{stage.name}, saved; the same command goes on from there"
        )
    wait_share = trainer.step_metrics.data_wait
    console.print(describe_data_wait(trainer, spec), highlight=False, soft_wrap=True)
    with raise_on_write_error(folder):
        trainer.save_result(folder / "result")
        if is_main_process():
            facts = {"log_history": trainer.state.log_history, "data_wait": wait_share}
            _mark_done(folder, facts)
    barrier()


def _build_collator(collator: Collator, stage: Stage, *, packed: bool) -> Any:
    if stage.distillation is not None:
        return DistillationCollator(collator, packed=packed)
    if stage.dpo is not None:
        return PreferenceCollator(collator)
    return collator.pack if packed else collator


def _mark_done(folder: Path, facts: dict[str, Any]) -> None:
    partial = folder / f".{_DONE}"
    partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    partial.replace(folder / _DONE)
