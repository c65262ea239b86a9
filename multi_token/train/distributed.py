"""Several processes that train one model: who is first, what all know, what all agree on.

Border: words between processes, by torch.distributed; with one process everything here is a no-op.
What of the model lies where is sharding.py's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from multi_token.errors import RecipeError
from multi_token.recipe import Recipe
from multi_token.train.sources import Source

T = TypeVar("T")

_NUM_ROWS = 1000
"""Rows of each source that are compared in full between processes."""


def num_processes() -> int:
    """How many train together; 1 before they have met."""
    return distributed.get_world_size() if _have_met() else 1


def rank() -> int:
    """The number of this process among all, from 0."""
    return distributed.get_rank() if _have_met() else 0


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if num_processes() > 1:
        distributed.barrier()


def part() -> None:
    """The last word: processes that have met go on alone."""
    if num_processes() > 1:
        distributed.destroy_process_group()


def from_first(decide: Callable[[], T]) -> T:
    """What the first process finds, for all: others might see a folder later, or differently."""
    found: list[Any] = [decide() if is_first() else None]
    if num_processes() > 1:
        distributed.broadcast_object_list(found)
    return found[0]


def from_all(value: T) -> list[T]:
    """The value of every process, by rank."""
    if num_processes() == 1:
        return [value]
    found: list[Any] = [None] * num_processes()
    distributed.all_gather_object(found, value)
    return found


def in_any(flag: bool, device: torch.device) -> bool:
    """Whether it is so in any process. Signals reach them at different steps."""
    if num_processes() == 1:
        return flag
    told = torch.tensor(int(flag), device=device)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
    return bool(told)


def refuse_other_recipes(recipe: Recipe) -> None:
    """Raises RecipeError in all processes if their recipes differ."""
    digest = _digest([recipe.model_dump(mode="json")])
    _refuse_differing("recipe", digest, "start all of them with one recipe and the same overrides")


def refuse_other_rows(sources: Sequence[Source]) -> None:
    """Raises RecipeError in all processes if their rows differ.

    Compared are the number of rows, which of them are good, the length of each, and up to 1,000
    rows of each source in full, evenly spread.
    """
    if num_processes() == 1:
        return
    for source in sources:
        facts: list[Any] = [len(source.rows), list(source.good or ()), list(source.lengths)]
        step = max(1, -(-len(source.rows) // _NUM_ROWS))
        digest = _digest([*facts, *(source.rows[i] for i in range(0, len(source.rows), step))])
        _refuse_differing(
            f"data (rows of {source.name})", digest, "give all machines the same files"
        )


def _refuse_differing(what: str, digest: str, mend: str) -> None:
    digests = from_all(digest)
    others = [str(i) for i, other in enumerate(digests) if other != digests[0]]
    if others:
        raise RecipeError(
            f"the {what} of process {', '.join(others)} is not that of process 0; {mend}"
        )


def _digest(values: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(value, sort_keys=True, default=_plain, ensure_ascii=False)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """What JSON has no word for: bytes by their hash, an opened picture by its kind."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return hashlib.sha256(value).hexdigest()
    return type(value).__name__


def _have_met() -> bool:
    return distributed.is_available() and distributed.is_initialized()
