# ruff: noqa: E501 - rows as their data sets have them
"""Rows of real data sets and tools, with their exact columns; texts and bytes are short stand-ins.

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


SHAPES = [
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
    Shape(
        "Common Voice",
        ["speech"],
        {
            "client_id": "c",
            "path": "a.mp3",
            "audio": AUDIO,
            "sentence": "Turn it on.",
            "locale": "en",
        },
        "user: <speech b'RIFF'>\nWrite down what is said. | assistant: Turn it on.",
        format="transcripts",
    ),
    Shape(
        "LibriSpeech",
        ["speech"],
        {
            "file": "a.flac",
            "audio": AUDIO,
            "text": "MISTER QUILTER",
            "speaker_id": 1,
            "chapter_id": 2,
            "id": "1-2-3",
        },
        "user: <speech b'RIFF'>\nWrite down what is said. | assistant: MISTER QUILTER",
        format="transcripts",
    ),
    Shape(
        "fixie-ai/librispeech_asr (continuation)",
        ["speech"],
        {"audio": AUDIO, "text": "mister quilter", "continuation": "...", "id": "1"},
        "user: <speech b'RIFF'>\nWrite down what is said. | assistant: mister quilter",
        format="transcripts",
    ),
    Shape(
        "messages + `audio` column, modality named speech",
        ["speech"],
        {
            "audio": AUDIO,
            "messages": [
                {"role": "user", "content": "<speech>"},
                {"role": "assistant", "content": "a"},
            ],
        },
        "user: <speech b'RIFF'> | assistant: a",
        format="messages",
    ),
    Shape(
        "messages + `audios` column, modality named audio",
        ["audio"],
        {
            "audios": ["a.wav"],
            "messages": [
                {"role": "user", "content": "<audio>What?"},
                {"role": "assistant", "content": "a"},
            ],
        },
        "user: <audio 'a.wav'>What? | assistant: a",
    ),
    Shape(
        "AudioCaps",
        ["sound"],
        {
            "audiocap_id": 1,
            "youtube_id": "y",
            "start_time": 3,
            "audio": AUDIO,
            "caption": "A dog barks.",
        },
        "user: <sound b'RIFF'>\nDescribe the sound. | assistant: A dog barks.",
        format="captions",
    ),
    Shape(
        "LLaVA-Video-178K",
        ["video"],
        {
            "id": "1",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat happens?"},
                {"from": "gpt", "value": "A man runs."},
            ],
            "data_source": "0_30_s_academic_v0_1",
            "video": "academic_source/a.mp4",
        },
        "user: <video 'academic_source/a.mp4'>\nWhat happens? | assistant: A man runs.",
        format="sharegpt",
    ),
    Shape(
        "LLaVA-Video-178K, modality named image",
        ["image=video"],
        {
            "id": "1",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat happens?"},
                {"from": "gpt", "value": "A man runs."},
            ],
            "video": "academic_source/a.mp4",
        },
        "user: <image 'academic_source/a.mp4'>\nWhat happens? | assistant: A man runs.",
        format="sharegpt",
    ),
    Shape(
        "Video-ChatGPT",
        ["video"],
        {"q": "What?", "a": "x", "video_id": "v_1"},
        "user: <video 'videos/v_1.mp4'>\nWhat? | assistant: x",
        source={"media": {"video": "videos/{{ video_id }}.mp4"}},
        format="qa",
    ),
    Shape(
        "ECG-QA",
        ["ecg"],
        {
            "template_id": 1,
            "question_id": 0,
            "sample_id": 0,
            "question_type": "single-verify",
            "attribute_type": "scp_code",
            "question": "Is there evidence of non-diagnostic t abnormalities on this ECG?",
            "answer": ["yes"],
            "ecg_id": [12662],
            "attribute": ["non-diagnostic t abnormalities"],
        },
        "user: <ecg 'records100/12000/12662_lr'>\nIs there evidence of non-diagnostic t abnormalities on this ECG? | assistant: yes",
        source={
            "media": {
                "ecg": "records100/{{ '%05d' % (ecg_id[0] // 1000 * 1000) }}/{{ '%05d' % ecg_id[0] }}_lr"
            }
        },
        format="qa",
    ),
    Shape(
        "PTB-XL row",
        ["ecg"],
        {
            "ecg_id": 1,
            "report": "sinusrhythmus",
            "scp_codes": "{'NORM': 100.0}",
            "filename_hr": "records500/00000/00001_hr",
            "strat_fold": 3,
        },
        "user: <ecg 'records500/00000/00001_hr'>\nDescribe the ecg. | assistant: sinusrhythmus",
        source={"media": {"ecg": "filename_hr"}, "where": "strat_fold < 9"},
        format="captions",
    ),
    Shape(
        "vectors parquet (embedding,text)",
        ["vector"],
        {"embedding": [0.1, 0.2], "text": "aspirin", "label": "x"},
        "user: <vector [0.1, 0.2]>\nDescribe the vector. | assistant: aspirin",
        format="captions",
    ),
    Shape(
        "RLAIF-V",
        ["image"],
        {
            "ds_name": "d",
            "image": IMAGE,
            "question": "What?",
            "chosen": "A cat.",
            "rejected": "A dog.",
            "idx": 0,
            "image_path": "x.jpg",
        },
        "user: <image b'\\x89PNG'>\nWhat? | assistant: A cat. | rejected: A dog.",
        format="preferences",
    ),
    Shape(
        "rlaif-v_formatted (TRL)",
        ["image"],
        {
            "images": [IMAGE],
            "prompt": [
                {
                    "role": "user",
                    "content": [{"text": None, "type": "image"}, {"text": "What?", "type": "text"}],
                }
            ],
            "chosen": [{"role": "assistant", "content": [{"text": "A cat.", "type": "text"}]}],
            "rejected": [{"role": "assistant", "content": [{"text": "A dog.", "type": "text"}]}],
        },
        "user: <image b'\\x89PNG'>What? | assistant: A cat. | rejected: A dog.",
    ),
    Shape(
        "llamafactory/RLHF-V",
        ["image"],
        {
            "conversations": [{"from": "human", "value": "<image>What?"}],
            "chosen": {"from": "gpt", "value": "A cat."},
            "rejected": {"from": "gpt", "value": "A dog."},
            "images": [IMAGE],
        },
        "user: <image b'\\x89PNG'>What? | assistant: A cat. | rejected: A dog.",
    ),
    Shape(
        "RLHF-V (json in text)",
        ["image"],
        {"image": IMAGE, "text": '{"question":"What?","chosen":"A","rejected":"B"}', "idx": 0},
        "user: <image b'\\x89PNG'>What? | assistant: A | rejected: B",
        source={
            "turns": [
                {"user": "<image>{{ (text | fromjson).question }}"},
                {"chosen": "{{ (text | fromjson).chosen }}"},
                {"rejected": "{{ (text | fromjson).rejected }}"},
            ]
        },
    ),
    Shape(
        "summaries (article, highlights)",
        ["document"],
        {"article": "Long ...", "highlights": "Short.", "id": "1"},
        "user: <document {'text': 'Long ...'}>\nSummarize the document. | assistant: Short.",
        format="summaries",
    ),
]
