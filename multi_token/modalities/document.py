"""Documents of any length through any sentence encoder: each chunk of text becomes one feature.

Border: a text to chunks, and chunks to features. What a file holds, and where a text may be cut, is
media/document.py's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from multi_token.errors import MediaError, RecipeError
from multi_token.media.document import (
    MAX_CHARACTERS,
    MAX_PAGES,
    as_document,
    read_document,
    split_document,
)
from multi_token.media.examples import EXAMPLE_HTML, EXAMPLE_TEXT
from multi_token.media.fetch import Fetch, shorten
from multi_token.modalities.base import (
    AnyProjector,
    Encoder,
    OpenAIKind,
    PretrainedModality,
    run_in_micro_batches,
)
from multi_token.projectors.kinds import Expand
from multi_token.types import Features, Prepared

Pooling = Literal["mean", "cls"]

DEFAULT_CHUNK_TOKENS = 256
_LEAST_ROOM = 8
"""Tokens of text that a chunk must at least hold; with fewer its embedding would say nothing."""
_NO_CHUNK = -1
"""In place of a chunk's number: padding behind a shorter document."""


class DocumentEncoder(Encoder):
    """A sentence encoder, and how the states of a chunk's tokens become its embedding."""

    def __init__(
        self, tower: nn.Module, *, pooling: Pooling, normalize: bool, micro_batch: int = 32
    ) -> None:
        super().__init__()
        self.tower = tower
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.micro_batch = micro_batch
        self.dim = -1  # known after the first forward; `build_encoder` runs one

    def forward(self, **inputs: Tensor) -> Features:
        """`chunk` [items, length], and the tokenizer's inputs [chunks, tokens] of all items.

        `chunk`: which chunk each feature of an item is.
        """
        chunk = inputs.pop("chunk")
        values = run_in_micro_batches(self._values, inputs, self.micro_batch)
        mask = chunk != _NO_CHUNK
        return Features(values[chunk.clamp(min=0)] * mask[..., None], mask)

    def _values(self, **inputs: Tensor) -> Tensor:
        """[chunks, dim]: sentence embeddings as in Sentence-BERT (arXiv:1908.10084)."""
        states = self.tower(**inputs).last_hidden_state
        if self.pooling == "cls":
            values = states[:, 0]
        else:
            weight = inputs["attention_mask"][..., None].to(states.dtype)
            values = (states * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(values, dim=-1) if self.normalize else values


class DocumentModality(PretrainedModality):
    """A text of any length: a plain text, Markdown, a web page, a PDF, or the row's own text."""

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("document",)
    requires: ClassVar[tuple[str, ...]] = ("pypdf", "bs4")
    install_extra: ClassVar[str] = "multi_token[document]"
    kit_example: ClassVar[str] = "multi_token.testing.text:document_example"

    type: Literal["document"] = "document"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a sentence encoder (MiniLM, GTE, E5, BGE, ...)."""
    projector: AnyProjector = Field(default_factory=lambda: Expand(factor=4))
    """How features become tokens: each chunk becomes `factor` of them."""
    pooling: Pooling = "mean"
    """What stands for a chunk: the `mean` of its tokens' last states, or that of the first (`cls`).
    Take what the encoder was trained with; its model card says it."""
    normalize: bool = False
    """Bring each embedding to length 1."""
    chunk_tokens: PositiveInt | None = None
    """Tokens of a chunk at most, special ones and `prefix` among them. Default: 256, or what the
    encoder takes if that is less."""
    prefix: str = ""
    """Written before each chunk, for encoders that were trained with one (E5: `"passage: "`)."""
    strings: Literal["path", "text"] = "path"
    """What a plain string in a row is: a `path` or address of a document, or the `text` itself."""
    max_pages: PositiveInt = MAX_PAGES
    """A PDF with more pages is refused."""
    max_characters: PositiveInt = MAX_CHARACTERS
    """A document with more characters is refused."""
    max_chunks: PositiveInt = 1024
    """A document with more chunks is refused."""

    def load(self, source: Any, fetch: Fetch) -> str:
        """Path, URL, data URI or bytes, or a text (see `strings`) -> the text. Raises MediaError.

        A mapping says which it is: `{"path": ...}` or `{"text": ...}`.
        """
        kind, value = self._kind(source)
        if kind == "text":
            return as_document(value, max_characters=self.max_characters)
        named = isinstance(value, (str, os.PathLike)) and not str(value).startswith("data:")
        return read_document(
            fetch.read(value),
            name=shorten(value) if named else "",
            max_pages=self.max_pages,
            max_characters=self.max_characters,
        )

    def example_sources(self) -> Sequence[Any]:
        """Return a text and a web page."""
        return [{"text": EXAMPLE_TEXT}, EXAMPLE_HTML]

    def named_file(self, source: Any) -> str | os.PathLike[str] | None:
        """None for a text (see `strings`)."""
        is_text = isinstance(source, str) and self.strings == "text"
        return None if is_text else super().named_file(source)

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """The bytes of a text or of a file."""
        kind, value = self._kind(source)
        data = value.encode(errors="surrogatepass") if kind == "text" else fetch.read(value)
        return kind.encode() + b"\0" + data

    def _kind(self, source: Any) -> tuple[Literal["path", "text"], Any]:
        """Whether a source is a text, or where one is to be read. Raises MediaError."""
        if not isinstance(source, Mapping):
            return (self.strings if isinstance(source, str) else "path"), source
        given = {key: value for key, value in source.items() if value is not None}
        if set(given) == {"path"}:
            return "path", given["path"]
        if set(given) == {"text"} and isinstance(given["text"], str):
            return "text", given["text"]
        raise MediaError(
            'expected a document as {"path": ...} or as {"text": "..."}, got an object with '
            + (", ".join(f"{k} ({type(v).__name__})" for k, v in given.items()) or "nothing"),
            kind="undecodable",
        )

    def chunks(self, text: str) -> list[str]:
        """The text as the encoder will see it, `prefix` left out.

        Raises MediaError for more than `max_chunks`, RecipeError for `chunk_tokens` that the
        encoder does not take.
        """
        chunks = split_document(
            text,
            offsets=functools.partial(_offsets, document_tokenizer(self.encoder, self.revision)),
            max_tokens=self._room(),
            prefix=self.prefix,
        )
        if len(chunks) > self.max_chunks:
            raise MediaError(
                f"a document of {len(text):,} characters has {len(chunks):,} chunks, and the limit "
                f"is {self.max_chunks:,}; give a part of it, or raise max_chunks or chunk_tokens",
                kind="undecodable",
            )
        return chunks

    def _room(self) -> int:
        """Tokens of `prefix` and text that fit into a chunk."""
        tokenizer = document_tokenizer(self.encoder, self.revision)
        most = most_tokens(self.encoder, self.revision)
        asked = self.chunk_tokens or min(DEFAULT_CHUNK_TOKENS, most)
        if asked > most:
            raise RecipeError(
                f"`chunk_tokens` is {asked}, but {self.encoder} takes {most} tokens at most"
            )
        room = asked - tokenizer.num_special_tokens_to_add()
        left = room - len(_offsets(tokenizer, self.prefix))
        if left < _LEAST_ROOM:
            raise RecipeError(
                f"chunks of {asked} tokens leave {left} for text beside the special ones and "
                f"`prefix`; set `chunk_tokens` to {asked + _LEAST_ROOM - left} or more"
            )
        return room

    def prepare(self, raw: Any) -> Prepared:
        """A text -> what the encoder's tokenizer makes of its chunks, int64 [chunks, tokens] each.

        Raises what `chunks` raises.
        """
        chunks = self.chunks(raw)
        inputs = document_tokenizer(self.encoder, self.revision)(
            [self.prefix + chunk for chunk in chunks],
            padding=True,
            padding_side="right",
            truncation=False,
            return_tensors="pt",
        )
        return Prepared(dict(inputs), num_features=len(chunks))

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """All chunks of all items in one batch [chunks, tokens], and `chunk` [items, longest]."""
        pad = nn.utils.rnn.pad_sequence
        # zeros whatever the tokenizer pads with: what stands there is masked
        inputs = {
            key: pad([row for item in items for row in item.inputs[key]], batch_first=True)
            for key in items[0].inputs
        }
        num_chunks = [item.num_features for item in items]
        chunk = list(torch.arange(sum(num_chunks)).split(num_chunks))
        return {**inputs, "chunk": pad(chunk, batch_first=True, padding_value=_NO_CHUNK)}

    def build_encoder(self) -> DocumentEncoder:
        from transformers import AutoModel

        tower: Any = AutoModel.from_pretrained(
            self.encoder, revision=self.revision, dtype=torch.float32
        )
        if tower.config.is_encoder_decoder:  # sentence encoders of the T5 kind
            tower = tower.get_encoder()
        encoder = DocumentEncoder(
            tower, pooling=self.pooling, normalize=self.normalize, micro_batch=self.micro_batch
        ).eval()
        with torch.no_grad():
            encoder.dim = encoder(**self.collate([self.prepare("a")])).values.shape[-1]
        return encoder


@functools.lru_cache(maxsize=8)
def document_tokenizer(encoder: str, revision: str | None) -> Any:
    """The encoder's own tokenizer; do not change it. Raises RecipeError for one without offsets."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder, revision=revision)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer of {encoder} ({type(tokenizer).__name__}) does not say where in a text "
            "its tokens stand; documents need an encoder with a tokenizer.json"
        )
    return tokenizer


@functools.lru_cache(maxsize=8)
def most_tokens(encoder: str, revision: str | None) -> int:
    """How many tokens the encoder takes, special ones among them."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(encoder, revision=revision)
    limit = document_tokenizer(encoder, revision).model_max_length
    return min(limit, getattr(config, "max_position_embeddings", None) or limit)


def _offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    # a saved tokenizer may be set to cut and to pad, and here it must not
    return tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )["offset_mapping"]
