"""Tiny models with a modality, prompts for them, and clients of an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from multi_token.generate import single_question
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec
from multi_token.serve.engines.base import (
    EngineEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.engines.engine import Engine
from multi_token.types import Media, Sample

VECTORS = [[1.0, -1.0, 0.5, 2.0, 0.0], [-2.0, 0.3, 1.5, -0.7, 1.0], [0.1, 2.2, -1.9, 0.4, -1.2]]


def composed(folder: Path, families: ModuleType, family: str, **changes: Any) -> Any:
    """A family's tiny model with a vector modality whose tokens weigh as much as text."""
    untied = {"tie_word_embeddings": False} if family == "Gemma3" else {}
    families.save_tiny_model(family, folder, **untied, **changes)  # tied, it repeats one token
    vector = {"type": "vector", "dim": 5, "projector": {"type": "expand", "factor": 3}}
    fields = {"language_model": str(folder), "modalities": {"vector": vector}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultiTokenForConditionalGeneration.from_spec(ModelSpec.model_validate(fields))
        for parameter in model.projectors.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@contextmanager
def engines(kind: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function that builds and starts engines of a kind; all of them are stopped at the end."""
    made: list[Any] = []

    def build(model: Any, **options: Any) -> Any:
        made.append(kind(model, **options))
        made[-1].start()
        return made[-1]

    try:
        yield build
    finally:
        for engine in made:
            engine.stop()


def sample_of(model: Any, text: str, *vectors: Sequence[float]) -> Sample:
    conversation = single_question(text, [Media("vector", list(vector)) for vector in vectors])
    return model.require_processor()(conversation, prompt_only=True)


@torch.no_grad()
def prompt_of(model: Any, sample: Sample) -> Prompt:
    tokens, keys = [], []
    for item in sample.media:
        inputs = model.modalities["vector"].collate([item])
        tokens.append(model.projectors["vector"](model.encode("vector", inputs)))
        keys.append(str(item.inputs["values"].tolist()))
    return Prompt(sample.input_ids, tuple(sample.media_spans), tuple(tokens), tuple(keys))


class Client:
    """Collects the events of one request; `after`: called with each event."""

    def __init__(self, after: Callable[[EngineEvent], None] | None = None) -> None:
        self.events: list[EngineEvent] = []
        self.has_ended = threading.Event()
        self._after = after

    def __call__(self, event: EngineEvent) -> None:
        assert not self.has_ended.is_set(), f"{event} after {self.events[-1]}"
        self.events.append(event)
        if self._after is not None:
            self._after(event)
        if not isinstance(event, TokenEvent):
            self.has_ended.set()

    def wait(self) -> EngineEvent:
        assert self.has_ended.wait(30), f"no end after {self.events}"
        return self.events[-1]

    @property
    def ids(self) -> list[int]:
        end = self.wait()
        assert isinstance(end, FinishEvent), end
        return [event.id for event in self.events if isinstance(event, TokenEvent)]


def at_token(number: int, act: Callable[[], object]) -> Client:
    """A client that calls `act` at its token of this number, counted from 1."""

    def look(event: EngineEvent) -> None:
        if isinstance(event, TokenEvent) and len(client.events) == number:
            act()

    client = Client(look)
    return client


def together(
    engine: Engine,
    prompts: Sequence[Prompt],
    options: Sequence[SamplingParams],
    clients: Sequence[Client],
    *,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Submit all prompts and call `meanwhile` while another prompt holds the engine."""
    is_held, all_are_there = threading.Event(), threading.Event()

    def hold(_: EngineEvent) -> None:
        is_held.set()
        all_are_there.wait(30)

    engine.submit("gate", prompts[0], SamplingParams(1), Client(hold))
    assert is_held.wait(30)
    for number, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
        engine.submit(f"r{number}", prompt, options[number], client)
    meanwhile()
    all_are_there.set()
