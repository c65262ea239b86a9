"""recipe/recipe.py and registry.py: strict, with the nearest name for every slip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from multi_token import registry
from multi_token.errors import RecipeError, RegistryError
from multi_token.modalities.image import ImageModality
from multi_token.modalities.vector import VectorModality
from multi_token.projectors.kinds import Expand, Mlp
from multi_token.recipe.recipe import Recipe, load_recipe, parse_recipe
from multi_token.recipe.train import FeatureCacheSpec, LearningRate, LoraSpec, TrainableEncoder

Fields = Callable[..., dict[str, Any]]


@pytest.fixture
def text(recipe_fields: Fields, tmp_path: Path) -> str:
    return yaml.safe_dump(recipe_fields(tmp_path / "run"))


def test_a_recipe_comes_back_from_its_own_file(text: str, tmp_path: Path) -> None:
    recipe = parse_recipe(text)
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_types_become_objects_of_the_registered_classes(text: str) -> None:
    modality = parse_recipe(text).model.modalities["image"]
    assert isinstance(modality, ImageModality)
    assert modality.projector == Expand(factor=3)


def test_overrides_reach_lists_and_free_form_sections(text: str) -> None:
    recipe = parse_recipe(
        text,
        [
            "train.stages.0.args.max_steps=7",
            "train.args.weight_decay=1e-3",
            "train.seed=5",
            "train.closed_form=null",
            "model.modalities.image.projector={type: mlp}",
        ],
    )
    assert recipe.train.stages[0].args["max_steps"] == 7
    assert recipe.train.args["weight_decay"] == 0.001
    assert recipe.train.seed == 5
    assert recipe.train.closed_form is None
    assert recipe.model.modalities["image"].projector == Mlp()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.sed=1", "unknown key 'train.sed': did you mean 'seed'"),
        ("dta.train=[]", "unknown key 'dta': did you mean 'data'"),
        ("data.max_token=4", "unknown key 'data.max_token': did you mean 'max_tokens'"),
        ("train.closed_form.penalti=1", "'train.closed_form.penalti': did you mean 'penalty'"),
        ("train.stages.0.learn.projector=1", "did you mean 'projectors'"),
        ("model.modalities.image.featurs=cls", "unknown key 'featurs': did you mean 'features'"),
        ("model.modalities.image.projector.facto=2", "unknown key 'facto': did you mean 'factor'"),
        ("train.seed=abc", "'train.seed': .*got 'abc'"),
        ("train.stages.5.name=x", "'5' is no index of a list of 1"),
        ("train.seed.deeper=1", "'train.seed': .*integer"),
        ("train.seed", "expected key=value"),
        ("train.stages.0.learn={}", "must train something"),
        ("model.modalities.text={type: vector, dim: 2}", "'text' cannot name a modality"),
        ("train.stages.0.learn.encoders={imge: 1e-5}", "`encoders` of 'imge'.*mean 'image'"),
        ("train.stages.0.learn.projectors={imge: 1e-5}", "`projectors` of 'imge'.*mean 'image'"),
        ("train.stages.0.learn.projectors={}", "must train something"),
        ("train.stages.0.learn.projectors={image: 0}", "greater than 0"),
        ("train.stages.0.learn.encoders={image: -1}", "'train.*encoders.image.lr': .*than 0"),
        (
            "train.stages.0.learn.encoders={image: {last_layers: 1}}",
            "encoders.image.lr' is required",
        ),
        (
            "train.stages.0.learn.encoders={image: {lr: 1, last_layers: 0}}",
            "image.last_layers': .*equal to 1",
        ),
        (
            "train.stages.0.learn.encoders={image: {lr: 1, last_layer: 1}}",
            "did you mean 'last_layers'",
        ),
        ("train.stages.0.learn.projectors={lr: 0}", "projectors.all.lr': .*greater than 0"),
        ("train.stages.0.learn.projectors={lr: 1, decay: 1}", "unknown key .*'weight_decay'"),
        ("train.stages.0.learn.adapter={weight_decay: 1}", "adapter.lr' is required"),
        ("train.stages.0.learn.adapter={lr: 1, weight_decay: -1}", "or equal to 0"),
        ("model.modalities.lr={type: vector, dim: 2}", "'lr' cannot name a modality"),
    ],
)
def test_a_slip_is_named_with_the_nearest_name(text: str, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe(text, [override])


def test_an_encoder_learns_by_a_rate_alone_by_its_last_layers_or_by_lora(text: str) -> None:
    learn = "train.stages.0.learn.encoders"
    for value, expected in (
        ("2.0e-6", TrainableEncoder(lr=2e-6)),
        ("{lr: 2e-6, last_layers: 2}", TrainableEncoder(lr=2e-6, last_layers=2)),
        ("{lr: 1e-4, lora: {r: 8}}", TrainableEncoder(lr=1e-4, lora=LoraSpec(r=8))),
    ):
        recipe = parse_recipe(text, [f"{learn}={{image: {value}}}"])
        assert recipe.train.stages[0].learn.encoders == {"image": expected}
    assert parse_recipe(text).train.stages[0].learn.encoders == {}


def test_the_feature_cache_is_a_word_or_a_section(text: str) -> None:
    for value, expected in (
        ("true", FeatureCacheSpec()),
        ("false", None),
        ("auto", FeatureCacheSpec(auto=True)),
        ("{path: kept, dtype: bfloat16}", FeatureCacheSpec(path="kept", dtype="bfloat16")),
    ):
        recipe = parse_recipe(text, [f"train.feature_cache={value}"])
        assert recipe.train.feature_cache == expected
        again = Recipe.model_validate(recipe.model_dump(mode="json"))
        assert again.train.feature_cache == expected
    assert parse_recipe(text).train.feature_cache is None
    for wrong, sentence in (
        ("maybe", "expected true, false, auto or a section"),
        ("{folder: kept}", "folder"),
        ("{dtype: int8}", "float32"),
        ("{shard_megabytes: 0}", "greater than or equal to 1"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            parse_recipe(text, [f"train.feature_cache={wrong}"])


def test_lora_on_an_encoder_is_the_same_in_all_stages_or_refused(text: str) -> None:
    stages = [
        {"name": "a", "learn": {"encoders": {"image": {"lr": 1e-4, "lora": {"r": 8}}}}},
        {"name": "b", "learn": {"projectors": 1e-4}},
        {"name": "c", "learn": {"encoders": {"image": {"lr": 1e-5, "lora": {"r": 8}}}}},
    ]
    parse_recipe(text, [f"train.stages={stages}"])
    for other in ({"lr": 1e-5, "lora": {"r": 4}}, {"lr": 1e-5, "last_layers": 1}, 1e-5):
        stages[2]["learn"] = {"encoders": {"image": other}}
        with pytest.raises(RecipeError, match="'image' is trained by other means in stage 'c'"):
            parse_recipe(text, [f"train.stages={stages}"])


def test_a_missing_key_and_a_missing_file_are_named(text: str, tmp_path: Path) -> None:
    fields = yaml.safe_load(text)
    del fields["train"]["output_dir"]
    with pytest.raises(RecipeError, match=r"'train\.output_dir' is required"):
        parse_recipe(yaml.safe_dump(fields))
    with pytest.raises(RecipeError, match="expected a recipe file at"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_recipe("model: [")


def test_a_language_model_in_pieces_is_a_line_of_the_recipe(text: str) -> None:
    assert parse_recipe(text).train.fsdp is None
    assert parse_recipe(text, ["train.fsdp=false"]).train.fsdp is None
    for value, num in (("true", 1), ("{replicas: 2}", 2)):
        fsdp = parse_recipe(text, [f"train.fsdp={value}"]).train.fsdp
        assert fsdp is not None and fsdp.replicas == num
    with pytest.raises(RecipeError, match="greater than or equal to 1"):
        parse_recipe(text, ["train.fsdp={replicas: 0}"])


def test_packing_is_a_word_or_a_section(text: str) -> None:
    packed = parse_recipe(text, ["train.packing=true", "train.pack_items=4"]).train
    assert packed.packing is not None and not packed.packing.share
    assert packed.pack_items == 4 and packed.pack_tokens is None
    shared = parse_recipe(text, ["train.packing={share: true}"]).train.packing
    assert shared is not None and shared.share
    assert parse_recipe(text, ["train.packing=false"]).train.packing is None


def test_a_learning_rate_is_a_number_or_a_section_with_its_weight_decay(text: str) -> None:
    for part in ("projectors", "adapter", "language_model"):
        for value, expected in (
            ("1e-3", LearningRate(lr=1e-3)),
            ("{lr: 1e-3, weight_decay: 0.1}", LearningRate(lr=1e-3, weight_decay=0.1)),
        ):
            recipe = parse_recipe(text, [f"train.stages.0.learn={{{part}: {value}}}"])
            assert getattr(recipe.train.stages[0].learn, part) == expected
            assert parse_recipe(yaml.safe_dump(recipe.model_dump(mode="json"))) == recipe
    own = "{image: {lr: 1, weight_decay: 2}}"
    some = parse_recipe(text, [f"train.stages.0.learn.projectors={own}"])
    learn = some.train.stages[0].learn
    assert learn.projectors == {"image": LearningRate(lr=1, weight_decay=2)}
    assert learn.projector("image") == LearningRate(lr=1, weight_decay=2)
    assert parse_recipe(yaml.safe_dump(some.model_dump(mode="json"))) == some


def test_two_stages_of_one_name_are_refused(text: str) -> None:
    stage = yaml.safe_load(text)["train"]["stages"][0]
    with pytest.raises(RecipeError, match="stages need different names"):
        parse_recipe(text, [f"train.stages={[stage, stage]}"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.modalities.image.type=imge", "unknown modality 'imge': did you mean 'image'"),
        ("model.modalities.image.projector.type=expnd", "unknown projector 'expnd'.*'expand'"),
        ("model.modalities.image.type=zzz", r"pip install PACKAGE.*multi_token\.modalities"),
        ("model.modalities.image=3", "a modality is a mapping with a `type`"),
    ],
)
def test_an_unknown_modality_or_projector_is_named_with_what_to_do(
    text: str, override: str, sentence: str
) -> None:
    with pytest.raises((RegistryError, RecipeError), match=sentence):
        parse_recipe(text, [override])


class Heartbeat(VectorModality):
    """A modality as a notebook would register it."""

    type: Literal["heartbeat"] = "heartbeat"  # type: ignore[assignment]
    dim: int = 3


def test_a_registered_modality_can_be_named_in_a_recipe(text: str) -> None:
    registry.register_modality("heartbeat", Heartbeat)
    registry.register_modality("heartbeat", Heartbeat)  # a notebook's cell run twice
    recipe = parse_recipe(text, ["model.modalities.pulse={type: heartbeat}"])
    assert isinstance(recipe.model.modalities["pulse"], Heartbeat)


def test_a_taken_name_is_refused_with_both_owners() -> None:
    with pytest.raises(RegistryError, match="image.*ImageModality.*Heartbeat"):
        registry.register_modality("image", Heartbeat)


def test_every_built_in_name_resolves() -> None:
    for kind in ("modality", "projector"):
        for name in registry.registered_names(kind):
            assert isinstance(registry.resolve(kind, name), type)


def test_a_saved_recipe_holds_registry_names_and_no_import_paths(text: str) -> None:
    saved = yaml.safe_dump(parse_recipe(text).model_dump(mode="json"))
    assert "type: image" in saved and "multi_token." not in saved


def test_a_recipe_object_can_be_built_by_hand(recipe_fields: Fields, tmp_path: Path) -> None:
    fields = recipe_fields(tmp_path)
    fields["model"]["modalities"]["image"] = ImageModality(encoder="some/encoder")
    assert Recipe.model_validate(fields).model.modalities["image"].type == "image"
