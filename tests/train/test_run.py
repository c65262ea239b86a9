"""A recipe becomes a model; the same command again resumes (train/run.py)."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

import multi_token
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.errors import (
    Interrupted,
    LanguageModelError,
    MultiTokenError,
    RecipeError,
    RowError,
)
from multi_token.recipe.recipe import Recipe
from multi_token.train import stage as stage_module
from multi_token.train.resume import last_checkpoint
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)
LONG = {"name": "projector", "learn": {"projectors": 1e-2}, "args": {"max_steps": 30}}


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=QUIET)


def losses(out: Path, stage: str = "1-projector") -> list[float]:
    history = json.loads((out / "stages" / stage / "done.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "projectors.safetensors")


def same(first: Path, second: Path) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def rows(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("closed_form", [{"penalty": 1.0}, None], ids=["closed form", "random"])
def test_thirty_steps_overfit_four_rows(
    recipe_fields: Fields, tmp_path: Path, data: Path, rows: Any, closed_form: Any
) -> None:
    adapter = {"name": "adapter", "learn": {"projectors": 1e-2, "adapter": 2e-2}}
    stages = [
        {**LONG, "args": {"max_steps": 10}},
        {**adapter, "args": {"max_steps": 20, "per_device_train_batch_size": 4}},
    ]
    model = trained(recipe_fields(tmp_path / "run", stages=stages, closed_form=closed_form))
    assert model.generate(rows, root=str(data), max_new_tokens=8) == [
        "red",
        "blue",
        "green",
        "white",
    ]
    assert losses(tmp_path / "run", "2-adapter")[-1] < 0.3 * losses(tmp_path / "run")[0]


def test_one_process_reports_that_it_shards_nothing(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    stages = [{**LONG, "args": {"max_steps": 1}}]
    fields = recipe_fields(tmp_path / "run", stages=stages, fsdp=True)
    train(Recipe.model_validate(fields), console=Console())
    assert "train.fsdp: one process trains, which shards nothing" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        trained(recipe_fields(tmp_path / name, seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


class _InterruptAt(TrainerCallback):
    """Sends this process the signal that Ctrl-C sends, at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_and_resumed_equals_uninterrupted(
    recipe_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_length = {"max_steps": 6, "train_sampling_strategy": "group_by_length"}
    stages = [
        {**LONG, "args": by_length},  # six steps of two rows are three epochs
        {"name": "adapter", "learn": {"adapter": 1e-2}, "args": {"max_steps": 4}},
    ]
    trained(recipe_fields(tmp_path / "whole", stages=stages))

    fields = recipe_fields(tmp_path / "cut", stages=stages)
    bar = stage_module.ProgressBarCallback

    def bar_and_signal(trainer: Any, console: Any, title: str) -> Any:
        trainer.add_callback(_InterruptAt(2))
        return bar(trainer, console, title)

    for stage, num_steps in (("1-projector", 3), ("2-adapter", 3)):
        monkeypatch.setattr(stage_module, "ProgressBarCallback", bar_and_signal)
        with pytest.raises(Interrupted, match=f"stopped at step {num_steps} of"):
            trained(fields)
        checkpoint = last_checkpoint(tmp_path / "cut" / "stages" / stage)
        assert checkpoint is not None and checkpoint.name == f"checkpoint-{num_steps}"
        monkeypatch.setattr(stage_module, "ProgressBarCallback", bar)
        if stage == "1-projector":
            # finish this stage only, so that the next interruption falls into the second one
            one = recipe_fields(tmp_path / "cut", stages=stages)
            with monkeypatch.context() as patch:
                patch.setattr(stage_module, "attach_adapter", _stop_here)
                with pytest.raises(MultiTokenError, match="the first stage is done"):
                    trained(one)
    trained(fields)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "cut", "2-adapter") == losses(tmp_path / "whole", "2-adapter")
    assert same(tmp_path / "cut", tmp_path / "whole")


def _stop_here(*_: Any) -> Any:
    raise MultiTokenError("the first stage is done")


def test_a_run_that_is_done_is_not_trained_again(recipe_fields: Fields, tmp_path: Path) -> None:
    fields = recipe_fields(tmp_path / "run")
    trained(fields)
    before = (tmp_path / "run" / "projectors.safetensors").stat().st_mtime_ns
    trained(fields)
    assert (tmp_path / "run" / "projectors.safetensors").stat().st_mtime_ns == before


def test_a_recipe_is_a_file_sections_or_both_with_overrides(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    stages = [{"name": "projector", "learn": {"projectors": 1e-2}, "args": {"max_steps": 1}}]
    fields = recipe_fields(tmp_path / "run", stages=stages)
    before = copy.deepcopy(fields)
    multi_token.train(fields, [f"train.output_dir={tmp_path / 'sections'}"], console=QUIET)
    assert fields == before, "the caller's sections are changed"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    multi_token.train(str(path), [f"train.output_dir={tmp_path / 'file'}"], console=QUIET)
    recipe = Recipe.model_validate(fields)
    multi_token.train(recipe, console=QUIET)
    assert same(tmp_path / "sections", tmp_path / "run")
    assert same(tmp_path / "file", tmp_path / "run")
    multi_token.train(recipe, ["train.seed=9", f"train.output_dir={tmp_path / '9'}"], console=QUIET)
    assert not same(tmp_path / "9", tmp_path / "run")


def test_a_folder_of_another_recipe_is_refused(recipe_fields: Fields, tmp_path: Path) -> None:
    trained(recipe_fields(tmp_path / "run"))
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        trained(recipe_fields(tmp_path / "run", seed=9))


def test_cached_features_train_to_the_same_curve(recipe_fields: Fields, tmp_path: Path) -> None:
    trained(recipe_fields(tmp_path / "plain"))
    trained(recipe_fields(tmp_path / "cached", feature_cache=True))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    assert len(FeatureCache(tmp_path / "cached" / "cache")) == 4


def test_captioned_rows_that_are_not_trained_on_are_cached_too(
    recipe_fields: Fields, tmp_path: Path, data: Path, rows: Any
) -> None:
    some = data / "some.jsonl"
    some.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    for name, cached in (("plain", False), ("cached", True)):
        closed_form = {"penalty": 1.0, "rows": [{"rows": str(data / "rows.jsonl")}]}
        fields = recipe_fields(tmp_path / name, feature_cache=cached, closed_form=closed_form)
        fields["data"]["train"] = [{"rows": str(some)}]
        trained(fields)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    assert len(FeatureCache(tmp_path / "cached" / "cache")) == 4


def test_gradient_accumulation_does_not_change_the_curve(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    args = {"use_cpu": True, "logging_steps": 1, "train_sampling_strategy": "sequential"}
    for name, size, num in (("one", 4, 1), ("four", 1, 4)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": num}
        trained(recipe_fields(tmp_path / name, args={**args, **batch}))
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_bad_rows_stop_the_run_or_are_skipped_and_counted(
    recipe_fields: Fields, tmp_path: Path, data: Path, rows: Any, capsys: Any
) -> None:
    for row in rows:
        row["images"] = [str(data / row["images"][0])]
    rows[1]["images"] = []
    rows[2]["images"] = ["gone.png"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = recipe_fields(tmp_path / "run")
    fields["data"] = {"train": [{"rows": str(path)}]}
    with pytest.raises(RowError, match="row blue: .*2 of 4 rows are bad"):
        trained(fields)
    fields = recipe_fields(tmp_path / "skipping")
    fields["data"] = {"train": [{"rows": str(path)}], "on_bad_row": "skip"}
    train(Recipe.model_validate(fields), console=Console(width=200))
    shown = capsys.readouterr().out
    assert "2 good, 2 skipped" in shown
    assert "skipped row blue (item_count)" in shown and "skipped row green (missing_file)" in shown
    path.write_text(json.dumps(rows[-1] | {"id": "lost", "images": ["nowhere.png"]}) + "\n")
    fields["train"]["output_dir"] = str(tmp_path / "none")
    with pytest.raises(RecipeError, match="1 rows, 1 skipped, the first, row lost: .*nowhere.png"):
        trained(fields)


def test_a_folder_of_a_run_that_never_began_is_free_for_another_recipe(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run")
    mistyped = {**fields, "model": {**fields["model"], "language_model": str(tmp_path / "none")}}
    with pytest.raises(LanguageModelError):
        trained(mistyped)
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    trained(fields)
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        trained(mistyped)


def test_rows_without_media_are_refused_where_only_modalities_train(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    rows = tmp_path / "text.jsonl"
    turns = [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "red"}]
    rows.write_text(json.dumps({"origin": "red.png", "messages": turns}) + "\n")
    fields = recipe_fields(tmp_path / "run")
    fields["data"] = {"train": [{"rows": str(rows)}]}
    with pytest.raises(RecipeError, match="no row of .*text.jsonl has an item of image"):
        trained(fields)
    fields["train"]["stages"][0]["learn"] = {"adapter": 1e-3}
    trained(fields)


def test_an_unknown_training_argument_is_named_before_anything_is_loaded(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run", args={"max_step": 3})
    fields["model"]["language_model"] = str(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="'max_step' is not a field .*did you mean 'max_steps'"):
        trained(fields)


def test_any_training_argument_is_passed_through(recipe_fields: Fields, tmp_path: Path) -> None:
    args = {
        "use_cpu": True,
        "logging_steps": 1,
        "weight_decay": 0.25,
        "lr_scheduler_type": "linear",
    }
    trained(recipe_fields(tmp_path / "run", args=args))
    history = json.loads((tmp_path / "run/stages/1-projector/done.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates[-1] < rates[1] and rates[1] - rates[2] == pytest.approx(rates[2] - rates[3])


def test_the_log_counts_real_tokens_and_the_supervised_share(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    trained(recipe_fields(tmp_path / "run"))
    history = json.loads((tmp_path / "run/stages/1-projector/done.json").read_text())["log_history"]
    assert all(0 < e["supervised_fraction"] < 1 for e in history if "loss" in e)
    assert all(e["tokens_per_second"] > 0 for e in history if "loss" in e)


def test_vectors_train_from_raw_values(recipe_fields: Fields, tmp_path: Path) -> None:
    rows = [
        {
            "id": name,
            "vector": [1000.0 * (i == j) + j for j in range(4)],
            "messages": [
                {"role": "user", "content": "What is <vector>?"},
                {"role": "assistant", "content": name},
            ],
        }
        for i, name in enumerate(("one", "two", "three", "four"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = recipe_fields(
        tmp_path / "run",
        stages=[
            {
                "name": "adapter",
                "learn": {"projectors": 1e-2, "adapter": 2e-2},
                "args": {"max_steps": 25, "per_device_train_batch_size": 4},
            }
        ],
    )
    fields["model"]["modalities"] = {"vector": {"type": "vector", "dim": 4}}
    fields["data"] = {"train": [{"rows": str(path)}]}
    model = trained(fields)
    assert model.generate(rows, max_new_tokens=6) == ["one", "two", "three", "four"]
    saved = tensors(tmp_path / "run")
    values = torch.tensor([row["vector"] for row in rows])  # type: ignore[arg-type]
    torch.testing.assert_close(saved["vector.feature_mean"], values.mean(0))
    torch.testing.assert_close(saved["vector.feature_scale"], 1 / values.std(0, correction=0))
