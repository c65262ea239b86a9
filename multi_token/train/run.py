"""Training: a recipe -> a trained model in the run's folder. The same recipe again continues."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from multi_token.checkpoint.load import load_trained
from multi_token.checkpoint.save import CONFIG, save
from multi_token.data.sources import good_rows
from multi_token.data.streaming import without_media
from multi_token.distributed import (
    all_gather,
    broadcast_from_main,
    is_main_process,
    peer_errors,
    raise_together,
)
from multi_token.errors import RecipeError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, load_recipe
from multi_token.train.accelerator import cast_frozen_encoders
from multi_token.train.closed_form import fit_projector
from multi_token.train.consistency import check_same_recipe
from multi_token.train.fsdp import FsdpShards, is_sharded
from multi_token.train.prepare import (
    Run,
    StageRun,
    closed_form_folder,
    compose_model,
    is_done,
    mark_done,
    open_rows,
    open_stages,
    prepare,
)
from multi_token.train.resume import RECIPE, claim_run_folder, raise_on_write_error, run_lock
from multi_token.train.stage import attach_adapters, fit
from multi_token.train.stage_zero import ItemReader, find_items


@peer_errors()
def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
) -> MultiTokenForConditionalGeneration:
    """Train the stages of a recipe that are not done yet.

    Stages that are done are loaded, and an interrupted one continues from its last complete
    checkpoint. Started by torchrun, every process calls this function.

    Args:
        recipe: Model, data and stages: a YAML file, the sections as a dict, or a recipe.
        overrides: `key=value` with dotted keys, as on the command line.
        console: Where progress is printed, by the main process alone; default: stderr.

    Returns:
        The trained model in eval mode, on the device it was trained on. It is also saved in
        `recipe.train.output_dir`. With `train.fsdp` in several processes it is in shards, and runs
        only if all processes call it alike.

    Raises:
        RecipeError: The recipe cannot be run, its folder holds a run of another recipe, or
            another process trains in that folder.
        RowError: A row is bad, and the recipe does not skip bad rows.
        Interrupted: Ctrl-C or SIGTERM came; the checkpoint is written.
    """
    if overrides or not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    stages = open_stages(recipe)
    console = (console or Console(stderr=True)) if is_main_process() else Console(quiet=True)
    out = Path(recipe.train.output_dir)
    # compared before anything is written: a process with another recipe must not claim the folder
    check_same_recipe(recipe)
    with ExitStack() as held:
        broadcast_from_main(lambda: _claim(out, recipe, console, held))
        return _train_in(out, recipe, stages, console)


def _claim(out: Path, recipe: Recipe, console: Console, held: ExitStack) -> None:
    """Lock a run's folder for as long as `held`, and write the recipe into it."""
    # locked before the recipe is written: a second start must change nothing
    held.enter_context(run_lock(out, partial(console.print, highlight=False)))
    claim_run_folder(out, recipe)


def _train_in(
    out: Path, recipe: Recipe, stages: list[StageRun], console: Console
) -> MultiTokenForConditionalGeneration:
    if not all(all_gather((out / RECIPE).is_file())):
        raise RecipeError(
            f"train.output_dir {out.absolute()} is not the same folder for all processes; name one "
            "on storage that all machines share"
        )
    if broadcast_from_main((out / CONFIG).is_file) and all(is_done(s.folder) for s in stages):
        console.print(f"{out} is trained already")
        return MultiTokenForConditionalGeneration.from_pretrained(out)
    return run_stages(prepare(recipe, stages, console))


def run_stages(run: Run) -> MultiTokenForConditionalGeneration:
    """Run the closed-form stage and the recipe's stages, save the model, and return it."""
    if not is_done(closed_form_folder(run.recipe)):
        closed_form_stage(run)
    if run.stream is not None:
        # the first rows of a stream hold the bytes of their media, which nothing reads again
        run.sources = [without_media(source) for source in run.sources]
    folder = Path(run.recipe.train.output_dir)
    for stage in run.stages:
        attach_adapters(run, stage)
        if is_done(stage.folder):
            load_trained(run.model, stage.folder / "result")
            continue
        fit(run, stage)
        if is_sharded(run.recipe.train):
            # sharded parameters stay sharded, and the next stage shards a model of its own
            run.model = compose_model(run.recipe, stage.args, run.model.capabilities)
            load_trained(run.model, stage.folder / "result")
            cast_frozen_encoders(run.model, run.recipe.train, stage.args)
            run.evaluation.detach(run.model)
            gc.collect()  # the trainer and its callbacks refer to each other
    with raise_together(), raise_on_write_error(folder):
        if is_main_process():
            save(run.model, folder)
    if is_sharded(run.recipe.train):
        args = run.stages[-1].args
        FsdpShards(run.model, args.device, bf16=args.mixed_precision == "bf16")
    run.evaluation.finish(run.model)
    run.console.print(f"saved to {folder}")
    return run.model.eval()


def closed_form_stage(run: Run) -> None:
    """Stage zero: feature statistics of every modality, then the closed-form start.

    Modalities that come from another run keep their projectors.
    """
    model, spec, console = run.model, run.recipe.train.closed_form, run.console
    captioned = None
    if spec is not None and spec.rows is not None:
        captioned = open_rows(model, run.recipe, spec.rows, run.cache, console)
        captioned = good_rows(captioned, run.recipe, console)
    names = [name for name in model.modalities if name not in run.initialized]
    for name, items in find_items(run, captioned, names).items():
        if not items.counts.any():
            console.print(f"{name}: no item in the training rows; its projector starts as it is")
            continue
        fitted = spec if model.encoder(name).pretrained else None
        report = fit_projector(model, name, ItemReader(items, fitted, run), spec=fitted)
        if spec is not None and fitted is None:
            console.print(
                f"{name}: no closed-form start, since its encoder starts from random weights",
                highlight=False,
            )
        elif spec is not None:
            console.print(
                f"{name}: closed-form start from {report.num_captioned:,} captioned items"
                if report.num_captioned
                else f"{name}: no captioned rows (one item, one answer), so it starts from random",
                highlight=False,
            )
    folder = closed_form_folder(run.recipe)
    with raise_together(), raise_on_write_error(folder):
        if is_main_process():
            save(model, folder)
            mark_done(folder, {})
    if not is_main_process():
        # another machine may round sums otherwise, and projectors have to be equal everywhere
        load_trained(model, folder)
