"""Loader of a stream: batches or packs of one process, and the state that checkpoints keep.

Padded batches need no state but the step. Packs do: rows wait in packs that are not trained on yet,
and in the emptiest pack of a window. A checkpoint keeps the positions of those rows, and a resumed
run reads them again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from transformers import TrainingArguments

from multi_token.data.dataset import worker_loader
from multi_token.data.mixture import permutation
from multi_token.data.packing import PackingPlan, pack_buffer
from multi_token.data.scan import Problem
from multi_token.data.streaming import (
    PackedShard,
    PaddedShard,
    SampleOrProblem,
    ShardReader,
    StreamDataset,
)
from multi_token.distributed import all_gather
from multi_token.errors import MultiTokenError
from multi_token.types import Sample

_PACKS = 1 << 32
"""Purpose of the random numbers that order a process' packs; its rank is added."""
_STATES = "stream.json"
"""File name in a checkpoint's folder."""
_BAD_ON_END = 1000
"""Bad rows in a row after which a process stops: then the cause is not a single row."""


@dataclass
class StreamState:
    """State of one process in a stream, as a checkpoint keeps it."""

    num_bad: int = 0
    window: int = 0
    """Next window to be packed."""
    packs: list[list[int]] = field(default_factory=list)
    """Positions of the rows of packs that are made and not trained on yet."""
    carried: list[int] = field(default_factory=list)
    """Positions of the rows of the emptiest pack, which wait for the next window."""


def save_states(folder: Path, step: int, states: Sequence[StreamState]) -> None:
    """Write the states of all processes into a checkpoint's folder."""
    facts = {"step": step, "processes": [dataclasses.asdict(state) for state in states]}
    (folder / _STATES).write_text(json.dumps(facts), encoding="utf-8")


def load_state(folder: Path, process: int, num_processes: int) -> tuple[int, StreamState]:
    """Read a checkpoint -> its step, and the state of this process.

    With another number of processes only the sum of bad rows is kept, by the first process.
    """
    facts = json.loads((folder / _STATES).read_text(encoding="utf-8"))
    states = [StreamState(**state) for state in facts["processes"]]
    # packs belong to the process that read their rows, and other processes read other rows
    if len(states) != num_processes:
        num_bad = sum(state.num_bad for state in states)
        return facts["step"], StreamState(num_bad if process == 0 else 0)
    return facts["step"], states[process]


class StreamLoader:
    """Endless batches of one process from a step on, which the trainer iterates.

    Its state is that of the batches it has yielded, however far data workers have read ahead.
    """

    def __init__(
        self,
        streams: StreamDataset,
        args: TrainingArguments,
        collate: Callable[[list[Sample]], Any],
        *,
        packing: PackingPlan | None = None,
        step: int = 0,
        state: StreamState | None = None,
        print_fn: Callable[[str], object] = lambda line: None,
    ) -> None:
        """`packing`: budgets of a pack, which is then a batch. `step`, `state`: where to resume."""
        self.streams = streams
        self.args = args
        self.collate = collate
        self.packing = packing
        self.step = step
        self.state = StreamState() if state is None else deepcopy(state)
        self.print_fn = print_fn
        self._reported: tuple[int, int] = (0, self.state.num_bad)

    def __len__(self) -> int:
        """Batches of the stage, including those before `step`."""
        return self.args.max_steps * self.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        batches = self._batches() if self.packing is None else self._packs(self.packing)
        device = self.args.device
        return (send_to_device(batch, device, non_blocking=True) for batch in batches)

    def tokens_per_batch(self, lengths: Sequence[int]) -> float:
        """Estimate the tokens of a batch from the lengths of some rows."""
        if self.packing is not None:
            return self.packing.max_tokens
        return self.args.train_batch_size * sum(lengths) / len(lengths)

    def _groups(self, reading: ShardReader) -> Iterator[Any]:
        args = self.args
        loader = worker_loader(
            reading,
            args.dataloader_num_workers,
            # packs are collated later, so pinned samples would be copied once more
            pin_memory=args.dataloader_pin_memory and self.packing is None,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        for group in loader:
            if isinstance(group, MultiTokenError):
                raise group
            yield group

    def _batches(self) -> Iterator[Any]:
        args = self.args
        shard = PaddedShard(
            args.train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
        )
        # arithmetic in place of a state: the batch number tells the rows
        start = self.step * args.gradient_accumulation_steps
        reading = ShardReader(self.streams, shard, self.collate, start=start)
        for number, (batch, problems) in enumerate(self._groups(reading), start):
            window = shard.positions(number)[-1] // self.streams.mixture.window
            self._report_skipped(window)
            self._handle_problems(problems)
            if batch is None:
                raise MultiTokenError(
                    f"window {window} of the stream has no good row; look at its rows "
                    "with `multi-token data check`"
                )
            yield batch

    def _packs(self, packing: PackingPlan) -> Iterator[Any]:
        args, state, window = self.args, self.state, self.streams.mixture.window
        # samples are not kept in a checkpoint: rows of unfinished packs are read again
        replay = [position for pack in [*state.packs, state.carried] for position in pack]
        chunks = PackedShard(args.world_size, args.process_index, window, state.window, replay)
        rows = self._rows(ShardReader(self.streams, chunks))
        samples = {}
        for position, read in (next(rows) for _ in replay):
            if isinstance(read, Problem):
                raise read.error(
                    f"was good before the run was interrupted, and is bad now: {read.message}"
                )
            samples[position] = read
        num_bad_on_end = 0
        position, read = next(rows)
        while True:
            # popped before the yield: a checkpoint is written after the step on this pack
            while state.packs:
                chosen = state.packs.pop(0)
                yield self.collate([samples.pop(p) for p in chosen])
            fresh: list[int] = []
            while position // window == state.window:
                if isinstance(read, Problem):
                    self._handle_problems([read])
                    num_bad_on_end += 1
                else:
                    samples[position] = read
                    fresh.append(position)
                    num_bad_on_end = 0
                position, read = next(rows)
            self._report_skipped(state.window + 1)
            if num_bad_on_end >= _BAD_ON_END:
                raise MultiTokenError(
                    f"{num_bad_on_end:,} rows of the stream in a row are bad; look at them with "
                    "`multi-token data check`"
                )
            state.packs, state.carried = self._pack_window(
                packing, [*state.carried, *fresh], samples
            )
            state.window += 1

    def _pack_window(
        self, packing: PackingPlan, positions: list[int], samples: Mapping[int, Sample]
    ) -> tuple[list[list[int]], list[int]]:
        """Pack rows -> (packs in random order, rows of the emptiest one for the next window)."""
        chosen = [samples[p] for p in positions]
        rows = PackingPlan(
            [len(sample.input_ids) for sample in chosen],
            packing.max_tokens,
            [len(sample.media) for sample in chosen] if packing.max_items is not None else (),
            packing.max_items,
        )
        packs, emptiest = pack_buffer(rows, range(len(chosen)))
        seed, process = self.streams.mixture.seed, self.args.process_index
        # pack_buffer sorts packs by length, and training takes them in random order
        order = permutation(len(packs), seed, _PACKS + process, self.state.window)
        return [[positions[i] for i in packs[at]] for at in order], [positions[i] for i in emptiest]

    def _rows(self, reading: ShardReader) -> Iterator[tuple[int, SampleOrProblem]]:
        """Yield rows one by one, those of data workers copied out of shared memory.

        Many rows of a window are kept at once, and each shared tensor keeps a file open.
        """
        shared = self.args.dataloader_num_workers > 0
        for group in self._groups(reading):
            for position, read in group.items():
                yield position, deepcopy(read) if shared else read

    def _handle_problems(self, problems: Sequence[Problem]) -> None:
        """Count bad rows, or raise RowError for the first one (`data.on_bad_row`)."""
        if problems and not self.streams.skip_bad:
            raise problems[0].error(
                f"{problems[0].message}; set data.on_bad_row=skip to leave such rows out"
            )
        self.state.num_bad += len(problems)

    def _report_skipped(self, window: int) -> None:
        last, num_bad = self._reported
        # a line for each window, since a line for each row would flood the terminal
        if window > last:
            if self.state.num_bad > num_bad:
                self.print_fn(
                    f"rows up to window {window} of the stream: {self.state.num_bad - num_bad} "
                    f"skipped, {self.state.num_bad} since the stage began (in this process)"
                )
            self._reported = (window, self.state.num_bad)


class StreamProgress:
    """The trainer's handle of a stream: start, current loader, state for checkpoints."""

    def __init__(self, streams: StreamDataset, print_fn: Callable[[str], object]) -> None:
        """`print_fn` is called with a line about skipped rows."""
        self.streams = streams
        self.print_fn = print_fn
        self.at: tuple[int, StreamState] = (0, StreamState())
        self.current_loader: StreamLoader | None = None

    def loader(self, args: TrainingArguments, collate: Any, packing: PackingPlan | None) -> Any:
        """Return a loader from the start of the stream, or from where it resumes."""
        step, state = self.at
        self.current_loader = StreamLoader(
            self.streams,
            args,
            collate,
            packing=packing,
            step=step,
            state=state,
            print_fn=self.print_fn,
        )
        return self.current_loader

    def resume(self, checkpoint: str | Path, args: TrainingArguments) -> None:
        """Start after the rows that a checkpoint was trained on."""
        self.at = load_state(Path(checkpoint), args.process_index, args.world_size)

    @property
    def state(self) -> StreamState:
        """State of this process."""
        return self.at[1] if self.current_loader is None else self.current_loader.state

    def finish(self) -> None:
        """Report the number of skipped rows of all processes."""
        num_bad = sum(state.num_bad for state in all_gather(self.state))
        if num_bad:
            self.print_fn(f"rows of the stream: {num_bad} skipped in this stage")
