"""Rows of one .parquet shard by index, with two row groups in memory."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, cast

from multi_token.data.rows import IndexedRows, Row
from multi_token.errors import MultiTokenError

if TYPE_CHECKING:
    import pyarrow

_NUM_GROUPS = 2
"""Row groups that stay in memory: the rows of a shuffle window may lie in two."""


class GroupedRows(IndexedRows):
    """Rows of a table that is stored in groups; a format sets `starts` and reads one group."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.starts: list[int] = [0]
        self._groups: dict[int, pyarrow.Table] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path,)  # without groups: a worker reads its own

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        group = bisect_right(self.starts, index) - 1
        table = self._group(group)
        return cast("Row", table.slice(index - self.starts[group], 1).to_pylist()[0])

    @abstractmethod
    def _read_group(self, number: int) -> pyarrow.Table: ...

    def _group(self, number: int) -> pyarrow.Table:
        import pyarrow

        if number not in self._groups:
            if len(self._groups) == _NUM_GROUPS:
                del self._groups[next(iter(self._groups))]
            try:
                self._groups[number] = self._read_group(number)
            except (OSError, pyarrow.ArrowException) as error:
                raise MultiTokenError(
                    f"row group {number} of {self.path} cannot be read: {error}; write the file "
                    "again"
                ) from error
        return self._groups[number]


class ParquetRows(GroupedRows):
    """Rows of a .parquet file; opening reads the footer, access reads one row group.

    `datasets` would convert the complete file into its cache first.
    """

    def __init__(self, path: Path) -> None:
        """Raises MultiTokenError for a file that is not parquet."""
        import pyarrow
        from pyarrow import parquet

        super().__init__(path)
        try:
            footer = parquet.read_metadata(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise MultiTokenError(f"{path} cannot be read as parquet: {error}") from error
        sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        self.starts = list(accumulate(sizes, initial=0))

    def _read_group(self, number: int) -> pyarrow.Table:
        from pyarrow import parquet

        # opened for each row group: forked workers would share one handle's position
        with parquet.ParquetFile(self.path) as file:
            # Arrow's threads do not survive a fork: a forked worker would wait for ever
            return file.read_row_group(number, use_threads=False)
