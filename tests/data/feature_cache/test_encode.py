"""Encoding the items of rows: counts, shares, a killed process, random preprocessing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from rich.console import Console

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.encode import (
    EncodeReport,
    RowSource,
    encode_rows,
    random_preprocessing,
    sample_items,
)
from multi_token.data.files.open import load_rows
from multi_token.media.fetch import Fetch
from multi_token.modalities.vector import VectorModality

MODALITIES = {"vector": VectorModality(dim=5)}
ENCODERS = {"vector": MODALITIES["vector"].build_encoder()}
QUIET = Console(quiet=True)


def row(*sources: Any) -> dict[str, Any]:
    asked = "What is " + " ".join("<vector>" for _ in sources) + "?"
    return {
        "vector": list(sources),
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "this"},
        ],
    }


@pytest.fixture
def place(tmp_path: Path) -> RowSource:
    """Sixteen rows with a file each, the last one with three."""
    for i in range(16):
        np.save(tmp_path / f"{i}.npy", np.full(5, i, dtype=np.float32))
    rows = [row(f"{i}.npy") for i in range(15)] + [row("15.npy", "0.npy", "1.npy")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return RowSource(load_rows(str(path)), Fetch(root=str(tmp_path)), str(path))


def encode(place: RowSource, folder: Path, **options: Any) -> EncodeReport:
    cache = FeatureCache(folder, max_shard_bytes=1)
    return encode_rows([place], MODALITIES, ENCODERS, cache, console=QUIET, **options)


def test_every_item_is_encoded_once_and_the_rest_is_counted(
    place: RowSource, tmp_path: Path
) -> None:
    first = encode(place, tmp_path / "cache")
    assert (first.num_rows, first.num_items, first.num_encoded, first.num_already_cached) == (
        16,
        18,
        16,
        2,
    )
    second = encode(place, tmp_path / "cache")
    assert (second.num_encoded, second.num_already_cached, second.problems) == (0, 18, [])


def test_unreadable_items_are_named_with_their_row_and_the_rest_is_encoded(
    place: RowSource, tmp_path: Path
) -> None:
    (tmp_path / "bad.npy").write_bytes(b"no array")
    rows = [row("0.npy"), row("gone.npy"), {"id": "x"}, row("1.npy", "bad.npy", "2.npy")]
    rows.append(row("gone.npy"))
    report = encode(RowSource(rows, place.fetch, "rows"), tmp_path / "cache")
    assert (report.num_items, report.num_encoded, report.num_already_cached) == (6, 3, 0)
    found = [(problem.row_id, problem.kind) for problem in report.problems]
    assert found == [
        ("rows[1]", "missing_file"),
        ("x", "format"),
        ("rows[3]", "undecodable"),
        ("rows[4]", "missing_file"),
    ]
    assert "bad.npy" in report.problems[2].message


def test_shares_are_all_items_and_none_twice(place: RowSource, tmp_path: Path) -> None:
    rows = [*place.rows, *(row([float(i)] * 5) for i in range(100, 106))]  # 6 without a name
    whole = RowSource(rows, place.fetch, "rows")
    reports = [encode(whole, tmp_path / "cache", share=i, num_shares=3) for i in range(3)]
    assert sum(report.num_items for report in reports) == 24
    assert sum(report.num_encoded for report in reports) == 22
    assert min(report.num_encoded for report in reports) > 2
    assert encode(whole, tmp_path / "cache").num_encoded == 0


def test_processes_that_write_at_once_make_one_folder(place: RowSource, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def work(share: int) -> None:
        together.wait(60)
        encode(place, tmp_path / "cache", share=share, num_shares=3)

    processes = [context.Process(target=work, args=(share,)) for share in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = FeatureCache(tmp_path / "cache")
    assert (len(cache), cache.damaged) == (16, [])
    assert encode(place, tmp_path / "cache").num_encoded == 0


def test_a_killed_process_loses_one_unfinished_shard_at_most(
    place: RowSource, tmp_path: Path
) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from collections.abc import Sequence
from multi_token.data.feature_cache.encode import RowSource
from multi_token.data.files.open import load_rows
from multi_token.media.fetch import Fetch
from test_encode import encode
from pathlib import Path

class Killed(Sequence):
    rows = load_rows({place.name!r})
    seen = []
    def __len__(self):
        return 16
    def __getitem__(self, index):
        self.seen.append(index)
        if self.seen.count(10) == 2:  # read to find its items, and then to encode them
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]

root = {str(tmp_path)!r}
encode(RowSource(Killed(), Fetch(root=root), "rows"), Path(root, "cache"))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # of ten items that were read, two batches of four had been encoded and written
    assert len(FeatureCache(tmp_path / "cache")) == 8
    report = encode(place, tmp_path / "cache")
    assert (report.num_encoded, report.num_already_cached) == (8, 10)
    assert len(FeatureCache(tmp_path / "cache")) == 16


class Noted(VectorModality):
    """Vectors whose loads are noted, with the process that did them."""

    type: Literal["noted"] = "noted"  # type: ignore[assignment]

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        with Path(str(fetch.root), "loads").open("a") as file:
            file.write(f"{os.getpid()} {source}\n")
        return super().load(source, fetch)


def test_data_workers_read_each_item_once_and_this_process_none(
    place: RowSource, tmp_path: Path
) -> None:
    modality = Noted(dim=5)
    twice = RowSource([*place.rows, *place.rows], place.fetch, "rows")
    cache = FeatureCache(tmp_path / "cache")
    report = encode_rows(
        [twice], {"vector": modality}, ENCODERS, cache, num_workers=2, console=QUIET
    )
    assert (report.num_items, report.num_encoded) == (36, 16)
    loads = [line.split() for line in (tmp_path / "loads").read_text().splitlines()]
    assert sorted(name for _, name in loads) == sorted(f"{i}.npy" for i in range(16))
    processes = {int(pid) for pid, _ in loads}
    assert len(processes) == 2 and os.getpid() not in processes


def test_stopped_by_ctrl_c_it_continues_after_what_was_encoded(
    place: RowSource, tmp_path: Path
) -> None:
    encoder, calls = VectorModality(dim=5).build_encoder(), []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # of four batches
            raise KeyboardInterrupt

    encoder.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        cache = FeatureCache(tmp_path / "cache")
        encode_rows([place], MODALITIES, {"vector": encoder}, cache, num_workers=2, console=QUIET)
    assert len(FeatureCache(tmp_path / "cache")) == 8
    report = encode(place, tmp_path / "cache", num_workers=2)
    assert (report.num_encoded, report.num_already_cached) == (8, 10)


class Jittered(VectorModality):
    """Modality that adds noise, as augmentation does."""

    type: Literal["jittered"] = "jittered"  # type: ignore[assignment]

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        return super().load(source, fetch) + np.random.default_rng().normal(size=5)


def test_random_preprocessing_is_found_by_preparing_an_item_twice(place: RowSource) -> None:
    items, _ = sample_items([place], MODALITIES)
    assert len(items) == 8
    assert random_preprocessing(items, MODALITIES) is None
    reason = random_preprocessing(items, {"vector": Jittered(dim=5)})
    assert reason is not None and "preprocessing of 'vector' is random" in reason


def test_first_items_are_those_of_rows_that_can_be_read(place: RowSource) -> None:
    rows: Sequence[Any] = [{"id": "x"}, *place.rows]
    found, num_rows = sample_items([RowSource(rows, place.fetch, "rows")], MODALITIES, num=2)
    assert [item.source for item, _ in found] == ["0.npy", "1.npy"] and num_rows == 3
