"""Bytes in, the text of a document out; and a text cut into chunks for a sentence encoder."""

from __future__ import annotations

import codecs
import io
import re
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from multi_token.errors import MultiTokenError
from multi_token.media.errors import undecodable

MAX_PAGES = 1_000
MAX_CHARACTERS = 2_000_000

_INSTALL = 'pip install "multi_token[document]"'
_EXPECTED = "expected a plain text (also Markdown), a web page or a PDF"
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_MARKUP = 16
"""Bytes of a web page for each character of the limit: it is parsed whole, so it is bounded first.
"""

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89png", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"gif8", "a GIF picture"),
    (b"ii*\0", "a TIFF picture"),
    (b"mm\0*", "a TIFF picture"),
    (b"riff", "a RIFF file (WebP, WAV or AVI)"),
    (b"pk\x03\x04", "a ZIP archive (.docx, .odt and .epub are such)"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93numpy", "a NumPy array"),
    (b"id3", "an MP3"),
    (b"oggs", "an Ogg file"),
)
# text to a decoder, but not what somebody would read
_NO_PROSE: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "an SVG drawing"),
    (b"{\\rtf", "a rich text (RTF)"),
    (b"%!ps", "a PostScript document"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
_WEB_PAGE = re.compile(
    rb"(?:\s|<\?xml[^>]*>|<!--(?:(?!-->).)*-->)*<(?:!doctype\s+html|html|head|body)[\s>]",
    re.I | re.S,
)
_INVISIBLE_TAGS = frozenset(("script", "style", "template", "noscript"))
_BLOCK_TAGS = re.compile(
    "address|article|aside|blockquote|body|caption|d[dlt]|div|figcaption|figure|footer|form|h[1-6]"
    "|header|hr|li|main|nav|ol|p|pre|section|summary|table|title|tr|ul"
)

# what pypdf raises on damaged bytes beside errors of its own; found by tests that damage bytes
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

# Borders at which a text may be cut, the best first. An abbreviation ("Dr. Who") passes for the end
# of a sentence: that moves the end of a chunk, and nothing is lost by it.
_BORDERS = (
    re.compile(
        r"""(?<![.!?…])[.!?…]+["'”’»)\]]*(?=\s)  # the end of a sentence, where a blank follows
        | [。！？]+[”’」』）]*  # the same in scripts that write no blanks
        | \n(?=[^\S\n]*\n)  # the end of a paragraph
        """,
        re.VERBOSE,
    ),
    re.compile(r"\n"),
    re.compile(r"(?<=\S)(?=\s)"),
)


def read_document(
    data: bytes,
    *,
    name: str = "",
    max_pages: int = MAX_PAGES,
    max_characters: int = MAX_CHARACTERS,
) -> str:
    """The text of a plain text (UTF-8, or UTF-16 with its mark), Markdown, web page or PDF.

    Which of them it is, its first bytes tell. Plain text and Markdown stay as they are, a web page
    gives its title and what is seen of it, a PDF its pages one after another. `name` opens the
    error message. Raises `MediaError(kind="undecodable")`, and MultiTokenError where the package
    that reads the format is missing.
    """
    label = name or "the document"
    if not data:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    if data[:1024].lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"%PDF-"):
        return _text_of_pdf(data, label, max_pages, max_characters)
    if _WEB_PAGE.match(data.removeprefix(codecs.BOM_UTF8)):
        text = _text_of_web_page(data, label, max_characters)
    else:
        text = _decode_text(data, label, max_characters)
    return as_document(text, name=name, max_characters=max_characters)


def as_document(text: str, *, name: str = "", max_characters: int = MAX_CHARACTERS) -> str:
    """A text that is there already, checked. Raises `MediaError(kind="undecodable")`."""
    label = name or "the document"
    _check_length(len(text), label, max_characters)
    if not text.strip():
        raise undecodable(f"{label} has no text, only blanks; leave it out of the rows")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell it, and no tokenizer takes it
        raise undecodable(
            f"{label} has half a character (a lone surrogate) at position {error.start:,}; "
            "write the whole one, or leave it out"
        ) from None
    return text


def split_document(
    text: str,
    *,
    offsets: Callable[[str], Sequence[tuple[int, int]]],
    max_tokens: int,
    prefix: str = "",
) -> list[str]:
    """The text in chunks of at most `max_tokens` tokens, as few as whole sentences allow.

    `offsets`: a text -> the characters [start, end) of each of its tokens, in order. `prefix`: what
    will be written before each chunk, and counts. A sentence that is longer than a chunk is cut at
    the end of a line, else at a blank, else between tokens. Blanks around chunks are left out,
    nothing else.
    """
    starts = [start for start, _ in offsets(text)]
    borders = [
        [*(found.end() for found in border.finditer(text)), len(text)] for border in _BORDERS
    ]
    most = max_tokens - len(offsets(prefix))
    chunks: list[str] = []
    begin = 0
    while begin < len(text):
        room = most
        while True:
            end = _chunk_end(begin, room, starts, borders, len(text))
            chunk = text[begin:end].strip()
            # a word that was cut may have more tokens by itself than it had in the text
            excess = len(offsets(prefix + chunk)) - max_tokens
            if excess <= 0 or room <= 1:
                break
            room = max(1, room - excess)
        if chunk:
            chunks.append(chunk)
        begin = end
    return chunks


def _chunk_end(
    begin: int,
    room: int,
    starts: Sequence[int],
    borders: Sequence[Sequence[int]],
    num_characters: int,
) -> int:
    """Return the end of a chunk that starts at `begin` and has room for N tokens."""
    next_token = bisect_left(starts, begin) + room
    limit = starts[next_token] if next_token < len(starts) else num_characters
    for ends in borders:
        place = bisect_right(ends, limit) - 1
        if place >= 0 and ends[place] > begin:
            return ends[place]
    return max(limit, begin + 1)  # several tokens may share a character


def _decode_text(data: bytes, label: str, max_characters: int) -> str:
    _check_kind(_NO_PROSE, data, label)
    _check_length(len(data) // 4, label, max_characters)  # no character has more than 4 bytes
    encoding = next((code for mark, code in _BOMS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        _check_kind(_MAGIC, data, label)
        if b"\0" not in data:
            raise undecodable(
                f"{label} is not {encoding.upper()} text (byte 0x{data[error.start]:02X} at "
                f"position {error.start:,}); save it as UTF-8"
            ) from None
        text = "\0"
    if "\0" in text:
        _check_kind(_MAGIC, data, label)
        raise undecodable(f"{label} is not a text: its first bytes are {data[:12]!r}; {_EXPECTED}")
    return text


def _check_kind(kinds: Sequence[tuple[bytes, str]], data: bytes, label: str) -> None:
    start = data[:64].lstrip(codecs.BOM_UTF8 + b" \t\r\n").lower()
    for magic, what in kinds:
        if start.startswith(magic):
            raise undecodable(f"{label} begins like {what}; {_EXPECTED}")


def _text_of_web_page(data: bytes, label: str, max_characters: int) -> str:
    try:
        from bs4 import BeautifulSoup, NavigableString, Tag, XMLParsedAsHTMLWarning
    except ImportError:
        raise MultiTokenError(f"web pages need Beautiful Soup: {_INSTALL}") from None
    import warnings

    _check_length(len(data) // _MARKUP, label, max_characters)
    with warnings.catch_warnings():
        # a page that opens with an XML declaration is a page all the same
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        page = BeautifulSoup(data, "html.parser")
    # tag -> the block that it stands in, None where it is not seen; one pass, however deep it goes
    blocks: dict[int, Tag | None] = {id(page): page}
    pieces: list[str] = []
    last: Tag | None = None
    for node in page.descendants:
        block = blocks[id(node.parent)]
        if isinstance(node, Tag):
            if node.name in _INVISIBLE_TAGS or node.has_attr("hidden"):
                block = None
            elif block is not None and _BLOCK_TAGS.fullmatch(node.name):
                block = node
            blocks[id(node)] = block
            if node.name == "br" and block is not None:
                pieces.append("\n")
        elif type(node) is NavigableString and block is not None:  # not a comment
            if block is not last:
                pieces.append("\n\n")
            # line breaks in the markup mean nothing: those of the text come from its blocks
            pieces.append(node if block.name == "pre" else re.sub(r"\s+", " ", node))
            last = block
    lines = (line.strip() for line in "".join(pieces).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _text_of_pdf(data: bytes, label: str, max_pages: int, max_characters: int) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError
    except ImportError:
        raise MultiTokenError(f"PDF documents need pypdf: {_INSTALL}") from None

    pages: list[str] = []
    num_characters = 0
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise FileNotDecryptedError
        num_pages = len(reader.pages)
        if num_pages > max_pages:
            raise undecodable(
                f"{label} has {num_pages:,} pages, and the limit is {max_pages:,}; give a part of "
                "it, or raise max_pages"
            )
        for text in _texts(reader):
            num_characters += len(text)
            _check_length(num_characters, label, max_characters)
            pages.append(text)
    except (DependencyError, FileNotDecryptedError):
        raise undecodable(
            f"{label} is an encrypted PDF; save it without a password "
            "(qpdf --decrypt WITH_PASSWORD.pdf WITHOUT.pdf)"
        ) from None
    except (PyPdfError, *_DAMAGE) as error:
        raise undecodable(
            f"{label} is a PDF that is truncated or damaged ({error or type(error).__name__}); "
            "copy or download it again"
        ) from error
    if not any(pages):
        raise undecodable(
            f"{label} is a PDF of {num_pages:,} page{'' if num_pages == 1 else 's'} without text, "
            "pictures of pages most likely; run text recognition (OCR) on it first "
            "(ocrmypdf IN.pdf OUT.pdf)"
        )
    return "\n".join(pages)


def _texts(reader: Any) -> Iterator[str]:
    for page in reader.pages:
        text = page.extract_text()
        # halves of characters beyond 16 bits, joined; a tokenizer takes no lone ones
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def _check_length(num_characters: int, label: str, max_characters: int) -> None:
    if num_characters > max_characters:
        raise undecodable(
            f"{label} has {num_characters:,} characters or more, and the limit is "
            f"{max_characters:,}; give a part of it, or raise max_characters"
        )
