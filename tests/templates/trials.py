"""Tries chat templates: tokenizers made in process, conversations, and TRL's twins as an oracle."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from multi_token.chat.format import ChatFormat
from multi_token.chat.named import named_template, template_names
from multi_token.chat.template import ChatTemplate
from multi_token.errors import ChatTemplateError
from multi_token.types import (
    IGNORE_INDEX,
    Conversation,
    Media,
    Message,
    Part,
    Role,
    Sample,
    Text,
)

_CORPUS = [
    "Look at this. What is it? It is a cat. Question answer of the user: be brief, say no more.",
    "system user assistant model tool User Assistant Falcon USER ASSISTANT\n\nQuestion\nanswer",
    "line\n\nline\nline\n\n\nline\n\n</think>\n\nline \n line",
]


def trl_folder() -> Path | None:
    """Return the folder of TRL's templates, without importing TRL."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def source(name: str) -> str | None:
    """Jinja text of a family; None for one without a template."""
    if name.startswith("default"):
        return None
    folder = trl_folder()
    if folder is not None and (path := folder / f"{name}.jinja").is_file():
        return path.read_text(encoding="utf-8")
    return named_template(name)


def twin(name: str) -> str | None:
    """The same template with marks on the assistant's text, made by TRL; or with its own."""
    folder = trl_folder()
    if folder is not None:
        for path in (folder / f"{name}_training.jinja", folder / f"{name}.jinja"):
            if path.is_file() and re.search(r"\{%-?\s*generation", text := path.read_text("utf-8")):
                return text
    return None


@cache
def _core(kind: str) -> str:
    """A trained tokenizer as JSON.

    bytes: byte-level BPE; nfc: the same after Unicode's NFC; llama: BPE with a leading blank put
    before every piece of text and single bytes for the rest; gemma: without that blank; unigram:
    pieces with Metaspace, with its blank before the first piece alone.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind in ("bytes", "nfc"):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, show_progress=False
        )
        if kind == "nfc":
            core.normalizer = normalizers.NFC()  # type: ignore[assignment]
        core.train_from_iterator(_CORPUS, trainer)
        return core.to_str()
    if kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
        core.decoder = decoders.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
        ascii_letters = [chr(i) for i in range(33, 127)]
        trainer = trainers.UnigramTrainer(
            vocab_size=300,
            unk_token="<unk>",
            special_tokens=["<unk>"],
            initial_alphabet=[*ascii_letters, "\n"],
            show_progress=False,
        )
        core.train_from_iterator(_CORPUS, trainer)
        return core.to_str()
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend("▁")] if kind == "llama" else []
    core.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if first else []),
        ]
    )
    # Words are split in training, as SentencePiece does, so that no piece holds a blank inside.
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # type: ignore[assignment]
    core.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    core.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    fields = {**json.loads(core.to_str()), "pre_tokenizer": None}
    vocab = fields["model"]["vocab"]
    for piece in ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]:
        vocab[piece] = len(vocab)
    return json.dumps(fields)


def tokenizer_of(family: Any) -> Any:
    """A tokenizer with the family's special tokens, that itself begins a text with its BOS."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(_core(family.kind))
    ends = re.findall(r"<[^<]+>|\[[^\[]+\]", family.end + family.last_end)
    eos = family.eos or ends[-1]
    special = dict.fromkeys([*filter(None, [family.bos, eos]), *ends, *family.special.split()])
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=family.rstrip) for t in special]
    )
    core.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    if family.bos:
        core.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single=f"{family.bos} $A", special_tokens=[(family.bos, core.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos or None,
        eos_token=eos,
        pad_token=eos,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = source(family.name)
    return tokenizer


def conversation(
    num_turns: int,
    *,
    system: bool = False,
    media_at: int | None = None,
    answer: str = "It is cat {}.",
    roles: tuple[Role, ...] = ("user", "assistant"),
) -> Conversation:
    """Turns of questions and answers; with two media items in the user turn `media_at`."""
    messages = [Message("system", (Text("Be brief."),))] if system else []
    for turn in range(num_turns):
        for role in roles:
            text = answer.format(turn) if role == "assistant" else f"Question {turn} of the {role}?"
            parts: tuple[Part, ...] = (Text(text),)
            if role == "user" and turn == media_at:
                parts = (
                    Text("Look at "),
                    Media("image", 0),
                    Media("sound", 1),
                    Text(" - "),
                    *parts,
                )
            messages.append(Message(role, parts))
    return Conversation(tuple(messages), id="row")


def plain(talk: Conversation) -> list[dict[str, str]]:
    """A conversation without media as templates take it."""
    return [
        {"role": m.role, "content": "".join(p.text for p in m.parts if isinstance(p, Text))}
        for m in talk.messages
    ]


def in_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@cache
def chat_of(family: Any) -> ChatFormat:
    """The family's chat format, made once."""
    return ChatFormat(tokenizer_of(family))


@cache
def shape_of(family: Any) -> ChatTemplate:
    """The family's template with its tokenizer."""
    chat = chat_of(family)
    return ChatTemplate(chat.template, chat.tokenizer)


def num_tokens(talk: Conversation) -> list[int]:
    """Return the lengths of the two items that a conversation may have."""
    return [3, 2][: len(talk.media)]


def runs_of(sample: Sample) -> list[tuple[int, int]]:
    """Return start and end of each run of supervised tokens."""
    supervised = [False, *(sample.labels != IGNORE_INDEX).tolist(), False]
    edges = [i for i in range(len(supervised) - 1) if supervised[i] != supervised[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def supervised_texts(chat: ChatFormat, talk: Conversation) -> list[str]:
    """Return the text of each run of supervised tokens."""
    sample = chat.tokenize(talk, num_tokens(talk))
    return [
        chat.tokenizer.decode(sample.labels[start:end], clean_up_tokenization_spaces=False)
        for start, end in runs_of(sample)
    ]


@dataclass(frozen=True)
class Marked:
    """Return a twin's rendering and its marked spans; adjacent marks are joined."""

    text: str
    marks: list[str]


def marked_by_twin(family: Any, messages: list[dict[str, str]]) -> Marked:
    """The oracle, which is not ours."""
    parts = shape_of(family).takes_content_parts
    rendered: Any = render_jinja_template(
        conversations=[in_parts(messages) if parts else messages],  # type: ignore[arg-type]
        chat_template=twin(family.name),
        return_assistant_tokens_mask=True,
        **chat_of(family).tokenizer.special_tokens_map,
    )
    (text,), (spans,) = rendered
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return Marked(text, [text[start:end] for start, end in joined])


def refusal(chat: ChatFormat, talk: Conversation) -> str | None:
    """Return the error for a conversation, or None."""
    try:
        chat.tokenize(talk, num_tokens(talk))
    except ChatTemplateError as error:
        return str(error)
    return None


def is_from_trl(name: str) -> bool:
    """Return True if TRL ships the family's template."""
    folder = trl_folder()
    return folder is not None and (folder / f"{name}.jinja").is_file()


def is_here(name: str) -> bool:
    """Return True if the family's template can be found."""
    return name in template_names() or name.startswith("default") or is_from_trl(name)
