"""train/metrics.py and flops.py: what is logged of a step is what the step was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, TrainerCallback

from multi_token.collate import Collator
from multi_token.data.dataset import ConversationDataset
from multi_token.data.files.open import load_rows
from multi_token.errors import MultiTokenError, SpliceError
from multi_token.language_model.lora import attach_adapter
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec, Trainable
from multi_token.train.batch_plan import PaddedBatches
from multi_token.train.consistency import BatchResult, StepCheck
from multi_token.train.flops import format_count
from multi_token.train.metrics import (
    StepMetrics,
    WithRowIds,
    count_tokens,
    group_norms,
)
from multi_token.train.parameter_groups import freeze_and_unfreeze
from multi_token.train.run import train
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import training_arguments
from multi_token.types import BatchCounts, MediaSpan, Prepared, Sample

Fields = Callable[..., dict[str, Any]]


def learning(**rates: float) -> Trainable:
    return Trainable.model_validate(rates)


def history(out: Path, stage: str = "1-projector") -> list[dict[str, Any]]:
    return json.loads((out / "stages" / stage / "done.json").read_text())["log_history"]


@pytest.mark.parametrize(
    "learn",
    [
        learning(projectors=1e-3),
        learning(projectors=1e-3, adapter=1e-3),
        learning(projectors=1e-3, language_model=1e-3),
    ],
    ids=["projectors", "adapter", "language model"],
)
@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_the_formula_counts_what_torch_counts(
    recipe_fields: Fields, tmp_path: Path, data: Path, learn: Trainable, features: str
) -> None:
    fields = recipe_fields(tmp_path)
    fields["model"]["attn_implementation"] = "eager"
    fields["model"]["modalities"]["image"]["features"] = features
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    if learn.adapter is not None:
        model.language_model = attach_adapter(model.language_model, AdapterSpec(r=4))
    for part in model.encoders.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    freeze_and_unfreeze(model, learn)
    rows = load_rows(str(data / "rows.jsonl"))
    assert model.processor is not None
    processor = replace(model.processor, fetch=Fetch(root=str(data)))
    samples = ConversationDataset(rows, processor, modalities=["image"])
    shortest = min((samples[i] for i in range(4)), key=lambda s: len(s.input_ids))
    batch: Any = Collator(model.modalities, 0)([shortest, shortest])
    model.train()
    assert model.capabilities.supports_logits_to_keep  # probed here, or its trials would be counted
    step_metrics = StepMetrics(model)
    for _ in range(2):  # the second time, encoder and projector go by what the first has counted
        with FlopCounterMode(display=False) as flops, step_metrics.timing_step(batch):
            model(**batch).loss.backward()
        assert step_metrics.last_flops == pytest.approx(flops.get_total_flops(), rel=0.02)


def test_padding_tokens_and_rates_are_logged_as_they_are(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    learn = {"projectors": 1e-2, "projector_biases": 1e-1}
    stage = {"name": "projector", "learn": learn, "args": {"max_steps": 4}}
    args = {"use_cpu": True, "logging_steps": 2, "lr_scheduler_type": "constant"}
    args["per_device_train_batch_size"] = 4
    out = tmp_path / "run"
    train(
        Recipe.model_validate(recipe_fields(out, stages=[stage], args=args, peak_tflops=2.0)),
        console=Console(quiet=True),
    )
    logs = [entry for entry in history(out) if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert entry["lr/projectors"] == 1e-2 and entry["lr/projector_biases"] == 1e-1
        parts = entry["grad_norm/projectors"] ** 2 + entry["grad_norm/projector_biases"] ** 2
        assert parts**0.5 == pytest.approx(entry["grad_norm"], rel=1e-4)
        assert 0 < entry["padding_fraction"] < 0.5, "four answers of different lengths"
        assert entry["pack_use"] == pytest.approx(1 - entry["padding_fraction"])
        assert 0 < entry["supervised_fraction"] < 1
        share = entry["supervised_tokens_per_second"] / entry["tokens_per_second"]
        assert share == pytest.approx(entry["supervised_fraction"], abs=1e-3)
        assert 0 < entry["data_wait_fraction"] < 1 and 0 < entry["encoder_fraction"] < 1
        assert entry["data_wait_fraction"] + entry["encoder_fraction"] < 1
        assert entry["mfu"] == pytest.approx(entry["tflops_per_device"] / 2, rel=1e-2)
    # two logs of two steps each: the whole lies between them
    done = json.loads((out / "stages" / "1-projector" / "done.json").read_text())
    shares = [entry["data_wait_fraction"] for entry in logs]
    assert min(shares) - 1e-4 <= done["data_wait"] <= max(shares) + 1e-4
    (stage,) = json.loads((out / "report.json").read_text())["stages"]
    assert min(shares) - 1e-4 <= stage["data_wait"] <= max(shares) + 1e-4
    words = f"step 4 of 4; {stage['data_wait']:.1%} of the time was waiting for data"
    assert words in (out / "report.html").read_text()


def test_without_a_known_peak_there_is_no_mfu(recipe_fields: Fields, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(Recipe.model_validate(recipe_fields(out)), console=Console(quiet=True))
    logs = [entry for entry in history(out) if "loss" in entry]
    assert logs and all("tflops_per_device" in e and "mfu" not in e for e in logs)


def test_norms_are_those_before_clipping(model: Any) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter, value in zip(parameters, (3.0, 4.0, 12.0), strict=True):
        parameter.grad = torch.tensor([value, 0.0])
    groups = [
        {"name": "a", "params": parameters[:1]},
        {"name": "a", "params": parameters[1:2]},
        {"name": "b", "params": parameters[2:]},
    ]
    step_metrics = StepMetrics(model)
    step_metrics.norms = group_norms(groups)
    assert {k: float(v) for k, v in step_metrics.norms.items()} == {"a": 5.0, "b": 12.0}
    norms = step_metrics.gradient_norms(26.0)  # clipped to 13 from twice as much
    assert norms == pytest.approx({"grad_norm/a": 10.0, "grad_norm/b": 24.0})


def test_work_is_counted_of_rows_and_of_segments_with_their_prefix() -> None:
    shared = BatchCounts((4, 2, 3), 2, num_before=(0, 4, 4))
    assert count_tokens(shared).num_pairs == 4 * 4 + 2 * (2 + 4) + 3 * (3 + 4)
    work = count_tokens(BatchCounts((3, 5), 2))
    assert (work.num_tokens, work.num_pairs, work.num_logits) == (8, 3 * 3 + 5 * 5, 2)


class _Poison(TrainerCallback):
    """Sets the weights to NaN before a step."""

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if state.global_step == 1:
            with torch.no_grad():
                for parameter in model.projectors.parameters():
                    parameter.fill_(float("nan"))


@pytest.mark.parametrize(
    "given",
    [
        {"max_steps": 4},
        {"max_steps": 4, "save_steps": 2},
        {"max_steps": 4, "logging_steps": 2},
        {"max_steps": 2, "save_strategy": "no", "logging_strategy": "no"},
    ],
    ids=["read in the next step", "before a save", "before a log", "after the last step"],
)
def test_a_loss_that_is_no_number_names_the_rows_of_its_batch_and_is_not_saved(
    recipe_fields: Fields, tmp_path: Path, data: Path, given: dict[str, Any]
) -> None:
    """The loss is read one step late, but before anything is made of the step's weights."""
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path)).model
    )
    assert model.processor is not None
    processor = replace(model.processor, fetch=Fetch(root=str(data)))
    args = training_arguments(
        tmp_path,
        {
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "train_sampling_strategy": "sequential",
            "dataloader_num_workers": 1,
            "report_to": [],
            **given,
        },
        seed=0,
        learning_rate=1e-3,
    )
    rows = load_rows(str(data / "rows.jsonl"))
    trainer = MultiTokenTrainer(
        model,
        learn=learning(projectors=1e-3),
        batches=PaddedBatches([1] * 4),
        args=args,
        train_dataset=ConversationDataset(rows, processor, modalities=["image"]),
        data_collator=Collator(model.modalities, 0),
    )
    trainer.add_callback(_Poison())
    with pytest.raises(MultiTokenError, match="nan at step 2, in the batch of the rows green, wh"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert all(entry["step"] < 2 for entry in trainer.state.log_history if "loss" in entry)


def test_media_embeddings_that_were_miscounted_name_modality_and_rows(model: Any) -> None:
    """As a loss of NaN: reported one step late, in all processes."""
    vectors = [torch.zeros(2, 5), torch.ones(1, 5)]
    prepared = [
        Prepared({"values": values, "mask": torch.ones(len(values))}, len(values))
        for values in vectors
    ]
    spans = [MediaSpan("vector", 1, 4), MediaSpan("vector", 0, 2)]
    samples = [
        Sample(torch.arange(6), torch.arange(6), [span], [item], id=name)
        for span, item, name in zip(spans, prepared, ("red", "blue"), strict=True)
    ]
    batch: Any = Collator(model.modalities, 0)(samples)
    for missing in (0, 1):
        batch["media"]["vector"]["positions"] = batch["media"]["vector"]["positions"][2 * missing :]
        with model.count_checks_deferred() as counts:
            loss = model(**batch).loss
        check = StepCheck([BatchResult(loss, ["red", "blue"], counts)], 7)
        if not missing:
            check.finish()
    with pytest.raises(
        SpliceError, match=r"^vector: .* at step 7, in the batch of the rows red, b"
    ):
        check.finish()


def test_batches_name_their_rows_also_from_a_worker(model: Any, data: Path) -> None:
    rows = [
        {"id": f"row {i}", "vector": [1.0] * 5, "messages": [
            {"role": "user", "content": "<vector>"}, {"role": "assistant", "content": "a"}]}
        for i in range(3)
    ]  # fmt: skip
    dataset = ConversationDataset(rows, model.processor, modalities=["vector"])
    loader = DataLoader(
        dataset, batch_size=2, collate_fn=WithRowIds(Collator(model.modalities, 0)), num_workers=1
    )
    assert [batch["row_ids"] for batch in loader] == [["row 0", "row 1"], ["row 2"]]


def test_counts_are_shown_in_steps_of_a_thousand() -> None:
    assert [format_count(n) for n in (0, 12, 1500, 12_300_000_000, 2e15)] == [
        "0",
        "12",
        "1.5 k",
        "12.3 G",
        "2 P",
    ]
