"""Distillation is zero for equal embeddings, and exact in any batch (train/distillation.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.errors import RecipeError, RowError
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.language_model.segment_attention import segment_attention_enabled
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.recipe.train import AdapterSpec, DistillationSpec
from multi_token.train.distillation import DistillationCollator, DistillationLoss, kl_divergence
from multi_token.train.run import train
from multi_token.types import Sample
from tests.train.test_distributed import processes

Fields = Callable[..., dict[str, Any]]
NAMES = ("red", "blue", "green", "white")


def row(
    name: str, text: str | None = "an image of {}", answer: str | None = None
) -> dict[str, Any]:
    return {
        "id": name,
        "images": [f"{name}.png"],
        **({} if text is None else {"media_texts": {"image": [text.format(name)]}}),
        "messages": [
            {"role": "user", "content": "What is this?\n<image>\n"},
            {"role": "assistant", "content": answer or name},
        ],
    }


@pytest.fixture
def model(recipe_fields: Fields, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    return MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path)).model
    )


def read(model: Any, data: Path, rows: list[dict[str, Any]], teacher: Any = "required") -> Any:
    from multi_token.media.fetch import Fetch

    processor = replace(model.processor, fetch=Fetch(root=str(data)), distillation=teacher)
    return [processor(to_conversation(r, ["image"], row_id="row")) for r in rows]


def loss_of(
    model: Any, samples: list[Sample], spec: DistillationSpec, **options: Any
) -> torch.Tensor:
    collate = DistillationCollator(Collator(model.modalities, model.processor.chat.filler_id))
    teacher = DistillationLoss(spec)
    inputs = teacher.before_forward(model, collate(samples))
    return teacher.loss(model(**inputs), **options)


class _Says(nn.Module):
    """A projector that gives a text's own embeddings, for one item."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.tokens = nn.Parameter(embeddings.clone())

    def forward(self, features: Any) -> torch.Tensor:
        return self.tokens


def says_its_text(model: Any, data: Path) -> tuple[list[Sample], Any]:
    """A sample whose image's three tokens are the embeddings of the three of its text."""
    samples = read(model, data, [row("red", "uvw")])
    sample = samples[0]
    (place,) = sample.media_spans
    assert sample.teacher is not None and len(sample.teacher.input_ids) == len(sample.input_ids)
    ids = sample.teacher.input_ids[place.start : place.start + place.length]
    assert model.processor.tokenizer.decode(ids) == "uvw"
    with torch.no_grad():
        projector = _Says(model.get_input_embeddings()(ids))
    model.projectors["image"] = projector
    return samples, projector


def test_the_divergence_is_zero_if_media_embeddings_equal_those_of_the_text(
    model: Any, data: Path
) -> None:
    samples, projector = says_its_text(model, data)
    assert loss_of(model, samples, DistillationSpec()).abs() < 1e-6
    with torch.no_grad():
        projector.tokens[1] += 1.0
    loss = loss_of(model, samples, DistillationSpec())
    loss.backward()
    assert loss > 1e-3
    assert projector.tokens.grad.abs().min() > 0, "each token is drawn"
    assert all(p.grad is None for p in model.language_model.parameters())
    # and downhill is where the text is
    with torch.no_grad():
        projector.tokens -= 1e-2 * projector.tokens.grad / projector.tokens.grad.norm()
    assert loss_of(model, samples, DistillationSpec()) < loss


def test_the_teacher_is_the_model_without_adapter_and_gets_no_gradient(
    model: Any, data: Path
) -> None:
    samples, _ = says_its_text(model, data)
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2, lora_dropout=0.5))
    assert loss_of(model, samples, DistillationSpec()).abs() < 1e-6
    adapter = adapter_parameters(model.language_model)
    with torch.no_grad():
        for parameter in adapter:
            parameter.normal_(std=0.1)
    model.eval()  # without dropout: the adapter is all the difference
    assert loss_of(model, samples, DistillationSpec()) > 1e-3
    for learns in (False, True):
        for parameter in adapter:
            parameter.requires_grad_(learns)
        model.train()
        loss = loss_of(model, samples, DistillationSpec())
        assert loss > 1e-3
        assert model.language_model.training
        assert {p.requires_grad for p in adapter} == {learns}
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter)


def test_the_divergence_is_that_of_torch_and_zero_only_for_the_same() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 11)
    for temperature in (1.0, 2.0):
        expected = temperature**2 * nn.functional.kl_div(
            (ours / temperature).log_softmax(-1),
            (theirs / temperature).log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        torch.testing.assert_close(kl_divergence(theirs, ours, temperature), expected)
    assert (kl_divergence(theirs, ours, 1.0) > 0).all()


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_batch_equals_its_rows_and_rows_without_a_text_use_cross_entropy(
    model: Any, data: Path, weight: float
) -> None:
    rows = [
        row("red"),
        row("blue", None),
        row("green", "{} it is, quite so"),
        row("white", None, "It is white, and nothing else"),
    ]
    samples = read(model, data, rows, teacher="optional")
    assert [s.teacher is None for s in samples] == [False, True, False, True]
    spec = DistillationSpec(weight=weight, missing="cross_entropy")
    num = sum(int((s.labels[1:] != -100).sum()) for s in samples)
    parameters = [p for p in model.projectors.parameters() if p.requires_grad]
    whole = loss_of(model, samples, spec, num_items_in_batch=num)
    gradients = torch.autograd.grad(whole, parameters)
    parts = [loss_of(model, [s], spec, num_items_in_batch=num) for s in samples]
    summed = torch.stack(parts).sum()
    torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(summed, parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # what the untaught rows give is the model's own cross entropy
    plain = Collator(model.modalities, model.processor.chat.filler_id)([samples[1]])
    torch.testing.assert_close(parts[1], model(**plain, num_items_in_batch=num).loss)
    plain = Collator(model.modalities, model.processor.chat.filler_id)([samples[0]])
    entropy = model(**plain, num_items_in_batch=num).loss
    pure = loss_of(model, [samples[0]], DistillationSpec(), num_items_in_batch=num)
    torch.testing.assert_close(parts[0], (1 - weight) * entropy + weight * pure)


@pytest.mark.parametrize("trains", ["adapter of the head", "everything in bfloat16"])
def test_loss_and_gradients_in_chunks_are_those_of_all_logits(
    model: Any, data: Path, trains: str
) -> None:
    rows = [row("red", None), row("blue"), row("green", None), row("white", answer="It is white")]
    samples = read(model, data, rows, teacher="optional")
    if trains == "adapter of the head":
        spec = AdapterSpec(r=2, target_modules=["q_proj", "lm_head"])
        model.language_model = attach_adapter(model.language_model, spec)
        for parameter in adapter_parameters(model.language_model):
            torch.nn.init.normal_(parameter, std=0.1)
    else:
        model.language_model.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tokens = 3 * 4 * model.language_model.config.vocab_size
    found = []
    for model.logits_bytes in (1 << 30, tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in trains):
            loss = loss_of(model, samples, DistillationSpec(weight=0.5, missing="cross_entropy"))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([loss.detach(), *(g for g in gradients if g is not None)])
    tolerance = 2e-2 if "bfloat16" in trains else 1e-4
    assert len(found[0]) > 4
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("share", [False, True])
def test_a_pack_is_its_rows_padded(model: Any, data: Path, share: bool) -> None:
    rows = [
        row("red"),
        row("red", None, "It is red, quite so"),
        row("red", "a {} thing", "so"),
        row("green", "{} it is, quite so"),
        row("white", None, "It is white, and nothing else"),
        row("blue", "a longer text that says {}"),
    ]
    for one in rows:
        one["messages"][0]["content"] = "What is <image>?"
    samples = read(model, data, rows, teacher="optional")
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    for parameter in adapter_parameters(model.language_model):
        torch.nn.init.normal_(parameter, std=0.1)
    spec = DistillationSpec(weight=0.75, missing="cross_entropy")
    collator = Collator(model.modalities, model.processor.chat.filler_id, share=share)
    learned = [p for p in model.parameters() if p.requires_grad]
    found = []
    for packed in (False, True):
        teacher = DistillationLoss(spec)
        with segment_attention_enabled(model.language_model) as by_segment:
            batch = DistillationCollator(collator, packed=packed)(samples)
            assert by_segment and batch["counts"].shares_prefix == (packed and share)
            assert ("cu_seq_lens_q" in batch["teacher"]) == packed
            inputs = teacher.before_forward(model, batch)
            assert [len(teacher.untaught), len(teacher.taught)] == [
                sum(int((s.labels[1:] != -100).sum()) for s in samples if (s.teacher is None) == no)
                for no in (True, False)
            ]
            loss = teacher.loss(model(**inputs))
            found.append((loss, torch.autograd.grad(loss, learned)))
    (padded, by_padding), (packed_one, by_packing) = found
    torch.testing.assert_close(packed_one, padded, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(by_packing, by_padding, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-4 for g in by_packing)


def test_texts_are_counted_named_and_belong_to_items_in_reading_order() -> None:
    fields = row("red")
    fields["images"] = ["a.png", "b.png"]
    fields["messages"][0]["content"] = "<image> and <image>"
    fields["media_texts"] = {"image": ["one", None], "sound": None}
    conversation = to_conversation(fields, ["image", "sound"], row_id="row")
    assert [item.media_text for item in conversation.media] == ["one", None]
    for wrong, sentence in (
        ({"image": ["one"]}, "has 1 texts under 'image', but the row has 2 items"),
        ({"image": [1, 2]}, "a list under 'image', expected a list of texts"),
        ({"imge": ["one", "two"]}, "under 'imge', expected a list of texts under one of image"),
        (["one", "two"], "`media_texts` is a list, expected an object"),
    ):
        with pytest.raises(RowError, match=sentence):
            to_conversation({**fields, "media_texts": wrong}, ["image", "sound"], row_id="row")


def test_a_row_without_a_text_is_named(model: Any, data: Path) -> None:
    with pytest.raises(
        RowError, match=r"row blue: has no text for a teacher .* place of its image"
    ):
        read(model, data, [row("red"), row("blue", None)])


def taught_fields(recipe_fields: Fields, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    rows = data / "taught.jsonl"
    rows.write_text("".join(json.dumps(row(name)) + "\n" for name in NAMES))
    stage = {"name": "a", "learn": {"projectors": 1e-2}, "distillation": {}, **more}
    fields = recipe_fields(out, stages=[stage], closed_form=None)
    fields["data"]["train"] = [{"rows": str(rows)}]
    fields["train"]["args"] |= {"max_steps": 4, "train_sampling_strategy": "sequential"}
    return fields


def losses(out: Path) -> list[float]:
    history = json.loads((out / "stages" / "1-a" / "done.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=Console(quiet=True))


def test_a_stage_lowers_the_divergence_whatever_the_accumulation(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    for name, size, num in (("one", 4, 1), ("four", 1, 4)):
        fields = taught_fields(recipe_fields, data, tmp_path / name)
        fields["train"]["args"] |= {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": num,
        }
        trained(fields)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert four == pytest.approx(one, rel=1e-3)
    assert one[-1] < one[0]
    plain = taught_fields(recipe_fields, data, tmp_path / "plain", distillation=None)
    plain["train"]["args"] |= {"per_device_train_batch_size": 4}
    trained(plain)
    packed = taught_fields(recipe_fields, data, tmp_path / "packed")
    packed["train"] |= {"packing": True, "pack_tokens": 10_000}
    del packed["train"]["args"]["train_sampling_strategy"]
    trained(packed)
    assert losses(tmp_path / "packed") == pytest.approx(one, rel=1e-3)
    assert losses(tmp_path / "plain")[0] != pytest.approx(one[0], rel=1e-2)
    file = "projectors.safetensors"
    ours, theirs = (load_file(tmp_path / name / file) for name in ("one", "four"))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_two_processes_with_fsdp_distill_like_one(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    def fields(name: str, size: int, **more: Any) -> dict[str, Any]:
        made = taught_fields(
            recipe_fields, data, tmp_path / name, learn={"projectors": 1e-2, "adapter": 1e-2}
        )
        made["train"] |= more
        made["train"]["args"] |= {"per_device_train_batch_size": size, "report_to": []}
        return made

    # logits of a few tokens at a time, in other numbers of chunks on each process
    run = {"name": "two", "fields": fields("two", 2, fsdp=True, logits_megabytes=0.004)}
    seen = processes(2, tmp_path, [run])["two"]
    assert all(one["num_pieces"] > 0 for one in seen)
    trained(fields("one", 4))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_weight_above_one_is_refused(recipe_fields: Fields, data: Path, tmp_path: Path) -> None:
    text = yaml.safe_dump(taught_fields(recipe_fields, data, tmp_path / "run"))
    with pytest.raises(RecipeError, match="less than or equal to 1"):
        parse_recipe(text, ["train.stages.0.distillation.weight=2"])
