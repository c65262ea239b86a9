"""A recipe -> a trained model in the run's folder. The same recipe again goes on where it stopped.

    RUN/recipe.yaml, config.json, *.safetensors, adapter/            the result (checkpoint.py)
    RUN/cache/features.safetensors                                   features of frozen encoders
    RUN/stages/0-align, 1-<name>, ...                                each stage's own state

Border: the order of the stages. Each step is somebody else's: data/, align.py, trainer.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, set_seed

from multi_token.checkpoint import CONFIG, compose, load, load_trained, move, save
from multi_token.collate import Collator
from multi_token.data.cache import FeatureCache
from multi_token.data.dataset import ConversationDataset
from multi_token.encoders import attach_lora, refuse_unreached
from multi_token.errors import Interrupted, RecipeError
from multi_token.language_model import attach_adapter
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.probe import try_training
from multi_token.recipe import Recipe, load_recipe
from multi_token.train.align import align, calibrate, captioned, encoded
from multi_token.train.report import Bar, StopOnInterrupt, groups_of, parts_of
from multi_token.train.sources import Source, fill_cache, good_rows, open_source
from multi_token.train.start_from import take_over
from multi_token.train.trainer import (
    MultiTokenTrainer,
    last_checkpoint,
    learning_encoders,
    parameter_groups,
    training_arguments,
)
from multi_token.train_spec import Stage

RECIPE = "recipe.yaml"
_DONE = "done.json"


def train(recipe: Recipe, *, console: Console | None = None) -> MultiTokenForConditionalGeneration:
    """Run every stage of a recipe that is not done yet, and return the trained model.

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
            {**recipe.train.args, **stage.args},
            seed=recipe.train.seed,
            learning_rate=stage.learn.first_rate,
        )
        for folder, stage in zip(stage_folders, recipe.train.stages, strict=True)
    ]
    _claim(out, recipe)
    if (out / CONFIG).is_file() and all((f / _DONE).is_file() for f in stage_folders):
        console.print(f"{out} is trained already")
        return load(out)

    set_seed(recipe.train.seed)
    model = compose(recipe.model, max_tokens=recipe.data.max_tokens)
    move(model, arguments[0].device)
    start, taken = out / "stages" / "0-align", ()
    begun = (start / _DONE).is_file()
    if begun:
        load_trained(model, start)
    elif recipe.train.start_from is not None:
        taken = take_over(model, recipe.train)
        console.print(
            f"{', '.join(taken)}: taken over from {recipe.train.start_from}", highlight=False
        )
    console.print(*parts_of(model), sep="\n", highlight=False)
    if recipe.train.feature_cache:
        _refuse_cached_learners(model, recipe)
    if recipe.train.share_prefix:
        model.capabilities.require("repeats_cache")
    cache = FeatureCache(out / "cache" / "features.safetensors")
    sources = [open_source(source, model, recipe, cache) for source in recipe.data.train]
    if recipe.train.feature_cache:
        fill_cache(model, sources, cache, console)
    sources = good_rows(sources, recipe, console)
    dataset = ConcatDataset(
        [
            ConversationDataset(
                source.rows,
                source.reader,
                modalities=list(model.modalities),
                good=source.good,
                source=source.name,
            )
            for source in sources
        ]
    )
    if not begun:
        _start(model, sources, recipe, cache, console, taken=taken)
        save(model, start)
        _mark_done(start, {})
    for stage, folder, args in zip(recipe.train.stages, stage_folders, arguments, strict=True):
        if stage.learn.adapter is not None and not hasattr(model.language_model, "peft_config"):
            # a seed of its own, so that a resumed run draws the same adapter
            set_seed(recipe.train.seed)
            model.language_model = attach_adapter(model.language_model, recipe.train.adapter)
        for name, learner in stage.learn.encoders.items():
            if learner.lora is not None and model.encoder(name).pretrained:
                set_seed(recipe.train.seed)
                attach_lora(name, model.encoder(name), learner.lora)
        if (folder / _DONE).is_file():
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
            share_prefix=recipe.train.share_prefix,
        )
    save(model, out)
    console.print(f"saved to {out}")
    return model.eval()


def _claim(out: Path, recipe: Recipe) -> None:
    """Write the recipe into its folder, or make sure that the one there is the same."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / RECIPE
    if path.is_file() and load_recipe(path) != recipe:
        raise RecipeError(
            f"{out} holds a run of another recipe ({path}); choose another `train.output_dir`, or "
            "remove that folder to start anew"
        )
    recipe.save(path)


def _refuse_cached_learners(model: MultiTokenForConditionalGeneration, recipe: Recipe) -> None:
    """Those that the recipe names are refused by it; here are those that learn by themselves."""
    for stage in recipe.train.stages:
        for name in learning_encoders(model, stage.learn):
            raise RecipeError(
                f"`feature_cache` keeps the features of frozen encoders, but that of {name!r} "
                f"starts from random weights and learns in stage {stage.name!r}; set it to false"
            )


def _start(
    model: MultiTokenForConditionalGeneration,
    sources: Sequence[Source],
    recipe: Recipe,
    cache: FeatureCache,
    console: Console,
    *,
    taken: Collection[str],
) -> None:
    """Stage zero: feature statistics of every modality, then the closed-form start.

    Those that were `taken` over are left as they are.
    """
    pairs = [pair for source in sources for pair in source.conversations()]
    spec = recipe.train.align
    if spec is not None and spec.rows is not None:
        aligned = [open_source(source, model, recipe, cache) for source in spec.rows]
        if recipe.train.feature_cache:
            fill_cache(model, aligned, cache, console)
        aligned = good_rows(aligned, recipe, console)
        captions = [c for source in aligned for c in captioned(source.conversations())]
    else:
        captions = list(captioned(pairs))
    for name in model.modalities:
        if name in taken:
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
        num_aligned = align(model, name, chosen, spec=spec)
        console.print(
            f"{name}: closed-form start from {num_aligned} captioned items"
            if num_aligned
            else f"{name}: no captioned rows (one item, one answer), so it starts from random",
            highlight=False,
        )


def _run_stage(
    model: MultiTokenForConditionalGeneration,
    dataset: ConcatDataset[Any],
    stage: Stage,
    folder: Path,
    args: Any,
    console: Console,
    *,
    sources: Sequence[Source],
    share_prefix: bool,
) -> None:
    assert model.reader is not None
    trainer = MultiTokenTrainer(
        model,
        learn=stage.learn,
        lengths=[length for source in sources for length in source.lengths],
        args=args,
        train_dataset=dataset,
        data_collator=Collator(
            model.modalities, model.reader.chat.filler_id, share_prefix=share_prefix
        ),
    )
    for name, spec in learning_encoders(model, stage.learn).items():
        one = next((pair for s in sources for pair in s.items() if pair[0].modality == name), None)
        if one is not None:
            (features,) = encoded(model, name, [one], batch_size=1)
            refuse_unreached(name, model.encoder(name), spec, features)
    num_learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_all = sum(p.numel() for p in model.parameters())
    console.print(
        f"stage {stage.name}: {num_learned:,} of {num_all:,} parameters learn",
        *groups_of(parameter_groups(model, stage.learn)),
        sep="\n",
        highlight=False,
    )
    try_training(model.language_model)
    trainer.remove_callback(PrinterCallback)
    stop = StopOnInterrupt(console)
    trainer.add_callback(Bar(trainer, console, stage.name))
    trainer.add_callback(stop)
    resume = last_checkpoint(folder)
    if resume is not None:
        console.print(f"going on from {resume}")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage "
            f"{stage.name}, saved; the same command goes on from there"
        )
    save(model, folder / "result")
    _mark_done(folder, {"log_history": trainer.state.log_history})


def _mark_done(folder: Path, facts: dict[str, Any]) -> None:
    (folder / _DONE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
