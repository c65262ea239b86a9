"""Several processes that train one model: who is first, what all know, what all agree on.

Border: words between processes, by torch.distributed; with one process everything here is a no-op.
What of the model lies where is sharding.py's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from multi_token.errors import MultiTokenError, RecipeError, RowError
from multi_token.recipe.recipe import Recipe, differences

if TYPE_CHECKING:
    from multi_token.data.sources import TrainingSource

T = TypeVar("T")

_NUM_ROWS = 1000
"""Rows of each source that are compared in full between processes."""


def num_processes() -> int:
    """How many train together; 1 before they have met."""
    return distributed.get_world_size() if _is_initialized() else 1


def rank() -> int:
    """The number of this process among all, from 0."""
    return distributed.get_rank() if _is_initialized() else 0


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Until all processes are here."""
    if num_processes() > 1:
        distributed.barrier()


def destroy_process_group(*, after_fault: bool = False) -> None:
    """The last word: processes that have met go on alone.

    After a fault too, or a thread of gloo now and then ends a process with an abort, which hides
    its exit code. NCCL is left alone then: it would wait for processes that are elsewhere.
    """
    if _is_initialized() and not (after_fault and distributed.get_backend() == "nccl"):
        distributed.destroy_process_group()


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """What the first process finds, for all: others might see a folder later, or differently."""
    found: list[Any] = [decide() if is_main_process() else None]
    if num_processes() > 1:
        distributed.broadcast_object_list(found)
    return found[0]


def all_gather(value: T) -> list[T]:
    """The value of every process, by rank."""
    if num_processes() == 1:
        return [value]
    found: list[Any] = [None] * num_processes()
    distributed.all_gather_object(found, value)
    return found


def any_rank(flag: bool | Tensor, device: torch.device) -> bool:
    """Whether it is so in any process. Signals reach them at different steps.

    `flag` may be a bool tensor [], which is read once all processes have added theirs.
    """
    if num_processes() == 1:
        return bool(flag)
    told = torch.as_tensor(flag, device=device).int()
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
    return bool(told)


@contextmanager
def peer_errors() -> Iterator[None]:
    """Within, a connection to another process that breaks is a MultiTokenError, in words.

    gloo and NCCL find it in whatever exchange comes next, at once where the other one ended, and
    after `ddp_timeout` where it only stands still.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        broken = isinstance(error, distributed.DistError) or "gloo" in text or "by peer" in text
        if num_processes() == 1 or not broken:
            raise
        raise MultiTokenError(
            f"process {rank()} lost another process of this run, which ended or cannot be reached "
            f"any more; what it printed itself says why. Start the same command again: it goes on "
            f"from the last whole checkpoint. ({(text.splitlines() or [type(error).__name__])[0]})"
        ) from error


def check_losses_finite(
    batches: Sequence[tuple[Tensor, Sequence[str | RowError]]], step: int
) -> None:
    """Raises MultiTokenError in all processes, in the same words, if a loss is no number in any.

    Or if a row of the step is a bad one in any (RowError). `batches`: of each batch of the step,
    the loss [] and the names of its rows, or what is wrong with them. It costs one exchange of a
    number, and one wait for the device.
    """
    losses = torch.stack([loss.detach() for loss, _ in batches])
    bad = [row for _, rows in batches for row in rows if isinstance(row, RowError)]
    wrong = ~torch.isfinite(losses).all()
    if not any_rank(torch.ones_like(wrong) if bad else wrong, losses.device):
        return
    if everywhere := [row for of_process in all_gather(bad) for row in of_process]:
        check_no_bad_rows(everywhere, f"step {step}")
    values = losses.tolist()
    mine = [
        (value, list(rows))
        for value, (_, rows) in zip(values, batches, strict=True)
        if not math.isfinite(value)
    ]
    found = [one for of_process in all_gather(mine) for one in of_process]
    rows = ", ".join(str(row) for _, some in found for row in some)
    raise MultiTokenError(
        f"the loss is {found[0][0]} at step {step}, in the batch of the rows {rows}; lower the "
        "learning rates under `learn`, or look for extreme values in these rows"
    )


def check_weights_finite(model: torch.nn.Module, step: int) -> None:
    """Raises MultiTokenError in all processes if a weight that learns is no number in any: after
    the last step no loss would tell.
    """
    broken = []
    for name, p in model.named_parameters():
        mine = p.to_local() if isinstance(p, DTensor) else p
        if p.requires_grad and not bool(mine.isfinite().all()):
            broken.append(name)
    found = [name for of_process in all_gather(broken) for name in of_process]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise MultiTokenError(
            f"after step {step} the weight {found[0]}{more} holds nan or inf, so nothing is "
            "written; lower the learning rates under `learn`"
        )


def check_no_bad_rows(rows: Sequence[str | RowError], where: str) -> None:
    """Raises RowError if there is one among the names of rows; `where` they were met, in words."""
    bad = [row for row in rows if isinstance(row, RowError)]
    if not bad:
        return
    others = f", and {len(bad) - 1} more with it" if len(bad) > 1 else ""
    raise RowError(
        f"{bad[0].sentence} (met at {where}{others}, since with `data.lengths: headers` nothing is "
        "decoded before; mend the file, and the same command goes on from the last checkpoint)",
        kind=bad[0].kind,
        row_id=bad[0].row_id,
    )


def check_same_recipe(recipe: Recipe) -> None:
    """Raises RecipeError in all processes if their recipes differ, which names the fields."""
    first, *others = all_gather(recipe.model_dump(mode="json"))
    for number, other in enumerate(others, 1):
        if differing := [name for name, _, _ in differences(first, other)]:
            raise RecipeError(
                f"the recipe of process {number} is not that of process 0: it differs in "
                f"{', '.join(differing)}; start all of them with one recipe and the same overrides"
            )


def check_same_rows(sources: Sequence[TrainingSource]) -> None:
    """Raises RecipeError in all processes if their rows differ.

    Compared are the number of rows, and up to 1,000 rows of each source in full, evenly spread.
    """
    if num_processes() == 1:
        return
    for source in sources:
        step = max(1, -(-len(source.rows) // _NUM_ROWS))
        some = [_row(source.rows, i) for i in range(0, len(source.rows), step)]
        check_same_values(
            f"data (rows of {source.name})",
            [len(source.rows), *some],
            "give all machines the same files",
        )


def _row(rows: Sequence[Any], index: int) -> Any:
    """A row, or what is wrong with a line that is none."""
    try:
        return rows[index]
    except RowError as error:
        return [error.row_id, error.kind]


def check_same_values(what: str, values: Sequence[Any], mend: str) -> None:
    """Raises RecipeError in all processes if these values are not the same in each."""
    digests = all_gather(_digest(values))
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


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
