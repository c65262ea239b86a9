"""The DPO losses equal their formulas and TRL's, whatever the media (train/dpo.py)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.chat.format import DEFAULT_TEMPLATE
from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.errors import RowError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import DpoSpec, Trainable
from multi_token.train.batch_plan import PaddedBatches
from multi_token.train.dpo import (
    DpoLoss,
    PreferenceCollator,
    PreferenceDataset,
    PreferencePair,
    dpo_losses,
)
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import training_arguments
from multi_token.types import Sample

Fields = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(pair_fields: Fields, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    return MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(pair_fields(tmp_path / "model")).model
    )


def read(model: Any, rows: list[dict[str, Any]], pairs: Any = "required") -> list[Sample]:
    processor = replace(model.processor, preference=pairs)
    return [processor(to_conversation(r, list(model.modalities), row_id="row")) for r in rows]


def by_hand(model: Any, sample: Sample) -> torch.Tensor:
    """The log-probability of an answer, from the model's own loss of that sample alone."""
    batch = Collator(model.modalities, model.processor.chat.filler_id)([sample])
    return -model(**batch).loss * int((sample.labels != -100).sum())


def loss_of(
    model: Any, samples: list[Sample], reference: torch.Tensor, spec: DpoSpec, **options: Any
) -> torch.Tensor:
    pairs = [PreferencePair(s, r) for s, r in zip(samples, reference, strict=True)]
    collate = PreferenceCollator(Collator(model.modalities, model.processor.chat.filler_id))
    preference = DpoLoss(spec)
    inputs = preference.before_forward(model, collate(pairs))
    return preference.loss(model(**inputs), **options)


@pytest.mark.parametrize(
    "spec",
    [
        DpoSpec(beta=0.3),
        DpoSpec(beta=0.3, label_smoothing=0.2),
        DpoSpec(beta=0.3, loss="ipo"),
        DpoSpec(beta=0.3, loss="hinge"),
    ],
)
def test_a_batch_of_pairs_is_the_formula_of_log_probabilities_one_by_one(
    model: Any, pair_rows: list[dict[str, Any]], spec: DpoSpec
) -> None:
    samples = read(model, pair_rows)
    torch.manual_seed(1)
    model.language_model.requires_grad_(True)
    logps = [[by_hand(model, a) for a in (s, s.rejected) if a is not None] for s in samples]
    reference = torch.tensor([[float(x.detach()) for x in pair] for pair in logps])
    reference += 3 * torch.randn(len(pair_rows), 2)
    learned = [p for p in model.projectors.parameters() if p.requires_grad]
    learned += list(model.language_model.parameters())
    losses = []
    for sample, of_answers, of_reference in zip(samples, logps, reference, strict=True):
        assert sample.rejected is not None
        chosen, rejected = (now - ref for now, ref in zip(of_answers, of_reference, strict=True))
        d = chosen - rejected
        if spec.loss == "ipo":
            n_chosen, n_rejected = (
                int((s.labels != -100).sum()) for s in (sample, sample.rejected)
            )
            losses.append((chosen / n_chosen - rejected / n_rejected - 1 / (2 * 0.3)) ** 2)
        elif spec.loss == "hinge":
            losses.append((1 - 0.3 * d).clamp(min=0))
        else:
            s = spec.label_smoothing
            p = torch.sigmoid(0.3 * d)
            losses.append(-(1 - s) * p.log() - s * (1 - p).log())
    expected = torch.stack(losses).mean()
    loss = loss_of(model, samples, reference, spec)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, learned, allow_unused=True)
    theirs = torch.autograd.grad(expected, learned, allow_unused=True)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in ours) > 10
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_in_chunks_are_those_of_all_logits(
    model: Any, pair_rows: list[dict[str, Any]]
) -> None:
    samples, spec = read(model, pair_rows), DpoSpec(beta=0.3)
    model.language_model.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for model.logits_bytes in (1 << 30, 1):
        loss = loss_of(model, samples, torch.zeros(len(samples), 2), spec)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([loss.detach(), *(g for g in gradients if g is not None)])
    assert len(found[0]) > 10
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_each_item_is_encoded_once_for_both_answers(
    model: Any, pair_rows: list[dict[str, Any]]
) -> None:
    num_items = {"image": 0, "pulse": 0}
    for name in num_items:

        def count(_: Any, __: Any, features: Any, name: str = name) -> None:
            num_items[name] += len(features.values)

        model.encoder(name).register_forward_hook(count)
    loss_of(model, read(model, pair_rows), torch.zeros(len(pair_rows), 2), DpoSpec())
    assert num_items == {"image": 3, "pulse": 3}


def test_only_the_last_answers_count_whatever_train_on_turns_is(model: Any) -> None:
    assert model.processor.chat.train_on_turns == "all"
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "Two?"},
    ]
    (pair,) = read(model, [{"messages": turns, "chosen": "two", "rejected": "twelve"}])
    (alone,) = read(
        model, [{"messages": [*turns, {"role": "assistant", "content": "two"}]}], pairs=None
    )
    assert pair.rejected is not None and pair.input_ids.tolist() == alone.input_ids.tolist()
    decode = model.processor.tokenizer.decode
    texts = [decode(s.labels[s.labels != -100]) for s in (pair, pair.rejected, alone)]
    assert texts[0].startswith("two") and texts[1].startswith("twelve")
    assert texts[2].startswith("one") and texts[2].endswith(texts[0])


class BesideTrl:
    """TRL's trainer and our model, of one policy and one reference, on three pairs of text."""

    def __init__(self, fields: dict[str, Any], folder: Path, loss: str) -> None:
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        fields["model"]["chat_template"] = DEFAULT_TEMPLATE
        torch.manual_seed(0)
        self.model: Any = MultiTokenForConditionalGeneration.from_spec(
            Recipe.model_validate(fields).model
        )
        pairs = [
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for question, chosen, rejected in (
                ("What is red?", "a colour of light", "no"),
                ("Say blue", "blue", "green, green and green"),
                ("One?", "one", "two"),
            )
        ]
        self.policy = copy.deepcopy(self.model.language_model).requires_grad_(True)
        before = copy.deepcopy(self.policy).requires_grad_(False)
        with torch.no_grad():
            for parameter in before.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        tokenizer = copy.deepcopy(self.model.processor.tokenizer)
        tokenizer.chat_template = DEFAULT_TEMPLATE
        self.theirs = trl.DPOTrainer(
            self.policy,
            ref_model=before,
            args=trl.DPOConfig(
                output_dir=str(folder / "trl"),
                loss_type=[loss],
                beta=0.3,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
            ),
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
        rows = [self.theirs.train_dataset[i] for i in range(len(pairs))]
        self.batch = self.theirs.data_collator(rows)
        self.samples = read(self.model, pairs)
        self.collate = PreferenceCollator(
            Collator(self.model.modalities, self.model.processor.chat.filler_id)
        )
        ids = self.collate([PreferencePair(s, torch.zeros(2)) for s in self.samples])["input_ids"]
        assert ids.tolist() == self.batch["input_ids"].tolist(), "else it proves nothing"
        with torch.no_grad():
            now, self.model.language_model = self.model.language_model, before
            of_each = [
                [by_hand(self.model, s), by_hand(self.model, s.rejected)]  # type: ignore[arg-type]
                for s in self.samples
            ]
            self.reference = torch.tensor([[float(x) for x in pair] for pair in of_each])
            self.model.language_model = now.requires_grad_(True)


@pytest.mark.slow  # to import TRL
@pytest.mark.filterwarnings("ignore")  # TRL's own, of arguments that transformers renamed
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_loss_and_gradients_are_those_of_trl(
    recipe_fields: Fields, tmp_path: Path, loss: str
) -> None:
    beside = BesideTrl(recipe_fields(tmp_path / "run"), tmp_path, loss)
    model, theirs = beside.model, beside.theirs
    beside.policy.train()  # there is no dropout in it
    expected = theirs.compute_loss(theirs.model, beside.batch)
    expected.backward()
    spec = DpoSpec(beta=0.3, loss=loss)  # type: ignore[arg-type]
    found = loss_of(model, beside.samples, beside.reference, spec)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in beside.policy.named_parameters()}
    assert all(bool(g is not None and g.abs().max() > 0) for g in gradients.values())
    for name, parameter in model.language_model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    logged = theirs._metrics["train"]
    preference = DpoLoss(spec)
    pairs = [PreferencePair(s, r) for s, r in zip(beside.samples, beside.reference, strict=True)]
    preference.loss(model(**preference.before_forward(model, beside.collate(pairs))))
    for name, value in preference.metrics().items():
        assert value == pytest.approx(logged[name][0], rel=1e-4, abs=1e-4), name


@pytest.mark.slow  # to import TRL
@pytest.mark.filterwarnings("ignore")  # TRL's own, of arguments that transformers renamed
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_evaluation_is_that_of_trl_however_rows_are_cut_into_batches(
    recipe_fields: Fields, tmp_path: Path, loss: str
) -> None:
    beside = BesideTrl(recipe_fields(tmp_path / "run"), tmp_path, loss)
    expected = beside.theirs.evaluate()
    pairs = PreferenceDataset(beside.samples, [(1, 1)] * len(beside.samples))
    pairs.reference = beside.reference
    args = {"use_cpu": True, "per_device_eval_batch_size": 2}
    trainer = MultiTokenTrainer(
        beside.model,
        learn=Trainable.model_validate({"language_model": 1e-3}),
        batches=PaddedBatches(pairs.num_tokens),
        objective=DpoLoss(DpoSpec(beta=0.3, loss=loss)),  # type: ignore[arg-type]
        args=training_arguments(tmp_path, args, seed=0, learning_rate=1e-3),
        train_dataset=pairs,
        eval_dataset=pairs,
        data_collator=beside.collate,
    )
    found = trainer.evaluate()
    of_pairs = ("loss", *(f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")))
    for name in (*of_pairs, "logps/chosen", "logps/rejected"):
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-4), name
    assert trainer.objective.metrics() == {}, "nothing of it counts as training"


def test_a_smoothed_loss_is_least_at_the_margin_of_its_label_smoothing() -> None:
    spec = DpoSpec(beta=1.0, label_smoothing=0.1)
    margins = torch.linspace(-6, 6, 1201)
    ratios = torch.stack([margins, torch.zeros_like(margins)], -1)
    losses = dpo_losses(ratios, torch.ones_like(ratios), spec)
    assert float(margins[losses.argmin()]) == pytest.approx(math.log(0.9 / 0.1), abs=0.01)


def test_a_rejected_answer_must_have_words_and_fit(
    model: Any, pair_rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(RowError, match="row red: has an empty `rejected` answer"):
        read(model, [{**pair_rows[0], "rejected": " "}])
    long = [{**pair_rows[0], "rejected": "blue " * 50}]
    model.processor = replace(model.processor, max_tokens=40)
    with pytest.raises(RowError, match=r"row red: is \d+ tokens long \(3 of them media\), over"):
        read(model, long)
    read(model, long, pairs=None)
