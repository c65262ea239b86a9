"""Pages of a PDF as images, and their sizes; or a MediaError."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from PIL import Image

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.errors import DAMAGE, require_package, undecodable
from multi_token.media.fetch import shorten

MAX_PAGES = 1_000
_POINTS = 72
_MAGIC = b"%PDF-"
_LOCK = threading.Lock()
"""PDFium may not run in two threads at once."""


def is_pdf(start: bytes) -> bool:
    """Return True if a file begins like a PDF."""
    return start[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_MAGIC)


def parse_page(source: Any) -> tuple[Any, int | None]:
    """Return the file of `{"path" or "bytes": ..., "page": 3}` and the page, counted from 1.

    Any other source is returned as it is, without a page. Raises MediaError.
    """
    if not isinstance(source, Mapping):
        return source, None
    given = {key: value for key, value in source.items() if value is not None}
    files, page = given.keys() & {"path", "bytes"}, given.get("page")
    is_page = page is None or (isinstance(page, int) and not isinstance(page, bool) and page > 0)
    if len(files) != 1 or not given.keys() <= {"path", "bytes", "page"} or not is_page:
        raise undecodable(
            'expected an image, or a page of a PDF as {"path": "a.pdf", "page": 3}, counted from 1 '
            f"and an item for each page, got {shorten(repr(source))}"
        )
    return given[files.pop()], page


def render_page(
    file: BinaryIO, page: int | None, *, label: str, dpi: int, max_pixels: int, max_pages: int
) -> Image.Image:
    """Return a page as RGB image over white. `page` None is the only page. Raises MediaError."""
    with _opened(file, page, label, dpi, max_pixels, max_pages) as (opened, size):
        image = opened.render(scale=dpi / _POINTS).to_pil().convert("RGB")
        assert image.size == size
        return image


def page_size(
    file: BinaryIO, page: int | None, *, label: str, dpi: int, max_pixels: int, max_pages: int
) -> tuple[int, int]:
    """Return width and height of the image that `render_page` gives. Raises MediaError."""
    with _opened(file, page, label, dpi, max_pixels, max_pages) as (_, size):
        return size


@contextmanager
def _opened(
    file: BinaryIO, page: int | None, label: str, dpi: int, max_pixels: int, max_pages: int
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """A page, and its size in pixels."""
    try:
        pdfium = require_package("pypdfium2", "document")
    except MultiTokenError as error:
        # An error of the item, because a client of a server may send any file.
        raise undecodable(str(error)) from None
    with _LOCK:
        document = None
        try:
            document = pdfium.PdfDocument(file)
            num_pages = len(document)
            _check_page(page, num_pages, label, max_pages)
            opened = document[(page or 1) - 1]
            width, height = (math.ceil(side * dpi / _POINTS) for side in opened.get_size())
            if width * height > max_pixels:
                raise undecodable(
                    f"page {page or 1} of {label} is {width} x {height} = {width * height:,} "
                    f"pixels at {dpi} dpi, and the limit is {max_pixels:,}; lower `page_dpi`, or "
                    "raise `max_pixels`"
                )
            yield opened, (width, height)
        except MediaError:
            raise
        except (pdfium.PdfiumError, *DAMAGE) as error:
            if "password" in str(error).lower():
                raise undecodable(
                    f"{label} is an encrypted PDF; save it without a password "
                    "(qpdf --decrypt WITH_PASSWORD.pdf WITHOUT.pdf)"
                ) from None
            raise undecodable(
                f"{label} is a PDF that is truncated or damaged ({error}); copy or download it "
                "again"
            ) from None
        finally:
            if document is not None:
                document.close()


def _check_page(page: int | None, num_pages: int, label: str, max_pages: int) -> None:
    if num_pages > max_pages:
        raise undecodable(
            f"{label} has {num_pages:,} pages, and the limit is {max_pages:,}; give a part of it, "
            "or raise `max_pages`"
        )
    if page is None and num_pages != 1:
        raise undecodable(
            f"{label} is a PDF of {num_pages:,} pages; name the one to show: "
            '{"path": "a.pdf", "page": 1}, and an item for each page'
        )
    if page is not None and page > num_pages:
        raise undecodable(f"{label} has {num_pages:,} pages, and the item names page {page:,}")
