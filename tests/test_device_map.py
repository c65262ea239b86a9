"""A language model over several devices (`device_map`) gives the answers of one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from multi_token.cli import app
from multi_token.errors import LanguageModelError, MultiTokenError
from multi_token.generate import single_question
from multi_token.language_model.lora import adapter_parameters, place_adapter
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import Trainable
from multi_token.serve.engines.base import Prompt, SamplingParams
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.train.batch_plan import PaddedBatches
from multi_token.train.run import train
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.types import Media
from tests.serve.engine_parts import Client

Fields = Callable[..., dict[str, Any]]
STAGES = {
    "adapter": {"projectors": 1e-2, "adapter": 1e-2},
    "full": {"projectors": 1e-2, "language_model": 1e-3},
}


@pytest.fixture(scope="module")
def runs(recipe_fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained part -> its run, of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    for name, learn in STAGES.items():
        args = {"max_steps": 2, "report_to": [], "use_cpu": True}
        fields = recipe_fields(folder / name, stages=[{"name": name, "learn": learn}], args=args)
        train(Recipe.model_validate(fields), console=Console(quiet=True))
    return {name: folder / name for name in STAGES}


def offloaded(run: Path) -> dict[str, str]:
    """A map that leaves the last layer and the head on disk, beside all others on the CPU."""
    model = MultiTokenForConditionalGeneration.from_pretrained(run)
    child = model.language_model
    child = child.get_base_model() if hasattr(child, "peft_config") else child
    last = child.config.num_hidden_layers - 1
    found = {f"model.layers.{n}": "disk" if n == last else "cpu" for n in range(last + 1)}
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    return {**found, **rest, "model.rotary_emb": "cpu"}


@pytest.mark.parametrize("name", list(STAGES))
def test_answers_and_served_answers_are_those_of_one_device(
    runs: dict[str, Path], data: Path, name: str
) -> None:
    question = [single_question("What is this?", [Media("image", str(data / "red.png"))])]
    found = {}
    for kind, device_map in (("one", None), ("map", offloaded(runs[name]))):
        model = MultiTokenForConditionalGeneration.from_pretrained(
            runs[name], device_map=device_map
        )
        sample = model.require_processor()(question[0], prompt_only=True)
        with torch.no_grad():
            embeds = model._media_embeds("image", media_of(model, sample))
        prompt = Prompt(sample.input_ids, tuple(sample.media_spans), (embeds,), ("red",))
        engine, clients = LocalEngine(model, max_batch=2), [Client(), Client()]
        engine.start()
        try:
            for number, client in enumerate(clients):
                params = SamplingParams(6, ignore_eos=True)
                engine.submit(str(number), prompt, params, client)
            served = [client.ids for client in clients]
        finally:
            engine.stop()
        is_offloaded = any(p.is_meta for p in model.language_model.parameters())
        assert is_offloaded == (kind == "map")
        found[kind] = (model.generate(question, max_new_tokens=6), served, model.capabilities)
    assert found["one"] == found["map"]


def media_of(model: Any, sample: Any) -> Any:
    from multi_token.collate import Collator

    return Collator(model.modalities, model.processor.chat.filler_id)([sample])["media"]["image"]


def test_the_command_line_takes_a_file_of_devices_and_refuses_what_is_none(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run, file = runs["adapter"], tmp_path / "devices.json"
    ask = ["ask", str(run), "What is this?", "--image", str(data / "red.png")]
    ask += ["--max-new-tokens", "4", "--device"]
    file.write_text(json.dumps(offloaded(run)))
    answers = [CliRunner().invoke(app, [*ask, device]) for device in ("cpu", str(file), "auto")]
    assert [answer.exit_code for answer in answers] == [0, 0, 0]
    assert answers[0].stdout == answers[1].stdout == answers[2].stdout
    for text, sentence in (("[1]", "expected {module: device}"), ("{", "cannot be read as JSON")):
        file.write_text(text)
        result = CliRunner().invoke(app, [*ask, str(file)])
        assert isinstance(result.exception, MultiTokenError)
        assert sentence in str(result.exception)


def test_input_embeddings_off_the_devices_and_a_second_device_are_refused(
    runs: dict[str, Path],
) -> None:
    load = MultiTokenForConditionalGeneration.from_pretrained
    devices = offloaded(runs["adapter"])
    with pytest.raises(LanguageModelError, match="input embeddings"):
        load(runs["adapter"], device_map={**devices, "model.embed_tokens": "disk"})
    with pytest.raises(MultiTokenError, match="exclude each other"):
        load(runs["adapter"], device="cpu", device_map=devices)
    with pytest.raises(LanguageModelError, match="model.norm"):
        load(runs["adapter"], device_map={"model.embed_tokens": "cpu"})


def test_training_over_several_devices_is_refused(runs: dict[str, Path]) -> None:
    model = MultiTokenForConditionalGeneration.from_pretrained(
        runs["adapter"], device_map=offloaded(runs["adapter"])
    )
    with pytest.raises(LanguageModelError, match=r"cannot be trained.*train\.fsdp"):
        MultiTokenTrainer(
            model, learn=Trainable.model_validate({"adapter": 1e-3}), batches=PaddedBatches([1])
        )


def test_lora_lies_where_the_weights_of_its_layer_come_to(runs: dict[str, Path]) -> None:
    model = MultiTokenForConditionalGeneration.from_pretrained(
        runs["adapter"], device_map=offloaded(runs["adapter"])
    )
    layers = [m for m in model.language_model.modules() if hasattr(m, "adapter_layer_names")]
    moved, kept = [m for m in layers if m.base_layer.weight.is_meta][:2]
    assert not any(p.is_meta for p in adapter_parameters(model.language_model))
    moved.base_layer._hf_hook.execution_device = "meta"
    place_adapter(model.language_model)
    assert all(p.is_meta for p in moved.lora_A.parameters())
    assert not any(p.is_meta for p in kept.lora_A.parameters())
