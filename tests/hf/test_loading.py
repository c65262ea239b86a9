"""Load options in Python and on the command line: precision, attention, quantization, the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import multi_token.hf  # noqa: F401 - registers the Auto classes
from multi_token.cli import app
from multi_token.errors import MultiTokenError
from multi_token.hub import HubOptions, hub_arguments, hub_options
from multi_token.language_model.lora import attach_adapter
from multi_token.language_model.quantization import quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec

Fields = Callable[..., dict[str, Any]]
QUESTION = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def run(recipe_fields: Fields, tmp_path_factory: Any) -> str:
    """A run in bfloat16 with an adapter."""
    folder = tmp_path_factory.mktemp("run")
    fields = recipe_fields(folder)["model"] | {"dtype": "bfloat16"}
    spec = Recipe.model_validate({**recipe_fields(folder), "model": fields}).model
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(spec)
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    model.save_pretrained(folder)
    return str(folder)


def auto(run: str, **options: Any) -> Any:
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM.from_pretrained(run, **options)


def dtype_of(model: Any) -> torch.dtype:
    return model.language_model.get_input_embeddings().weight.dtype


def test_dtype_and_attention_are_those_of_the_run_or_of_the_caller(run: str) -> None:
    assert dtype_of(auto(run)) == dtype_of(auto(run, dtype="auto")) == torch.bfloat16
    assert dtype_of(auto(run, dtype=torch.float32)) == torch.float32
    assert dtype_of(auto(run, dtype="float16")) == torch.float16
    eager = auto(run, attn_implementation="eager", dtype="float32")
    assert eager.language_model.config._attn_implementation == "eager"
    assert auto(run).language_model.config._attn_implementation == "sdpa"
    base = MultiTokenForConditionalGeneration.from_pretrained(run, dtype=torch.float32)
    row = [{"messages": QUESTION}]
    assert eager.generate(row, max_new_tokens=4) == base.generate(row, max_new_tokens=4)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes about this CPU
def test_a_run_in_bfloat16_opens_in_4_bits(run: str) -> None:
    from transformers import BitsAndBytesConfig

    theirs = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    opened = [
        auto(run, quantization_config=theirs, device_map="auto"),
        MultiTokenForConditionalGeneration.from_pretrained(run, quantization_config="4bit"),
    ]
    for model in opened:
        assert quantized_parameters(model.language_model)
        assert hasattr(model.language_model, "peft_config"), "the adapter stays"
        assert model.generate([{"messages": QUESTION}], max_new_tokens=2)


def test_an_option_that_a_run_does_not_have_is_refused(run: str) -> None:
    from transformers import AutoProcessor

    with pytest.raises(MultiTokenError, match="does not know max_memory; it has attn_impl"):
        auto(run, max_memory={0: "1GB"})
    with pytest.raises(MultiTokenError, match="does not know min_pixels"):
        AutoProcessor.from_pretrained(run, min_pixels=5)


def test_options_of_the_hub_hold_for_all_parts_of_a_run(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the hub whose parts are on the hub too, in a cache folder of the caller."""
    from transformers import AutoProcessor

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = json.loads((Path(run) / "config.json").read_text())
    parts = {"ada/model": config["model"]["language_model"]}
    parts["ada/eye"] = config["model"]["modalities"]["image"]["encoder"]
    cache = tmp_path / "cache"
    for name, folder in {**parts, "ada/run": run}.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    config |= {"adapter": False}
    config["model"]["language_model"] = "ada/model"
    config["model"]["modalities"]["image"]["encoder"] = "ada/eye"
    snapshot = cache / "models--ada--run" / "snapshots" / ("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"cache_dir": str(cache), "local_files_only": True}
    with pytest.raises(MultiTokenError, match="no folder ada/run here"):
        MultiTokenForConditionalGeneration.from_pretrained("ada/run")
    model = auto("ada/run", **options)
    assert model.config.model["language_model"] == "ada/model"
    processor = AutoProcessor.from_pretrained("ada/run", **options)
    from PIL import Image

    part = {"type": "image", "image": Image.new("RGB", (32, 32))}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [part]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert model.generate(**inputs, max_new_tokens=1).shape[0] == 1


def test_a_download_within_a_block_has_its_options() -> None:
    assert hub_arguments() == hub_arguments(of_weights=True) == {}
    with hub_options(HubOptions(token="hf_x", local_files_only=True)):
        found = {"token": "hf_x", "local_files_only": True}
        assert hub_arguments() == found
        # transformers looks for an adapter of a model with options of its own
        assert hub_arguments(of_weights=True) == {**found, "adapter_kwargs": found}
    assert hub_arguments() == {}


def test_commands_take_the_load_options(run: str, tmp_path: Path) -> None:
    plain = CliRunner().invoke(app, ["ask", run, "What is it?", "--max-new-tokens", "3"])
    options = ["--dtype", "float32", "--attn-implementation", "eager", "--local-files-only"]
    found = CliRunner().invoke(app, ["ask", run, "What is it?", "--max-new-tokens", "3", *options])
    assert plain.exit_code == found.exit_code == 0, found.output
    model = MultiTokenForConditionalGeneration.from_pretrained(
        run, dtype="float32", attn_implementation="eager"
    )
    expected = model.generate([{"messages": QUESTION}], max_new_tokens=3)[0]
    assert found.stdout.strip() == expected
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": QUESTION}) + "\n")
    out = str(tmp_path / "out.jsonl")
    predict = ["predict", run, str(rows), "--out", out, "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, [*predict, "--dtype", "float32"]).exit_code == 0
    other = CliRunner().invoke(app, [*predict, "--dtype", "bfloat16"])
    assert isinstance(other.exception, MultiTokenError), "answers of another precision are others"
