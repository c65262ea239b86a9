"""Each ready recipe: its rows are read, it trains two steps on stand-ins, and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from multi_token.cli.recipes import HEADER_FIELDS, ready_recipes
from multi_token.data.row_source import open_rows
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.train import train
from tests.recipes.data_sets import FILES, write_hub
from tests.recipes.stand_ins import ENCODERS, LANGUAGE_MODELS, StandIns

READY = ready_recipes()
RECIPES = {name: ready.text for name, ready in READY.items() if ".job." not in ready.file_name}
BEFORE = {"dpo": "siglip2_qwen3", "add_audio_to_vision": "siglip2_qwen3"}
"""Recipe -> the one whose run it starts from."""
QUICK = ("captions_folder", "smoke_cpu")
"""Recipes of the quick suite."""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


def small(name: str, folder: Path, stand_ins: StandIns) -> Recipe:
    """The recipe with tiny parts and rows, of two steps; all else is as it is."""
    recipe = parse_recipe(RECIPES[name])
    fields: Any = recipe.model_dump(mode="json")
    model = fields["model"]
    if not model["language_model"].startswith("runs/"):
        model["language_model"] = stand_ins(model["language_model"], LANGUAGE_MODELS)
        for modality in model["modalities"].values():
            if modality.get("encoder"):
                modality["encoder"] = stand_ins(modality["encoder"], ENCODERS)
    model["dtype"] = "float32"
    sources = [*fields["data"]["train"], *fields["data"]["eval"]]
    sources += [s for stage in fields["train"]["stages"] for s in stage.get("data") or []]
    for source in sources:
        rows = source["rows"]
        if rows.startswith("hf://"):
            written = folder / rows.removeprefix("hf://").replace("/", "-")
            hub_name = rows.removeprefix("hf://")
            source["rows"] = (
                str(written / "saved") if written.is_dir() else write_hub(hub_name, written)
            )
        elif rows in FILES and not (folder / rows).exists():
            FILES[rows](folder / rows)
        # three rows have no part from the thousandth on, and no twentieth
        if rows.startswith("hf://") or "%" not in source["split"]:
            source["split"] = source["split"].partition("[")[0]
    stages = fields["train"]["stages"]
    for stage in stages:
        steps = {"max_steps": 2 if len(stages) == 1 else 1, "num_train_epochs": 1}
        stage["args"] = {**stage["args"], **steps, "per_device_train_batch_size": 2}
    fields["train"]["args"] |= {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    return Recipe.model_validate(fields)


def trained(name: str, folder: Path, stand_ins: StandIns) -> Recipe:
    if name in BEFORE:
        trained(BEFORE[name], folder, stand_ins)
    if name == "import_llava":
        from multi_token.convert.llava import import_llava
        from multi_token.testing.encoders import tiny_llava

        import_llava(Path(tiny_llava(folder / "llava")), folder / "runs/llava15_imported")
    recipe = small(name, folder, stand_ins)
    train(recipe)
    return recipe


@pytest.mark.parametrize("name", READY)
def test_the_header_of_a_ready_recipe_is_complete(name: str) -> None:
    assert READY[name].header.keys() == {"title", *HEADER_FIELDS}
    assert all(READY[name].header.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_ready_recipe_parses_and_has_what_everybody_copies(name: str) -> None:
    recipe = parse_recipe(RECIPES[name])
    assert recipe.train.output_dir == f"runs/{name}"
    # LLaVA's own recipe evaluates nothing, and a stream has no end to hold rows out from
    if name not in ("llava15", "stream_webdataset"):
        assert recipe.data.eval
    if "activation_checkpointing" in recipe.train.args:
        assert recipe.train.args["bf16"]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_a_ready_recipe_reads_its_rows_trains_two_steps_and_answers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: StandIns
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "smoke_cpu":
        rows = Path(__file__).parents[2] / "multi_token/recipes/smoke_cpu.jsonl"
        (tmp_path / rows.name).write_bytes(rows.read_bytes())
    recipe = trained(name, tmp_path, stand_ins)
    model = MultiTokenForConditionalGeneration.from_pretrained(recipe.train.output_dir)
    source = (recipe.data.eval or recipe.data.train)[0]
    opened = open_rows(source, model.modalities)
    (answer,) = model.generate([opened.rows[0]], max_new_tokens=4, root=opened.fetch.root)
    assert isinstance(answer, str)
    log = Path(recipe.train.output_dir) / "recipe.yaml"
    assert yaml.safe_load(log.read_text())["train"]["stages"][0]["name"]


def test_two_steps_were_trained_in_every_recipe() -> None:
    for name, text in RECIPES.items():
        assert len(parse_recipe(text).train.stages) in (1, 2), name
