"""modalities/sequence.py: letters through a protein model; the oracle is its own forward."""

from __future__ import annotations

import gzip
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.media.unpack import gunzip
from multi_token.modalities.sequence import SequenceModality
from multi_token.registry import validate_fields
from multi_token.testing.encoders import tiny_protein_encoder, tiny_sentence_encoder

FASTA = b">sp|P1|FIRST a protein\nMKTAY\nIAKQR\n\n>second other words\nGAVL\n"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_protein_encoder(tmp_path_factory.mktemp("esm"))


def load(source: Any, encoder: str, **fields: Any) -> str:
    return SequenceModality(encoder=encoder, **fields).load(source, Fetch())


def refusal(source: Any, encoder: str, **fields: Any) -> str:
    modality = SequenceModality(encoder=encoder, **fields)
    with pytest.raises(MediaError) as caught:
        modality.prepare(modality.load(source, Fetch()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layer", [None, 1])
def test_features_are_the_states_of_the_letters_alone_in_any_batch(
    encoder: str, layer: int | None
) -> None:
    oracle = hf.AutoModel.from_pretrained(encoder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(encoder)
    proteins = ["MKTAYIAKQR", "GAVL", "W"]
    for features in ("tokens", "mean", "cls"):
        modality = SequenceModality(encoder=encoder, layer=layer, features=features, micro_batch=2)
        items = [modality.prepare(protein) for protein in proteins]
        with torch.no_grad():
            together = modality.build_encoder()(**modality.collate(items))
        for row, protein in enumerate(proteins):
            with torch.no_grad():
                output = oracle(
                    **tokenizer(protein, return_tensors="pt"), output_hidden_states=True
                )
            states = output.last_hidden_state if layer is None else output.hidden_states[layer]
            letters = states[0, 1:-1]
            kinds = {"tokens": letters, "mean": letters.mean(0)[None], "cls": states[0, :1]}
            values = together.values[row]
            if together.mask is not None:
                values = values[together.mask[row]]
            assert len(values) == items[row].num_features
            torch.testing.assert_close(values, kinds[features], rtol=1e-4, atol=1e-5)


def test_texts_and_records_of_fasta_files_are_read(encoder: str, tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_bytes(FASTA)
    packed = tmp_path / "a.fa.gz"
    packed.write_bytes(gzip.compress(FASTA[:30]) + gzip.compress(FASTA[30:]))
    for source in (str(path), str(packed), {"path": str(path)}, FASTA, {"bytes": FASTA}):
        assert load(source, encoder) == "MKTAYIAKQR"
    for source in ({"path": str(path), "record": "second"}, {"bytes": FASTA, "record": "second"}):
        assert load(source, encoder) == "GAVL"
    for source in ("MKT AY\nIAKQR", {"text": "MKTAYIAKQR"}, b"MKTAYIAKQR\n"):
        assert load(source, encoder) == "MKTAYIAKQR"
    assert load("mkt", encoder, upper_case=True) == "MKT"
    assert load("CC(=O)OC1=CC=CC=C1C(=O)O.[Na+]", encoder) == "CC(=O)OC1=CC=CC=C1C(=O)O.[Na+]"


def test_the_time_to_unpack_members_of_gzip_grows_with_their_number() -> None:
    member = random.Random(0).randbytes(4000)
    packed = (gzip.compress(member) + bytes(3)) * 5000
    start = time.process_time()
    assert gunzip(packed, "a.gz", 1 << 30) == member * 5000
    assert time.process_time() - start < 0.8, "20 MB"


def test_the_number_of_features_is_known_from_the_letters(encoder: str) -> None:
    modality = SequenceModality(encoder=encoder)
    assert modality.num_features_from_header(FASTA, Fetch()) == 10
    assert modality.named_file("MKT") is None and modality.named_file("a.fasta") == "a.fasta"
    assert modality.content("MK T", Fetch()) == modality.content(b">x\nMKT", Fetch())


def test_a_tokenizer_that_expects_blanks_gets_them(tmp_path: Path) -> None:
    words = tiny_sentence_encoder(tmp_path / "words")
    assert "token 0 of a sequence" in refusal("dab", words)
    spaced = SequenceModality(encoder=words, spaced=True).prepare("dab")
    tokenizer = hf.AutoTokenizer.from_pretrained(words)
    assert spaced.inputs["input_ids"][0].tolist() == tokenizer("d a b")["input_ids"]


def test_nothing_is_cut_and_bad_letters_are_named(encoder: str, tmp_path: Path) -> None:
    assert "has 65 tokens, and the limit is 64" in refusal("M" * 63, encoder)
    assert "has 6 tokens, and the limit is 5" in refusal("MKTA", encoder, max_length=5)
    assert "token 2 of a sequence, 'J', is unknown" in refusal("MKJ", encoder)
    assert "'k'" in (said := refusal("Mk", encoder)) and "`upper_case`" in said
    assert "has 10 letters, and the limit is 9" in refusal(FASTA, encoder, max_characters=9)
    assert "no record 'secnd': did you mean 'second'? (2 records)" in refusal(
        {"bytes": FASTA, "record": "secnd"}, encoder
    )
    assert "no FASTA file" in refusal({"bytes": b"MKT", "record": "x"}, encoder)
    for nothing in ("", " \n", b">name\n\n"):
        assert "no letters" in refusal(nothing, encoder)
    assert "truncated or damaged" in refusal(gzip.compress(FASTA)[:-9], encoder)
    assert "is not a text" in refusal(b"\x00\xff", encoder)
    for wrong in ({"text": 1}, {}, {"text": "M", "record": "x"}, {"text": "M", "path": "x"}):
        assert "expected a sequence as" in refusal(wrong, encoder)
    bomb = SequenceModality(encoder=encoder)
    with pytest.raises(MediaError, match="unpacks to more than 1,000 bytes"):
        bomb.load(gzip.compress(b"M" * 2000), Fetch(max_bytes=1000))


def test_a_recipe_that_the_encoder_does_not_take_is_refused(encoder: str) -> None:
    with pytest.raises(RecipeError, match="`max_length` is 100, but .* takes 64 tokens at most"):
        SequenceModality(encoder=encoder, max_length=100).prepare("MKT")
    with pytest.raises(RecipeError, match="`line_break` in the projector is for images"):
        fields = {"encoder": encoder, "projector": {"type": "mlp", "line_break": True}}
        validate_fields(SequenceModality, fields, where="the recipe")
