"""Answers of the golden run `taught`: through `generate`, through engines, and over HTTP."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx

from tests.golden.material import VECTORS
from tests.serve.running_server import b64, data_url, npy

NUM_NEW = 12

QUESTIONS: dict[str, list[str]] = {
    "a picture": ["What is this? ", "image:red"],
    "another picture": ["What is this? ", "image:blue"],
    "two pictures": ["Look at ", "image:red", " and ", "image:blue", ", then say which is first."],
    "a vector": ["Which number is ", "vector:two", "?"],
    "two senses": ["Is ", "vector:one", " in the picture ", "image:green", "?"],
    "text alone": ["What is a fruit that you like?"],
    "never learned": ["What is this? ", "vector:two"],
}
"""Pieces of a question: text, or an item as `modality:name`."""


def _item(piece: str) -> tuple[str, str] | None:
    modality, colon, name = piece.partition(":")
    return (modality, name) if colon and modality in ("image", "vector") else None


def row_of(pieces: list[str], material: Path) -> dict[str, Any]:
    """A question as a row with slots."""
    items = [item for item in map(_item, pieces) if item is not None]
    text = "".join(f"<{item[0]}>" if (item := _item(piece)) else piece for piece in pieces)
    row: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if images := [str(material / f"{name}.png") for kind, name in items if kind == "image"]:
        row["images"] = images
    if vectors := [VECTORS[name] for kind, name in items if kind == "vector"]:
        row["vector"] = vectors if len(vectors) > 1 else vectors[0]
    return row


def messages_of(pieces: list[str], material: Path) -> list[dict[str, Any]]:
    """A question as OpenAI's messages, with its media in them."""
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        match _item(piece):
            case None:
                parts.append({"type": "text", "text": piece})
            case "image", name:
                url = data_url((material / f"{name}.png").read_bytes())
                parts.append({"type": "image_url", "image_url": {"url": url}})
            case modality, name:
                data = b64(npy(*VECTORS[name]))
                parts.append({"type": "media", "modality": modality, "data": data})
    return [{"role": "user", "content": parts}]


class _Ids:
    """Streamer of transformers that keeps all ids."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Any) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def loaded(run: Path) -> Any:
    """The model of a run."""
    from multi_token import MultiTokenForConditionalGeneration

    return MultiTokenForConditionalGeneration.from_pretrained(run)


def generated(model: Any, material: Path) -> dict[str, dict[str, Any]]:
    """Question -> ids and text by `model.generate`, each asked alone."""
    found = {}
    for name, pieces in QUESTIONS.items():
        ids = _Ids()
        row = row_of(pieces, material)
        (text,) = model.generate([row], max_new_tokens=NUM_NEW, streamer=ids)
        found[name] = {"ids": ids.ids, "text": text}
    return found


def generated_together(model: Any, material: Path) -> dict[str, str]:
    """Question -> text by `model.generate`, all asked in one padded batch."""
    rows = [row_of(pieces, material) for pieces in QUESTIONS.values()]
    return dict(zip(QUESTIONS, model.generate(rows, max_new_tokens=NUM_NEW), strict=True))


def engine_answers(model: Any, material: Path) -> dict[str, list[int]]:
    """Question -> ids by the local engine, all asked at once."""
    import torch

    from multi_token.generate import drop_last_answer
    from multi_token.serve.engines.base import Prompt, SamplingParams, TokenEvent
    from multi_token.serve.engines.local.engine import LocalEngine

    engine = LocalEngine(model)
    ids: dict[str, list[int]] = {name: [] for name in QUESTIONS}
    ends: dict[str, list[Any]] = {name: [] for name in QUESTIONS}
    all_ended = {name: threading.Event() for name in QUESTIONS}

    def listener(name: str) -> Any:
        def emit(event: Any) -> None:
            if isinstance(event, TokenEvent):
                ids[name].append(event.id)
            else:
                ends[name].append(event)
                all_ended[name].set()

        return emit

    engine.start()
    try:
        for name, pieces in QUESTIONS.items():
            conversation = drop_last_answer(row_of(pieces, material), model)
            sample = model.require_processor()(conversation, prompt_only=True)
            tokens = []
            for place, item in zip(sample.media_spans, sample.media, strict=True):
                inputs = model.modalities[place.modality].collate([item])
                with torch.no_grad():
                    tokens.append(
                        model.projectors[place.modality](model.encode(place.modality, inputs))
                    )
            keys = tuple(f"{name} {number}" for number in range(len(tokens)))
            prompt = Prompt(sample.input_ids, tuple(sample.media_spans), tuple(tokens), keys)
            engine.submit(name, prompt, SamplingParams(NUM_NEW), listener(name))
        for name, ended in all_ended.items():
            assert ended.wait(60), f"no end of the answer to {name!r}"
            assert ends[name][0].reason in ("stop", "length"), ends[name]
    finally:
        engine.stop()
    return ids


def served_answers(url: str, material: Path) -> dict[str, dict[str, Any]]:
    """Question -> text, lengths and margin by a server at an address."""
    answers = {}
    for name, pieces in QUESTIONS.items():
        body = {
            "messages": messages_of(pieces, material),
            "max_tokens": NUM_NEW,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 2,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        answers[name] = _summary(answer.json())
    return answers


def _summary(answer: dict[str, Any]) -> dict[str, Any]:
    """Return text and lengths of an answer, and the smallest margin of a chosen token."""
    (choice,) = answer["choices"]
    steps = choice["logprobs"]["content"]
    margins = []
    for step in steps:
        first, second = (top["logprob"] for top in step["top_logprobs"])
        margins.append(first - second)
    return {
        "text": choice["message"]["content"],
        "finish_reason": choice["finish_reason"],
        "num_prompt": answer["usage"]["prompt_tokens"],
        "num_new": answer["usage"]["completion_tokens"],
        "margin": min(margins),
    }
