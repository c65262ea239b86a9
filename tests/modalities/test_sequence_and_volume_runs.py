"""Runs that learn what only the item shows: a motif in a protein, a lesion in a volume.

Held-out items are answered above chance, and with the items of other rows at chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from multi_token.data.files.open import load_rows
from multi_token.evaluate.blind import blind
from multi_token.evaluate.scores import with_processor
from multi_token.recipe.recipe import Recipe
from multi_token.testing.encoders import tiny_image_encoder, tiny_protein_encoder
from multi_token.train.run import train

AMINO_ACIDS = "ADEGIKLNPQRSTVY"
NUM_TRAINED, NUM_HELD_OUT = 160, 48


def proteins(folder: Path, number: int, seed: int) -> list[tuple[Any, str]]:
    """Random proteins with `WHC` or, of the same composition, `CHW` at a random place."""
    chance = np.random.default_rng(seed)
    items = []
    for i in range(number):
        letters = "".join(chance.choice(list(AMINO_ACIDS), chance.integers(12, 20)))
        at, motif = chance.integers(len(letters)), ("WHC", "CHW")[i % 2]
        items.append((letters[:at] + motif + letters[at:], ("yes", "no")[i % 2]))
    return items


def volumes(folder: Path, number: int, seed: int) -> list[tuple[Any, str]]:
    """Noise with a bright ball on the patient's left or right, stored in a random orientation."""
    chance = np.random.default_rng(seed)
    grid = np.indices((24, 20, 16))
    items = []
    for i in range(number):
        centre = [chance.uniform(4, 9) + 11 * (i % 2), chance.uniform(5, 15), chance.uniform(4, 12)]
        ball = sum((axis - place) ** 2 for axis, place in zip(grid, centre, strict=True)) < 16
        voxels = (chance.normal(100, 20, grid.shape[1:]) + 300 * ball).astype(np.int16)
        axes = chance.permutation(3)
        flips = chance.choice([-1, 1], 3)
        image = nib.Nifti1Image(voxels, np.eye(4))
        stored = image.as_reoriented(np.stack([axes, flips], axis=1))
        path = folder / f"{seed}-{i}.nii"
        stored.to_filename(path)
        items.append((str(path), ("left", "right")[i % 2]))
    return items


KINDS: dict[str, tuple[Callable[..., Any], Callable[[Path], dict[str, Any]]]] = {
    "sequence": (
        proteins,
        lambda folder: {"encoder": tiny_protein_encoder(folder / "encoder"), "features": "mean"},
    ),
    "volume": (
        volumes,
        lambda folder: {"encoder": tiny_image_encoder(folder / "encoder"), "num_slices": 4},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_what_the_item_shows_and_guesses_with_the_items_of_others(
    kind: str, recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    make, modality = KINDS[kind]
    for name, number, seed in (("train", NUM_TRAINED, 0), ("held_out", NUM_HELD_OUT, 1)):
        rows = [
            {
                "item": {"text": source} if kind == "sequence" else source,
                "messages": [
                    {"role": "user", "content": "What is <item>?"},
                    {"role": "assistant", "content": answer},
                ],
            }
            for source, answer in make(tmp_path, number, seed)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    learn = {"projectors": 5e-3, "encoders": {"item": 3e-3}}
    args = {"max_steps": 150, "per_device_train_batch_size": 16, "max_grad_norm": 1.0}
    stages = [{"name": "all", "learn": learn, "args": args}]
    fields = recipe_fields(tmp_path / "run", stages=stages, closed_form=None)
    projector = {"type": "expand", "factor": 2}
    fields["model"]["modalities"] = {
        "item": {"type": kind, "projector": projector, **modality(tmp_path)}
    }
    fields["data"] = {"train": [{"rows": str(tmp_path / "train.jsonl")}], "lengths": "headers"}
    fields["train"]["args"]["logging_steps"] = 25
    model = train(Recipe.model_validate(fields), console=Console(quiet=True))
    path = tmp_path / "held_out.jsonl"
    rows = with_processor(
        load_rows(str(path)), model, source=str(path), indices=range(NUM_HELD_OUT)
    )
    report = blind(model, rows)
    assert report["original"].accuracy >= 0.8
    assert 0.25 <= report["shuffled"].accuracy <= 0.75
    assert report["shuffled"].differs
