"""Encoders that learn: exactly what a recipe names, at its own rate, and nothing else of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.encoders import attach_lora, merge_lora
from multi_token.errors import MultiTokenError, RecipeError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import LoraSpec, Trainable
from multi_token.train.batch_plan import PaddedBatches
from multi_token.train.parameter_groups import freeze_and_unfreeze, parameter_groups
from multi_token.train.run import train
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import training_arguments

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)
LORA = {"lr": 1e-4, "lora": {"r": 2, "lora_alpha": 4}}
BLOCK = "tower.encoder.layers"


def composed(fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)


def learn(image: Any, **more: Any) -> Trainable:
    return Trainable.model_validate({"encoders": {"image": image}, **more})


def opened(model: Any, stage: Trainable) -> set[str]:
    """Let a stage's parameters learn, as a run does; returns the names of those of `image`."""
    for name, spec in stage.encoders.items():
        if spec.lora is not None:
            attach_lora(name, model.encoder(name), spec.lora)
    freeze_and_unfreeze(model, stage)
    return {n for n, p in model.encoder("image").named_parameters() if p.requires_grad}


def batch_of(model: Any, data: Path) -> Any:
    rows = [
        {
            "id": name,
            "images": [str(data / f"{name}.png")],
            "messages": [
                {"role": "user", "content": "What is <image>?"},
                {"role": "assistant", "content": name},
            ],
        }
        for name in ("red", "blue")
    ]
    samples = [model.processor(to_conversation(r, ["image"], row_id=r["id"])) for r in rows]
    return Collator(model.modalities, model.processor.chat.filler_id)(samples)


def stage(image: Any, num_steps: int = 3, **more: Any) -> dict[str, Any]:
    fields = {"projectors": 1e-2, "encoders": {"image": image}, **more}
    return {"name": "both", "learn": fields, "args": {"max_steps": num_steps}}


def expected(model: Any, image: Any) -> set[str]:
    names = {n for n, _ in model.encoder("image").named_parameters()}
    if isinstance(image, float):
        return names
    if "last_layers" in image:
        numbers = range(3 - image["last_layers"], 3)
        return {n for n in names if any(n.startswith(f"{BLOCK}.{i}.") for i in numbers)}
    linear = ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]
    assert {n.split(".")[-4] for n in names if "lora_" in n} == set(linear)
    return {n for n in names if "lora_" in n}


CHOICES: dict[str, Any] = {
    "all": 1e-5,
    "last 1": {"lr": 1e-5, "last_layers": 1},
    "last 2": {"lr": 1e-5, "last_layers": 2},
    "lora": LORA,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_gradient_reaches_exactly_what_the_recipe_names(
    recipe_fields: Fields, tmp_path: Path, data: Path, choice: str
) -> None:
    model = composed(recipe_fields(tmp_path))
    names = opened(model, learn(CHOICES[choice]))
    assert names == expected(model, CHOICES[choice]) and names
    model.train()
    model(**batch_of(model, data)).loss.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {f"encoders.image.{n}" for n in names}
    # of LoRA, B starts at zero, so that A gets no gradient yet
    moving = {n for n in names if "lora_A" not in n}
    assert all(p.grad.any() for n, p in model.encoder("image").named_parameters() if n in moving)


@pytest.mark.parametrize("choice", CHOICES)
def test_only_what_learns_is_in_train_mode(
    recipe_fields: Fields, tmp_path: Path, choice: str
) -> None:
    model = composed(recipe_fields(tmp_path))
    names = opened(model, learn(CHOICES[choice]))
    encoder = model.encoder("image")
    model.train()
    training = {n for n, m in encoder.named_modules() if m.training}
    owners = {n.rpartition(".")[0] for n in names}
    assert owners <= training
    frozen = {n.rpartition(".")[0] for n, p in encoder.named_parameters() if not p.requires_grad}
    assert not frozen & training
    model.eval()
    assert not any(m.training for m in encoder.modules())


def test_the_dropout_of_lora_is_for_training_only(recipe_fields: Fields, tmp_path: Path) -> None:
    model = composed(recipe_fields(tmp_path))
    opened(model, learn({"lr": 1e-4, "lora": {"r": 2, "lora_dropout": 0.5}}))
    drops = [m for m in model.encoders.modules() if isinstance(m, nn.Dropout)]
    assert len(drops) == 18  # six linear layers in each of three blocks
    assert all(m.training for m in model.train() and drops)
    assert not any(m.training for m in model.eval() and drops)


def test_every_encoder_is_a_group_of_the_optimizer_with_its_own_rate(
    mixed_fields: Fields, tmp_path: Path
) -> None:
    model = composed(mixed_fields(tmp_path))
    stage = Trainable.model_validate(
        {"projectors": 1e-3, "encoders": {"image": {"lr": 2e-6, "last_layers": 1}}}
    )
    args = training_arguments(
        tmp_path, {"use_cpu": True, "weight_decay": 0.1}, seed=0, learning_rate=1e-3
    )
    trainer = MultiTokenTrainer(model, learn=stage, batches=PaddedBatches([]), args=args)
    groups = trainer.create_optimizer().param_groups
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"projectors": 1e-3, "encoder image": 2e-6, "encoder pulse": 1e-3}
    for name, parameters in (
        ("encoder image", model.encoder("image").layers()[-1].parameters()),
        ("encoder pulse", model.encoder("pulse").parameters()),
    ):
        inside = {id(p) for g in groups if g["name"] == name for p in g["params"]}
        assert inside == {id(p) for p in parameters} and len(inside) > 4
    undecayed = [p for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert undecayed and all(p.ndim == 1 for p in undecayed)


def test_what_learns_is_float32_whatever_the_encoder_came_in(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    for choice in CHOICES.values():
        model = composed(recipe_fields(tmp_path))
        model.encoder("image").to(torch.bfloat16)
        opened(model, learn(choice))
        learning = [p for p in model.encoder("image").parameters() if p.requires_grad]
        assert learning and all(p.dtype == torch.float32 for p in learning)


@pytest.mark.parametrize(
    ("layer", "last", "sentence"),
    [
        (None, 4, "expected `last_layers` to be at most 3.* got 4"),
        (-2, 3, "expected `last_layers` to be at most 2.* got 3"),
        ([0, 1], 2, "expected `last_layers` to be at most 1.* got 2"),
    ],
)
def test_layers_that_are_not_there_or_give_no_features_are_refused(
    recipe_fields: Fields, tmp_path: Path, layer: Any, last: int, sentence: str
) -> None:
    fields = recipe_fields(tmp_path / "run", stages=[stage({"lr": 1e-5, "last_layers": last})])
    fields["model"]["modalities"]["image"] |= {"features": "mean", "layer": layer}
    with pytest.raises(RecipeError, match=sentence):
        train(Recipe.model_validate(fields), console=QUIET)


def test_an_encoder_without_what_was_asked_for_is_refused(
    mixed_fields: Fields, tmp_path: Path
) -> None:
    fields = mixed_fields(tmp_path)
    fields["model"]["modalities"]["vector"] = {"type": "vector", "dim": 3}
    model = composed(fields)
    with pytest.raises(MultiTokenError, match="nothing to train under 'encoder vector'"):
        freeze_and_unfreeze(model, Trainable.model_validate({"encoders": {"vector": 1e-3}}))
    with pytest.raises(RecipeError, match="VectorEncoder.* has no linear layer"):
        attach_lora("vector", model.encoder("vector"), LoraSpec())
    with pytest.raises(RecipeError, match="LoRA is for pretrained encoders"):
        freeze_and_unfreeze(model, Trainable.model_validate({"encoders": {"pulse": LORA}}))
    opened(model, learn(1e-5))
    with pytest.raises(RecipeError, match="was trained without LoRA before"):
        opened(model, learn(LORA))


def test_parameters_that_the_features_do_not_depend_on_stay_frozen_and_are_counted(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run", stages=[stage(1e-2)])
    fields["model"]["modalities"]["image"] |= {"features": "patches", "layer": -2}
    fresh = composed(fields).encoder("image")
    console = Console(record=True, width=300, file=io.StringIO())
    encoder = train(Recipe.model_validate(fields), console=console).encoder("image")
    after = dict(encoder.named_parameters())
    kept = {key for key, p in fresh.named_parameters() if torch.equal(p, after[key])}
    last = {key for key in after if key.startswith((f"{BLOCK}.2.", "tower.post_layernorm."))}
    assert kept == last == encoder.unused_parameters
    num = sum(after[key].numel() for key in last)
    said = f"image: the features do not depend on {num:,} parameters of the encoder"
    assert said in console.export_text()


class _Blind(nn.Module):
    """A tower that computes without gradients, as some packages' do."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.config = tower.config

    def forward(self, **inputs: Any) -> Any:
        with torch.no_grad():
            return self.tower(**inputs)


def test_an_encoder_that_no_gradient_comes_through_is_refused(
    recipe_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multi_token.modalities.image import ImageModality

    build = ImageModality.build_encoder

    def blind(self: ImageModality) -> Any:
        encoder = build(self)
        encoder.tower = _Blind(encoder.tower)
        return encoder

    monkeypatch.setattr(ImageModality, "build_encoder", blind)
    for choice, sentence in [
        (1e-5, "ImageEncoder.* runs without gradients"),
        ({"lr": 1e-5, "last_layers": 1}, "no gradient reaches layer 1 of its `last_layers` 1"),
    ]:
        fields = recipe_fields(tmp_path / sentence[:4], stages=[stage(choice)])
        with pytest.raises(RecipeError, match=sentence):
            train(Recipe.model_validate(fields), console=QUIET)


def resnet(folder: Path) -> str:
    """A random encoder with BatchNorm after each of its convolutions."""
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    hf.ResNetModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return str(folder)


def test_statistics_of_batch_norm_stay_as_they_were_while_its_weights_learn(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run", stages=[stage(1e-2)])
    fields["model"]["modalities"]["image"]["encoder"] = resnet(tmp_path / "net")
    fresh = composed(fields).encoder("image")
    encoder = train(Recipe.model_validate(fields), console=QUIET).encoder("image")
    before, after = fresh.state_dict(), encoder.state_dict()
    statistics = [key for key in after if "running_" in key or "num_batches" in key]
    weights = [n for n, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(statistics) == 3 * len(weights) > 10
    assert all(torch.equal(before[key], after[key]) for key in statistics)
    assert not any(torch.equal(before[f"{n}.weight"], after[f"{n}.weight"]) for n in weights)


def test_an_encoder_from_random_weights_learns_with_its_projector(
    mixed_fields: Fields, tmp_path: Path
) -> None:
    one = {"name": "one", "learn": {"projectors": {"image": 1e-2}}, "args": {"max_steps": 1}}
    two = {"name": "two", "learn": {"projectors": {"pulse": 3e-3}}, "args": {"max_steps": 2}}
    console = Console(record=True, width=200, file=io.StringIO())
    out = tmp_path / "run"
    train(Recipe.model_validate(mixed_fields(out, stages=[one, two])), console=console)
    said = console.export_text()
    assert "pulse: no closed-form start, since its encoder starts from random weights" in said
    assert "image: closed-form start from" in said and "pulse: closed-form" not in said
    assert said.count("encoder pulse: 136 parameters in float32, learning rate 0.003") == 1
    start, first, second = (
        load_file(out / "stages" / stage / "encoders.safetensors")
        for stage in ("0-closed-form", "1-one/result", "2-two/result")
    )
    assert {n.split(".")[0] for n in start} == {"pulse"} and "pulse.norm.running_mean" in start
    assert all(torch.equal(first[key], start[key]) for key in start)
    assert not torch.equal(second["pulse.blocks.0.weight"], start["pulse.blocks.0.weight"])
    scale = load_file(out / "stages" / "0-closed-form" / "projectors.safetensors")
    assert not (scale["pulse.feature_scale"] == 1).all(), "its projector is calibrated all the same"


@pytest.mark.slow
def test_random_weights_come_from_the_seed(mixed_fields: Fields, tmp_path: Path) -> None:
    quick = {"name": "a", "learn": {"projectors": 1e-2}, "args": {"max_steps": 1}}
    starts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fields = mixed_fields(tmp_path / name, seed=seed, stages=[quick])
        train(Recipe.model_validate(fields), console=QUIET)
        starts.append(
            load_file(tmp_path / name / "stages" / "0-closed-form" / "encoders.safetensors")
        )
    key = "pulse.blocks.0.weight"
    assert torch.equal(starts[0][key], starts[1][key])
    assert not torch.equal(starts[0][key], starts[2][key])


def test_cached_features_and_an_encoder_that_learns_by_itself_exclude_each_other(
    mixed_fields: Fields, tmp_path: Path
) -> None:
    fields = mixed_fields(tmp_path / "run", feature_cache=True)
    with pytest.raises(RecipeError, match="random weights and is trained in stage"):
        train(Recipe.model_validate(fields), console=QUIET)
    fields = mixed_fields(
        tmp_path / "frozen",
        feature_cache=True,
        stages=[{"name": "a", "learn": {"projectors": {"image": 1e-2}}, "args": {"max_steps": 1}}],
    )
    train(Recipe.model_validate(fields), console=QUIET)


def test_what_learns_of_an_encoder_is_counted_and_shown(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    fields = recipe_fields(tmp_path / "run", stages=[stage({"lr": 2e-6, "last_layers": 2}, 1)])
    model = train(Recipe.model_validate(fields), console=console)
    said = console.export_text().splitlines()
    chosen = sum(
        p.numel() for layer in model.encoder("image").layers()[-2:] for p in layer.parameters()
    )
    assert f"  encoder image: {chosen:,} parameters in float32, learning rate 2e-06" in said
    groups = parameter_groups(model, Recipe.model_validate(fields).train.stages[0].learn)
    num_learned = sum(p.numel() for group in groups for p in group.parameters)
    assert any(line.startswith(f"stage both: {num_learned:,} of") for line in said)


def test_merged_lora_gives_the_same_features(recipe_fields: Fields, tmp_path: Path) -> None:
    model = composed(recipe_fields(tmp_path))
    encoder = model.encoder("image")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = encoder(pixel_values=pixels).values
        attach_lora("image", encoder, LoraSpec(r=2))
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        adapted = encoder(pixel_values=pixels).values
        merge_lora(encoder)
        merged = encoder(pixel_values=pixels).values
    assert not torch.allclose(before, adapted, atol=1e-3)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert not any("lora_" in name for name, _ in encoder.named_parameters())
