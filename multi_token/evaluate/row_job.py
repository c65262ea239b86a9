"""Job over rows: results in part files that any number of processes write, joined in row order.

    rows -> share of this process, less the rows that are done -> results -> part file
    all part files -> joined, by the last process to finish -> OUT

    OUT.parts/job.json             the settings that results depend on
    OUT.parts/part-0-of-4.jsonl    results of a share, each with the index of its row, in any order
    OUT.parts/part-0-of-4.lock     locked by the process that writes them
    OUT.parts/join.lock            locked by the process that joins, which locks all parts too

A killed job continues with any number of processes: every row without a result in any part is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from multi_token.checkpoint.atomic import atomic_file, lock_file
from multi_token.data.parallel import progress_bar
from multi_token.data.rows import Row
from multi_token.distributed import digest_values
from multi_token.errors import MultiTokenError, RowError

T = TypeVar("T")

SUFFIXES = (".jsonl", ".parquet")
_SCHEMA = 1
_NUM_COMPARED_ROWS = 1000
"""Rows, evenly spread, whose results hold a digest of the row."""
_GROUP_ROWS = 10_000
"""Rows of a row group of .parquet."""
_NUM_EXAMPLES = 5
_BAR_STEP = 1000
_BAD = 2
"""State of a row whose only result is an error."""


@dataclass(frozen=True)
class RowResult:
    """Result of one row: the fields of its line, or the error that the row raised."""

    index: int
    row_id: str
    found: Mapping[str, Any] | RowError


@dataclass
class JobReport:
    """Totals of a joined job."""

    num_rows: int = 0
    num_bad: int = 0
    examples: list[str] = field(default_factory=list)
    """Sentences of the first bad rows."""


class RowJob:
    """One result for each row of a source, by one of several processes."""

    def __init__(
        self,
        out: Path,
        rows: Sequence[Row],
        *,
        columns: Sequence[str],
        settings: Mapping[str, Any],
        share: int = 0,
        num_shares: int = 1,
        console: Console | None = None,
    ) -> None:
        """`columns`: fields of a result. `settings`: what the results depend on, as JSON values.

        `console`: console of bars; None shows nothing.

        Raises MultiTokenError for a file that cannot be written, or holds something else.
        """
        if out.suffix.lower() not in SUFFIXES:
            raise MultiTokenError(f"--out writes {' or '.join(SUFFIXES)} files, got {str(out)!r}")
        self.out = out
        self.folder = out.parent / f"{out.name}.parts"
        self.rows = rows
        self.columns = tuple(columns)
        self.name = f"part-{share}-of-{num_shares}"
        self._file: IO[bytes] | None = None
        self._has_locks = True
        self._console = Console(quiet=True) if console is None else console
        with self._write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._claim({"schema": _SCHEMA, "num_rows": len(rows), **settings})
        self.refresh()

    def _claim(self, settings: Mapping[str, Any]) -> None:
        """Write the settings into the folder, or compare them with those in it."""
        path = self.folder / "job.json"
        remedy = f"choose another --out, or remove {self.out} and {self.folder}"
        if self.out.exists() and not path.is_file():
            raise MultiTokenError(f"{self.out} is there and belongs to other rows; {remedy}")
        # settings of a start that failed before its first result may change
        parts = self.folder.glob("part-*.jsonl")
        if not self.out.exists() and not any(part.stat().st_size for part in parts):
            with self._write_errors(), atomic_file(path) as partial:
                partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} {theirs.get(key)!r} there, {settings.get(key)!r} here"
            for key in dict.fromkeys((*theirs, *settings))
            if theirs.get(key) != settings.get(key)
        ]
        if changed:
            raise MultiTokenError(
                f"{self.folder} belongs to another job, which differs in {'; '.join(changed)}; "
                f"{remedy}"
            )

    def refresh(self) -> None:
        """Read which rows have results, in the parts of all processes."""
        num_rows = len(self.rows)
        self._parts = sorted(self.folder.glob("part-*.jsonl"))
        # numbers of each row instead of its line: the parts may be larger than memory
        self._state = np.zeros(num_rows, np.uint8)
        self._part_of = np.zeros(num_rows, np.int16)
        self._offsets = np.zeros(num_rows, np.int64)
        lines = ((n, *line) for n, path in enumerate(self._parts) for line in _lines(path))
        for number, offset, fields in self._shown(lines, "Reading results"):
            index, state = fields["index"], _BAD if "error" in fields else 1
            if index >= num_rows or not self._is_same_row(index, fields):
                raise MultiTokenError(
                    f"{self._parts[number]} has a result of row {fields['id']!r}, which is not row "
                    f"{index} here: it belongs to other rows; choose another --out, or remove "
                    f"{self.folder}"
                )
            # a row that was bad may have been fixed since
            if self._state[index] != 1:
                self._state[index] = state
                self._part_of[index], self._offsets[index] = number, offset

    def _shown(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yield the items, one for each row, with a bar."""
        with progress_bar(self._console, description, len(self.rows)) as advance:
            for number, item in enumerate(items, 1):
                yield item
                if number % _BAR_STEP == 0:
                    advance(_BAR_STEP)

    def _is_same_row(self, index: int, fields: Mapping[str, Any]) -> bool:
        return "row" not in fields or fields["row"] == _row_digest(self.rows, index)

    @property
    def is_joined(self) -> bool:
        """True if the output is written, and nothing is left to do."""
        # a part without results is no work: a process may have been killed as it began one
        return self.out.exists() and not self._state.any()

    @property
    def num_done(self) -> int:
        """Rows with a result that is no error."""
        return len(self.rows) if self.is_joined else int((self._state == 1).sum())

    def todo(self, window: int) -> NDArray[np.int64]:
        """Return the rows of this share without a result, ascending; none once all are joined.

        A share is every n-th window of as many neighbours: rows of a window are batched together,
        and so the batches do not depend on the number of processes.
        """
        if self.is_joined:
            return np.empty(0, np.int64)
        share, num_shares = map(int, self.name.removeprefix("part-").split("-of-"))
        windows = np.arange(len(self.rows), dtype=np.int64) // window
        return np.flatnonzero((windows % num_shares == share) & (self._state != 1))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, `write` appends to the part of this process, which no other may write.

        The results of all processes are read again first. Once they are joined, `todo` has no
        rows, and no part is begun. Raises MultiTokenError if another process writes the part.
        """
        path = self.folder / f"{self.name}.jsonl"
        with ExitStack() as stack:
            try:
                # who joins holds the lock of this part too, and is no second start of this shard
                with ExitStack() as joining:
                    self._lock(joining, "join.lock", wait=True)
                    self._lock(stack, f"{self.name}.lock")
            except BlockingIOError:
                raise MultiTokenError(
                    f"{path} is being written by another process; start each shard once"
                ) from None
            self.refresh()
            if self.is_joined:
                yield
                return
            with self._write_errors():
                self._file = stack.enter_context(path.open("ab"))
                # a killed process may have written half a line
                with path.open("rb") as found:
                    self._file.truncate(sum(len(n) for n in found if n.endswith(b"\n")))
            try:
                yield
            finally:
                self._file = None

    def _lock(self, stack: ExitStack, name: str, *, wait: bool = False) -> None:
        """Lock a file of the folder until `stack` ends; see `lock_file`."""
        with self._write_errors():
            # a file of its own: a process loses its lock when it closes any handle of a file
            file = stack.enter_context((self.folder / name).open("a"))
        reason = lock_file(file, wait=wait)
        if reason is not None and self._has_locks:
            self._has_locks = False
            self._console.print(
                f"{self.folder} is not locked: {reason}; start each shard once, and do bad rows "
                "again with one process"
            )

    def write(self, results: Sequence[RowResult]) -> None:
        """Append results, flushed together. Raises MultiTokenError (a full disk)."""
        assert self._file is not None
        lines = []
        for result in results:
            fields: dict[str, Any] = {"index": result.index, "id": result.row_id}
            if isinstance(result.found, RowError):
                # without a digest: the row may be fixed before the next start
                fields["error"] = result.found.sentence
            else:
                fields |= result.found
                digest = _row_digest(self.rows, result.index)
                if digest is not None:
                    fields["row"] = digest
            lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
        with self._write_errors():
            # ids of JSON may hold half of a UTF-16 pair, which no table takes
            self._file.write("".join(lines).encode("utf-8", "replace"))
            self._file.flush()

    def join(
        self, on_result: Callable[[Mapping[str, Any]], None] | None = None
    ) -> JobReport | None:
        """Join all parts and remove them; None if rows are left, or they were joined before.

        Also None while another process writes: it may do bad rows again, and joins when it ends.
        `on_result` gets the fields of each good row, in order.
        """
        with ExitStack() as stack:
            # two processes that finish together: the second finds the work done
            self._lock(stack, "join.lock", wait=True)
            try:
                for path in self.folder.glob("part-*.lock"):
                    self._lock(stack, path.name)
            except BlockingIOError:
                return None
            self.refresh()
            if self.is_joined or not self._state.all():
                return None
            report = JobReport(len(self.rows))
            with self._write_errors(), atomic_file(self.out, sync=True) as partial:
                write = _write_parquet if self.out.suffix.lower() == ".parquet" else _write_jsonl
                write(partial, self._results(report, on_result), self.columns)
            for path in self._parts:
                path.unlink()
            self.refresh()
        for path in self.folder.glob("*.lock"):
            path.unlink(missing_ok=True)
        return report

    def _results(
        self, report: JobReport, on_result: Callable[[Mapping[str, Any]], None] | None
    ) -> Iterator[Mapping[str, Any]]:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self._parts]
            for index in self._shown(range(len(self.rows)), "Joining results"):
                file = files[self._part_of[index]]
                file.seek(int(self._offsets[index]))
                fields = json.loads(file.readline())
                if "error" in fields:
                    report.num_bad += 1
                    if len(report.examples) < _NUM_EXAMPLES:
                        report.examples.append(f"row {fields['id']}: {fields['error']}")
                elif on_result is not None:
                    on_result(fields)
                yield {key: value for key, value in fields.items() if key not in ("index", "row")}

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MultiTokenError(
                f"{error.filename or self.folder} could not be written "
                f"({error.strerror or error}); free some space there, or choose another --out. "
                "The same command continues"
            ) from error


def _row_digest(rows: Sequence[Row], index: int) -> str | None:
    """Return a digest of a row's content if it is one of those that are compared, else None."""
    if index % -(-len(rows) // _NUM_COMPARED_ROWS):
        return None
    try:
        return digest_values([rows[index]])[:16]
    except RowError as error:
        return error.kind


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield offset and fields of each complete line."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                fields = json.loads(line)
                _ = fields["index"], fields["id"]
            except (ValueError, KeyError, TypeError):
                raise MultiTokenError(
                    f"{path} line {number} is damaged; remove that line, and its row is done again"
                ) from None
            yield offset, fields
            offset += len(line)


def _write_jsonl(path: Path, results: Iterator[Mapping[str, Any]], columns: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for fields in results:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _write_parquet(
    path: Path, results: Iterator[Mapping[str, Any]], columns: Sequence[str]
) -> None:
    import pyarrow
    from pyarrow import parquet

    names = ("id", *columns, "error")
    types = {"answer": pyarrow.string(), "id": pyarrow.string(), "error": pyarrow.string()}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.float64())) for name in names])
    with parquet.ParquetWriter(path, schema) as writer:
        group: list[Mapping[str, Any]] = []

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
            group.clear()

        for fields in results:
            group.append(fields)
            if len(group) == _GROUP_ROWS:
                flush()
        # a file without rows has its columns too
        flush()
