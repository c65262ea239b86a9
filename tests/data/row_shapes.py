# ruff: noqa: E501 - rows as their data sets have them
"""Rows of real data sets and tools, with their exact columns; texts and bytes are short stand-ins.

Images and texts are here, other columns in row_shapes_columns.py.

Expected: the turns that the model gets, with `<modality source>` for each item.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from multi_token.modalities.base import Modality
from multi_token.modalities.document import DocumentModality
from multi_token.modalities.image import ImageModality
from multi_token.modalities.sound import SoundModality
from multi_token.modalities.speech import SpeechModality
from multi_token.modalities.timeseries import TimeseriesModality
from multi_token.modalities.vector import VectorModality
from multi_token.modalities.video import VideoModality
from multi_token.types import Conversation, Media, Part

IMAGE = {"bytes": b"\x89PNG", "path": None}
AUDIO = {"bytes": b"RIFF", "path": "a.wav"}
TYPES: dict[str, Modality] = {
    "image": ImageModality(encoder="x"),
    "speech": SpeechModality(encoder="x"),
    "sound": SoundModality(encoder="x"),
    "audio": SoundModality(encoder="x"),
    "video": VideoModality(encoder="x"),
    "ecg": TimeseriesModality(channels=12),
    "vector": VectorModality(dim=2),
    "document": DocumentModality(encoder="x"),
}


@dataclass(frozen=True)
class Shape:
    """A row of a data set, the recipe's modalities (`name` or `name=type`), and what it becomes."""

    title: str
    names: list[str]
    row: dict[str, Any]
    expected: str
    source: dict[str, Any] = field(default_factory=dict)
    """Keys that the source needs beside `rows`."""
    format: str | None = None
    """Format that the columns choose; None: read as it is, or by `turns`."""

    @property
    def modalities(self) -> dict[str, Modality]:
        """The recipe's modalities."""
        pairs = (name.partition("=") for name in self.names)
        return {name: TYPES[type or name] for name, _, type in pairs}


def shown(conversation: Conversation) -> str:
    """Return a conversation in one line."""

    def part(p: Part) -> str:
        return f"<{p.modality} {p.source!r}>" if isinstance(p, Media) else p.text

    turns = [f"{m.role}: {''.join(map(part, m.parts))}" for m in conversation.messages]
    if conversation.rejected is not None:
        turns.append("rejected: " + "".join(map(part, conversation.rejected.messages[-1].parts)))
    return " | ".join(turns)


CONVERSATIONS = [
    Shape(
        "LLaVA-Pretrain json",
        ["image"],
        {
            "id": "004539375",
            "image": "00453/004539375.jpg",
            "conversations": [
                {
                    "from": "human",
                    "value": "Render a clear and concise summary of the photo.\n<image>",
                },
                {
                    "from": "gpt",
                    "value": "select luxury furniture 3 - inch gel memory foam mattress topper",
                },
            ],
        },
        "user: Render a clear and concise summary of the photo.\n<image '00453/004539375.jpg'> | assistant: select luxury furniture 3 - inch gel memory foam mattress topper",
    ),
    Shape(
        "LLaVA mix665k json (image)",
        ["image"],
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": [
                {
                    "from": "human",
                    "value": "<image>\nWhat are the colors of the bus in the image?\nAnswer the question using a single word or phrase.",
                },
                {"from": "gpt", "value": "White and red"},
            ],
        },
        "user: <image 'coco/train2017/000000033471.jpg'>\nWhat are the colors of the bus in the image?\nAnswer the question using a single word or phrase. | assistant: White and red",
    ),
    Shape(
        "LLaVA mix665k json (text only)",
        ["image"],
        {
            "id": "wgByO4Y_0",
            "model": "",
            "conversations": [
                {"from": "human", "value": "How can I implement a queue in Python?"},
                {"from": "gpt", "value": "Use collections.deque."},
            ],
        },
        "user: How can I implement a queue in Python? | assistant: Use collections.deque.",
    ),
    Shape(
        "LLaVA-NeXT-Data / OneVision-Data parquet",
        ["image"],
        {
            "id": "x",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is shown?"},
                {"from": "gpt", "value": "A cat."},
            ],
            "data_source": "coco",
            "image": IMAGE,
        },
        "user: <image b'\\x89PNG'>\nWhat is shown? | assistant: A cat.",
    ),
    Shape(
        "OneVision-Data parquet, text only (image null)",
        ["image"],
        {
            "id": "x",
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
            "data_source": "magpie",
            "image": None,
        },
        "user: hi | assistant: hello",
    ),
    Shape(
        "the_cauldron / Docmatix / FineVision",
        ["image"],
        {
            "images": [IMAGE],
            "texts": [{"user": "What is it?", "assistant": "A cat.", "source": "vqav2"}],
        },
        "user: <image b'\\x89PNG'>\nWhat is it? | assistant: A cat.",
        format="pairs",
    ),
    Shape(
        "llava-instruct-mix-vsft (TRL, parts)",
        ["image"],
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"index": None, "text": "What is this?", "type": "text"},
                        {"index": 0, "text": None, "type": "image"},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"index": None, "text": "A cat.", "type": "text"}],
                },
            ],
            "images": [IMAGE],
        },
        "user: What is this?<image b'\\x89PNG'> | assistant: A cat.",
    ),
    Shape(
        "TRL prompt/completion",
        ["image"],
        {
            "images": [IMAGE],
            "prompt": [{"role": "user", "content": "What is this?"}],
            "completion": [{"role": "assistant", "content": "A cat."}],
        },
        "user: <image b'\\x89PNG'>\nWhat is this? | assistant: A cat.",
        format="prompt_completion",
    ),
    Shape(
        "TRL messages, images column, no slot in text",
        ["image"],
        {
            "images": [IMAGE],
            "messages": [
                {"role": "user", "content": "What is this?"},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        "user: <image b'\\x89PNG'>\nWhat is this? | assistant: A cat.",
        format="messages",
    ),
    Shape(
        "imagefolder metadata (image,text)",
        ["image"],
        {"image": IMAGE, "text": "A cat on a mat."},
        "user: <image b'\\x89PNG'>\nDescribe the image. | assistant: A cat on a mat.",
        format="captions",
    ),
    Shape(
        "imagefolder metadata.jsonl read as a file",
        ["image"],
        {"file_name": "0001.png", "text": "A cat on a mat."},
        "user: <image '0001.png'>\nDescribe the image. | assistant: A cat on a mat.",
        format="captions",
    ),
    Shape(
        "VQA columns (image,question,answer)",
        ["image"],
        {"image": IMAGE, "question": "What?", "answer": "cat"},
        "user: <image b'\\x89PNG'>\nWhat? | assistant: cat",
        format="qa",
    ),
    Shape(
        "DocVQA (answers list)",
        ["image"],
        {
            "questionId": "1",
            "question": "What date?",
            "image": IMAGE,
            "docId": 1,
            "answers": ["1/8/93"],
            "data_split": "train",
        },
        "user: <image b'\\x89PNG'>\nWhat date? | assistant: 1/8/93",
        format="qa",
    ),
    Shape(
        "OpenAI image_url part",
        ["image"],
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                        {"type": "text", "text": "?"},
                    ],
                },
                {"role": "assistant", "content": "a"},
            ]
        },
        "user: <image 'data:image/png;base64,AA=='>? | assistant: a",
    ),
    Shape(
        "HF chat-template part {type:image,url}",
        ["image"],
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "url": "http://x/y.png"},
                        {"type": "text", "text": "?"},
                    ],
                },
                {"role": "assistant", "content": "a"},
            ]
        },
        "user: <image 'http://x/y.png'>? | assistant: a",
    ),
    Shape(
        "HF chat-template part {type:image,path}",
        ["image"],
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": "y.png"}, {"type": "text", "text": "?"}],
                },
                {"role": "assistant", "content": "a"},
            ]
        },
        "user: <image 'y.png'>? | assistant: a",
    ),
    Shape(
        "Qwen-VL part {type:image,image}",
        ["image"],
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "y.png"}, {"type": "text", "text": "?"}],
                },
                {"role": "assistant", "content": "a"},
            ]
        },
        "user: <image 'y.png'>? | assistant: a",
    ),
    Shape(
        "ms-swift/LLaMA-Factory messages+images",
        ["image"],
        {
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "a"},
            ],
            "images": ["y.png"],
        },
        "user: <image 'y.png'>What? | assistant: a",
    ),
    Shape(
        "LLaMA-Factory sharegpt with `system` column",
        ["image"],
        {
            "system": "Answer in French.",
            "conversations": [
                {"from": "human", "value": "<image>What?"},
                {"from": "gpt", "value": "a"},
            ],
            "images": ["y.png"],
        },
        "system: Answer in French. | user: <image 'y.png'>What? | assistant: a",
    ),
    Shape(
        "ms-swift query/response",
        ["image"],
        {"query": "<image>What?", "response": "a", "images": ["y.png"]},
        "user: <image 'y.png'>What? | assistant: a",
        format="query_response",
    ),
    Shape(
        "alpaca",
        ["image"],
        {"instruction": "<image>What?", "input": "", "output": "a", "images": ["y.png"]},
        "user: <image 'y.png'>What? | assistant: a",
        format="alpaca",
    ),
]
