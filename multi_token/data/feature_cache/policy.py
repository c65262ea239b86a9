"""Whether a run keeps the features of its encoders, and keeping them.

Border: decides, measures and fills; the cache itself is data/feature_cache/cache.py.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from multi_token.checkpoint.load import compose
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.encode import random_preprocessing, share_of
from multi_token.data.sources import TrainingSource
from multi_token.distributed import all_gather, barrier, broadcast_from_main, num_processes, rank
from multi_token.encoders import build_encoders, is_randomly_initialized
from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Encoder
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import FeatureCacheSpec
from multi_token.train.init_from import init_from_run
from multi_token.train.parameter_groups import trainable_encoders
from multi_token.types import Media

_NUM_MEASURED = 8
"""Items that `auto` is decided on."""

MediaItem = tuple[Media, Fetch]


def cache_folder(recipe: Recipe) -> Path:
    """Where a recipe's features lie."""
    spec = recipe.train.feature_cache
    if spec is not None and spec.path is not None:
        return Path(spec.path).expanduser()
    return Path(recipe.train.output_dir) / "cache"


def open_cache(folder: Path, spec: FeatureCacheSpec, console: Console) -> FeatureCache:
    """The cache in a folder; says what of it is damaged and will be made again."""
    cache = FeatureCache(
        folder, dtype=spec.dtype, max_shard_bytes=spec.shard_megabytes * 1024 * 1024
    )
    for damage in cache.damaged:
        console.print(
            f"features in {folder}: {damage}; its items are encoded again", highlight=False
        )
    return cache


def frozen_encoders(recipe: Recipe) -> dict[str, Encoder]:
    """The encoders of a recipe as its training will use them, on the device of this process.

    Those that `init_from` has trained come from there, for which the whole model is loaded.
    Raises RecipeError for one that learns: its features change.
    """
    for stage in recipe.train.stages:
        for name in stage.learn.encoders:
            raise RecipeError(_is_trained(name, stage.name, named=True))
    if recipe.train.init_from is not None:
        model = compose(recipe.model)
        init_from_run(model, recipe.train)
        encoders = {name: model.encoder(name) for name in model.modalities}
    else:
        encoders = build_encoders(recipe.model.modalities)
    for name, encoder in encoders.items():
        for stage in recipe.train.stages:
            if is_randomly_initialized(encoder) and stage.learn.projector(name) is not None:
                raise RecipeError(_is_trained(name, stage.name, named=False))
        encoder.requires_grad_(False).eval().to(_device(recipe))
    return encoders


def _device(recipe: Recipe) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if recipe.train.args.get("use_cpu") or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def _is_trained(name: str, stage: str, *, named: bool) -> str:
    return (
        f"`feature_cache` keeps the features of frozen encoders, but that of {name!r} "
        f"{'' if named else 'starts from random weights and '}learns in stage {stage!r}"
    )


def choose_feature_cache(
    model: MultiTokenForConditionalGeneration,
    recipe: Recipe,
    sources: Sequence[TrainingSource],
    arguments: Sequence[Any],
    console: Console,
) -> FeatureCache | None:
    """The cache of a run, or None where it has none.

    `sources` are opened without one; `arguments`: transformers.TrainingArguments of the stages.
    `auto` turns it off with a printed reason where a recipe that insists is refused: for an encoder
    that learns, and for preprocessing that is random. Raises RecipeError.
    """
    spec = recipe.train.feature_cache
    if spec is None:
        return None
    first, num_items = _first_items(sources)
    reason = broadcast_from_main(lambda: _reason_not_to_cache(model, recipe, first))
    if reason is not None and not spec.auto:
        raise RecipeError(f"{reason}; set train.feature_cache to false")
    if reason is not None:
        _print_decision(console, on=False, why=reason)
        return None
    cache = open_cache(cache_folder(recipe), spec, console)
    if not spec.auto:
        return cache
    # others would have measured other times
    on, why = broadcast_from_main(
        lambda: _decide(model, cache, first, num_items, _num_uses(sources, arguments))
    )
    _print_decision(console, on=on, why=why)
    return cache if on else None


def fill_cache(
    model: MultiTokenForConditionalGeneration,
    sources: Sequence[TrainingSource],
    cache: FeatureCache,
    console: Console,
) -> None:
    """Encode what the rows have and the cache lacks. Processes that train together share it."""
    encoders: Any = model.encoders
    num_rows = sum(len(source.rows) for source in sources)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Encoding items", total=num_rows)

        def items(share: int, num_shares: int) -> Iterator[MediaItem]:
            number = 0
            for source in sources:
                for conversation, processor in source.conversations():
                    for item in conversation.media:
                        number += 1
                        if share_of(item, number, num_shares) == share:
                            yield item, processor.fetch
                    progress.advance(task)

        num_encoded = cache.fill(items(rank(), num_processes()), model.modalities, encoders)
        if num_processes() > 1:
            barrier()
            cache.refresh()
            # nothing, unless the folder is not the same on all machines
            progress.reset(task)
            num_encoded += cache.fill(items(0, 1), model.modalities, encoders)
    num_encoded = sum(all_gather(num_encoded))
    console.print(
        f"features: {num_encoded} items encoded, {len(cache)} in the cache", highlight=False
    )


def _first_items(sources: Sequence[TrainingSource]) -> tuple[list[MediaItem], int]:
    """A few items, and by their number in the first rows a guess at how many there are in all."""
    first: list[MediaItem] = []
    num_rows = sum(len(source.rows) for source in sources)
    pairs = (pair for source in sources for pair in source.conversations())
    for num_seen, (conversation, processor) in enumerate(pairs, 1):
        first += [(item, processor.fetch) for item in conversation.media]
        if len(first) >= _NUM_MEASURED:
            return first[:_NUM_MEASURED], round(num_rows * len(first) / num_seen)
    return first, len(first)


def _reason_not_to_cache(
    model: MultiTokenForConditionalGeneration, recipe: Recipe, first: Sequence[MediaItem]
) -> str | None:
    """Why features cannot be kept, or None. What a recipe names alone it refuses by itself."""
    for stage in recipe.train.stages:
        for name in trainable_encoders(model, stage.learn):
            return _is_trained(name, stage.name, named=name in stage.learn.encoders)
    return random_preprocessing(first, model.modalities)


def _decide(
    model: MultiTokenForConditionalGeneration,
    cache: FeatureCache,
    first: Sequence[MediaItem],
    num_items: int,
    num_uses: float,
) -> tuple[bool, str]:
    measured = _time_cache(model, cache, first)
    if measured is None:
        return False, "no item of the first rows can be read"
    if measured.all_there:
        return True, f"the first {measured.num_items} items are in {cache.path} already"
    costs = (
        f"an item takes {measured.encode_ms:.1f} ms to load and encode and {measured.read_ms:.1f} "
        f"ms to read from the cache, and is used about {num_uses:.1f} times"
    )
    # every item is encoded once to be kept, so one use alone wins nothing
    pays = measured.encode_ms * num_uses > measured.encode_ms + measured.read_ms * num_uses
    needed = measured.num_bytes * num_items
    assert cache.path is not None
    free = shutil.disk_usage(_existing(cache.path)).free
    if pays and needed > free:
        return False, (
            f"{costs}, but about {num_items:,} items would take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free at {cache.path}"
        )
    return pays, costs


@dataclass(frozen=True)
class _CacheTimings:
    num_items: int
    all_there: bool
    encode_ms: float = 0.0
    read_ms: float = 0.0
    num_bytes: float = 0.0
    """An item, in the cache."""


def _time_cache(
    model: MultiTokenForConditionalGeneration, cache: FeatureCache, first: Sequence[MediaItem]
) -> _CacheTimings | None:
    """Means over the first items: what an item costs without the cache, and with it."""
    register_encoders(cache, model)
    encoders: Any = model.encoders
    readable = [pair for pair in first if _is_readable(pair, model)]
    if not readable:
        return None
    found = [cache.find(item, model.modalities[item.modality], fetch) for item, fetch in readable]
    if all(prepared is not None for prepared in found):
        return _CacheTimings(len(readable), all_there=True)
    encoded = 0.0
    # twice, since the first call of a model is slow
    for _ in range(2):
        anew = _registered(model, None)
        began = time.perf_counter()
        anew.fill(readable, model.modalities, encoders)
        encoded = time.perf_counter() - began
    # on the disk where the cache would be
    with tempfile.TemporaryDirectory(dir=_existing(cache.path), prefix=".measure-") as folder:
        FeatureCache(Path(folder)).fill(readable, model.modalities, encoders)
        num_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        kept = _registered(model, Path(folder))
        began = time.perf_counter()
        for item, fetch in readable:
            prepared = kept.find(item, model.modalities[item.modality], fetch)
            if prepared is not None:
                for tensor in prepared.inputs.values():
                    tensor.clone()  # a view of the mapped file is read when it is touched
        read = time.perf_counter() - began
    num = len(readable)
    return _CacheTimings(num, False, 1e3 * encoded / num, 1e3 * read / num, num_bytes / num)


def register_encoders(cache: FeatureCache, model: MultiTokenForConditionalGeneration) -> None:
    """Let a cache know whose features it has, where it is used without being filled."""
    for name, modality in model.modalities.items():
        cache.register_encoder(name, modality, model.encoder(name))


def _registered(model: MultiTokenForConditionalGeneration, folder: Path | None) -> FeatureCache:
    """A cache to be timed: hashing the weights, which is done once a run, is over."""
    cache = FeatureCache(folder)
    register_encoders(cache, model)
    return cache


def _is_readable(pair: MediaItem, model: MultiTokenForConditionalGeneration) -> bool:
    item, fetch = pair
    modality = model.modalities[item.modality]
    try:
        modality.prepare(modality.load(item.source, fetch))
    except MediaError:
        return False
    return True


def _num_uses(sources: Sequence[TrainingSource], arguments: Sequence[Any]) -> float:
    """How often the stages come by each row, by their steps or their epochs."""
    num_rows = max(1, sum(len(source.rows) for source in sources))
    return sum(
        args.max_steps
        * args.train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size
        / num_rows
        if args.max_steps > 0
        else args.num_train_epochs
        for args in arguments
    )


def _print_decision(console: Console, *, on: bool, why: str) -> None:
    console.print(
        f"feature_cache auto is {'on' if on else 'off'}: {why}", highlight=False, soft_wrap=True
    )


def _existing(folder: Path | None) -> Path:
    """The folder, or the nearest one above it that is there."""
    assert folder is not None
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
