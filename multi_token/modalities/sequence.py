"""Proteins, DNA, RNA and SMILES through any language model of such letters in transformers."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.media.errors import undecodable
from multi_token.media.fetch import Fetch, source_name
from multi_token.media.sniff import FILE_KINDS, FileKind, describe
from multi_token.media.unpack import gunzip
from multi_token.modalities.base import Encoder, PretrainedModality, max_input_tokens
from multi_token.modalities.hidden_states import HiddenStates, layers_up_to
from multi_token.modalities.parts import collate_parts, gather_features, run_in_micro_batches
from multi_token.registry import did_you_mean
from multi_token.types import Features, Prepared

SequenceFeatures = Literal["tokens", "mean", "cls"]

_FILE = re.compile(r"\.(?:fasta|fas|fa|faa|fna|ffn|frn)(?:\.gz)?$|^data:|://", re.IGNORECASE)
"""Strings that name a file; every other one is the sequence itself."""
_KEYS = ("text", "path", "bytes")


class SequenceEncoder(Encoder):
    """A language model of letters and the features taken from it."""

    def __init__(self, tower: nn.Module, modality: SequenceModality) -> None:
        super().__init__()
        self.tower = tower
        self.modality = modality
        self.states = HiddenStates(() if modality.layer is None else (modality.layer,))
        self.dim = -1  # known after the first forward, which `build_encoder` runs

    def forward(self, **inputs: Tensor) -> Features:
        """Encode a batch of sequences: the tokenizer's tensors [items, tokens]; `part`, `feature`
        int64 [items, length].
        """
        part, feature = inputs.pop("part"), inputs.pop("feature")
        values = run_in_micro_batches(self._states, inputs, self.modality.micro_batch)
        features = gather_features(values, part, feature)
        if self.modality.features != "mean":
            return features
        assert features.mask is not None
        # Padding is zero, so the sum over all is the sum over the real tokens.
        num_real = features.mask.sum(1)[:, None, None]
        return Features(features.values.sum(1, keepdim=True) / num_real)

    def _states(self, **inputs: Tensor) -> Tensor:
        """Hidden states [items, tokens, dim]."""
        run = functools.partial(self.tower, **inputs)
        if self.modality.layer is None:
            return run().last_hidden_state
        return self.states(self.tower, super().layers(), run)[0]

    def layers(self) -> Sequence[nn.Module]:
        """Return the layers up to the one whose hidden state is taken."""
        return layers_up_to(super().layers(), self.modality.layer)


class SequenceModality(PretrainedModality):
    """A sequence of letters: a protein, DNA, RNA or a molecule as SMILES.

    An item becomes one feature per token of the encoder's tokenizer (for ESM-2 an amino acid,
    Lin et al., Science 2023), as [length, dim], or one vector (`features`).
    """

    kit_example: ClassVar[str] = "multi_token.testing.examples:sequence_example"

    type: Literal["sequence"] = "sequence"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of an encoder with a tokenizer (ESM-2, ProtBert, Nucleotide Transformer,
    DNABERT, ChemBERTa, MoLFormer, ...)."""
    features: SequenceFeatures = "tokens"
    """`tokens`: one feature per token, without the special ones; `mean`: their mean; `cls`: the
    state of the first token."""
    layer: int | None = None
    """Hidden state to take, counted as transformers does (-1 is the last)."""
    spaced: bool = False
    """Put a blank between letters, as ProtBert and ProtT5 expect it."""
    upper_case: bool = False
    """Change letters to upper case, for files that mark repeats by lower case. Not for SMILES,
    where case has a meaning."""
    max_length: PositiveInt | None = None
    """Largest number of tokens, special ones included; a longer sequence is refused. Default: the
    encoder's limit."""
    max_characters: PositiveInt = 100_000
    """Largest number of letters."""

    @model_validator(mode="after")
    def _check_projector(self) -> SequenceModality:
        if self.projector.line_break:
            raise ValueError("`line_break` in the projector is for images with `tile_grids`")
        return self

    def load(self, source: Any, fetch: Fetch) -> str:
        """Return the letters of a sequence, without blanks and line breaks.

        | source | meaning |
        |---|---|
        | `"MKTAYIAK"`, `{"text": ...}` | the sequence |
        | `"x.fasta"` (also .fa, .faa, .fna, .gz), URL | the first record of a FASTA file |
        | `{"path": "x.fasta", "record": "P12345"}` | the record of that name; also `bytes` |
        | bytes | a FASTA file, or the sequence as text |

        Raises:
            MediaError: The source cannot be read, is empty, or is over `max_characters`.
        """
        value, is_text, record = self._parse(source)
        label = "the sequence" if is_text else source_name(value) or "the bytes given"
        if is_text:
            letters = value
        else:
            data = gunzip(fetch.read(value), label, fetch.max_bytes)
            letters = read_letters(data, label, record=record)
        letters = "".join(letters.split())
        if not letters:
            raise undecodable(f"{label} has no letters; leave the row out")
        if len(letters) > self.max_characters:
            raise undecodable(
                f"{label} has {len(letters):,} letters, and the limit is {self.max_characters:,}; "
                "give a part of it, or raise `max_characters`"
            )
        return letters.upper() if self.upper_case else letters

    def _parse(self, source: Any) -> tuple[Any, bool, str | None]:
        """A text or file, True for a text, and the name of a record. Raises MediaError."""
        if not isinstance(source, Mapping):
            return source, isinstance(source, str) and not _FILE.search(source), None
        given = {key: value for key, value in source.items() if value is not None}
        keys = [key for key in _KEYS if key in given]
        record = given.get("record")
        bad_record = record is not None and (keys == ["text"] or not isinstance(record, str))
        bad_text = "text" in given and not isinstance(given["text"], str)
        if len(keys) != 1 or bad_record or bad_text or not given.keys() <= {*_KEYS, "record"}:
            raise undecodable(
                'expected a sequence as {"text": "MKT..."} or {"path": "x.fasta", "record": '
                f'"name"}}, got an object with {", ".join(map(str, given)) or "nothing"}'
            )
        return given[keys[0]], keys == ["text"], record

    def named_file(self, source: Any) -> str | os.PathLike[str] | None:
        """Return the path or URL that a source names; None for a sequence."""
        is_text = isinstance(source, str) and not _FILE.search(source)
        return None if is_text else super().named_file(source)

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return the letters as bytes; the key of cached features."""
        # Not the file, which may have a million records.
        return self.load(source, fetch).encode(errors="surrogatepass")

    def size_from_header(self, source: Any, fetch: Fetch) -> int:
        """Return the number of tokens without special ones; the letters are tokenized."""
        return len(self._tokenize(self.load(source, fetch))[1])

    def count_features(self, size: int) -> int:
        """Return the number of features of a sequence of `size` tokens."""
        return size if self.features == "tokens" else 1

    def _tokenize(self, letters: str) -> tuple[dict[str, list[int]], list[int]]:
        """The tokenizer's lists, and the places of tokens that are not special.

        Raises MediaError for a sequence that is too long, or has an unknown token.
        """
        tokenizer = self.auto("AutoTokenizer")
        limit = self._limit()
        if self.spaced:
            letters = " ".join(letters)
        # A saved tokenizer may be set to truncate and pad.
        inputs = tokenizer(
            letters,
            truncation=False,
            padding=False,
            return_special_tokens_mask=True,
            return_attention_mask=True,
            verbose=False,
        )
        special = inputs.pop("special_tokens_mask")
        places = [place for place, is_special in enumerate(special) if not is_special]
        if len(special) > limit:
            raise undecodable(
                f"a sequence has {len(special):,} tokens, and the limit is {limit:,}; give a part "
                "of it, or raise `max_length` if the encoder takes more"
            )
        unknown = tokenizer.unk_token_id
        place = next((i for i, id in enumerate(inputs["input_ids"]) if id == unknown), None)
        if unknown is not None and place is not None:
            pieces = tokenizer.tokenize(letters)
            at = place - (places[0] if places else 0)
            piece = f", {pieces[at]!r}" if 0 <= at < len(pieces) else ""
            raise undecodable(
                f"token {at} of a sequence{piece}, is unknown to the tokenizer of {self.encoder}; "
                "fix the letter, or set `upper_case` or `spaced` if the encoder needs it"
            )
        if not places:
            raise undecodable(f"a sequence has no tokens for {self.encoder}")
        return dict(inputs), places

    def _limit(self) -> int:
        """Tokens that an item may have. Raises RecipeError."""
        most = max_input_tokens(self.encoder, self.revision)
        if self.max_length is not None and self.max_length > most:
            raise RecipeError(
                f"`max_length` is {self.max_length}, but {self.encoder} takes {most} tokens at most"
            )
        return self.max_length or most

    def prepare(self, raw: str) -> Prepared:
        """Tokenize the letters of a sequence.

        Returns:
            The tokenizer's tensors, int64 [1, tokens]; `part`, `feature` int64 [length].

        Raises:
            MediaError: The sequence has more than `max_length` tokens, or an unknown one.
            RecipeError: The encoder does not take `max_length`.
        """
        tokens, places = self._tokenize(raw)
        taken = [0] if self.features == "cls" else places
        inputs = {key: torch.tensor([ids]) for key, ids in tokens.items()}
        # An item is one part, of which the places of features are taken.
        inputs |= {
            "part": torch.zeros(len(taken), dtype=torch.long),
            "feature": torch.tensor(taken),
        }
        return Prepared(inputs, num_features=self.count_features(len(places)))

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into one batch."""
        # Padded with zeros and not with the tokenizer's padding: the mask hides either.
        return collate_parts(items)

    def example_sources(self) -> Sequence[Any]:
        """Return cysteines, cytosines or carbons: letters of every alphabet."""
        return [{"text": "CCCCCCCCCCCC"}]

    def file_kinds(self) -> Sequence[FileKind]:
        """Return FASTA files and texts."""
        return [FILE_KINDS["sequence"]]

    def build_encoder(self) -> SequenceEncoder:
        """Return the encoder; the decoder of a T5 is dropped."""
        tower = self.load_tower()
        if tower.config.is_encoder_decoder:
            tower = tower.get_encoder()
        encoder = SequenceEncoder(tower, self).eval()
        encoder.dim = self.output_dim(encoder, "CCCCCCCCCCCC")
        return encoder


def read_letters(data: bytes, label: str, *, record: str | None = None) -> str:
    """Return the letters of a record in a FASTA file, or of a plain text.

    Args:
        data: The file; FASTA if its first character is `>`.
        label: Opens error messages.
        record: The first word of the record's header; None for the first record.

    Raises:
        MediaError: The file is no text, or has no such record.
    """
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError
    except ValueError:
        raise undecodable(f"{label} is not a text: {describe(data)}; expected FASTA") from None
    if not text.lstrip().startswith(">"):
        if record is not None:
            raise undecodable(f"{label} is no FASTA file, so it has no record {record!r}")
        return text
    names: list[str] = []
    for entry in text.lstrip()[1:].split("\n>"):
        head, _, body = entry.partition("\n")
        names.append(head.split()[0] if head.split() else "")
        if record is None or names[-1] == record:
            return body
    raise undecodable(
        f"{label} has no record {record!r}{did_you_mean(record or '', names)} "
        f"({len(names):,} records)"
    )
