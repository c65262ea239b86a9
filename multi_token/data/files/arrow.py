"""Rows of .arrow and .feather files by index, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from multi_token.data.files.parquet import GroupedRows
from multi_token.errors import MultiTokenError

if TYPE_CHECKING:
    import pyarrow

_MAGIC = b"ARROW1"
"""First bytes of Arrow's file format; the stream format, which `datasets` writes, has none."""


class ArrowRows(GroupedRows):
    """Rows of an Arrow file in either format (Feather version 2 is the file format).

    Record batches are views of the mapped file. Compressed ones are unpacked when they are read,
    and two of them stay in memory.
    """

    def __init__(self, path: Path) -> None:
        """Raises MultiTokenError for a file that is not Arrow, or is cut short."""
        import pyarrow

        super().__init__(path)
        sizes: list[int] = []
        self.is_mapped = True
        """False for a compressed file."""
        try:
            for number, batch in enumerate(self._batches()):
                sizes.append(len(batch))
                # Arrow's own memory can be written to, a mapped file not
                buffers = (b for column in batch.columns for b in column.buffers() if b)
                self.is_mapped = self.is_mapped and not any(b.is_mutable for b in buffers)
                if self.is_mapped:
                    self._groups[number] = pyarrow.Table.from_batches([batch])
                else:
                    self._groups.clear()
        except (OSError, pyarrow.ArrowException) as error:
            raise MultiTokenError(
                f"{path} cannot be read as Arrow: {error}; write the file again"
            ) from error
        self.starts = list(accumulate(sizes, initial=0))

    def _batches(self) -> Iterator[pyarrow.RecordBatch]:
        from pyarrow import ipc, memory_map

        with self.path.open("rb") as file:
            is_file = file.read(len(_MAGIC)) == _MAGIC
        # Arrow's threads do not survive a fork: a forked worker would wait for ever
        options = ipc.IpcReadOptions(use_threads=False)
        mapped = memory_map(str(self.path))
        if not is_file:
            yield from ipc.open_stream(mapped, options=options)
            return
        reader = ipc.open_file(mapped, options=options)
        yield from map(reader.get_batch, range(reader.num_record_batches))

    def _read_group(self, number: int) -> pyarrow.Table:
        import pyarrow

        batch = next(batch for i, batch in enumerate(self._batches()) if i == number)
        return pyarrow.Table.from_batches([batch])
