"""Feature cache: keys, files of the folder, several readers and writers."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.keys import KeyTable
from multi_token.data.feature_cache.store import FeatureStore
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import digest
from multi_token.modalities.image import ImageModality
from multi_token.modalities.vector import VectorModality
from multi_token.types import Media

FETCH = Fetch()
VECTOR = VectorModality(dim=5)
ENCODER = VECTOR.build_encoder()
Items = list[tuple[Media, Fetch]]


def vectors(num: int) -> Items:
    return [(Media("vector", [float(i), 1.0, 2.0, 3.0, 4.0]), FETCH) for i in range(num)]


def fill(cache: FeatureCache, items: Any, **options: Any) -> int:
    return cache.fill(items, {"vector": VECTOR}, {"vector": ENCODER}, **options)


def opened(path: Path, **options: Any) -> FeatureCache:
    cache = FeatureCache(path, **options)
    cache.register_encoder("vector", VECTOR, ENCODER)
    return cache


def first_value(cache: FeatureCache, item: Media) -> float | None:
    found = cache.find(item, VECTOR, FETCH)
    return None if found is None else float(found.inputs["features"][0, 0])


def shards_of(path: Path) -> list[Path]:
    return sorted(path.glob("features-*.safetensors"))


def make_old(folder: Path) -> None:
    """Date all files of a cache to yesterday: no writer can still be busy with them."""
    yesterday = time.time() - 86_400
    for file in folder.iterdir():
        os.utime(file, (yesterday, yesterday))


@pytest.fixture
def clip(parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts / "clip", tmp_path / "clip"))


def image(folder: Path, **fields: Any) -> ImageModality:
    return ImageModality(encoder=str(folder), features="pooled", **fields)


def num_new(cache: FeatureCache, modality: ImageModality, data: Path, encoder: Any = None) -> int:
    items = [(Media("image", str(data / "red.png")), FETCH)]
    encoder = encoder or modality.build_encoder()
    return cache.fill(items, {"image": modality}, {"image": encoder})


def test_features_are_found_again_exactly_in_shards_of_bounded_size(tmp_path: Path) -> None:
    items = vectors(20)
    # an item takes 20 bytes, so a shard is full after two batches of four
    assert fill(FeatureCache(tmp_path, max_shard_bytes=150), items, batch_size=4) == 20
    assert len(shards_of(tmp_path)) == 3
    again = opened(tmp_path)
    assert len(again) == 20
    assert [first_value(again, item) for item, _ in items] == [float(i) for i in range(20)]
    assert fill(again, items) == 0
    assert first_value(again, Media("vector", [99.0] * 5)) is None


def test_features_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    items = vectors(2)
    fill(FeatureCache(tmp_path), items)
    cache = opened(tmp_path)
    found = [cache.find(items[i][0], VECTOR, FETCH) for i in (0, 0, 1)]
    one, same, other = (f.inputs["features"].data_ptr() for f in found if f is not None)
    assert one == same
    assert abs(other - one) == 20


def test_a_cache_without_a_folder_keeps_features_in_memory() -> None:
    cache, items = FeatureCache(), vectors(3)
    assert fill(cache, [*items, *items]) == 3
    assert fill(cache, items) == 0
    assert [first_value(cache, item) for item, _ in items] == [0.0, 1.0, 2.0]


def test_bfloat16_halves_the_features_and_has_keys_of_its_own(tmp_path: Path) -> None:
    items = [(Media("vector", torch.randn(2000, 5)), FETCH)]
    fill(FeatureCache(tmp_path), items)
    (whole,) = shards_of(tmp_path)
    half = FeatureCache(tmp_path, dtype="bfloat16")
    assert fill(half, items) == 1
    (small,) = set(shards_of(tmp_path)) - {whole}
    assert small.stat().st_size < 0.51 * whole.stat().st_size
    found = half.find(items[0][0], VECTOR, FETCH)
    assert found is not None and found.inputs["features"].dtype == torch.float32
    exact = items[0][0].source
    assert torch.equal(found.inputs["features"], exact.bfloat16().float())
    assert not torch.equal(found.inputs["features"], exact)


def test_an_encoder_with_other_weights_makes_other_features(
    clip: Path, data: Path, tmp_path: Path
) -> None:
    modality = image(clip)
    encoder = modality.build_encoder()
    cache = FeatureCache(tmp_path / "cache")
    assert num_new(cache, modality, data, encoder) == 1
    assert num_new(cache, modality, data, encoder) == 0
    with torch.no_grad():
        next(encoder.parameters()).flatten()[0].add_(1e-3)
    assert num_new(cache, modality, data, encoder) == 1
    assert num_new(FeatureCache(tmp_path / "cache"), modality, data) == 0  # as it is on disk
    assert num_new(FeatureCache(tmp_path / "cache"), modality, data, encoder) == 0


def test_a_key_depends_on_preprocessing_and_not_on_the_projector_or_the_path_of_the_folder(
    clip: Path, data: Path, tmp_path: Path
) -> None:
    def new(modality: ImageModality) -> int:
        return num_new(FeatureCache(tmp_path / "cache"), modality, data)

    assert new(image(clip)) == 1
    assert new(image(clip, projector={"type": "linear"}, micro_batch=1)) == 0
    moved = Path(shutil.copytree(clip, tmp_path / "moved"))
    assert new(image(moved)) == 0
    assert new(image(clip).model_copy(update={"features": "mean"})) == 1
    settings = json.loads((moved / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.1, 0.2, 0.3]
    (moved / "preprocessor_config.json").write_text(json.dumps(settings))
    assert new(image(moved)) == 1


@pytest.mark.parametrize("harm", ["cut off", "overwritten", "gone"])
def test_a_damaged_shard_is_named_and_its_items_alone_are_encoded_again(
    tmp_path: Path, harm: str
) -> None:
    items = vectors(8)
    fill(FeatureCache(tmp_path, max_shard_bytes=1), items, batch_size=4)
    shard = shards_of(tmp_path)[0]
    size = shard.stat().st_size
    if harm == "cut off":
        os.truncate(shard, size - 10)
    elif harm == "overwritten":
        shard.write_bytes(b"\xff" * size)
    else:
        shard.unlink()
    make_old(tmp_path)
    cache = opened(tmp_path)
    (damage,) = cache.damaged
    said = {"cut off": f"cut off: {size - 10:,} of {size:,}", "gone": "No such file"}
    assert shard.name in damage and said.get(harm, "cannot be read") in damage
    assert len(cache) == 4
    assert fill(cache, items) == 4
    again = opened(tmp_path)
    assert again.damaged == []
    assert [first_value(again, item) for item, _ in items] == [float(i) for i in range(8)]


def test_a_damaged_list_of_sources_is_named_and_their_files_are_read_again(
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "one.npy", np.ones(5, np.float32))
    items = [(Media("vector", str(tmp_path / "one.npy")), FETCH)]
    folder = tmp_path / "cache"
    assert fill(FeatureCache(folder), items) == 1
    (sources,) = folder.glob("sources-*.safetensors")
    os.truncate(sources, sources.stat().st_size - 8)
    make_old(folder)
    cache = opened(folder)
    (damage,) = cache.damaged
    assert damage.startswith(f"{sources.name} cannot be read")
    assert damage.endswith("; its files are read again")
    assert fill(cache, items) == 0
    assert not sources.exists() and opened(folder).damaged == []


@pytest.mark.parametrize("kind", ["features-*.json", "features-*.safetensors", "sources-*"])
def test_a_file_that_could_not_be_read_once_is_kept_and_read_by_the_next_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    store = FeatureStore(tmp_path)
    features = (torch.zeros(3, 2), None, None)
    store.write({digest(b"first"): features})
    store.add_sources({digest(b"path"): digest(b"first")})
    make_old(tmp_path)
    files = sorted(tmp_path.iterdir())
    real = io.open

    def fails(file: Any, *args: Any, **options: Any) -> Any:
        if isinstance(file, (str, Path)) and Path(file).match(kind):
            raise OSError(errno.EMFILE, "Too many open files", str(file))
        return real(file, *args, **options)

    monkeypatch.setattr(io, "open", fails)
    other = FeatureStore(tmp_path)
    monkeypatch.undo()
    (damage,) = other.damaged
    assert "Too many open files" in damage
    other.write({digest(b"second"): features})
    assert [file for file in files if not file.exists()] == []
    other.refresh()
    assert other.damaged == []
    assert digest(b"first") in other and other.key_of(digest(b"path")) == digest(b"first")


def test_a_shard_that_looks_cut_off_is_kept_until_no_writer_can_be_busy_with_it(
    tmp_path: Path,
) -> None:
    items = vectors(4)
    fill(FeatureCache(tmp_path), items)
    (shard,) = shards_of(tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])  # a network file system may show the size late
    cache = opened(tmp_path)
    assert "cut off" in cache.damaged[0]
    assert fill(cache, vectors(5)[4:]) == 1
    shard.write_bytes(whole)
    cache.refresh()
    assert cache.damaged == []
    assert [first_value(cache, item) for item, _ in items] == [0.0, 1.0, 2.0, 3.0]


def test_half_an_index_and_a_shard_without_one_are_encoded_again(tmp_path: Path) -> None:
    items = vectors(12)
    fill(FeatureCache(tmp_path, max_shard_bytes=1), items, batch_size=4)
    torn, unnamed, _ = shards_of(tmp_path)
    part = torn.with_suffix(".json")
    part.write_text(part.read_text()[:-20])
    unnamed.with_suffix(".json").unlink()
    cache = opened(tmp_path)
    assert [part.name in damage for damage in cache.damaged] == [True]
    assert fill(cache, items) == 8


def test_unfinished_files_of_dead_writers_are_removed_and_those_of_live_ones_kept(
    tmp_path: Path,
) -> None:
    old, new = (tmp_path / f".features-{n}.safetensors.x1" for n in ("old", "new"))
    for partial in (old, new):
        partial.write_bytes(b"half")
    yesterday = time.time() - 86_400
    os.utime(old, (yesterday, yesterday))
    fill(FeatureCache(tmp_path), vectors(1))
    assert [p.name for p in tmp_path.glob(".features-*")] == [new.name]


def test_two_caches_that_write_at_once_are_one_after_a_refresh(tmp_path: Path) -> None:
    one, two = FeatureCache(tmp_path), FeatureCache(tmp_path)
    items = vectors(6)
    assert fill(one, items[:4]) == 4
    assert fill(two, items[2:]) == 4  # it has not looked since, so two items are there twice
    one.refresh()
    assert len(one) == 6
    assert [first_value(one, item) for item, _ in items] == [float(i) for i in range(6)]
    assert fill(one, items) == 0


def test_an_index_is_read_as_arrays_however_many_keys_it_has(tmp_path: Path) -> None:
    calls = []
    for num in (1, 2000):
        store = FeatureStore(tmp_path / str(num))
        keys = [digest(str(i).encode()) for i in range(num)]
        store.write({key: (torch.zeros(1, 1), None, None) for key in keys})
        calls.append(0)

        def count(*_: Any) -> None:
            calls[-1] += 1

        sys.setprofile(count)  # calls of functions, those of C included
        try:
            read = FeatureStore(tmp_path / str(num))
        finally:
            sys.setprofile(None)
        assert len(read) == num and all(key in read for key in keys)
    assert calls[1] < calls[0] + 100


class Rows(Dataset[float]):
    """Reads one feature of each item; a stand-in for rows in a data worker."""

    def __init__(self, cache: FeatureCache, items: Items) -> None:
        self.cache = cache
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        found = self.cache.find(self.items[index][0], VECTOR, FETCH)
        assert found is not None
        return found.inputs["features"][0, 0]


def test_data_workers_read_the_mapped_files_for_themselves(tmp_path: Path) -> None:
    items = vectors(12)
    fill(FeatureCache(tmp_path, max_shard_bytes=1), items, batch_size=4)
    cache = opened(tmp_path)
    assert first_value(cache, items[0][0]) == 0.0  # a handle is open before the workers begin
    loader = DataLoader(Rows(cache, items), batch_size=3, num_workers=2)
    assert torch.cat(list(loader)).tolist() == [float(i) for i in range(12)]
    sent = pickle.dumps(cache)
    assert first_value(pickle.loads(sent), items[7][0]) == 7.0  # noqa: S301 - our own, just made
    assert len(sent) < 6_000


def test_a_cache_without_a_registered_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MultiTokenError, match="no encoder for 'vector'; call `fill`"):
        FeatureCache(tmp_path).find(vectors(1)[0][0], VECTOR, FETCH)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file")
    with pytest.raises(MultiTokenError, match="cannot write features to .*/file"):
        fill(cache, vectors(1))


def test_ctrl_c_keeps_what_is_encoded(tmp_path: Path) -> None:
    def stopped() -> Any:
        yield from vectors(8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(FeatureCache(tmp_path), stopped(), batch_size=4)
    assert len(FeatureCache(tmp_path)) == 8


def test_a_key_table_holds_many_keys_and_keeps_first_values() -> None:
    table = KeyTable("i8")
    keys = [digest(str(i).encode()) for i in range(20_000)]
    for i, key in enumerate(keys):
        table.add(key, i)
    for i in range(0, 20_000, 7):
        table.add(keys[i], -1)
    assert len(table) == 20_000
    assert [table.get(key) for key in keys] == list(range(20_000))
    assert table.get(digest(b"none")) is None
    assert len(pickle.dumps(table)) < 20_000 * 45


def test_facts_come_with_cached_features_and_their_text_is_no_part_of_the_key(
    tmp_path: Path,
) -> None:
    items = vectors(3)
    assert fill(FeatureCache(tmp_path), items) == 3
    # features with facts have keys of their own, whatever text is made of the facts
    for facts, num_encoded in (("{norm:.1f} ", 3), ("norm {norm}: ", 0)):
        modality = VectorModality(dim=5, facts=facts)
        cache = FeatureCache(tmp_path)
        assert cache.fill(items, {"vector": modality}, {"vector": ENCODER}) == num_encoded
    again = FeatureCache(tmp_path)
    again.register_encoder("vector", modality, ENCODER)
    for item, fetch in items:
        found = again.find(item, modality, fetch)
        decoded = modality.prepare(modality.load(item.source, fetch))
        assert found is not None and found.facts == decoded.facts != ()
        assert modality.runs(found) == modality.runs(decoded)
    plain = opened(tmp_path).find(items[0][0], VECTOR, FETCH)
    assert plain is not None and plain.facts == ()
