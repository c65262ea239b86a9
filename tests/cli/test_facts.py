"""`env` and `schema`, overrides in every command, and the modality of `ask --audio`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from multi_token.cli import app
from multi_token.cli.ask import modality_for
from multi_token.cli.recipes import HEADER_FIELDS, ready_recipes
from multi_token.cli.schema import recipe_schema
from multi_token.errors import MultiTokenError
from multi_token.modalities.image import ImageModality
from multi_token.modalities.sound import SoundModality
from multi_token.modalities.speech import SpeechModality
from multi_token.modalities.timeseries import TimeseriesModality
from multi_token.modalities.vector import VectorModality
from multi_token.modalities.video import VideoModality
from tests.test_docs import DOCUMENTS, blocks, name_of

ROOT = Path(__file__).resolve().parents[2]


def command(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


def test_env_has_versions_devices_and_extras_as_json_too() -> None:
    shown = command("env")
    assert shown.exit_code == 0 and "torch" in shown.stdout and "accelerator" in shown.stdout
    facts = json.loads(command("env", "--json").stdout)
    assert {"multi_token", "python", "torch"} <= facts["machine"].keys()
    assert facts["packages"]["transformers"] == facts["machine"]["transformers"]
    assert facts["extras"]["serve"] == "ready"


def faults(schema: dict[str, Any], fields: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(fields)]


def test_the_schema_takes_every_recipe_of_the_documents_and_of_the_package(
    schema: dict[str, Any],
) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    found = {
        name_of(p): body for p in DOCUMENTS for body in blocks(p.read_text("utf-8"), "yaml")
    } | {
        p.name: p.read_text("utf-8")
        for p in (ROOT / "multi_token/recipes").glob("*.yaml")
        if ".job." not in p.name
    }
    for name, text in found.items():
        # 1e-3 without a point is a text in YAML 1.1, which our own reader takes as a number
        fields = yaml.safe_load(text)
        assert not faults(schema, fields), name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("train", "packng"), True),
        (("model", "modalities", "image", "encodr"), "x"),
        (("model", "modalities", "image", "type"), "imag"),
        (("train", "stages", 0, "learn", "projectors"), "fast"),
    ],
)
def test_an_editor_marks_a_wrong_key_or_value(
    schema: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    text = (ROOT / "multi_token/recipes/image_patches.yaml").read_text("utf-8")
    fields: Any = yaml.safe_load(text)
    at = fields
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert faults(schema, fields)


def test_keys_have_their_descriptions_and_training_arguments_their_names(
    schema: dict[str, Any],
) -> None:
    sections = schema["$defs"]
    assert sections["TrainSpec"]["properties"]["packing"]["description"].startswith("Lay rows")
    assert sections["ImageModality"]["properties"]["encoder"]["description"].startswith("Hub name")
    assert "per_device_train_batch_size" in sections["Stage"]["properties"]["args"]["properties"]
    assert command("schema").exit_code == 0


def test_the_shell_completes_names_of_recipes() -> None:
    words = {"COMP_WORDS": "multi-token recipes show vec", "COMP_CWORD": "3"}
    done = CliRunner().invoke(
        app, [], prog_name="multi-token", env={**words, "_MULTI_TOKEN_COMPLETE": "complete_bash"}
    )
    assert done.stdout.split() == ["vectors"]


def test_an_override_by_set_is_answered_with_the_one_way() -> None:
    done = command("data", "show", "rows.jsonl", "0", "-r", "a.yaml", "--set", "train.seed=1")
    assert done.exit_code == 2 and "`KEY=VALUE`, after the other arguments" in done.stderr


SPEECH = SpeechModality(type="speech", encoder="x")
SOUND = SoundModality(type="sound", encoder="x")
IMAGE = ImageModality(type="image", encoder="x")
VIDEO = VideoModality(type="video", encoder="x")
SERIES = TimeseriesModality(type="timeseries", channels=1)
VECTOR = VectorModality(type="vector", dim=4)


@pytest.mark.parametrize(
    ("kind", "path", "modalities", "expected"),
    [
        ("image", "a.png", {"photo": IMAGE}, "photo"),
        ("audio", "a.wav", {"eyes": IMAGE, "voice": SPEECH}, "voice"),
        ("video", "a.mp4", {"clip": VIDEO, "eyes": IMAGE}, "clip"),
        ("document", "a.csv", {"eyes": IMAGE, "ecg": SERIES}, "ecg"),
        # as in the server, where `image_url` goes to the modality `image`
        ("image", "a.png", {"photo": IMAGE, "image": IMAGE}, "image"),
    ],
)
def test_an_option_finds_the_modality_by_what_it_takes(
    kind: Any, path: str, modalities: dict[str, Any], expected: str
) -> None:
    assert modality_for(kind, Path(path), modalities) == expected


@pytest.mark.parametrize(
    ("kind", "path", "modalities", "said"),
    [
        ("audio", "a.wav", {"voice": SPEECH, "noise": SOUND}, "voice, noise take --audio a.wav"),
        ("document", "a.pdf", {"eyes": IMAGE}, "no modality of this run takes --document a.pdf"),
        ("document", "a.csv", {"ecg": SERIES, "row": VECTOR}, "ecg, row take --document a.csv"),
    ],
)
def test_several_or_no_modality_is_a_sentence_with_the_option_to_use(
    kind: Any, path: str, modalities: dict[str, Any], said: str
) -> None:
    with pytest.raises(MultiTokenError) as error:
        modality_for(kind, Path(path), modalities)
    assert said in str(error.value) and f"--media {next(iter(modalities))}={path}" in str(
        error.value
    )


def test_a_recipe_is_listed_shown_and_copied_with_its_rows_but_never_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = command("recipes", "list")
    assert listed.exit_code == 0 and all(name in listed.stdout for name in ready_recipes())
    shown = command("recipes", "show", "vectors").stdout
    assert command("recipes", "copy", "vectors").exit_code == 0
    assert (tmp_path / "vectors.yaml").read_text("utf-8") == shown
    again = command("recipes", "copy", "vectors")
    assert isinstance(again.exception, MultiTokenError) and "is there already" in str(
        again.exception
    )
    unknown = command("recipes", "show", "vectros")
    assert "did you mean 'vectors'" in str(unknown.exception)


def test_the_table_of_the_page_is_that_of_the_headers() -> None:
    assert all(recipe.header.keys() == {"title", *HEADER_FIELDS} for recipe in READY.values())
    spec = importlib.util.spec_from_file_location("recipes_page", ROOT / "docs" / "recipes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.rendered(page) == page, "the table is old: run `make fix`"


READY = ready_recipes()
