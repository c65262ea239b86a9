"""Hub streams: each reader fetches the files of its own lanes, and all readers have one order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from multi_token.data.dataset import worker_loader
from multi_token.data.mixture import Mixture
from multi_token.data.row_stream import LanedRows
from multi_token.data.streaming import PackedShard, PaddedShard, ShardReader, StreamDataset
from multi_token.types import Conversation, Sample

FILES, ROWS, WINDOW, BATCH = 8, 64, 32, 2


def generate(files: list[int], log: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for number in range(ROWS):
            with Path(log).open("a") as out:
                info = torch.utils.data.get_worker_info()
                out.write(f"{0 if info is None else info.id} {file}\n")
            turns = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": f"{file} {number}"},
            ]
            yield {"id": f"{file}/{number}", "messages": turns}


def open_rows(log: str) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(
        generate, gen_kwargs={"files": list(range(FILES)), "log": log}
    )


class Processor:
    """Processor of text rows, without a tokenizer."""

    modalities: tuple[str, ...] = ()

    def __call__(self, conversation: Conversation) -> Sample:
        return Sample(torch.zeros(2), torch.zeros(2), id=conversation.id)


def streams(log: Path) -> StreamDataset:
    rows = LanedRows("hub", partial(open_rows, str(log)), keep=WINDOW)
    processor: Any = Processor()
    return StreamDataset([rows], ["hub"], [processor], Mixture([1.0], seed=3, window=WINDOW))


def ids_of(samples: Any) -> list[str]:
    return [sample.id for sample in samples]


def read(
    log: Path, shard: Any, *, num_workers: int, num: int, start: int = 0, groups: bool = False
) -> list[Any]:
    reader = ShardReader(streams(log), shard, None if groups else ids_of, start=start)
    found = islice(worker_loader(reader, num_workers), num)
    return [ids_of(one.values()) if groups else one[0] for one in found]


def fetched(log: Path) -> tuple[int, dict[int, set[int]]]:
    """Return the number of rows that were fetched, and the workers that fetched each file."""
    lines = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    return len(lines), {file: {w for w, f in lines if f == file} for _, file in lines}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_data_worker_fetches_the_files_of_its_lanes_alone(
    tmp_path: Path, num_workers: int
) -> None:
    log, num = tmp_path / "log", 64
    read(log, PaddedShard(BATCH), num_workers=num_workers, num=num)
    num_fetched, workers = fetched(log)
    assert all(len(found) == 1 for found in workers.values())
    # a window ahead, prefetched batches, and the rows that `datasets` converts at a time
    ahead = WINDOW + 2 * num_workers * BATCH + 16 * FILES
    assert num_fetched <= num * BATCH + ahead


def test_the_order_of_a_hub_stream_is_that_of_one_reader_with_any_number_of_them(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    alone = read(log, PaddedShard(BATCH), num_workers=0, num=96)
    assert read(log, PaddedShard(BATCH), num_workers=2, num=96) == alone
    resumed = read(log, PaddedShard(BATCH), num_workers=2, num=60, start=36)
    assert resumed == alone[36:]
    both = [PaddedShard(BATCH, 1, 2, process) for process in (0, 1)]
    parts = [read(log, shard, num_workers=0, num=48) for shard in both]
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == alone
    ids = [name for batch in alone for name in batch]
    assert len(set(ids)) == len(ids), "no row comes twice before the end of its lane"


def test_every_row_of_a_hub_stream_comes_once_in_an_epoch(tmp_path: Path) -> None:
    found = read(tmp_path / "log", PaddedShard(BATCH), num_workers=0, num=FILES * ROWS // BATCH)
    ids = sorted(name for batch in found for name in batch)
    assert ids == sorted(f"{file}/{number}" for file in range(FILES) for number in range(ROWS))


def test_processes_that_pack_fetch_other_files(tmp_path: Path) -> None:
    logs = [tmp_path / f"{process}" for process in (0, 1)]
    ids: list[str] = []
    for process, log in enumerate(logs):
        shard = PackedShard(2, process, WINDOW)
        found = read(log, shard, num_workers=2, num=12, groups=True)
        ids += [name for group in found for name in group]
    assert len(set(ids)) == len(ids)
    files = [set(fetched(log)[1]) for log in logs]
    assert not files[0] & files[1]


def test_lanes_of_a_mixture_are_the_same_after_a_jump() -> None:
    def lanes_of(positions: Any) -> Any:
        return positions // 2

    def mixture() -> Mixture:
        return Mixture([2.0, 1.0], seed=1, window=8).with_lanes([4, 1], lanes_of)

    walked, jumping = mixture(), mixture()
    places = [walked.row_ref(position) for position in range(400)]
    assert [jumping.row_ref(position) for position in (399, 8, 250)] == [
        places[position] for position in (399, 8, 250)
    ]
    first = [(p, ref.number) for p, ref in enumerate(places) if ref.source == 0]
    assert all(number % 4 == p // 2 % 4 for p, number in first)
    for lane in range(4):
        inside = np.sort([number // 4 for _, number in first if number % 4 == lane])
        assert inside.tolist() == list(range(len(inside))), "no row of a lane is left out"


@pytest.mark.parametrize("num_files", [5, 12, 20, 36, 70])
def test_no_lane_of_a_stream_has_many_fewer_files_than_another(
    tmp_path: Path, num_files: int
) -> None:
    def some() -> datasets.IterableDataset:
        files = {"files": list(range(num_files)), "log": str(tmp_path / "log")}
        return datasets.IterableDataset.from_generator(generate_one, gen_kwargs=files)

    rows = LanedRows("hub", some, keep=4)
    read = [rows.row(number).row["id"] for number in range(num_files)]
    # a lane that ends sooner begins again
    assert len(read) - len(set(read)) <= num_files / 16
    assert num_files % rows.num_lanes == 0 or num_files / rows.num_lanes >= 8


def generate_one(files: list[int], log: str) -> Iterator[dict[str, Any]]:
    yield from ({"id": str(file)} for file in files)


def test_a_stream_of_one_file_has_one_lane(tmp_path: Path) -> None:
    def one() -> datasets.IterableDataset:
        kwargs = {"files": [0], "log": str(tmp_path / "log")}
        return datasets.IterableDataset.from_generator(generate, gen_kwargs=kwargs)

    rows = LanedRows("hub", one, keep=4)
    assert rows.num_lanes == 1
    assert [rows.row(n).row["id"] for n in (0, 5, ROWS)] == ["0/0", "0/5", "0/0"]
    assert rows.row(5).row_id == "0/5" and rows.row(ROWS).epoch == 1
