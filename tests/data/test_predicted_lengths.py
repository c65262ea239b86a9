"""ConversationDataset with predicted lengths: bad rows raise nothing in a data worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.collate import Collator
from multi_token.data.dataset import ConversationDataset, placeholder_sample, row_to_sample
from multi_token.data.files.open import load_rows
from multi_token.errors import RowError
from multi_token.processor import MultiTokenProcessor, build_processor
from multi_token.recipe.recipe import Recipe
from multi_token.train.consistency import BatchResult, StepCheck, check_no_bad_rows
from multi_token.train.distillation import DistillationCollator
from multi_token.train.dpo import PreferenceCollator, PreferencePair
from multi_token.train.metrics import ROW_IDS, WithRowIds

Fields = Callable[..., dict[str, Any]]


@pytest.fixture
def processor(recipe_fields: Fields, data: Path, tmp_path: Path) -> MultiTokenProcessor:
    return build_processor(Recipe.model_validate(recipe_fields(tmp_path / "run")), root=str(data))


@pytest.fixture
def rows(data: Path) -> Any:
    return load_rows(str(data / "rows.jsonl"))


def test_a_row_of_another_length_comes_with_its_error(
    rows: Any, processor: MultiTokenProcessor
) -> None:
    read = [
        row_to_sample(row, row["id"], processor=processor, modalities=["image"]) for row in rows
    ]
    lengths = [len(sample.input_ids) for sample in read]

    def dataset(lengths: list[int]) -> ConversationDataset:
        return ConversationDataset(rows, processor, modalities=["image"], lengths=lengths)

    assert all(sample.error is None for sample in map(dataset(lengths).__getitem__, range(4)))
    sample = dataset([lengths[0] + 1, *lengths[1:]])[0]
    assert str(sample.error).startswith(f"row red: is {lengths[0]} tokens long, but by the headers")
    assert sample.id == "red"


def test_the_placeholder_of_a_bad_row_goes_through_every_collator(
    rows: Any, processor: MultiTokenProcessor
) -> None:
    good = row_to_sample(rows[0], "red", processor=processor, modalities=["image"])
    pair = replace(good, teacher=replace(good, media_spans=[], media=[]), rejected=good)
    error = RowError("is bad", kind="undecodable", row_id="blue")
    for share in (False, True):
        collator = Collator(processor.modalities, processor.chat.filler_id, share=share)
        for collate in (collator, collator.pack, DistillationCollator(collator, packed=False)):
            for samples in ([pair, placeholder_sample(error)], [placeholder_sample(error)]):
                names = WithRowIds(collate)(samples)[ROW_IDS]
                assert names == ["red", error][-len(names) :]
        pairs = [
            PreferencePair(sample, torch.zeros(2)) for sample in (pair, placeholder_sample(error))
        ]
        batch = WithRowIds(PreferenceCollator(collator))(pairs)
        assert batch[ROW_IDS] == ["red", error] and len(batch["input_ids"]) == 4


def test_bad_rows_of_a_step_are_one_error_with_any_loss() -> None:
    first = RowError("is bad", kind="undecodable", row_id="blue")
    other = RowError("is worse", kind="missing_file", row_id="red")
    for loss in (1.0, float("nan")):
        with pytest.raises(
            RowError, match=r"^row blue: is bad \(found at step 3, and 1 more with it, since with"
        ) as caught:
            StepCheck([BatchResult(torch.tensor(loss), ["white", first, other])], 3).finish()
        assert caught.value.row_id == "blue" and caught.value.kind == "undecodable"
    StepCheck([BatchResult(torch.tensor(1.0), ["white"])], 3).finish()
    check_no_bad_rows(["white"], "step 3")
