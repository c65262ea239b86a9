"""Plan of a run: encodings before the first step, then steps, memory and time of every stage."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch
from rich.console import Console

from multi_token.data.feature_cache.keys import canonical_source
from multi_token.data.sources import TrainingSource, open_source
from multi_token.distributed import num_processes
from multi_token.errors import RecipeError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.recipe import Recipe
from multi_token.train.closed_form import encode_items
from multi_token.train.plan.estimate import format_duration, plan_stage, print_plan
from multi_token.train.prepare import Run, open_stages, prepare
from multi_token.train.stage import attach_adapters, build_trainer
from multi_token.train.stage_zero import find_items
from multi_token.types import Media

_NUM_TIMED = 8
"""Items that are encoded to measure the time of one."""


def plan_run(recipe: Recipe, *, console: Console | None = None) -> None:
    """Print the steps, memory and time of every stage, from a few steps that are only tried.

    Nothing is written to `recipe.train.output_dir`, and nothing is trained.

    Args:
        recipe: The recipe as it would be trained.
        console: Where the plan is printed; default: stderr.

    Raises:
        RecipeError: The recipe cannot be run, or several processes were started.
        MultiTokenError: Not even one row or pack fits into memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        fields = recipe.model_dump(mode="json")
        # measured without a cache: filling one would be most of the work that is to be planned
        fields["train"] |= {"output_dir": folder, "feature_cache": False}
        tried = Recipe.model_validate(fields)
        stages = open_stages(tried)
        # after `open_stages`, in which transformers joins the process group: before it, every
        # process counts one
        if num_processes() > 1:
            raise RecipeError("a plan is made by one process; start `--plan` without torchrun")
        run = prepare(tried, stages, console or Console(stderr=True))
        # the recipe as it was given, with its feature cache
        print_encodings(run, recipe)
        for stage in run.stages:
            attach_adapters(run, stage)
            trainer = build_trainer(run, stage)
            plan = plan_stage(trainer, stage.spec.name, try_steps=True)
            print_plan(plan, trainer, run.console)


def print_encodings(run: Run, recipe: Recipe) -> None:
    """Print the encodings of each modality before the first step.

    With a feature cache these are all items, as if the cache were empty, else the items of the
    calibration and of the closed form. Each different item counts once.
    """
    model, spec = run.model, recipe.train.closed_form
    cached = recipe.train.feature_cache is not None
    captioned = None
    if spec is not None and spec.rows is not None:
        captioned = [open_source(s, model.processor, recipe, None) for s in spec.rows]
    why = "for the feature cache" if cached else "for the closed form"
    # modalities of another run are neither calibrated nor fitted
    names = [name for name in model.modalities if cached or name not in run.initialized]
    found = find_items(run, captioned, names)
    in_cache = _num_different([*run.sources, *(captioned or ())]) if cached else Counter()
    for name, items in found.items():
        num = in_cache[name] if cached else len(items)
        if num and len(items):
            # evenly spaced, since items of one kind often come one after the other
            step = max(1, len(items) // _NUM_TIMED)
            tried = [items.item(i) for i in range(0, len(items), step)][:_NUM_TIMED]
            seconds = _seconds_per_item(model, name, tried)
            run.console.print(
                f"  {name}: {num:,} encodings before the first step ({why}, each item once), about "
                f"{1000 * seconds:.3g} ms each ({len(tried)} were tried): about "
                f"{format_duration(num * seconds)}",
                highlight=False,
            )


def _num_different(sources: Sequence[TrainingSource]) -> Counter[str]:
    """Number of items in a full cache, by modality; one without a name differs from all others."""
    named: set[str] = set()
    found: Counter[str] = Counter()
    for source in sources:
        names = source.processor.modalities
        for item, processor in chain.from_iterable(map(source.items, names)):
            text = canonical_source(item.source)
            key = f"{item.modality} {processor.fetch.root} {text}"
            found[item.modality] += text is None or key not in named
            if text is not None:
                named.add(key)
    return found


@torch.no_grad()
def _seconds_per_item(
    model: MultiTokenForConditionalGeneration,
    name: str,
    items: Sequence[tuple[Media, MultiTokenProcessor]],
) -> float:
    seconds = 0.0
    # twice, and the second counts: the first call of a model allocates and compiles kernels
    for _ in range(2):
        start = time.perf_counter()
        for features in encode_items(model, name, items, batch_size=len(items)):
            features.values.sum().item()  # waits for the GPU
        seconds = time.perf_counter() - start
    return seconds / len(items)
