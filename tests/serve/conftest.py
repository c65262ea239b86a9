"""A tiny run with images and vectors, and a real server of it on a free port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.serve.running_server import KEY, RunningServer, running


@pytest.fixture(scope="session")
def served_run(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run with the modalities `image` (3 tokens) and `vector` (2 per vector)."""
    import torch

    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe

    folder = tmp_path_factory.mktemp("served") / "tiny-run"
    fields = recipe_fields(folder)
    fields["model"]["modalities"]["vector"] = {
        "type": "vector",
        "dim": 5,
        "projector": {"type": "expand", "factor": 2},
    }
    torch.manual_seed(0)
    MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(fields).model
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served_model(served_run: Path) -> Any:
    """The run's model; do not change it."""
    from multi_token.model import MultiTokenForConditionalGeneration

    return MultiTokenForConditionalGeneration.from_pretrained(served_run)


@pytest.fixture(scope="session")
def running_server(served_model: Any) -> Iterator[RunningServer]:
    """One server for all tests that do not change it; it needs `KEY`."""
    with running(served_model, api_keys=(KEY, "sk-test-key-2")) as server:
        yield server


@pytest.fixture(scope="session")
def server(running_server: RunningServer) -> str:
    """Base URL of that server."""
    return running_server.url


@pytest.fixture(scope="session")
def http(server: str) -> Iterator[httpx.Client]:
    """A client of that server, with its key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def openai_client(server: str) -> Iterator[Any]:
    """The `openai` package's own client."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def all_modalities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small modality of every built-in type, and of documents also one whose strings are texts;
    those of media lowered to small limits."""
    from multi_token.modalities.base import Modality
    from multi_token.registry import build
    from multi_token.serve.media.limits import MediaLimits
    from multi_token.testing.encoders import (
        tiny_clap,
        tiny_image_encoder,
        tiny_joint_clip,
        tiny_protein_encoder,
        tiny_sentence_encoder,
        tiny_whisper,
    )

    folder = tmp_path_factory.mktemp("all_modalities")
    clip = tiny_image_encoder(folder / "clip")
    sentences = tiny_sentence_encoder(folder / "sentences")
    fields: dict[str, dict[str, Any]] = {
        "image": {"encoder": clip, "page_dpi": 72},
        "speech": {"encoder": tiny_whisper(folder / "whisper")},
        "sound": {"encoder": tiny_clap(folder / "clap")},
        "video": {"encoder": clip, "fps": 4.0, "max_seconds": 60.0},
        "document": {"encoder": sentences, "chunk_tokens": 32},
        "text": {"type": "document", "encoder": sentences, "strings": "text"},
        "joint": {"encoder": tiny_joint_clip(folder / "joint")},
        "timeseries": {"channels": 2},
        "vector": {"dim": 4},
        "sequence": {"encoder": tiny_protein_encoder(folder / "proteins")},
        "volume": {"encoder": clip, "num_slices": 3},
    }
    limits = MediaLimits(
        max_bytes=8 * 1024 * 1024,
        max_pixels=1_000_000,
        max_frames=16,
        max_video_pixels=160_000,
        max_seconds=3.0,
        max_pages=5,
        max_characters=5_000,
        max_numbers=10_000,
    )
    return {
        name: build("modality", {"type": name, **own}, Modality).with_limits(limits.model_dump())
        for name, own in fields.items()
    }


@pytest.fixture(scope="session")
def llama(families: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama with a vector modality, for tests of engines; do not change it."""
    from tests.serve.engine_parts import composed

    return composed(tmp_path_factory.mktemp("llama"), families, "Llama")


@pytest.fixture
def start_local() -> Iterator[Callable[..., Any]]:
    """A function that builds and starts local engines; all of them are stopped at the end."""
    from multi_token.serve.engines.local.engine import LocalEngine
    from tests.serve.engine_parts import engines

    with engines(LocalEngine) as build:
        yield build
