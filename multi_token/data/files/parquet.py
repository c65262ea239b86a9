"""The rows of a .parquet file by index, a row group in memory at a time.

Border: tables as pyarrow gives them; sources and their names are dataset.py's and stream.py's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

from multi_token.data.dataset import Row
from multi_token.errors import MultiTokenError

if TYPE_CHECKING:
    import pyarrow

_NUM_GROUPS = 2
"""Row groups whose columns stay in memory: neighbours of a window may lie in two."""


class ParquetRows(Sequence[Row]):
    """A .parquet file whose footer is read when it is opened, and its row groups when asked for.

    Unlike `datasets`, it neither reads the whole file nor writes a copy. The file is opened for
    each row group, so that no handle is shared with forked workers.
    """

    def __init__(self, path: Path) -> None:
        """Raises MultiTokenError for a file that is not parquet."""
        import pyarrow
        from pyarrow import parquet

        self.path = path.resolve()
        try:
            footer = parquet.read_metadata(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise MultiTokenError(f"{path} cannot be read as parquet: {error}") from error
        sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        self.starts = list(accumulate(sizes, initial=0))
        self._groups: dict[int, pyarrow.Table] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return ParquetRows, (self.path,)  # row groups stay where they are

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        group = bisect_right(self.starts, index) - 1
        table = self._group(group)
        return cast("Row", table.slice(index - self.starts[group], 1).to_pylist()[0])

    def _group(self, number: int) -> pyarrow.Table:
        import pyarrow
        from pyarrow import parquet

        if number not in self._groups:
            if len(self._groups) == _NUM_GROUPS:
                del self._groups[next(iter(self._groups))]
            try:
                with parquet.ParquetFile(self.path) as file:
                    # without threads: they do not outlive a fork
                    self._groups[number] = file.read_row_group(number, use_threads=False)
            except (OSError, pyarrow.ArrowException) as error:
                raise MultiTokenError(
                    f"row group {number} of {self.path} cannot be read: {error}; write the file "
                    "anew"
                ) from error
        return self._groups[number]
