"""Checks that stop all processes of a run together: recipes, losses, weights and rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from multi_token.distributed import all_gather, any_rank
from multi_token.errors import MultiTokenError, RecipeError, RowError
from multi_token.recipe.recipe import Recipe, differences


def check_losses_finite(
    batches: Sequence[tuple[Tensor, Sequence[str | RowError]]], step: int
) -> None:
    """Raise MultiTokenError in all processes if a loss of this step is NaN or inf in any of them.

    Raises RowError instead if a row of the step is bad in any process. `batches`: of each batch of
    the step, the loss [] and its row ids, with a RowError in place of the id of a bad row.
    """
    losses = torch.stack([loss.detach() for loss, _ in batches])
    bad = [row for _, rows in batches for row in rows if isinstance(row, RowError)]
    wrong = ~torch.isfinite(losses).all()
    # One reduction of one number and one host sync a step: the ids below are exchanged only after
    # a fault. All processes must take the same branch, or the next collective would hang.
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
