"""Tasks that only facts can solve: with them a tiny model answers, without them it guesses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from multi_token.recipe.recipe import Recipe
from multi_token.testing.encoders import tiny_patchtst
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
Items = list[tuple[Any, str]]
NUM_TRAINED, NUM_ASKED = 128, 32


def series(parts: Path, folder: Path, drawn: random.Random) -> tuple[dict[str, Any], Items]:
    """Series of random mean, through an encoder that scales each window to mean 0."""
    patchtst = tiny_patchtst(folder / "patchtst", channels=1)
    modality = {"type": "timeseries", "channels": 1, "encoder": patchtst}
    items: Items = []
    for _ in range(NUM_TRAINED + NUM_ASKED):
        mean = drawn.randrange(1, 10)
        noise = [drawn.gauss(0, 1) for _ in range(32)]
        shift = mean - sum(noise) / 32
        items.append(([value + shift for value in noise], str(mean)))
    return {**modality, "facts": "{mean:.0f} "}, items


def videos(parts: Path, folder: Path, drawn: random.Random) -> tuple[dict[str, Any], Items]:
    """Three frames with a lamp that turns on in the second or third; a frame lasts 1 to 4 s."""
    for name, colour in (("dark", (0, 0, 0)), ("lit", (255, 230, 120))):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    clip = str(parts / "clip")
    video = {"type": "video", "encoder": clip, "num_frames": 3, "features": "pooled"}
    items: Items = []
    for _ in range(NUM_TRAINED + NUM_ASKED):
        first, each = drawn.choice((1, 2)), drawn.choice((1, 2, 3, 4))
        shown = [str(folder / f"{'lit' if i >= first else 'dark'}.png") for i in range(3)]
        items.append(({"array": shown, "fps": 1 / each}, str(first * each)))
    return {**video, "facts": "{time:.0f}s ", "projector": {"type": "linear"}}, items


def accuracy(
    recipe_fields: Fields, folder: Path, modality: dict[str, Any], items: Items, seed: int
) -> float:
    """Share of exact answers to held-out questions."""
    name = modality["type"]
    question = {"type": "text", "text": "What?"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": name, name: source}, question]},
                {"role": "assistant", "content": answer},
            ]
        }
        for source, answer in items
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(lines[:NUM_TRAINED]))
    learn = {"projectors": 5e-3, "language_model": 5e-3}
    args = {"max_steps": 90, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine"}
    stages = [{"name": "all", "learn": learn, "args": {**args, "report_to": []}}]
    fields = recipe_fields(folder / "run", stages=stages, seed=seed, feature_cache=True)
    fields["model"]["modalities"] = {name: modality}
    fields["data"] = {"train": [{"rows": str(folder / "rows.jsonl")}]}
    model = train(Recipe.model_validate(fields), console=Console(quiet=True))
    asked = rows[NUM_TRAINED:]
    answers = model.generate(asked, max_new_tokens=4, batch_size=NUM_ASKED)
    pairs = zip(asked, answers, strict=True)
    return sum(row["messages"][-1]["content"] == answer for row, answer in pairs) / len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("made", [series, videos])
def test_with_facts_the_model_tells_what_no_feature_holds(
    made: Any, recipe_fields: Fields, parts: Path, tmp_path: Path, seed: int
) -> None:
    modality, items = made(parts, tmp_path, random.Random(seed))
    answered = accuracy(recipe_fields, tmp_path / "with", modality, items, seed)
    blind = {**modality, "facts": None}
    guessed = accuracy(recipe_fields, tmp_path / "without", blind, items, seed)
    assert answered > 0.9 and guessed < 0.5, (answered, guessed)
