"""A tiny sentence encoder, built in process, random; and PDF files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multi_token.testing.language_models import tiny_tokenizer

_CORPUS = [
    "The warehouse in Oslo holds blue crates. Who keeps the red lamp? Nobody knows it yet!",
    "A document may be long: it has chapters, and each of them has many sentences.",
    "passage: Anna lives in Rome and likes green apples, while Ben has a dog and an old boat.",
]


def tiny_sentence_encoder(
    folder: Path, kind: str = "bert", *, max_tokens: int = 64, seed: int = 0
) -> str:
    """A random sentence encoder with its tokenizer, saved; returns the folder's name.

    `kind`: bert, roberta (its tokens are of bytes), t5 (its decoder is not needed).
    """
    import torch
    import transformers as hf

    tokenizer = tiny_tokenizer() if kind == "roberta" else _word_tokenizer()
    tokenizer.model_max_length = max_tokens
    small: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "bert":
            config: Any = hf.BertConfig(**small, max_position_embeddings=max_tokens)
            model: Any = hf.BertModel(config)
        elif kind == "roberta":
            # its positions are counted from the padding's id on
            num_positions = max_tokens + tokenizer.pad_token_id + 1
            config = hf.RobertaConfig(**small, max_position_embeddings=num_positions)
            model = hf.RobertaModel(config)
        elif kind == "t5":
            config = hf.T5Config(
                vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
            )
            model = hf.T5Model(config)
        else:
            raise ValueError(f"no tiny sentence encoder of kind {kind!r}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _word_tokenizer() -> Any:
    """Pieces of words, as BERT's: small letters, blanks lost."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    core.decoder = decoders.WordPiece()  # type: ignore[assignment]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    core.train_from_iterator(_CORPUS, trainer)
    core.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        special_tokens=[(name, special.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def write_pdf(path: Path, pages: Sequence[str]) -> Path:
    """A PDF with these pages, a line of text for each line; an empty one has no text at all."""
    page_ids = [4 + 2 * i for i in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in page_ids)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, text in zip(page_ids, pages, strict=True):
        escaped = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        shown = "".join(f"({line}) Tj T*\n" for line in escaped.splitlines())
        stream = f"BT /F1 11 Tf 14 TL 40 800 Td\n{shown}ET" if text else ""
        body = stream.encode("cp1252")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {number + 1} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(body), body))
    data = b"%PDF-1.4\n"
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    data += (
        f"xref\n0 {size}\n0000000000 65535 f \n{table}"
        f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    ).encode()
    path.write_bytes(data)
    return path


def document_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Fields of a small instance, and documents of one chunk and of many."""
    encoder = tiny_sentence_encoder(folder / "sentence_encoder")
    note = folder / "note.txt"
    note.write_text("The red lamp is in Oslo.", encoding="utf-8")
    book = write_pdf(folder / "book.pdf", ["\n".join(_CORPUS)] * 3)
    fields = {"type": "document", "encoder": encoder, "chunk_tokens": 32}
    return fields, [str(note), {"text": " ".join(_CORPUS)}, str(book)]
