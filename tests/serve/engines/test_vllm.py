"""The vLLM engine over real HTTP: a gateway, and stand-ins of vLLM with tiny models."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch

from multi_token.convert.export import export
from multi_token.errors import CheckpointError, LanguageModelError
from multi_token.generate import generate_ids
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.serve.engines.base import FinishEvent, SamplingParams
from multi_token.serve.engines.vllm.engine import PromptEmbedder
from multi_token.serve.engines.vllm.golden import read_golden
from multi_token.serve.settings import ServeSettings
from tests.serve.asking import BLUE, IMAGE, QUESTION, VECTOR, asked, content_of, post
from tests.serve.engine_parts import VECTORS, Client, composed, prompt_of, sample_of
from tests.serve.running_server import data_url, running
from tests.serve.vllm_parts import started
from tests.serve.vllm_stand_in import StandIn

pytestmark = pytest.mark.slow
NUM_NEW = 8


@pytest.fixture(scope="module")
def model(families: ModuleType, tmp_path_factory: Any) -> Any:
    return composed(tmp_path_factory.mktemp("lm"), families, "Llama")


@pytest.fixture(scope="module")
def exported(recipe_fields: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three modalities, as `multi-token export --to language-model` writes it."""
    folder = tmp_path_factory.mktemp("exported")
    fields = recipe_fields(folder / "run")
    fields["model"]["modalities"] |= {
        "vector": {"type": "vector", "dim": 5, "projector": {"type": "expand", "factor": 2}},
        "sensor": {"type": "timeseries", "channels": 2},
    }
    torch.manual_seed(0)
    MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(fields).model
    ).save_pretrained(folder / "run")
    export(folder / "run", folder / "out", to="language-model")
    return folder / "out"


@pytest.fixture(scope="module")
def complete(exported: Path) -> Any:
    """The exported run with its complete language model."""
    from multi_token.model import MultiTokenForConditionalGeneration

    return MultiTokenForConditionalGeneration.from_pretrained(exported)


def only_embeddings(exported: Path) -> Any:
    from multi_token.model import MultiTokenForConditionalGeneration

    return MultiTokenForConditionalGeneration.from_pretrained(exported, embeddings_only=True)


def settings_of(exported: Path, *urls: str, **fields: Any) -> dict[str, Any]:
    return {"engine_urls": urls, "run_folder": exported, **fields}


SENSOR = {"type": "media", "modality": "sensor", "data": [[float(i % 7), 1.0] for i in range(64)]}
BLUE_IMAGE = {"type": "image_url", "image_url": {"url": data_url(BLUE)}}
CASES: dict[str, list[dict[str, Any]]] = {
    "text": asked("What is a cat?"),
    "image": asked(IMAGE, QUESTION),
    "another image": asked(BLUE_IMAGE, QUESTION),
    "vector": asked(VECTOR, QUESTION),
    "sensor": asked(SENSOR, QUESTION),
    "all modalities": asked(IMAGE, VECTOR, SENSOR, BLUE_IMAGE, QUESTION),
    "several turns": [
        {"role": "system", "content": "You answer briefly."},
        *asked(VECTOR, QUESTION),
        {"role": "assistant", "content": "A vector."},
        *asked({"type": "text", "text": "<image> and <|im_end|>, "}, IMAGE),
    ],
}


def test_a_gateway_without_layers_gives_the_answers_of_the_complete_model(
    exported: Path, complete: Any
) -> None:
    gateway = only_embeddings(exported)
    num_held = sum(p.numel() for p in gateway.language_model.parameters())
    assert num_held == complete.language_model.get_input_embeddings().weight.numel()
    stand_in = StandIn(complete.language_model)
    fields = {"temperature": 0, "logprobs": True, "top_logprobs": 3}
    with (
        running(gateway, **settings_of(exported, stand_in.url)) as far,
        running(complete) as near,
        httpx.Client(base_url=far.url, timeout=30) as here,
        httpx.Client(base_url=near.url, timeout=30) as there,
    ):
        answers = []
        for case, messages in CASES.items():
            found, expected = (
                post(http, messages, **fields).json()["choices"][0] for http in (here, there)
            )
            assert found["message"] == expected["message"], case
            for token, other in zip(
                found["logprobs"]["content"], expected["logprobs"]["content"], strict=True
            ):
                assert token["bytes"] == other["bytes"]
                assert token["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
                assert len(token["top_logprobs"]) == 3
            answers.append(found["message"]["content"])
        assert len(set(answers)) == len(answers), "the media must matter"
        text = httpx.get(f"{far.url}/metrics").text
        assert "multi_token_engines_alive 1.0" in text
    stand_in.die()
    kinds = ["prompt" if body.get("prompt") else "prompt_embeds" for body in stand_in.bodies]
    assert kinds == ["prompt"] + ["prompt_embeds"] * (len(CASES) - 1)
    embeds = embeds_of(stand_in.bodies[1])
    assert (
        embeds.dtype == torch.float32
        and embeds.shape[1] == stand_in.language_model.config.hidden_size
    )


def embeds_of(body: dict[str, Any]) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)


def test_each_tenant_has_its_own_salt(exported: Path, complete: Any) -> None:
    stand_in = StandIn(complete.language_model)
    keys = ("sk-test-key-1", "sk-test-key-2")
    with running(complete, **settings_of(exported, stand_in.url, api_keys=keys)) as server:
        for key in (*keys, keys[0]):
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=server.url, headers=headers, timeout=30) as http:
                content_of(post(http, CASES["text"]))
    stand_in.die()
    salts = [body["cache_salt"] for body in stand_in.bodies]
    assert salts[0] == salts[2] != salts[1]
    assert not any(key in salt for key in keys for salt in salts)


def test_a_client_that_disconnects_ends_the_request_in_the_replica(model: Any) -> None:
    stand_in = StandIn(model.language_model)
    prompt = prompt_of(model, sample_of(model, "What is this?", VECTORS[0]))
    with started(model, stand_in) as engine:
        with stand_in.held():
            waiting = Client()
            engine.submit("waits", prompt, SamplingParams(5), waiting)
            assert stand_in.wait_until(lambda: stand_in.num_waiting == 1)
            engine.cancel("waits")
            assert waiting.wait() == FinishEvent("cancelled")
            assert stand_in.wait_until(lambda: stand_in.num_waiting == 0)
        leaver = Client(lambda _: engine.cancel("leaves") if len(leaver.events) == 3 else None)
        engine.submit("leaves", prompt, SamplingParams(200, ignore_eos=True), leaver)
        assert leaver.wait() == FinishEvent("cancelled") and len(leaver.events) == 4
        assert stand_in.wait_until(lambda: stand_in.num_running == 0)
        assert (engine.num_running, engine.num_waiting) == (0, 0)


@pytest.mark.filterwarnings("ignore")  # of families' own code
def test_families_that_scale_embeddings_are_right_wherever_vllm_scales_them(
    families: ModuleType, tmp_path: Path
) -> None:
    """Within its look-up, so prompts must be scaled already, or after it, so they must not be."""
    for family in ("Gemma3", "Gemma2", "Granite", "Falcon-H1"):
        model = composed(tmp_path / family, families, family)
        scale = PromptEmbedder.of(model).scale
        sample = sample_of(model, "What is this?", VECTORS[0])
        alone = generate_ids(model, [sample], max_new_tokens=NUM_NEW)[0].tolist()
        for multiplies in {1.0, scale}:
            outside = model.capabilities.embedding_scale
            stand_in = StandIn(model.language_model, multiplies=multiplies, multiplies_ids=outside)
            with started(model, stand_in) as engine:
                client = Client()
                engine.submit("r", prompt_of(model, sample), SamplingParams(NUM_NEW), client)
                assert client.ids == alone, (family, multiplies)


def test_a_wrong_replica_is_refused_with_the_reason(model: Any, families: ModuleType) -> None:
    other = families.tiny_model("Llama", seed=1)
    wide = families.tiny_model("Llama", hidden_size=64)
    right = model.language_model
    cases: list[tuple[StandIn, str]] = [
        (StandIn(other), r"the golden request by ids, 'stand-in' .* it has other weights"),
        (StandIn(wide), "it has other weights"),
        (StandIn(right, takes_embeds=False), "by embeddings.*--enable-prompt-embeds"),
        (StandIn(right, multiplies=2.0), "by embeddings, .* other tokens .* right ones by ids"),
        (StandIn(right, key="sk-engine"), "HTTP 401: Unauthorized"),
    ]
    for stand_in, words in cases:
        with pytest.raises(LanguageModelError, match=words) as refused, started(model, stand_in):
            pass
        assert str(refused.value).startswith(f"no engine can be used: {stand_in.url} ")
        assert "\n" not in str(refused.value)
    absent = StandIn(right, start=False)
    absent.port = 9
    with pytest.raises(LanguageModelError, match="does not answer /health"), started(model, absent):
        pass
    locked = StandIn(right, key="sk-engine")
    with started(model, locked, key="sk-engine") as engine:
        assert engine.is_alive


def test_log_probabilities_reveal_a_model_with_the_same_first_ids() -> None:
    from multi_token.serve.engines.base import TokenEvent
    from multi_token.serve.engines.vllm.golden import GoldenRequest

    golden = GoldenRequest((1, 2), (5, 6, 7), (-1.0, -2.0, -0.5))
    same = [TokenEvent(5, -1.01), TokenEvent(6, -2.0), TokenEvent(7, -0.5)]
    assert golden.mismatch(same, 0.02) is None
    assert "log-probability" in str(golden.mismatch([*same[:2], TokenEvent(7, -0.9)], 0.02))
    # a tie within rounding: the other id was chosen, and later tokens are not compared
    tied = [same[0], TokenEvent(8, -1.99, ((8, -1.99), (6, -2.0))), TokenEvent(9, -4.0)]
    assert golden.mismatch(tied, 0.02) is None
    parted = [same[0], replace(tied[1], top=((8, -1.99), (6, -2.5))), tied[2]]
    assert "expected [5, 6, 7]" in str(golden.mismatch(parted, 0.02))
    assert "got 2 tokens" in str(golden.mismatch(same[:2], 0.02))


def test_a_folder_that_is_no_export_is_refused_with_the_command(
    exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="multi-token export RUN --to language-model --out"):
        read_golden(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1, "golden": {}, "language_model": {}}')
    with pytest.raises(CheckpointError, match="write it again with `multi-token export"):
        read_golden(tmp_path)
    golden = read_golden(exported)
    assert len(golden.greedy_ids) == len(golden.logprobs) == 8 and golden.embedding_scale == 1.0


def test_a_model_that_looks_ids_up_in_its_layers_is_refused(
    families: ModuleType, tmp_path: Path
) -> None:
    model = composed(tmp_path, families, "Gemma3n")
    absent = StandIn(model.language_model, start=False)
    with (
        pytest.raises(LanguageModelError, match="looks ids up in its layers.*without --engine-url"),
        started(model, absent),
    ):
        pass


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engine_urls": ("ftp://a:1",)}, "should be http://HOST:PORT"),
        ({"engine_urls": ("a:8000",)}, "should be http://HOST:PORT"),
        ({"engine_urls": ("http://a:1/v1",)}, "without a path"),
        ({"engine_urls": ("http://me:secret@a:1",)}, "without a path, user or password"),
        ({"engine_urls": ("http://a:1", "http://a:1/")}, "names an engine twice"),
        ({"engine_urls": ("http://a:1",), "engine_key": "a\r\nb"}, "engine_key"),
    ],
)
def test_addresses_of_engines_are_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        ServeSettings(**fields)
    assert "secret" not in str(refused.value).partition("[type=")[0]
    good = ServeSettings(engine_urls=("http://a:1",), engine_key="sk-hidden")
    assert "sk-hidden" not in repr(good)


@pytest.mark.filterwarnings("ignore")  # of families' own code
def test_embeddings_of_every_family_are_right_with_or_without_layers(
    families: ModuleType, tmp_path: Path
) -> None:
    from multi_token.language_model.embeddings_only import _load_without_layers, load_embeddings
    from multi_token.language_model.loading import load_language_model

    complete = set()
    for family in families.FAMILIES:
        name = str(tmp_path / family)
        families.save_tiny_model(family, tmp_path / family)
        expected = load_language_model(name)
        found = load_embeddings(name)
        ids = torch.arange(100)
        rows = found.get_input_embeddings()(ids)
        assert torch.equal(rows, expected.get_input_embeddings()(ids)), family
        assert found.config.to_dict() == expected.config.to_dict(), family
        assert found.generation_config.eos_token_id == expected.generation_config.eos_token_id
        assert sum(p.numel() for p in found.parameters()) < 0.9 * expected.num_parameters()
        complete |= {family} if _load_without_layers(name, None, "auto") is None else set()
    assert complete == {"Mamba2", "Falcon-H1", "Gemma3n", "Gemma4", "xLSTM"}
