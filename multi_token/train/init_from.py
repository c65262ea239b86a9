"""Initialization from a trained run (`train.init_from`), to add modalities or to train further."""

from __future__ import annotations

from typing import Any

from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.load import load_trained, read_config
from multi_token.checkpoint.references import absolutize, resolve
from multi_token.checkpoint.save import CONFIG
from multi_token.errors import RecipeError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.recipe import differences
from multi_token.recipe.train import TrainSpec
from multi_token.registry import validate_fields


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
        ModelSpec, resolve(fields["model"], folder), where=str(folder / CONFIG)
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
        changed = differences(described[name], model.config.model["modalities"][name])
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
    _check_same_adapter(model, spec)
    return names


def _check_same_adapter(model: MultiTokenForConditionalGeneration, spec: TrainSpec) -> None:
    """Raise RecipeError if the recipe gives the run's adapter another rank, scale or dropout."""
    adapters = getattr(model.language_model, "peft_config", None)
    if not adapters or all(stage.learn.adapter is None for stage in spec.stages):
        return
    theirs: Any = adapters["default"]
    for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora"):
        if getattr(theirs, key) != getattr(spec.adapter, key):
            raise RecipeError(
                f"train.adapter.{key} is {getattr(spec.adapter, key)}, but the adapter of "
                f"{spec.init_from} has {getattr(theirs, key)}, which cannot change; set it to that"
            )
