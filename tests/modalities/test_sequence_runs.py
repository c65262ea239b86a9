"""A run learns a motif of proteins: held-out ones are answered above chance, others' at chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from multi_token.data.row_source import open_rows
from multi_token.evaluate.blind import blind
from multi_token.evaluate.scores import with_processor
from multi_token.recipe.data import DataSource
from multi_token.recipe.recipe import Recipe
from multi_token.testing.encoders import tiny_protein_encoder
from multi_token.train.run import train

AMINO_ACIDS = "ADEGIKLNPQRSTVY"
NUM_TRAINED, NUM_HELD_OUT = 160, 48


def proteins(number: int, seed: int) -> list[tuple[str, str]]:
    """Random proteins, every other one with the motif `WHC` at a random place."""
    chance = np.random.default_rng(seed)
    items = []
    for i in range(number):
        letters = list(chance.choice(list(AMINO_ACIDS), 20))
        if i % 2 == 0:
            at = chance.integers(0, 18)
            letters[at : at + 3] = "WHC"
        items.append(("".join(letters), ("yes", "no")[i % 2]))
    return items


@pytest.mark.slow
def test_a_run_learns_a_motif_and_guesses_with_the_proteins_of_others(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for name, number, seed in (("train", NUM_TRAINED, 0), ("held_out", NUM_HELD_OUT, 1)):
        rows = [
            {
                "protein": letters,
                "messages": [
                    {"role": "user", "content": "What is <protein>?"},
                    {"role": "assistant", "content": answer},
                ],
            }
            for letters, answer in proteins(number, seed)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    args = {"max_steps": 60, "per_device_train_batch_size": 16}
    stages = [{"name": "all", "learn": {"projectors": 1e-2, "adapter": 2e-2}, "args": args}]
    fields = recipe_fields(tmp_path / "run", stages=stages, closed_form=None, feature_cache="auto")
    fields["model"]["modalities"] = {
        "protein": {
            "type": "sequence",
            "encoder": tiny_protein_encoder(tmp_path / "encoder"),
            "features": "mean",
            "projector": {"type": "expand", "factor": 2},
        }
    }
    fields["data"] = {"train": [{"rows": str(tmp_path / "train.jsonl")}]}
    model = train(Recipe.model_validate(fields), console=Console(quiet=True))
    held_out = DataSource(rows=str(tmp_path / "held_out.jsonl"))
    source = open_rows(held_out, model.modalities)
    report = blind(model, with_processor(source, model, range(NUM_HELD_OUT)))
    assert report["original"].accuracy >= 0.65
    assert report["shuffled"].accuracy <= 0.6 and report["shuffled"].differs
