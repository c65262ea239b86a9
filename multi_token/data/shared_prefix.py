"""Rows that begin with the same media, and how much of their samples they share.

    scan -> reference of the first item: path, size and time of change | URL | hash of bytes
         -> groups of rows with one reference -> common prefix, from the texts of the rows

Only rows of groups are read, and by data workers of all processes; media are decoded only where no
header has their length. Prefixes are kept in the run's folder, so the next start reads no row here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch.utils.data import Dataset

from multi_token.checkpoint.atomic import save_arrays
from multi_token.collate import shared_prefix
from multi_token.data.formats import to_conversation
from multi_token.data.parallel import read_parallel, share_of
from multi_token.data.rows import row_id_of
from multi_token.data.sources import TrainingSource
from multi_token.distributed import all_gather, broadcast_from_main
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.hashing import digest, source_stamp
from multi_token.processor import MultiTokenProcessor
from multi_token.types import Conversation, Media, Prepared, Sample

FILE = "shared-prefixes.safetensors"
_PART = 64
"""Rows, or groups, that a data worker reads at a time."""
_BYTES = 16
"""Bytes of a digest."""


@dataclass(frozen=True)
class SharedPrefixGroup:
    """Rows whose samples begin with the same media, and the size of that common prefix."""

    rows: tuple[int, ...]
    num_tokens: int
    num_items: int


def shared_prefix_groups(
    sources: Sequence[TrainingSource], folder: Path, *, num_workers: int, console: Console
) -> list[SharedPrefixGroup]:
    """Find the good rows of all sources that begin with the same media; collective.

    Rows have the numbers of the dataset that `build_dataset` makes of the sources. Text that rows
    begin with alike needs no group: collate.py finds it in whatever pack it comes.

    Args:
        sources: Sources that were scanned for a recipe with `packing.share`.
        folder: The run's folder, which keeps the prefixes for the next start.
        num_workers: Data workers of each process.
        console: Console of the bars.

    Raises:
        RowError: A row can no longer be read.
        MultiTokenError: The file in the folder is damaged, or cannot be written.
    """
    rows = _GoodRows(sources)
    table = np.concatenate([_references(source) for source in sources])
    groups = _rows_of_one_reference(table[:, :_BYTES])
    if not groups:
        return []
    # digests of rows cover their texts, their files and the processor
    keys = [digest(table[group, _BYTES:].tobytes()) for group in groups]
    known = broadcast_from_main(lambda: _load(folder / FILE))
    unknown = [number for number, key in enumerate(keys) if key not in known]
    if unknown:
        mine = share_of(unknown)
        read = read_parallel(
            _Prefixes(rows, [groups[number] for number in mine]),
            num_workers=num_workers,
            console=console,
            description="Measuring shared prefixes",
            total=len(mine),
        )
        found = dict(zip(mine, read, strict=True))
        by_group = {number: sizes for some in all_gather(found) for number, sizes in some.items()}
        _raise_first(by_group.values())
        known |= {keys[number]: sizes for number, sizes in by_group.items()}
        sizes = {key: known[key] for key in keys}
        broadcast_from_main(lambda: _save(folder / FILE, sizes))
    return [
        SharedPrefixGroup(tuple(group.tolist()), *known[key])
        for group, key in zip(groups, keys, strict=True)
        if known[key][1]
    ]


class _GoodRows:
    """Good rows of all sources by one number, picklable into data workers."""

    def __init__(self, sources: Sequence[TrainingSource]) -> None:
        self.sources = sources
        self.ends = np.cumsum([len(source.lengths) for source in sources])

    def read(self, number: int) -> tuple[Conversation, MultiTokenProcessor, int]:
        """Return conversation, processor and number of tokens of a row. Raises RowError."""
        at = int(np.searchsorted(self.ends, number, side="right"))
        source = self.sources[at]
        own = number - (int(self.ends[at - 1]) if at else 0)
        index = own if source.good_indices is None else source.good_indices[own]
        row = source.rows[index]
        row_id = row_id_of(index, row, source.name)
        conversation = to_conversation(row, source.processor.modalities, row_id=row_id)
        return conversation, source.processor, source.lengths[own]


def _references(source: TrainingSource) -> NDArray[np.uint8]:
    assert source.references is not None  # scanned with `packing.share`
    return source.references


def _reference(item: Media, processor: MultiTokenProcessor) -> str:
    """Digest of the modality and the source of an item: 32 hexadecimal digits. Raises NoStamp."""
    stamp = source_stamp(item.source, processor.fetch)
    return digest(item.modality.encode(), json.dumps(stamp).encode())


def _rows_of_one_reference(references: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Return the rows of each reference that several rows have, by their first row."""
    with_media = np.flatnonzero(references.any(1))
    whole = np.ascontiguousarray(references[with_media]).view(f"S{_BYTES}").reshape(-1)
    _, numbers, counts = np.unique(whole, return_inverse=True, return_counts=True)
    order = np.argsort(numbers, kind="stable")
    groups = np.split(with_media[order], np.cumsum(counts)[:-1])
    return sorted((group for group in groups if len(group) > 1), key=lambda group: group[0])


@dataclass
class _Prefixes(Dataset["tuple[int, int] | RowError"]):
    """Groups of rows -> (tokens, media items) of the prefix that the rows have in common."""

    rows: _GoodRows
    groups: Sequence[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[int, int] | RowError:
        try:
            return self._sizes(self.groups[number])
        except RowError as error:
            return error

    def _sizes(self, group: NDArray[np.int64]) -> tuple[int, int]:
        ((first, num_others),) = self._samples(group[:1])
        num_tokens, num_items = len(first.input_ids), len(first.media)
        fewest = (num_items, num_others)
        # a part at a time: a million rows may begin with one image
        for start in range(1, len(group), _PART):
            part = self._samples(group[start : start + _PART])
            # what each row shares with the first one, all rows share
            shared = shared_prefix([first, *(sample for sample, _ in part)])
            num_tokens, num_items = min((num_tokens, num_items), shared)
            if not num_items:
                return num_tokens, 0
            fewest = min(fewest, *((len(sample.media), num) for sample, num in part))
        if fewest[0] == num_items:  # of a row whose items are all shared
            return num_tokens + fewest[1], num_items
        conversation, processor, _ = self.rows.read(int(group[0]))
        processor = replace(processor, lengths_only=True)
        lengths = [
            processor.modalities[item.modality].num_tokens(
                processor.prepare(item, row_id=conversation.id).num_features
            )
            for item in conversation.media[:num_items]
        ]
        return num_tokens + sum(lengths) - num_items, num_items

    def _samples(self, numbers: NDArray[np.int64]) -> list[tuple[Sample, int]]:
        """Return the samples of rows, each media item as one token, and the tokens left out."""
        rows = [self.rows.read(int(number)) for number in numbers]
        conversations = [conversation for conversation, _, _ in rows]
        found = rows[0][1].chat.tokenize_many(
            conversations, [[1] * len(c.media) for c in conversations], [None] * len(rows)
        )
        samples = []
        for (conversation, processor, length), sample in zip(rows, found, strict=True):
            if not isinstance(sample, Sample):
                raise RowError(str(sample), kind="chat_template", row_id=conversation.id)
            sample.media = [
                Prepared({"reference": _bytes(_reference(item, processor))}, num_features=1)
                for item in conversation.media
            ]
            samples.append((sample, length - len(sample.input_ids)))
        return samples


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _raise_first(found: Any) -> None:
    """Raise the first error, in all processes alike."""
    for one in found:
        if isinstance(one, RowError):
            raise one


def _load(file: Path) -> dict[str, tuple[int, int]]:
    if not file.is_file():
        return {}
    try:
        arrays = load_file(file)
        keys, sizes = arrays["keys"], arrays["sizes"].tolist()
    except (OSError, SafetensorError, KeyError) as error:
        raise MultiTokenError(
            f"{file} is damaged ({error}); remove it, and its prefixes are measured again"
        ) from error
    return {key.tobytes().hex(): tuple(one) for key, one in zip(keys, sizes, strict=True)}


def _save(file: Path, sizes: dict[str, tuple[int, int]]) -> None:
    keys = np.frombuffer(bytes.fromhex("".join(sizes)), np.uint8).reshape(-1, _BYTES)
    arrays = {"keys": keys, "sizes": np.array(list(sizes.values()), np.int32)}
    save_arrays(arrays, file)
