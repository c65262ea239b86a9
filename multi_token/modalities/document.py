"""Documents of any length through any sentence encoder: each chunk of text becomes one feature."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.media.document import (
    MAX_CHARACTERS,
    MAX_PAGES,
    as_document,
    read_document,
    split_document,
)
from multi_token.media.errors import undecodable
from multi_token.media.examples import EXAMPLE_HTML, EXAMPLE_TEXT
from multi_token.media.fetch import Fetch, source_name
from multi_token.modalities.base import (
    AnyProjector,
    Encoder,
    OpenAIKind,
    PretrainedModality,
    load_auto,
    max_input_tokens,
)
from multi_token.modalities.parts import (
    collate_parts,
    gather_features,
    index_features,
    run_in_micro_batches,
)
from multi_token.projectors.kinds import Expand
from multi_token.types import Fact, Features, Prepared

Pooling = Literal["mean", "cls"]

DEFAULT_CHUNK_TOKENS = 256
_MIN_TEXT_TOKENS = 8
"""Tokens of text that a chunk must at least hold; the embedding of fewer would mean little."""


class DocumentEncoder(Encoder):
    """A sentence encoder, and the pooling of a chunk's token states into its embedding."""

    def __init__(self, tower: nn.Module, modality: DocumentModality) -> None:
        super().__init__()
        self.tower = tower
        self.modality = modality
        self.dim = -1  # known after the first forward, which `build_encoder` runs

    def forward(self, **inputs: Tensor) -> Features:
        """Encode the chunks of all items: the tokenizer's tensors [chunks, tokens]; `part`,
        `feature` [items, length].
        """
        part, feature = inputs.pop("part"), inputs.pop("feature")
        values = run_in_micro_batches(self._values, inputs, self.modality.micro_batch)
        # A chunk is a part with one feature.
        return gather_features(values[:, None], part, feature)

    def _values(self, **inputs: Tensor) -> Tensor:
        """Embeddings [chunks, dim], pooled as in Sentence-BERT (arXiv:1908.10084)."""
        states = self.tower(**inputs).last_hidden_state
        if self.modality.pooling == "cls":
            values = states[:, 0]
        else:
            # The mean over real tokens alone; padding has states too.
            weight = inputs["attention_mask"][..., None].to(states.dtype)
            values = (states * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(values, dim=-1) if self.modality.normalize else values


class DocumentModality(PretrainedModality):
    """A text of any length: plain text, Markdown, a web page, a PDF, or the row's own text.

    The text is cut into chunks at sentence ends; each chunk becomes one feature, its sentence
    embedding, as [chunks, dim]. Source: Sentence-BERT, arXiv:1908.10084.
    """

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("document",)
    requires: ClassVar[tuple[str, ...]] = ("pypdf", "bs4")
    install_extra: ClassVar[str] = "multi_token[document]"
    kit_example: ClassVar[str] = "multi_token.testing.examples:document_example"
    fact_names: ClassVar[Mapping[str, str]] = {
        "characters": "characters of the document's text",
        "pages": "pages of a PDF; other documents have none",
    }

    type: Literal["document"] = "document"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a sentence encoder (MiniLM, GTE, E5, BGE, ...)."""
    projector: AnyProjector = Field(default_factory=lambda: Expand(factor=4))
    """Network that turns each chunk into `factor` media embeddings."""
    pooling: Pooling = "mean"
    """Embedding of a chunk: `mean` of the last states of its tokens, or the state of the first
    token (`cls`). Use the one that the encoder was trained with; its model card names it."""
    normalize: bool = False
    """Scale each embedding to length 1."""
    chunk_tokens: PositiveInt | None = None
    """Largest number of tokens in a chunk, with special tokens and `prefix`. Default: 256, or the
    encoder's limit if that is lower."""
    prefix: str = ""
    """Text before each chunk, for encoders that were trained with one (E5: `"passage: "`)."""
    strings: Literal["path", "text"] = "path"
    """Meaning of a plain string in a row: a `path` or URL of a document, or the `text` itself."""
    max_pages: PositiveInt = MAX_PAGES
    """Largest number of pages in a PDF. A longer one is refused."""
    max_characters: PositiveInt = MAX_CHARACTERS
    """Largest number of characters in a document. A longer one is refused."""
    max_chunks: PositiveInt = 1024
    """Largest number of chunks in a document. A longer one is refused."""

    def load(self, source: Any, fetch: Fetch) -> str:
        """Return the text of a document.

        Args:
            source: Path, URL, data URI or bytes, or a text (`strings`); `{"path": ...}` and
                `{"text": ...}` say which.
            fetch: Reader of paths and URLs.

        Raises:
            MediaError: The document cannot be read, has no text, or is over a limit.
        """
        kind, value = self._kind(source)
        if kind == "text":
            return as_document(value, max_characters=self.max_characters)
        return read_document(
            fetch.read(value),
            name=source_name(value),
            max_pages=self.max_pages,
            max_characters=self.max_characters,
        )

    def example_sources(self) -> Sequence[Any]:
        """Return a text and a web page."""
        return [{"text": EXAMPLE_TEXT}, EXAMPLE_HTML]

    def named_file(self, source: Any) -> str | os.PathLike[str] | None:
        """Return the path or URL that a source names; None for a text (`strings`)."""
        is_text = isinstance(source, str) and self.strings == "text"
        return None if is_text else super().named_file(source)

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return the bytes of a text or of a file; the key of cached features."""
        kind, value = self._kind(source)
        data = value.encode(errors="surrogatepass") if kind == "text" else fetch.read(value)
        # With the kind, because a text and a file may have the same bytes.
        return kind.encode() + b"\0" + data

    def _kind(self, source: Any) -> tuple[Literal["path", "text"], Any]:
        """The kind of a source, text or path, and its value. Raises MediaError."""
        if not isinstance(source, Mapping):
            return (self.strings if isinstance(source, str) else "path"), source
        given = {key: value for key, value in source.items() if value is not None}
        if set(given) == {"path"}:
            return "path", given["path"]
        if set(given) == {"text"} and isinstance(given["text"], str):
            return "text", given["text"]
        raise undecodable(
            'expected a document as {"path": ...} or as {"text": "..."}, got an object with '
            + (", ".join(f"{k} ({type(v).__name__})" for k, v in given.items()) or "nothing")
        )

    def chunks(self, text: str) -> list[str]:
        """Return the chunks of a text, without `prefix`.

        Raises:
            MediaError: The text has more than `max_chunks` chunks.
            RecipeError: The encoder does not take `chunk_tokens`.
        """
        chunks = split_document(
            text,
            offsets=functools.partial(_offsets, document_tokenizer(self.encoder, self.revision)),
            max_tokens=self._max_text_tokens(),
            prefix=self.prefix,
        )
        if len(chunks) > self.max_chunks:
            raise undecodable(
                f"a document of {len(text):,} characters has {len(chunks):,} chunks, and the limit "
                f"is {self.max_chunks:,}; give a part of it, or raise max_chunks or chunk_tokens"
            )
        return chunks

    def _max_text_tokens(self) -> int:
        """Tokens of `prefix` and text that fit into a chunk."""
        tokenizer = document_tokenizer(self.encoder, self.revision)
        most = max_input_tokens(self.encoder, self.revision)
        asked = self.chunk_tokens or min(DEFAULT_CHUNK_TOKENS, most)
        if asked > most:
            raise RecipeError(
                f"`chunk_tokens` is {asked}, but {self.encoder} takes {most} tokens at most"
            )
        # Special tokens are added to each chunk, so the text has less than the limit.
        available = asked - tokenizer.num_special_tokens_to_add()
        left = available - len(_offsets(tokenizer, self.prefix))
        if left < _MIN_TEXT_TOKENS:
            raise RecipeError(
                f"chunks of {asked} tokens leave {left} for text after the special tokens and "
                f"`prefix`; set `chunk_tokens` to {asked + _MIN_TEXT_TOKENS - left} or more"
            )
        return available

    def prepare(self, raw: str) -> Prepared:
        """Tokenize the chunks of a text.

        Returns:
            The tokenizer's tensors, int64 [chunks, tokens]; `part`, `feature` int64 [chunks].

        Raises:
            MediaError: The text has more than `max_chunks` chunks.
            RecipeError: The encoder does not take `chunk_tokens`.
        """
        chunks = self.chunks(raw)
        # Chunks fit already, so truncation would only hide a fault.
        inputs = document_tokenizer(self.encoder, self.revision)(
            [self.prefix + chunk for chunk in chunks],
            padding=True,
            padding_side="right",
            truncation=False,
            return_tensors="pt",
        )
        inputs = {**inputs, **index_features([1] * len(chunks))}
        facts = Fact({"characters": len(raw), "pages": getattr(raw, "num_pages", None)})
        return Prepared(inputs, len(chunks), (facts,))

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into one batch, in which the chunks of all items are encoded together."""
        # Padded with zeros and not with the tokenizer's padding: the mask hides either.
        return collate_parts(items)

    def build_encoder(self) -> DocumentEncoder:
        """Return the sentence encoder; the decoder of a T5 is dropped."""
        tower = self.load_tower()
        if tower.config.is_encoder_decoder:
            tower = tower.get_encoder()
        encoder = DocumentEncoder(tower, self).eval()
        encoder.dim = self.output_dim(encoder, "a")
        return encoder


def document_tokenizer(encoder: str, revision: str | None) -> Any:
    """Return the encoder's own tokenizer. Raises RecipeError for one without offsets."""
    tokenizer = load_auto("AutoTokenizer", encoder, revision)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer of {encoder} ({type(tokenizer).__name__}) does not report the offsets "
            "of its tokens; documents need an encoder with a tokenizer.json"
        )
    return tokenizer


def _offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    # A saved tokenizer may be set to truncate and pad, and would then drop the end of a document.
    return tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )["offset_mapping"]
