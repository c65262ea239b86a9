"""data/streaming.py and stream_loader.py: rows of a process, and their batches."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from multi_token.collate import Collator
from multi_token.data.files.open import media_root
from multi_token.data.mixture import Mixture
from multi_token.data.packing import PackingPlan
from multi_token.data.row_stream import open_stream
from multi_token.data.scan import Problem
from multi_token.data.stream_loader import StreamLoader, StreamState, load_state, save_states
from multi_token.data.streaming import NUM_TRIED_ITEMS, PaddedShard, StreamDataset, without_media
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.fetch import Fetch
from multi_token.train.training_args import training_arguments
from tests.data.streams import BAD, row_of


class Rows:
    """Stream over a list of rows that records the rows it returned."""

    root: str | None = None
    num_lanes = 1

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: list[int] = []

    def row(self, number: int) -> Any:
        from multi_token.data.row_stream import NumberedRow

        self.asked.append(number)
        row = self.rows[number % len(self.rows)]
        return NumberedRow(row, str(row.get("id")), number // len(self.rows))

    def close(self) -> None:
        """Nothing is open."""


class Bench:
    """Loaders over a list of rows, without a model to train."""

    def __init__(self, model: Any, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.model, self.folder = model, folder
        self.stream = Rows(rows)

    def __call__(
        self,
        *,
        window: int = 4,
        skip: bool = False,
        packing: PackingPlan | None = None,
        **more: Any,
    ) -> StreamLoader:
        args_of = {k: more.pop(k) for k in list(more) if k not in ("step", "state", "print_fn")}
        args = training_arguments(
            self.folder,
            {"use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 2, **args_of},
            seed=0,
            learning_rate=1e-3,
        )
        mixture = Mixture([1.0], seed=0, window=window)
        streams = StreamDataset(
            [self.stream], ["rows"], [self.model.processor], mixture, skip_bad=skip
        )
        return StreamLoader(streams, args, names, packing=packing, **more)


def names(samples: Any) -> list[str]:
    return [sample.id for sample in samples]


@pytest.fixture
def bench(model: Any, tmp_path: Path, data: Path) -> Bench:
    return Bench(model, tmp_path, [row_of(n, data) for n in range(24)])


def first(loader: StreamLoader, num: int) -> list[list[str]]:
    return list(islice(iter(loader), num))


def test_the_steps_of_two_processes_are_those_of_one() -> None:
    one = PaddedShard(4)
    two = [PaddedShard(2, process=i, num_processes=2) for i in (0, 1)]
    accumulated = [PaddedShard(1, num_accumulated=2, process=i, num_processes=2) for i in (0, 1)]
    for step in range(5):
        rows = sorted(one.positions(step))
        assert sorted(p for s in two for p in s.positions(step)) == rows
        numbers = (2 * step, 2 * step + 1)
        assert sorted(p for s in accumulated for n in numbers for p in s.positions(n)) == rows


@pytest.mark.parametrize("packing", [None, PackingPlan([], 120)], ids=["padded", "packed"])
def test_data_workers_give_the_same_batches(bench: Bench, packing: Any) -> None:
    alone = first(bench(packing=packing), 14)
    helped = first(bench(packing=packing, dataloader_num_workers=2), 14)
    assert helped == alone and len({name for batch in alone for name in batch}) == 24


def test_rows_of_a_window_come_in_random_order_and_each_once_an_epoch(bench: Bench) -> None:
    batches = first(bench(window=6), 12)
    order = [int(name) for batch in batches for name in batch]
    assert order != sorted(order)
    for start in range(0, 24, 6):
        assert sorted(order[start : start + 6]) == list(range(start, start + 6))


def test_a_resumed_stream_reads_no_earlier_row(bench: Bench) -> None:
    every = first(bench(), 10)
    bench.stream.asked.clear()
    assert first(bench(step=6), 4) == every[6:]
    assert min(bench.stream.asked) >= 12


def test_packs_hold_every_row_once_within_both_budgets(bench: Bench, model: Any) -> None:
    loader = bench(window=12, packing=PackingPlan([], 150, [], 3))
    packs = first(loader, 30)
    given = [name for pack in packs for name in pack]
    waiting = [p for pack in [*loader.state.packs, loader.state.carried] for p in pack]
    place = loader.streams.mixture.row_ref
    read = [f"{place(p).number % 24:02}" for p in range(12 * loader.state.window)]
    assert len(read) >= 5 * 24
    assert sorted(read) == sorted([*given, *(f"{place(p).number % 24:02}" for p in waiting)])
    lengths = {name: length_of(bench, int(name)) for name in set(given)}
    assert all(sum(lengths[name] for name in pack) <= 150 for pack in packs)
    assert all(sum(int(name) % 4 != 3 for name in pack) <= 3 for pack in packs)
    used = sum(lengths[name] for name in given) / (150 * len(packs))
    assert used > 0.8


def length_of(bench: Bench, number: int) -> int:
    from multi_token.data.dataset import row_to_sample

    row = bench.stream.rows[number]
    sample = row_to_sample(row, "", processor=bench.model.processor, modalities=["image"])
    return len(sample.input_ids)


def test_packs_resume_exactly_from_any_of_them(bench: Bench, tmp_path: Path) -> None:
    def loader(**more: Any) -> StreamLoader:
        return bench(window=10, packing=PackingPlan([], 150), **more)

    every = first(loader(), 24)
    for num in (1, 5, 6, 13):
        begun = loader()
        assert first(begun, num) == every[:num]
        save_states(tmp_path, num, [begun.state])
        step, state = load_state(tmp_path, 0, 1)
        bench.stream.asked.clear()
        assert step == num and first(loader(step=step, state=state), 24 - num) == every[num:]
        # what was learned from is not read again
        waiting = {p for pack in [*state.packs, state.carried] for p in pack}
        place = begun.streams.mixture.row_ref
        learned = [place(p).number for p in range(10 * state.window) if p not in waiting]
        assert len(learned) > num and not set(learned) & set(bench.stream.asked)


def test_a_bad_row_stops_the_run_by_name(bench: Bench) -> None:
    bench.stream.rows[5] = BAD
    with pytest.raises(RowError, match=r"^row bad: `messages` is empty.*on_bad_row=skip"):
        first(bench(), 12)
    bench.stream.rows[5] = BAD
    with pytest.raises(RowError, match=r"^row bad: "):
        first(bench(packing=PackingPlan([], 120), dataloader_num_workers=1), 12)


def test_skipped_rows_leave_every_other_row_in_its_batch_and_are_counted(bench: Bench) -> None:
    whole = first(bench(), 12)
    bench.stream.rows[5] = bench.stream.rows[17] = BAD
    said: list[str] = []
    loader = bench(skip=True, print_fn=said.append)
    batches = first(loader, 12)
    assert batches == [[n for n in b if n not in ("05", "17")] or ["?"] for b in whole]
    assert loader.state.num_bad == 2
    assert said[0].startswith("rows up to window 2 of the stream: 1 skipped, 1 since")


def test_a_batch_without_a_good_row_takes_the_next_one_of_its_window(bench: Bench) -> None:
    whole = first(bench(per_device_train_batch_size=1), 24)
    bad = int(whole[4][0])
    bench.stream.rows[bad] = BAD
    batches = first(bench(skip=True, per_device_train_batch_size=1), 24)
    assert batches == [*whole[:4], whole[5], *whole[5:]]
    bench.stream.rows[4:8] = [BAD] * 4
    with pytest.raises(MultiTokenError, match="window 1 of the stream has no good row"):
        first(bench(skip=True, per_device_train_batch_size=1), 24)


def test_packs_leave_bad_rows_out(bench: Bench) -> None:
    bench.stream.rows[5] = bench.stream.rows[17] = BAD
    loader = bench(skip=True, packing=PackingPlan([], 150))
    given = {name for pack in first(loader, 20) for name in pack}
    assert given == {f"{n:02}" for n in range(24)} - {"05", "17"}
    assert loader.state.num_bad >= 2
    bench.stream.rows[:] = [BAD] * 24
    with pytest.raises(MultiTokenError, match="1,.* rows of the stream in a row are bad"):
        first(bench(skip=True, packing=PackingPlan([], 150)), 1)


def test_another_number_of_processes_keeps_the_count_of_bad_rows(tmp_path: Path) -> None:
    save_states(tmp_path, 4, [StreamState(num_bad=2), StreamState(num_bad=3)])
    assert load_state(tmp_path, 0, 1) == (4, StreamState(num_bad=5))
    assert [load_state(tmp_path, i, 3)[1].num_bad for i in range(3)] == [5, 0, 0]


def test_iterating_over_streams_gives_the_good_samples(bench: Bench) -> None:
    streams = bench().streams
    samples = list(islice(iter(streams), 24))
    assert sorted(names(samples)) == [f"{n:02}" for n in range(24)]
    assert not isinstance(streams.read(0), Problem)


# --- whole runs ---------------------------------------------------------------------------------


def test_relative_paths_start_at_the_folder_of_the_rows(
    model: Any, data: Path, tmp_path: Path
) -> None:
    source = str(data / "*.jsonl")
    stream = open_stream(source)
    from dataclasses import replace

    processor = replace(model.processor, fetch=Fetch(root=media_root(source)))
    streams = StreamDataset([stream], ["data"], [processor], Mixture([1.0], seed=0, window=4))
    collated = Collator(model.modalities, model.processor.chat.filler_id)(list(islice(streams, 4)))
    assert collated["input_ids"].shape[0] == 4


def test_first_rows_keep_some_items_of_each_modality_once_stage_zero_is_done(
    bench: Bench,
) -> None:
    def num_bytes(value: Any) -> int:
        if isinstance(value, dict):
            return sum(map(num_bytes, value.values()))
        return len(value) if isinstance(value, bytes) else 0

    (source,) = bench().streams.first_rows(24)
    (after,) = map(without_media, [source])
    kept = [row for row in after.rows if num_bytes(row)]
    assert len(kept) == NUM_TRIED_ITEMS < len(source.rows) / 4
    assert [len(c.media) for c, _ in after.conversations()] == [
        len(c.media) for c, _ in source.conversations()
    ]
    for item, processor in islice(after.items(), NUM_TRIED_ITEMS):
        assert processor.prepare(item).inputs
