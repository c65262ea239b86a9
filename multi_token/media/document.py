"""Bytes -> the text of a document, or a MediaError; and text -> chunks for a sentence encoder."""

from __future__ import annotations

import codecs
import io
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from multi_token.media.errors import DAMAGE, require_package, undecodable
from multi_token.media.sniff import BINARY, NOT_PROSE, describe, format_name

MAX_PAGES = 1_000
MAX_CHARACTERS = 2_000_000

_EXPECTED = "expected a plain text (also Markdown), a web page or a PDF"
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_MARKUP = 16
"""Bytes of a web page per character of the limit: the parser reads all of it, so the bytes are
bounded first."""

_WEB_PAGE = re.compile(
    rb"(?:\s|<\?xml[^>]*>|<!--(?:(?!-->).)*-->)*<(?:!doctype\s+html|html|head|body)[\s>]",
    re.I | re.S,
)
_INVISIBLE_TAGS = frozenset(("script", "style", "template", "noscript"))
_BLOCK_TAGS = re.compile(
    "address|article|aside|blockquote|body|caption|d[dlt]|div|figcaption|figure|footer|form|h[1-6]"
    "|header|hr|li|main|nav|ol|p|pre|section|summary|table|title|tr|ul"
)

# pypdf also trips over wrong types inside of a damaged file.
_DAMAGE = (*DAMAGE, AssertionError, AttributeError)

# Borders at which a text may be cut, the best first. An abbreviation ("Dr. Who") counts as the end
# of a sentence: that only moves the end of a chunk.
_BORDERS = (
    re.compile(
        r"""(?<![.!?…])[.!?…]+["'”’»)\]]*(?=\s)  # the end of a sentence, before a blank
        | [。！？]+[”’」』）]*  # the same in scripts without blanks
        | \n(?=[^\S\n]*\n)  # the end of a paragraph
        """,
        re.VERBOSE,
    ),
    re.compile(r"\n"),
    re.compile(r"(?<=\S)(?=\s)"),
)


class PdfText(str):
    """The text of a PDF, and its number of pages."""

    num_pages: int

    def __new__(cls, text: str, num_pages: int) -> PdfText:
        made = super().__new__(cls, text)
        made.num_pages = num_pages
        return made


def read_document(
    data: bytes,
    *,
    name: str = "",
    max_pages: int = MAX_PAGES,
    max_characters: int = MAX_CHARACTERS,
) -> str:
    """Return the text of plain text (UTF-8, or UTF-16 with a BOM), Markdown, a web page or a PDF.

    The first bytes decide the format. Plain text and Markdown are unchanged, a web page gives its
    title and its visible text, a PDF its pages in order.

    Raises:
        MediaError: The bytes are no document or over a limit; `name` opens the message.
        MultiTokenError: The package that reads the format is not installed.
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
    """Return a text after the checks of `read_document`. Raises MediaError."""
    label = name or "the document"
    _check_length(len(text), label, max_characters)
    if not text.strip():
        raise undecodable(f"{label} has no text, only blanks; leave it out of the rows")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold it, and no tokenizer takes it
        raise undecodable(
            f"{label} has half a UTF-16 character at position {error.start:,}; write the complete "
            "one, or leave it out"
        ) from None
    return text


def split_document(
    text: str,
    *,
    offsets: Callable[[str], Sequence[tuple[int, int]]],
    max_tokens: int,
    prefix: str = "",
) -> list[str]:
    """Return a text in chunks of at most `max_tokens` tokens, the fewest that sentences allow.

    A sentence that is longer than a chunk is cut at the end of a line, else at a blank, else
    between tokens. Only blanks around chunks are left out.

    Args:
        text: The text.
        offsets: Function of a text that returns the characters [start, end) of each token.
        max_tokens: Tokens of a chunk, with `prefix`.
        prefix: Text that will be written before each chunk.
    """
    starts = [start for start, _ in offsets(text)]
    borders = [
        [*(found.end() for found in border.finditer(text)), len(text)] for border in _BORDERS
    ]
    most = max_tokens - len(offsets(prefix))
    chunks: list[str] = []
    begin = 0
    while begin < len(text):
        available = most
        # Tokens are counted in the complete text and checked in the chunk itself.
        while True:
            end = _chunk_end(begin, available, starts, borders, len(text))
            chunk = text[begin:end].strip()
            # A word that was cut may have more tokens by itself than it had in the text.
            excess = len(offsets(prefix + chunk)) - max_tokens
            if excess <= 0 or available <= 1:
                break
            available = max(1, available - excess)
        if chunk:
            chunks.append(chunk)
        begin = end
    return chunks


def _chunk_end(
    begin: int,
    num_tokens: int,
    starts: Sequence[int],
    borders: Sequence[Sequence[int]],
    num_characters: int,
) -> int:
    """End of a chunk of up to `num_tokens` tokens that starts at the character `begin`."""
    next_token = bisect_left(starts, begin) + num_tokens
    limit = starts[next_token] if next_token < len(starts) else num_characters
    for ends in borders:
        place = bisect_right(ends, limit) - 1
        if place >= 0 and ends[place] > begin:
            return ends[place]
    return max(limit, begin + 1)  # several tokens may share a character


def _decode_text(data: bytes, label: str, max_characters: int) -> str:
    # Texts to a decoder, but not documents that a person wrote.
    if name := format_name(data, NOT_PROSE):
        raise undecodable(f"{label} begins like {name}; {_EXPECTED}")
    _check_length(len(data) // 4, label, max_characters)  # no character has more than 4 bytes
    encoding = next((code for mark, code in _BOMS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        position = error.start
    else:
        if "\0" not in text:
            return text
        position = -1
    # Known first bytes or a NUL: a binary file, and not a text in another encoding.
    if b"\0" in data or format_name(data, BINARY):
        raise undecodable(f"{label} is not a text: {describe(data)}; {_EXPECTED}")
    raise undecodable(
        f"{label} is not {encoding.upper()} text (byte 0x{data[position]:02X} at position "
        f"{position:,}); save it as UTF-8"
    )


def _text_of_web_page(data: bytes, label: str, max_characters: int) -> str:
    require_package("bs4", "document")
    import warnings

    from bs4 import BeautifulSoup, NavigableString, Tag, XMLParsedAsHTMLWarning

    _check_length(len(data) // _MARKUP, label, max_characters)
    with warnings.catch_warnings():
        # A page with an XML declaration is still a web page.
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        page = BeautifulSoup(data, "html.parser")
    # Tag -> the block around it, None if it is invisible. One pass and no recursion, since markup
    # may be nested deeper than the stack.
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
        # Comments and scripts are subclasses of NavigableString.
        elif type(node) is NavigableString and block is not None:
            if block is not last:
                pieces.append("\n\n")
            # Line breaks in the markup mean nothing; those of the text come from its blocks.
            pieces.append(node if block.name == "pre" else re.sub(r"\s+", " ", node))
            last = block
    lines = (line.strip() for line in "".join(pieces).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _text_of_pdf(data: bytes, label: str, max_pages: int, max_characters: int) -> str:
    require_package("pypdf", "document")
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    pages: list[str] = []
    num_characters = 0
    try:
        reader = PdfReader(io.BytesIO(data))
        # Many PDFs are encrypted with an empty user password.
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
            "probably scanned images; run text recognition (OCR) on it first "
            "(ocrmypdf IN.pdf OUT.pdf)"
        )
    return PdfText("\n".join(pages), num_pages)


def _texts(reader: Any) -> Iterator[str]:
    for page in reader.pages:
        text = page.extract_text()
        # pypdf returns characters beyond 16 bits as two halves; a tokenizer takes only joined ones.
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def _check_length(num_characters: int, label: str, max_characters: int) -> None:
    if num_characters > max_characters:
        raise undecodable(
            f"{label} has {num_characters:,} characters or more, and the limit is "
            f"{max_characters:,}; give a part of it, or raise max_characters"
        )
