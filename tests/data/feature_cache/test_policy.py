"""Feature cache of a run: `auto` measures and reports; features that change are never cached."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import distributed

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.encode import MissingItems
from multi_token.data.feature_cache.policy import fill_cache
from multi_token.data.sources import open_source
from multi_token.errors import RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.vector import VectorModality
from multi_token.recipe.recipe import Recipe
from multi_token.registry import register_modality
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]


def said(fields: dict[str, Any], capsys: Any) -> str:
    capsys.readouterr()
    train(Recipe.model_validate(fields), console=Console(width=300))
    return capsys.readouterr().out


def losses(out: Path) -> list[float]:
    text = (out / "stages" / "1-projector" / "done.json").read_text()
    return [entry["loss"] for entry in json.loads(text)["log_history"] if "loss" in entry]


def test_a_folder_is_shared_between_runs_and_the_curve_is_that_without_one(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    cache = {"path": str(tmp_path / "features"), "shard_megabytes": 1}
    first = recipe_fields(tmp_path / "first", feature_cache=cache)
    first["train"]["args"]["dataloader_num_workers"] = 2
    second = recipe_fields(tmp_path / "second", feature_cache=cache)
    assert "features: 4 items encoded, 4 in the cache" in said(first, capsys)
    assert "features: 0 items encoded, 4 in the cache" in said(second, capsys)
    said(recipe_fields(tmp_path / "plain"), capsys)
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    assert not (tmp_path / "first" / "cache").exists()


class CountedRows(Sequence[Any]):
    """Rows that remember which of them were read."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows, self.seen = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(index)
        return self.rows[index]


def test_a_second_start_with_a_full_cache_reads_no_raw_file_and_a_changed_one_is_noticed(
    recipe_fields: Fields, data: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(data, folder)

    def start(name: str) -> str:
        # another run, since the lengths of rows are stored in the folder of the run
        cache = {"path": str(tmp_path / "features")}
        fields = recipe_fields(tmp_path / name, feature_cache=cache)
        fields["data"]["train"] = [{"rows": str(folder / "rows.jsonl")}]
        return said(fields, capsys)

    assert "features: 4 items encoded, 4 in the cache" in start("first")
    for file in folder.glob("*.png"):
        # no image any more, but of the same size and time
        before = file.stat()
        file.write_bytes(b"x" * before.st_size)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "features: 0 items encoded, 4 in the cache" in start("second")
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    for file in data.glob("*.png"):
        shutil.copy(file, folder)
    Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "red.png")
    assert "features: 1 items encoded, 5 in the cache" in start("third")


def test_processes_that_train_together_share_the_encoding(
    model: Any, recipe_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate(recipe_fields(tmp_path / "run"))
    folder = tmp_path / "features"

    def work(rank: int) -> None:
        torch.set_num_threads(1)  # a forked child has none of its parent's
        store = f"file://{tmp_path / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        cache = FeatureCache(folder)
        source = open_source(recipe.data.train[0], model.processor, recipe, cache)
        out = Console(file=(tmp_path / f"said-{rank}").open("w"), width=200)
        fill_cache(recipe, model.modalities, model.encoders, [source], cache, out)
        assert all(
            source.processor.prepare(item).inputs.keys() == {"features"}
            for name in model.modalities
            for item, _ in source.items(name)
        )
        # another start with a full cache: each process looks at its half of the rows
        counted = CountedRows(source.rows)
        again = replace(source, rows=counted)
        fill_cache(recipe, model.modalities, model.encoders, [again], FeatureCache(folder), out)
        assert counted.seen == [rank, rank + 2]

    monkeypatch.setattr(MissingItems, "PART", 1)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    said_by_both = "".join(f"features: {n} items encoded, 4 in the cache\n" for n in (4, 0))
    assert [(tmp_path / f"said-{rank}").read_text() for rank in range(2)] == [said_by_both] * 2
    assert len(list(folder.glob("features-*.safetensors"))) == 2


def test_a_torn_shard_is_reported_and_encoded_again(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    cache = {"path": str(tmp_path / "features")}
    said(recipe_fields(tmp_path / "first", feature_cache=cache), capsys)
    (shard,) = (tmp_path / "features").glob("features-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    shown = said(recipe_fields(tmp_path / "second", feature_cache=cache), capsys)
    assert f"{shard.name} is cut off" in shown and "are encoded again" in shown
    assert "features: 4 items encoded, 4 in the cache" in shown


def test_auto_reports_its_measurements_and_is_off_for_a_single_use(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    fields = recipe_fields(tmp_path / "run", feature_cache="auto")
    fields["train"]["stages"][0]["args"]["max_steps"] = 2  # of two rows, of which there are four
    shown = said(fields, capsys)
    (line,) = [line for line in shown.splitlines() if line.startswith("feature_cache auto")]
    assert re.fullmatch(
        r"feature_cache auto is off: an item takes \d+\.\d ms to load and encode and \d+\.\d ms to "
        r"read from the cache, and is used about 1\.0 times",
        line,
    )
    assert "items encoded" not in shown
    assert not list((tmp_path / "run").rglob("features-*"))


def test_auto_is_on_where_items_are_used_often(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    # many passes make it certain, since an item costs less to read than to encode
    fields = recipe_fields(tmp_path / "run", feature_cache="auto")
    fields["train"]["stages"][0]["args"] = {"max_steps": 50, "save_strategy": "no"}
    shown = said(fields, capsys)
    assert "feature_cache auto is on: an item takes" in shown
    assert "used about 25.0 times" in shown
    assert "features: 4 items encoded" in shown
    assert len(FeatureCache(tmp_path / "run" / "cache")) == 4
    assert not list((tmp_path / "run").glob(".measure-*"))


def test_auto_is_off_with_a_reason_where_an_encoder_is_trained(
    recipe_fields: Fields, mixed_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    fields = recipe_fields(tmp_path / "named", feature_cache="auto")
    fields["train"]["stages"][0]["learn"]["encoders"] = {"image": 1e-4}
    assert "auto is off: `feature_cache` keeps the features of frozen encoders, but that of " in (
        said(fields, capsys)
    )
    shown = said(mixed_fields(tmp_path / "random", feature_cache="auto"), capsys)
    assert "that of 'pulse' starts from random weights and is trained in stage 'projector'" in shown


class Shaken(VectorModality):
    """Vectors that differ at each read, as under augmentation."""

    type: Literal["shaken"] = "shaken"  # type: ignore[assignment]
    dim: int = 5

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        return super().load(source, fetch) + np.random.default_rng().normal(size=5)


def test_random_preprocessing_is_refused_and_turns_auto_off(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    register_modality("shaken", Shaken)
    messages = [{"role": "user", "content": "<shaken>"}, {"role": "assistant", "content": "yes"}]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"shaken": [1, 2, 3, 4, 5], "messages": messages}] * 2))

    def fields(name: str, cache: Any) -> dict[str, Any]:
        found = recipe_fields(tmp_path / name, feature_cache=cache)
        found["model"]["modalities"] = {"shaken": {"type": "shaken"}}
        found["data"]["train"] = [{"rows": str(rows)}]
        return found

    with pytest.raises(RecipeError, match="preprocessing of 'shaken' is random.*to false"):
        train(Recipe.model_validate(fields("refused", True)))
    shown = said(fields("auto", "auto"), capsys)
    assert "auto is off: " in shown and "preprocessing of 'shaken' is random" in shown
