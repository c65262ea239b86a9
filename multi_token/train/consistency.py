"""Checks that stop all processes of a run together: recipes, losses, weights and rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from multi_token.distributed import DelayedAny, all_gather
from multi_token.errors import MultiTokenError, RecipeError, RowError, SpliceError
from multi_token.recipe.recipe import Recipe, differences


@dataclass(frozen=True)
class BatchResult:
    """Results of a batch that are checked after its step.

    Attributes:
        loss: Loss [].
        rows: Row ids, with a RowError in place of the id of a bad row.
        counts: (modality, bool []), true where media embeddings and positions disagree in number.
    """

    loss: Tensor
    rows: Sequence[str | RowError]
    counts: Sequence[tuple[str, Tensor]] = ()


class StepCheck:
    """Check of the results of one step, started in the step and read later.

    It starts one reduction of one number, and the host does not wait for it.
    """

    def __init__(self, batches: Sequence[BatchResult], step: int) -> None:
        """Start the check; collective."""
        self._batches, self._step = batches, step
        self._losses = torch.stack([batch.loss.detach() for batch in batches])
        self._bad = [row for b in batches for row in b.rows if isinstance(row, RowError)]
        flags = [is_wrong for batch in batches for _, is_wrong in batch.counts]
        wrong = torch.stack([~torch.isfinite(self._losses).all(), *flags]).any()
        device = self._losses.device
        self._any = DelayedAny(torch.ones_like(wrong) if self._bad else wrong, device)

    def finish(self) -> None:
        """Raise in all processes if a result of the step is wrong in any of them; collective.

        Raises RowError for a bad row, SpliceError for media embeddings that are too many or too
        few, MultiTokenError for a loss of NaN or inf.
        """
        # The ids below are exchanged only after a fault. All processes must take the same branch,
        # or the next collective would hang.
        if not self._any.read():
            return
        if everywhere := [row for of_process in all_gather(self._bad) for row in of_process]:
            check_no_bad_rows(everywhere, f"step {self._step}")
        miscounted = [
            (name, list(batch.rows))
            for batch in self._batches
            for name, is_wrong in batch.counts
            if bool(is_wrong)
        ]
        for name, rows in (one for of_process in all_gather(miscounted) for one in of_process):
            raise SpliceError(
                f"{name}: its encoder returned another number of features than `num_features` of "
                f"its items, at step {self._step}, in the batch of the rows "
                f"{', '.join(map(str, rows))}; `multi-token modalities check` tests a modality"
            )
        mine = [
            (value, list(batch.rows))
            for value, batch in zip(self._losses.tolist(), self._batches, strict=True)
            if not math.isfinite(value)
        ]
        found = [one for of_process in all_gather(mine) for one in of_process]
        rows = ", ".join(str(row) for _, some in found for row in some)
        raise MultiTokenError(
            f"the loss is {found[0][0]} at step {self._step}, in the batch of the rows {rows}; "
            "lower the learning rates under `learn`, or look for extreme values in these rows"
        )


def check_weights_finite(model: torch.nn.Module, step: int) -> None:
    """Raise MultiTokenError in all processes if a trainable weight holds NaN or inf in any.

    Called before a save: the update of the last step is followed by no loss that would show it.
    """
    broken = []
    for name, p in model.named_parameters():
        # each process checks its own shard: a gather would need the memory of the full weight
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
    """Raise RowError if `rows` (row ids) holds one; `where`: the step or pass, for the message."""
    bad = [row for row in rows if isinstance(row, RowError)]
    if not bad:
        return
    others = f", and {len(bad) - 1} more with it" if len(bad) > 1 else ""
    raise RowError(
        f"{bad[0].sentence} (found at {where}{others}, since with `data.lengths: headers` nothing "
        "is decoded earlier; fix the file, and the same command continues from the last "
        "checkpoint)",
        kind=bad[0].kind,
        row_id=bad[0].row_id,
    )


def check_same_recipe(recipe: Recipe) -> None:
    """Raise RecipeError in all processes if their recipes differ, with the names of the fields."""
    first, *others = all_gather(recipe.model_dump(mode="json"))
    for number, other in enumerate(others, 1):
        if differing := [name for name, _, _ in differences(first, other)]:
            raise RecipeError(
                f"the recipe of process {number} differs from that of process 0 in "
                f"{', '.join(differing)}; start all processes with one recipe and the same "
                "overrides"
            )
