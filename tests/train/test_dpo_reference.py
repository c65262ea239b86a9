"""The reference is the model at the start of the stage (train/dpo_reference.py)."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from multi_token.cli import app
from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.errors import Interrupted, RecipeError, RowError
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.train import dpo_reference as reference_module
from multi_token.train import plan_run, train
from multi_token.train import stage as stage_module

pytestmark = pytest.mark.slow

Fields = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=Console(quiet=True))


def logs(out: Path, stage: str = "1-prefer") -> list[dict[str, float]]:
    history = json.loads((out / "stages" / stage / "done.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_two_processes_share_the_reference_and_train_like_one(
    recipe_fields: Fields, pair_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    # the second process's rows are text alone
    chosen = [*pair_rows[:2], pair_rows[5], {**pair_rows[5], "id": "more", "chosen": "no"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    runs = []
    for name, size in (("one", 4), ("two", 2)):
        fields = recipe_fields(
            tmp_path / name,
            stages=[{"name": "prefer", "learn": {"projectors": 3e-3, "adapter": 2e-3}, "dpo": {}}],
            args={
                "use_cpu": True,
                "ddp_backend": "gloo",
                "logging_steps": 1,
                "max_steps": 3,
                "report_to": [],
                "lr_scheduler_type": "constant",
                "train_sampling_strategy": "sequential",
                "per_device_train_batch_size": size,
                "per_device_eval_batch_size": 1,
                "eval_steps": 3,
            },
            num_samples=0,
            blind=False,
        )
        fields["data"] = {"train": [{"rows": str(path)}], "eval": [{"rows": str(uneven)}]}
        runs.append({"name": name, "fields": fields})
    trained(runs[0]["fields"])
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"out": str(tmp_path / "seen.json"), "runs": runs[1:]}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("in_processes.py")
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), str(job)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "error" not in json.loads((tmp_path / "seen.json").read_text())["two"][0]
    stored = [
        load_file(tmp_path / name / "stages" / "1-prefer" / "reference.safetensors")
        for name in ("one", "two")
    ]
    torch.testing.assert_close(stored[1]["logps"], stored[0]["logps"], rtol=1e-5, atol=1e-5)
    assert torch.equal(stored[1]["lengths"], stored[0]["lengths"])
    for a, b in zip(logs(tmp_path / "one"), logs(tmp_path / "two"), strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
    (a,), (b,) = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    for key in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected"):
        assert b[f"eval_{key}"] == pytest.approx(a[f"eval_{key}"], rel=1e-4, abs=1e-5), key
    for file in ("projectors.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / name / file) for name in ("one", "two"))
        for key, tensor in ours.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_the_reference_is_rounded_as_a_step_is(
    pair_fields: Fields, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    trained(pair_fields(out, args={"bf16": True, "max_steps": 1, "per_device_train_batch_size": 6}))
    (first,) = logs(out)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_loss_begins_at_log_two_and_every_pair_is_ranked_right_at_the_end(
    pair_fields: Fields, tmp_path: Path, pair_rows: list[dict[str, Any]]
) -> None:
    out = tmp_path / "run"
    args = {"max_steps": 30, "per_device_train_batch_size": 6, "lr_scheduler_type": "constant"}
    trained(pair_fields(out, args=args, stage={"dpo": {"beta": 0.5}}))
    first, *_, last = logs(out)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < 0.3 < first["loss"]
    # of each two rows with one question, a model that does not see the item has one wrong
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4
    )
    # only their answers' log-probabilities are below zero, and the chosen ones' rose
    assert first["logps/chosen"] < last["logps/chosen"] < 0
    stored = load_file(out / "stages" / "1-prefer" / "reference.safetensors")
    mean = stored["logps"].mean(0).tolist()
    assert [first["logps/chosen"], first["logps/rejected"]] == pytest.approx(mean, rel=1e-4)
    assert stored["lengths"].shape == stored["logps"].shape == (len(pair_rows), 2)


def test_the_reference_is_the_model_of_the_start_of_the_stage_not_of_the_run(
    pair_fields: Fields, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    before = [
        {
            "name": "tune",
            "learn": {"projectors": 1e-2, "adapter": 1e-2},
            "args": {"max_steps": 10, "lr_scheduler_type": "constant"},
        }
    ]
    args = {"per_device_train_batch_size": 6, "max_steps": 1}
    trained(pair_fields(out, before=before, args=args))
    tuned, (first, *_) = logs(out, "1-tune"), logs(out, "2-prefer")
    # the stage without `dpo` learned the chosen answers, by cross entropy
    assert tuned[-1]["loss"] < tuned[0]["loss"] and "rewards/chosen" not in tuned[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    trained(pair_fields(tmp_path / "plain", args=args))
    (plain, *_) = logs(tmp_path / "plain")
    assert first["logps/chosen"] > plain["logps/chosen"] + 1, "tuned before, or it proves nothing"


def test_accumulated_pairs_are_one_batch_of_them(pair_fields: Fields, tmp_path: Path) -> None:
    for name, size, num in (("one", 6, 1), ("three", 2, 3)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": num}
        trained(pair_fields(tmp_path / name, args=args))
    one, three = logs(tmp_path / "one"), logs(tmp_path / "three")
    for a, b in zip(one, three, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
    assert one[-1]["loss"] < one[0]["loss"]
    file = "projectors.safetensors"
    ours, theirs = (load_file(tmp_path / name / file) for name in ("one", "three"))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-3)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_stopped_stage_resumes_to_the_same_bits_with_the_same_reference(
    pair_fields: Fields, pair_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    args = {"max_steps": 5, "save_steps": 1, "per_device_train_batch_size": 2}
    trained(pair_fields(tmp_path / "whole", args=args))
    fields = pair_fields(tmp_path / "cut", args=args)
    bar = stage_module.ProgressBarCallback

    def stopping(trainer: Any, *more: Any) -> Any:
        trainer.add_callback(StopAt(3))
        return bar(trainer, *more)

    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "ProgressBarCallback", stopping)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            trained(fields)

    def never(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference_module, "_compute_reference", never)
    fewer = pair_fields(tmp_path / "cut", args=args, rows=pair_rows[:-1])
    with pytest.raises(RecipeError, match="is the reference of other rows than the recipe has now"):
        trained(fewer)
    trained(pair_fields(tmp_path / "cut", args=args))
    for file in ("projectors.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / name / file) for name in ("cut", "whole"))
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_rows_without_two_answers_are_refused_or_skipped_by_the_stage(
    pair_fields: Fields, pair_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = {
        "id": "plain",
        "messages": [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "white"},
        ],
    }
    mixed = [plain, *pair_rows[:3], {**plain, "id": "other"}]
    with pytest.raises(RowError, match=r"row plain: has no `chosen` and `rejected` answers"):
        trained(pair_fields(tmp_path / "refused", rows=mixed))
    out = tmp_path / "skipped"
    before = [{"name": "tune", "learn": {"projectors": 1e-2}, "args": {"max_steps": 1}}]
    trained(pair_fields(out, rows=mixed, before=before, stage={"dpo": {"missing": "skip"}}))
    stored = load_file(out / "stages" / "2-prefer" / "reference.safetensors")
    assert len(stored["logps"]) == 3
    with pytest.raises(RecipeError, match="has `dpo`, but none of 1 rows has a `chosen` and a"):
        trained(pair_fields(tmp_path / "none", rows=[plain], stage={"dpo": {"missing": "skip"}}))


def evaluations(out: Path) -> list[dict[str, float]]:
    history = json.loads((out / "stages" / "1-prefer" / "done.json").read_text())["log_history"]
    return [entry for entry in history if "eval_loss" in entry]


def test_held_out_pairs_are_evaluated_with_the_loss_of_training(
    pair_fields: Fields, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    best = {"metric_for_best_model": "eval_rewards/margins", "save_steps": 3}
    args = {"eval_steps": 3, "max_steps": 3, "per_device_eval_batch_size": 4, **best}
    fields = pair_fields(out, args=args, num_samples=0, blind=False)
    fields["data"]["eval"] = fields["data"]["train"]
    model = trained(fields)
    (found,) = evaluations(out)
    stage = out / "stages" / "1-prefer"
    reference = load_file(stage / "held_out_reference.safetensors")["logps"]
    assert torch.equal(reference, load_file(stage / "reference.safetensors")["logps"])
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    read = partial(to_conversation, modalities=list(model.modalities), row_id="row")
    collate = Collator(model.modalities, model.processor.chat.filler_id)
    with torch.no_grad():
        samples = [replace(model.processor, preference="required")(read(row)) for row in rows]
        logps = torch.tensor(
            [
                [-float(model(**collate([s])).loss) * int((s.labels != -100).sum()) for s in pair]
                for pair in ((sample, sample.rejected) for sample in samples)
            ]
        )
    rewards = 0.1 * (logps - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "loss": -torch.nn.functional.logsigmoid(margins).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
    }
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(float(value), rel=1e-3, abs=1e-4), name
    assert found["eval_loss"] < math.log(2), "it has learned, or it proves nothing"
    state = json.loads((stage / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_metric"] == found["eval_rewards/margins"]


def test_held_out_rows_with_one_answer_are_reported_and_skipped(
    pair_fields: Fields, pair_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    answer = {"role": "assistant", "content": "red"}
    plain = {"id": "plain", "messages": [{"role": "user", "content": "What?"}, answer]}

    def said(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = {"eval_steps": 1, "max_steps": 1}
        fields = pair_fields(tmp_path / name, args=args, num_samples=0, blind=False)
        fields["data"]["eval"] = [{"rows": str(path)}]
        console = Console(record=True, width=200, file=io.StringIO())
        train(Recipe.model_validate(fields), console=console)
        return console.export_text()

    assert "2 of 3 held-out rows have two answers; the others are" in said(
        "some", [pair_rows[0], plain, pair_rows[5]]
    )
    assert "eval_rewards/margins" in evaluations(tmp_path / "some")[0]
    assert "no held-out row has two answers" in said("none", [plain])
    assert "eval_rewards/margins" not in evaluations(tmp_path / "none")[0]
    with pytest.raises(RowError, match="has an empty `rejected` answer"):
        said("bad", [{**pair_rows[0], "rejected": " "}])


def test_a_plan_is_made_without_a_reference(pair_fields: Fields, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    plan_run(Recipe.model_validate(pair_fields(tmp_path / "run")), console=console)
    said = console.export_text()
    assert "3 steps of about" in said and "from 6 rows" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stages.0.dpo.beta=0", "greater than 0"),
        ("train.stages.0.dpo.label_smoothing=0.5", "less than 0.5"),
        ("train.stages.0.dpo.loss=kto", "'sigmoid', 'ipo' or 'hinge'"),
    ],
)
def test_a_recipe_that_contradicts_its_preferences_is_refused(
    pair_fields: Fields, tmp_path: Path, override: str, sentence: str
) -> None:
    text = yaml.safe_dump(pair_fields(tmp_path / "run"))
    parse_recipe(text)
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe(text, [override])


def test_check_and_show_read_both_answers(pair_fields: Fields, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    fields = pair_fields(tmp_path / "run")
    recipe.write_text(yaml.safe_dump(fields))
    rows = fields["data"]["train"][0]["rows"]

    def run(*words: str) -> str:
        env = {"COLUMNS": "200", "NO_COLOR": "1"}
        return CliRunner().invoke(app, ["data", *words, "--recipe", str(recipe)], env=env).output

    assert "6 rows: 6 good, 0 bad" in run("check", rows)
    shown = run("show", rows, "one")
    assert "⟦one, quite clearly" in shown and "⟦two" in shown
    assert "Below: the rejected answer" in shown
    fields["train"]["stages"][0]["dpo"] = None
    recipe.write_text(yaml.safe_dump(fields))
    shown = run("show", rows, "one")
    assert "⟦one, quite clearly" in shown and "⟦two" not in shown
    assert "only stages with `dpo` read the rejected one" in shown
