"""Results for rows at any size: rows -> samples -> batches of similar length -> answers or scores.

    share of the rows -> data workers -> window -> sorted by length -> batches -> a `Work` -> job

A `Work` takes batches and yields results, in any order: `answers` generates here, `scores` computes
losses, and `serve/engines/vllm/answers.py` keeps vLLM engines busy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import Dataset

from multi_token.data.dataset import worker_loader
from multi_token.data.formats import to_conversation
from multi_token.data.parallel import progress_bar
from multi_token.data.rows import Row, row_id_of
from multi_token.errors import MultiTokenError, RowError
from multi_token.evaluate.row_job import RowJob, RowResult
from multi_token.evaluate.scores import score_rows
from multi_token.generate import decode, generate_ids, without_last_answer
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.types import Conversation, Sample

OnBadRow = Literal["raise", "skip"]
_MOST_BATCHES = 32
"""Batches of a window, at most."""
_NUM_WINDOWS = 64
"""Windows that few rows are split into, so that as many processes may share them."""
_WINDOW_BYTES = 256 << 20
"""Encoder inputs from which a window is answered before it is full."""


@dataclass(frozen=True)
class PromptRow:
    """A row that was read, as a sample; for a prompt, without its last answer."""

    index: int
    row_id: str
    sample: Sample

    def result(self, found: Mapping[str, Any] | RowError) -> RowResult:
        """Return the result of this row."""
        return RowResult(self.index, self.row_id, found)


Work = Callable[[Iterator[list[PromptRow]]], Iterator[list[RowResult]]]
"""Batches of rows -> their results, in any order and number."""


def run_work(
    job: RowJob,
    work: Work,
    processor: MultiTokenProcessor,
    *,
    source: str,
    batch_size: int,
    prompt_only: bool = True,
    num_workers: int = 0,
    on_bad_row: OnBadRow = "raise",
    console: Console,
    description: str,
) -> None:
    """Compute and write the results of this process' share of a job.

    Args:
        job: Rows, share and part file.
        work: Computes results of batches.
        processor: Reads rows; its `fetch` has the folder of relative paths.
        source: Name of the rows, for messages.
        batch_size: Rows of a batch.
        prompt_only: Leave out the last answer of each row.
        num_workers: Data workers that read rows; 0 reads in this process.
        on_bad_row: `raise` ends at the first bad row; `skip` writes its error as its result.
        console: Console of the bar; a quiet one shows nothing.
        description: Label of the bar.

    Raises:
        RowError: a row is bad, and `on_bad_row` is `raise`.
        MultiTokenError: another process writes this share, or `work` cannot go on.
    """
    window = window_rows(len(job.rows), batch_size)
    if not job.todo(window).size:
        return
    with ExitStack() as stack:
        stack.enter_context(job.writing())
        # again: others may have answered rows, or joined all, since this process started
        indices = job.todo(window)
        chunks = _RowChunks(job.rows, processor, source, indices, batch_size, prompt_only)
        advance = stack.enter_context(progress_bar(console, description, len(indices)))

        def write(results: Sequence[RowResult]) -> None:
            for result in results:
                if isinstance(result.found, RowError) and on_bad_row == "raise":
                    job.write([r for r in results if not isinstance(r.found, RowError)])
                    raise RowError(
                        f"{result.found.sentence}. Results so far are kept: fix the row, and the "
                        "same command continues; --on-bad-row skip writes the error as the result",
                        kind=result.found.kind,
                        row_id=result.row_id,
                    )
            job.write(results)
            advance(len(results))

        read = chain.from_iterable(worker_loader(chunks, num_workers))
        if num_workers:
            # a tensor of a data worker keeps a file open as long as it lives
            read = map(copy.deepcopy, read)
        batches = batches_of(read, batch_size=batch_size, window=window, on_bad=write)
        for results in work(batches):
            write(results)


def window_rows(num_rows: int, batch_size: int) -> int:
    """Return the rows of a window, whose rows are sorted by length to batches."""
    # of the rows alone, so that each number of processes has the same batches
    num_batches = num_rows // (_NUM_WINDOWS * batch_size)
    return batch_size * min(_MOST_BATCHES, max(1, num_batches))


@dataclass
class _RowChunks(Dataset[list["PromptRow | RowResult"]]):
    """Parts of the rows, `size` rows each."""

    rows: Sequence[Row]
    processor: MultiTokenProcessor
    source: str
    indices: NDArray[np.int64]
    size: int
    prompt_only: bool

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __getitem__(self, number: int) -> list[PromptRow | RowResult]:
        indices = self.indices[number * self.size : (number + 1) * self.size].tolist()
        return read_rows(
            self.rows, indices, self.processor, source=self.source, prompt_only=self.prompt_only
        )


def read_rows(
    rows: Sequence[Row],
    indices: Sequence[int],
    processor: MultiTokenProcessor,
    *,
    source: str,
    prompt_only: bool,
) -> list[PromptRow | RowResult]:
    """Read some rows into samples, tokenized together; a bad row is its result already."""
    found: list[PromptRow | RowResult] = []
    good: list[tuple[int, Conversation]] = []
    for index in indices:
        try:
            row = rows[index]
            row_id = row_id_of(index, row, source)
            conversation = to_conversation(row, processor.modalities, row_id=row_id)
        except RowError as error:
            found.append(RowResult(index, error.row_id, error))
            continue
        if prompt_only:
            conversation = without_last_answer(conversation)
        good.append((len(found), conversation))
        found.append(RowResult(index, conversation.id, {}))
    samples = processor.many([c for _, c in good], prompt_only=prompt_only)
    for (at, conversation), sample in zip(good, samples, strict=True):
        kind = RowResult if isinstance(sample, RowError) else PromptRow
        found[at] = kind(found[at].index, conversation.id, sample)  # type: ignore[arg-type]
    return found


def batches_of(
    read: Iterator[PromptRow | RowResult],
    *,
    batch_size: int,
    window: int,
    on_bad: Callable[[Sequence[RowResult]], None],
) -> Iterator[list[PromptRow]]:
    """Sort the rows of each window by length, the longest first, and cut them into batches."""
    held: list[PromptRow] = []
    num_bytes = number = 0

    def cut() -> Iterator[list[PromptRow]]:
        nonlocal num_bytes
        held.sort(key=lambda row: -len(row.sample.input_ids))
        batches = [held[i : i + batch_size] for i in range(0, len(held), batch_size)]
        held.clear()
        num_bytes = 0
        yield from batches

    for row in read:
        if row.index // window != number or num_bytes > _WINDOW_BYTES:
            yield from cut()
            number = row.index // window
        if isinstance(row, RowResult):
            on_bad([row])
            continue
        held.append(row)
        num_bytes += sum(x.nbytes for item in row.sample.media for x in item.inputs.values())
    yield from cut()


def answers(
    model: MultiTokenForConditionalGeneration,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Work:
    """Return the work that generates an `answer` to each row with a model in this process.

    `temperature` 0 is greedy. The seed of a batch depends on `seed` and its first row.
    """
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}

    def work(batches: Iterator[list[PromptRow]]) -> Iterator[list[RowResult]]:
        for batch in batches:
            if sampling:
                torch.manual_seed(seed + batch[0].index)
            with _memory_errors(len(batch)):
                new_ids = generate_ids(
                    model,
                    [row.sample for row in batch],
                    max_new_tokens=max_new_tokens,
                    **sampling,
                )
            texts = (decode(model.require_processor(), ids[None])[0].strip() for ids in new_ids)
            yield [row.result({"answer": t}) for row, t in zip(batch, texts, strict=True)]

    return work


def scores(model: MultiTokenForConditionalGeneration) -> Work:
    """Return the work that computes `loss` and `exact` of each row; see `score_rows`."""

    def work(batches: Iterator[list[PromptRow]]) -> Iterator[list[RowResult]]:
        for batch in batches:
            with _memory_errors(len(batch)):
                found = score_rows(model, [row.sample for row in batch], batch_size=len(batch))
            pairs = zip(batch, found.loss.tolist(), found.accuracy.tolist(), strict=True)
            yield [row.result({"loss": loss, "exact": exact}) for row, loss, exact in pairs]

    return work


@contextmanager
def _memory_errors(num_rows: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MultiTokenError(
            f"the memory of the device is not enough for a batch of {num_rows} rows; the same "
            "command continues with a smaller --batch-size"
        ) from error
