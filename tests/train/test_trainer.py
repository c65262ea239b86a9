"""train/trainer.py and arguments.py: what it is told, and in which order rows come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multi_token.errors import RecipeError
from multi_token.train.arguments import training_arguments
from multi_token.train.trainer import ByLength


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_step": 3}, "did you mean 'max_steps'"),
        ({"learning_rate": 1e-3}, "learning rates are under `learn`"),
        ({"remove_unused_columns": True}, "needed as it is"),
        ({"save_strategy": "sometimes"}, "train args"),
    ],
)
def test_training_arguments_are_checked(fields: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        training_arguments(tmp_path, {"use_cpu": True, **fields}, seed=0, learning_rate=1e-3)


def test_rows_of_one_length_come_together_each_once_and_in_another_order_each_epoch() -> None:
    lengths = [10, 50] * 40 + [10]
    sampler = ByLength(lengths, batch_size=8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(81))
    batches = [[lengths[i] for i in first[k : k + 8]] for k in range(0, 80, 8)]
    assert sum(len(set(batch)) == 1 for batch in batches) >= 5  # by chance: none
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
