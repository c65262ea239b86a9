"""Reference of a stage with `dpo`: log-probability of each answer when the stage began.

    RUN/stages/<stage>/reference.safetensors   logps float32 [pairs, 2], lengths int64 [pairs, 2]
    RUN/stages/<stage>/held_out_reference.safetensors   the same of pairs in `data.eval`

One pass over the rows before the first step, so it holds for any trainable part. A second model in
memory is not needed, and a resumed run reads the file.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from multi_token.checkpoint.atomic import atomic_file
from multi_token.data.sources import TrainingSource, build_dataset
from multi_token.distributed import (
    all_gather,
    broadcast_from_main,
    is_main_process,
    num_processes,
    raise_together,
    rank,
)
from multi_token.errors import RecipeError
from multi_token.language_model.loss import token_losses
from multi_token.media.hashing import digest
from multi_token.recipe.train import Stage
from multi_token.train.consistency import check_no_bad_rows
from multi_token.train.dpo import REFERENCE, PreferenceDataset, sequence_logps
from multi_token.train.metrics import ROW_IDS
from multi_token.train.random_state import preserve_rng_state
from multi_token.train.resume import raise_on_write_error
from multi_token.train.training_args import mixed_precision

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.train.trainer import MultiTokenTrainer

REFERENCE_FILE, HELD_OUT_FILE = "reference.safetensors", "held_out_reference.safetensors"


def preference_dataset(
    sources: Sequence[TrainingSource], stage: Stage, model: MultiTokenForConditionalGeneration
) -> tuple[list[TrainingSource], PreferenceDataset]:
    """Return the rows of all sources that have two answers: as sources, and as a dataset.

    Raises RecipeError if there are none.
    """
    found = _preference_rows(sources, model)
    if found is None:
        num_rows = sum(len(source.lengths) for source in sources)
        raise RecipeError(
            f"stage {stage.name!r} has `dpo`, but none of {num_rows} rows has a `chosen` and a "
            "`rejected` answer; see docs/preferences.md"
        )
    return found


def held_out_preference_dataset(
    sources: Sequence[TrainingSource], model: MultiTokenForConditionalGeneration, console: Console
) -> PreferenceDataset | None:
    """Return the held-out rows that have two answers, or None if no row has; print the others."""
    found = _preference_rows(sources, model)
    num_rows = sum(len(source.lengths) for source in sources)
    if found is None:
        console.print("no held-out row has two answers: they are evaluated by cross entropy")
        return None
    if len(found[1]) < num_rows:
        console.print(
            f"{len(found[1])} of {num_rows} held-out rows have two answers; the others are left "
            "out of this stage's evaluation",
            highlight=False,
        )
    return found[1]


def _preference_rows(
    sources: Sequence[TrainingSource], model: MultiTokenForConditionalGeneration
) -> tuple[list[TrainingSource], PreferenceDataset] | None:
    found, lengths = [], []
    for source in sources:
        assert source.good_indices is not None  # scanned, so that no row is read here
        columns = (
            *(source.good_indices, source.lengths, source.num_items),
            *(source.num_rejected, source.modalities),
        )
        indices, chosen, num_items, rejected, modalities = (
            array("q", compress(column, source.num_rejected)) for column in columns
        )
        lengths += zip(chosen, rejected, strict=True)
        found.append(
            replace(
                source,
                good_indices=indices,
                lengths=chosen,
                num_items=num_items,
                num_rejected=rejected,
                modalities=modalities,
            )
        )
    if not lengths:
        return None
    reading = [s.with_processor(distillation=None, preference="required") for s in found]
    return found, PreferenceDataset(build_dataset(reading, model.modalities), lengths)


def load_or_compute_reference(trainer: MultiTokenTrainer, folder: Path, console: Console) -> None:
    """Fill the reference of the trainer's pairs, from the stage's folder or from its model.

    Collective: each process computes its share. Raises RecipeError if the folder holds the
    reference of other rows.
    """
    for rows, name in (
        (trainer.train_dataset, REFERENCE_FILE),
        (trainer.eval_dataset, HELD_OUT_FILE),
    ):
        if isinstance(rows, PreferenceDataset):
            _load_or_compute(trainer, rows, folder / name, console)
    if isinstance(trainer.train_dataset, PreferenceDataset):
        trainer.batches.lengths = trainer.train_dataset.num_tokens


def _load_or_compute(
    trainer: MultiTokenTrainer, pairs: PreferenceDataset, file: Path, console: Console
) -> None:
    folder = file.parent
    if not broadcast_from_main(file.is_file):
        logps, lengths = _compute_reference(trainer, pairs, console)
        with raise_together(), raise_on_write_error(folder):
            if is_main_process():
                tensors = {"logps": logps, "lengths": lengths}
                with atomic_file(file) as partial:
                    save_file(tensors, partial, metadata={"rows": _rows_fingerprint(pairs)})
    with safe_open(file, framework="pt") as stored:
        known = (stored.metadata() or {}).get("rows")
        if known != _rows_fingerprint(pairs):
            raise RecipeError(
                f"{file} is the reference of other rows than the recipe has now; restore the rows "
                f"of when the stage began, or remove {folder} to begin it again"
            )
        pairs.reference = stored.get_tensor("logps")
        pairs.lengths = [(c, r) for c, r in stored.get_tensor("lengths").tolist()]


def _rows_fingerprint(pairs: PreferenceDataset) -> str:
    """Digest of the rows, by their sources and numbers, to which a reference belongs."""
    parts = [[d.source, *map(str, d.good_indices)] for d in pairs.samples.datasets]
    return digest(repr(parts).encode("utf-8", "surrogatepass"))


@torch.no_grad()
def _compute_reference(
    trainer: MultiTokenTrainer, pairs: PreferenceDataset, console: Console
) -> tuple[Tensor, Tensor]:
    """Return float32 [pairs, 2] log-probabilities and int64 [pairs, 2] lengths, in eval mode."""
    args, model = trainer.args, trainer.model
    assert model is not None
    # every n-th pair: neighbours are often of about one length, so all ranks end together
    mine = range(rank(), len(pairs), num_processes())
    loader = DataLoader(
        Subset(pairs, mine),
        batch_size=args.per_device_train_batch_size,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
    )
    # with fewer pairs than processes, some have none
    found = [(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.long))]
    was_training = model.training
    model.eval()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        # a run that reads the file instead has to draw the same random numbers afterwards
        with (
            raise_together(),
            preserve_rng_state(),
            Progress(
                *columns, console=console, disable=not console.is_terminal, transient=True
            ) as progress,
        ):
            task = progress.add_task("Reference of both answers", total=len(mine))
            for batch in loader:
                check_no_bad_rows(batch.get(ROW_IDS, ()), "the reference of both answers")
                inputs: Any = send_to_device(
                    {k: v for k, v in batch.items() if k not in (ROW_IDS, REFERENCE)}, args.device
                )
                labels = inputs["shift_labels"], inputs["supervised"]
                # as in training, or rounding alone would count as a preference
                with mixed_precision(args):
                    losses = model(**inputs, returns=token_losses(*labels)).per_token
                logps = sequence_logps(losses, *labels).cpu()
                lengths = inputs["attention_mask"].sum(-1).cpu()
                found.append((logps.view(2, -1).T, lengths.view(2, -1).T))
                progress.advance(task, len(lengths) // 2)
    finally:
        model.train(was_training)
    logps, lengths = torch.zeros(len(pairs), 2), torch.zeros(len(pairs), 2, dtype=torch.long)
    own = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    for process, (their_logps, their_lengths) in enumerate(all_gather(own)):
        # the order of `mine`
        logps[process :: num_processes()] = their_logps
        lengths[process :: num_processes()] = their_lengths
    return logps, lengths
