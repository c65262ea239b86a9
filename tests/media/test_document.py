"""media/document.py: every kind of document gives its text, and nothing of it is lost in chunks."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multi_token.errors import MediaError
from multi_token.media.document import as_document, read_document, split_document
from multi_token.testing.files import write_pdf

TEXT = "# Notes\n\nThe café in Oslo is open. Ask Anna — she has the key!\n"
PAGE = b"""<!DOCTYPE html>
<html><head><title>The  caf&eacute;</title><style>p { color: red }</style>
<script>var hidden = 1;</script></head>
<body><!-- a note --><h1>Open
today</h1><p>Ask <b>An</b>na,<br>or Ben.</p><template>later</template>
<ul><li>tea<li>cake</ul><div hidden>secret</div><pre>a
  b</pre></body></html>"""


def image(kind: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, kind)
    return data.getvalue()


def pdf(folder: Path, *pages: str) -> bytes:
    return write_pdf(folder / "document.pdf", pages).read_bytes()


def encrypted(folder: Path, user_password: str) -> bytes:
    from pypdf import PdfWriter

    writer = PdfWriter(io.BytesIO(pdf(folder, "A secret.")))
    writer.encrypt(user_password, "owner", algorithm="RC4-128")
    data = io.BytesIO()
    writer.write(data)
    return data.getvalue()


def words(text: str) -> list[tuple[int, int]]:
    """A tokenizer whose tokens are words and marks; of a long word, pieces of 5 letters."""
    return [found.span() for found in re.finditer(r"\w{1,5}|[^\w\s]", text)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_plain_text_and_markdown_stay_as_they_are(encoding: str) -> None:
    assert read_document(TEXT.encode(encoding)) == TEXT


def test_a_web_page_gives_its_title_and_what_is_seen() -> None:
    expected = "The café\n\nOpen today\n\nAsk Anna,\nor Ben.\n\ntea\n\ncake\n\na\nb"
    assert read_document(PAGE) == expected
    declared = b'<?xml version="1.0" encoding="utf-8"?>\n<!-- x -->\n' + PAGE
    assert read_document(declared) == expected


def test_a_web_page_in_its_own_encoding_is_read_in_it() -> None:
    page = '<html><head><meta charset="iso-8859-1"></head><body>café</body></html>'
    assert read_document(page.encode("iso-8859-1")) == "café"


def test_a_web_page_nested_ten_thousand_deep_is_read() -> None:
    assert read_document(b"<html>" + b"<div>" * 10_000 + b"deep") == "deep"


def test_a_pdf_gives_its_pages_in_order(tmp_path: Path) -> None:
    data = pdf(tmp_path, "The first page.\nIt has (two) lines.", "", "The last.")
    text = "The first page. It has (two) lines. The last."
    assert " ".join(read_document(data).split()) == text


def test_a_pdf_that_asks_for_no_password_is_read_though_it_is_encrypted(tmp_path: Path) -> None:
    assert read_document(encrypted(tmp_path, "")) == "A secret."


def test_the_first_bytes_decide_the_kind_and_not_the_name(tmp_path: Path) -> None:
    assert read_document(pdf(tmp_path, "Words."), name="a.txt") == "Words."
    assert read_document(PAGE, name="page.pdf").startswith("The café")
    assert read_document(b"<p>Markdown may hold tags.</p>", name="a.html").startswith("<p>")


BAD: dict[str, tuple[Any, str]] = {
    "empty": (lambda f: b"", r"it is empty \(0 bytes\)"),
    "blanks": (lambda f: b" \n\t\n", "it has no text, only blanks"),
    "page_without_text": (lambda f: b"<html><script>1</script></html>", "no text, only blanks"),
    "latin1": (lambda f: b"caf\xe9 au lait", "it is not UTF-8 text .byte 0xE9 at position 3."),
    "junk": (lambda f: bytes(range(256)) * 4, "it is not a text: its first bytes are"),
    "nul": (lambda f: b"a\0b", "it is not a text"),
    "png": (lambda f: image("PNG"), "it begins like a PNG image; expected a plain text"),
    "jpeg": (lambda f: image("JPEG"), "it begins like a JPEG image"),
    "webp": (lambda f: image("WEBP"), "it begins like a RIFF file"),
    "svg": (lambda f: b'<svg xmlns="x"></svg>', "it begins like an SVG drawing"),
    "docx": (lambda f: b"PK\x03\x04\x14\0\x06\0\x08\0", "ZIP archive .*docx"),
    "rtf": (lambda f: b"{\\rtf1 Hello}", "rich text"),
    "scanned": (lambda f: pdf(f, "", ""), "a PDF of 2 pages without text, .* run text recognition"),
    "no_pages": (lambda f: pdf(f), "a PDF of 0 pages without text"),
    "encrypted": (lambda f: encrypted(f, "secret"), "it is an encrypted PDF; save it without"),
    "cut": (lambda f: b"%PDF-1.4\n" + b"x" * 100, "truncated or damaged"),
    "long_text": (lambda f: b"a" * 1001, "has 1,001 characters or more, and the limit is 1,000"),
    "huge_text": (lambda f: b"\xff" * 9000, "characters or more, and the limit"),
    "long_page": (lambda f: b"<html>" + b"a" * 2000, "has 2,000 characters"),
    "huge_page": (lambda f: b"<html>" + b"<br>" * 9000, "characters or more, and the limit"),
    "many_pages": (lambda f: pdf(f, *"abcdef"), "it has 6 pages, and the limit is 5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_one_sentence(kind: str, tmp_path: Path) -> None:
    data, message = BAD[kind]
    with pytest.raises(MediaError, match=message) as caught:
        read_document(data(tmp_path), name="it", max_pages=5, max_characters=1000)
    assert caught.value.kind == "undecodable"
    assert str(caught.value).startswith("it ") and "\n" not in str(caught.value)


def test_a_pdf_over_the_limit_is_refused_before_its_last_page_is_read(tmp_path: Path) -> None:
    data = pdf(tmp_path, "a" * 60, "b" * 60, "c" * 60)
    with pytest.raises(MediaError, match=r"has 120 characters or more, and the limit is 100"):
        read_document(data, max_characters=100)


def test_a_pdf_damaged_anywhere_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    whole = pdf(tmp_path, "One.", "Two.")
    outcomes = set()
    for place in range(0, len(whole), 7):
        for data in (whole[:place], whole[:place] + b"\xff<<\0" + whole[place + 4 :]):
            try:
                read_document(data, name="it")
                outcomes.add("read")
            except MediaError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_chunks_are_as_few_as_whole_sentences_allow() -> None:
    text = "One two three. Four five! Six?\n\nSeven eight nine ten. Eleven 'twelve.' Thirteen"
    assert split_document(text, offsets=words, max_tokens=9) == [
        "One two three. Four five! Six?",
        "Seven eight nine ten.",
        "Eleven 'twelve.' Thirteen",
    ]
    assert split_document(text, offsets=words, max_tokens=100) == [text]


def test_a_paragraph_and_a_full_stop_without_a_blank_are_borders() -> None:
    assert split_document("A title\n \nIts text", offsets=words, max_tokens=3) == [
        "A title",
        "Its text",
    ]
    assert split_document(
        "天气很好。我们走吧。", offsets=lambda t: [(i, i + 1) for i in range(len(t))], max_tokens=6
    ) == [
        "天气很好。",
        "我们走吧。",
    ]


def test_a_long_sentence_is_cut_at_a_line_else_at_a_blank_else_between_tokens() -> None:
    assert split_document("a b\nc d e f g", offsets=words, max_tokens=4) == ["a b", "c d e f", "g"]
    assert split_document("abcdefghijklmnop", offsets=words, max_tokens=2) == [
        "abcdefghij",
        "klmnop",
    ]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("prefix", ["", "to: "])
def test_nothing_is_lost_and_no_chunk_is_too_long(max_tokens: int, prefix: str) -> None:
    text = TEXT * 3 + "x" * 40 + " \u00a0 " + "Wait... what?! " * 4 + "\n\n\n天气很好。" * 3
    chunks = split_document(text, offsets=words, max_tokens=max_tokens + 2, prefix=prefix)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert max(len(words(prefix + chunk)) for chunk in chunks) <= max_tokens + 2
    assert all(chunk == chunk.strip() != "" for chunk in chunks)


def test_a_chunk_that_has_more_tokens_alone_than_in_the_text_is_made_shorter() -> None:
    def wide(text: str) -> list[tuple[int, int]]:
        # the first word of a text counts twice, as a piece of a word often does
        return words(text)[:1] + words(text)

    chunks = split_document("a b c d e f g", offsets=wide, max_tokens=3)
    assert "".join("".join(chunks).split()) == "abcdefg"
    assert max(len(wide(chunk)) for chunk in chunks) <= 3


def test_a_text_of_the_row_is_checked_alike() -> None:
    assert as_document(TEXT) == TEXT
    with pytest.raises(MediaError, match="no text, only blanks"):
        as_document(" \n")
    with pytest.raises(MediaError, match="5 characters or more, and the limit is 4"):
        as_document("abcde", max_characters=4)
    with pytest.raises(MediaError, match="half a UTF-16 character at position 1"):
        as_document("a\ud83d")


def test_texts_that_make_patterns_try_again_and_again_take_no_longer() -> None:
    # each of these would take hours if the work grew with the square, or worse
    dots = "." * 1_000_000
    assert split_document(dots, offsets=lambda t: [(0, 1)] * bool(t), max_tokens=1) == [dots]
    comments = "<!-- a -->" * 1000
    assert read_document(comments.encode()) == comments
