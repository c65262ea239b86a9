"""Feature cache of a run: the decision to use one (`auto` measures), its folder, and filling it.

`auto` decides in three steps, in the main process for all:

1. Off, if an encoder is trained or preprocessing is random: cached features would be wrong.
2. On, if the first items are in the cache already.
3. Else by time: load + encode once and read every use, against load + encode every use.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.encode import (
    RowSource,
    encode_missing,
    find_missing,
    random_preprocessing,
    sample_items,
)
from multi_token.data.parallel import share_of
from multi_token.data.sources import TrainingSource, num_readers
from multi_token.distributed import (
    all_gather,
    broadcast_from_main,
    num_processes,
    rank,
)
from multi_token.encoders import is_randomly_initialized
from multi_token.errors import MediaError, MultiTokenError, RecipeError
from multi_token.media.fetch import MIB, Fetch
from multi_token.modalities.base import Encoder, Modality
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import FeatureCacheSpec
from multi_token.types import Media

_NUM_MEASURED = 8
"""Items that `auto` is decided on."""

MediaItem = tuple[Media, Fetch]


def cache_folder(recipe: Recipe) -> Path:
    """Return `train.feature_cache.path`, or else the run's `cache`."""
    spec = recipe.train.feature_cache
    if spec is not None and spec.path is not None:
        return Path(spec.path).expanduser()
    return Path(recipe.train.output_dir) / "cache"


def open_cache(folder: Path, spec: FeatureCacheSpec, console: Console) -> FeatureCache:
    """Open the cache in a folder; prints a line for each damaged file in it."""
    cache = FeatureCache(folder, dtype=spec.dtype, max_shard_bytes=spec.shard_megabytes * MIB)
    for damage in cache.damaged:
        console.print(f"features in {folder}: {damage}", highlight=False)
    return cache


def frozen_encoders(
    recipe: Recipe, build: Callable[[], Mapping[str, Encoder]]
) -> dict[str, Encoder]:
    """Return the encoders that training will use, frozen, on the device of this process.

    `build` loads them as training starts with them, after the cheap checks. Raises RecipeError if a
    stage trains one of them, since its features would change.
    """
    # before `build`, which may take minutes
    for stage in recipe.train.stages:
        for name in stage.learn.encoders:
            raise RecipeError(_trained_reason(name, stage.name, named=True))
    encoders = dict(build())
    for name, encoder in encoders.items():
        for stage in recipe.train.stages:
            # an encoder with random weights is trained with its projector (parameter_groups.py)
            if is_randomly_initialized(encoder) and stage.learn.projector(name) is not None:
                raise RecipeError(_trained_reason(name, stage.name, named=False))
        encoder.requires_grad_(False).eval().to(_device(recipe))
    return encoders


def _device(recipe: Recipe) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if recipe.train.args.get("use_cpu") or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def _trained_reason(name: str, stage: str, *, named: bool) -> str:
    return (
        f"`feature_cache` keeps the features of frozen encoders, but that of {name!r} "
        f"{'' if named else 'starts from random weights and '}is trained in stage {stage!r}"
    )


def choose_feature_cache(
    recipe: Recipe,
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    sources: Sequence[TrainingSource],
    *,
    trained: Sequence[Collection[str]],
    arguments: Sequence[Any],
    console: Console,
) -> FeatureCache | None:
    """Open the feature cache of a run, or return None if it has none.

    `sources` are opened without a cache. `trained` has the names of the encoders that each stage
    trains, `arguments` the transformers.TrainingArguments of each stage.

    Where an encoder is trained or preprocessing is random, `auto` turns the cache off and prints
    the reason, and `true` raises RecipeError.
    """
    spec = recipe.train.feature_cache
    if spec is None:
        return None
    # a few items decide, since a start must not decode the data set
    row_sources = _row_sources(sources)
    first, num_seen = sample_items(row_sources, modalities, _NUM_MEASURED)
    num_items = round(
        sum(len(source.rows) for source in row_sources) * len(first) / max(num_seen, 1)
    )
    cache = open_cache(cache_folder(recipe), spec, console)
    reason = broadcast_from_main(
        lambda: (
            _trained_encoder(recipe, trained)
            or random_preprocessing(_new_items(first, modalities, encoders, cache), modalities)
        )
    )
    if reason is not None and not spec.auto:
        raise RecipeError(f"{reason}; set train.feature_cache to false")
    if reason is not None:
        console.print(f"feature_cache auto is off: {reason}", highlight=False, soft_wrap=True)
        return None
    if not spec.auto:
        return cache
    # one process decides for all: each would measure other times, and all must do the same
    on, why = broadcast_from_main(
        lambda: _decide(
            modalities, encoders, cache, first, num_items, _num_uses(sources, arguments)
        )
    )
    console.print(
        f"feature_cache auto is {'on' if on else 'off'}: {why}", highlight=False, soft_wrap=True
    )
    return cache if on else None


def fill_cache(
    recipe: Recipe,
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    sources: Sequence[TrainingSource],
    cache: FeatureCache,
    console: Console,
) -> None:
    """Encode all items that the cache lacks; collective.

    Each process and each of its data workers looks at its share of the rows. Each process encodes
    its share of the items, which its data workers read. An item whose file is unchanged since an
    earlier start is not read, and one that cannot be read is left to the scan, which names it.
    """
    row_sources = _row_sources(sources)
    num_rows = sum(len(source.rows) for source in row_sources)
    cache.register_encoders(modalities, encoders)
    look = partial(
        find_missing,
        row_sources,
        modalities,
        cache,
        num_workers=num_readers(recipe, num_rows // num_processes()),
        console=console,
    )

    def encode(missing: NDArray[Any], share: int) -> int:
        mine = missing[missing["share"] == share]
        num_encoded, error = 0, None
        try:
            num_encoded, _ = encode_missing(
                row_sources,
                modalities,
                encoders,
                cache,
                mine,
                num_workers=num_readers(recipe, len(mine)),
                console=console,
            )
        except MultiTokenError as problem:
            error = problem
        # exchanged: a process that raised alone would leave the others waiting in a collective
        for problem in all_gather(error):
            if problem is not None:
                raise problem
        return sum(all_gather(num_encoded))

    before = cache.shard_names
    found = look(num_shares=num_processes(), choose=share_of)
    num_encoded = encode(np.concatenate(all_gather(found.missing)), rank())
    if num_processes() > 1:
        # gathered, so all shards of all processes are in the folder
        written = set().union(*all_gather(cache.shard_names - before))
        cache.refresh()
        if not all(all_gather(written <= cache.shard_names)):
            # the folder is not the same one on all machines
            num_encoded += encode(look(num_shares=1).missing, 0)
    console.print(
        f"features: {num_encoded} items encoded, {len(cache)} in the cache", highlight=False
    )


def _row_sources(sources: Sequence[TrainingSource]) -> list[RowSource]:
    return [RowSource(source.rows, source.processor.fetch, source.name) for source in sources]


def _new_items(
    items: Sequence[MediaItem],
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    cache: FeatureCache,
) -> list[MediaItem]:
    """Return the items that the cache lacks; the preprocessing of the others was looked at."""
    cache.register_encoders(modalities, encoders)
    return [
        (item, fetch)
        for item, fetch in items
        if not cache.has(item, modalities[item.modality], fetch)
    ]


def _trained_encoder(recipe: Recipe, trained: Sequence[Collection[str]]) -> str | None:
    """Return the reason for the first encoder that a stage trains, or None."""
    for stage, names in zip(recipe.train.stages, trained, strict=True):
        for name in names:
            return _trained_reason(name, stage.name, named=name in stage.learn.encoders)
    return None


def _decide(
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    cache: FeatureCache,
    first: Sequence[MediaItem],
    num_items: int,
    num_uses: float,
) -> tuple[bool, str]:
    """Decide for a recipe with `auto` -> (on or off, reason)."""
    assert cache.path is not None
    cache.register_encoders(modalities, encoders)
    readable = [pair for pair in first if _is_readable(pair, modalities)]
    if not readable:
        return False, "no item of the first rows can be read"
    if all(cache.find(item, modalities[item.modality], fetch) for item, fetch in readable):
        return True, f"the first {len(readable)} items are in {cache.path} already"
    encode_ms, read_ms, num_bytes = _time_cache(modalities, encoders, cache.path, readable)
    costs = (
        f"an item takes {encode_ms:.1f} ms to load and encode and {read_ms:.1f} ms to read from "
        f"the cache, and is used about {num_uses:.1f} times"
    )
    # filling the cache encodes every item once, so a single use wins nothing
    pays = encode_ms * num_uses > encode_ms + read_ms * num_uses
    needed = num_bytes * num_items
    free = shutil.disk_usage(_existing(cache.path)).free
    if pays and needed > free:
        return False, (
            f"{costs}, but about {num_items:,} items would take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free at {cache.path}"
        )
    return pays, costs


def _time_cache(
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    path: Path,
    items: Sequence[MediaItem],
) -> tuple[float, float, float]:
    """Measure items -> mean (ms to load and encode, ms to read from the cache, bytes)."""

    def registered(folder: Path | None) -> FeatureCache:
        # a run hashes all weights once, so the hashing must not count as time of these few items
        fresh = FeatureCache(folder)
        fresh.register_encoders(modalities, encoders)
        return fresh

    encoded = 0.0
    # twice, and the second counts: kernels and lazy buffers make a model's first call slow
    for _ in range(2):
        fresh = registered(None)
        began = time.perf_counter()
        fresh.fill(items, modalities, encoders)
        encoded = time.perf_counter() - began
    # on the disk of the real cache, since disks differ in speed
    with tempfile.TemporaryDirectory(dir=_existing(path), prefix=".measure-") as folder:
        FeatureCache(Path(folder)).fill(items, modalities, encoders)
        num_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        stored = registered(Path(folder))
        began = time.perf_counter()
        for item, fetch in items:
            prepared = stored.find(item, modalities[item.modality], fetch)
            if prepared is not None:
                for tensor in prepared.inputs.values():
                    tensor.clone()  # a view of a mapped file costs nothing until it is touched
        read = time.perf_counter() - began
    num = len(items)
    return 1e3 * encoded / num, 1e3 * read / num, num_bytes / num


def _is_readable(pair: MediaItem, modalities: Mapping[str, Modality]) -> bool:
    item, fetch = pair
    modality = modalities[item.modality]
    try:
        modality.prepare(modality.load(item.source, fetch))
    except MediaError:
        return False
    return True


def _num_uses(sources: Sequence[TrainingSource], arguments: Sequence[Any]) -> float:
    """Return how often all stages together use each row, by their steps or epochs."""
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


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
