"""Pages of a PDF as items of `image` and frames of `video`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
import pytest

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.modalities.image import ImageModality
from multi_token.modalities.video import VideoModality
from multi_token.testing.encoders import tiny_image_encoder
from multi_token.testing.files import write_pdf

PAGES = ["A first page.", "A second page\nof two lines.", ""]


@pytest.fixture(scope="module")
def pdf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pdf(tmp_path_factory.mktemp("pdf") / "a.pdf", PAGES))


def image(**fields: Any) -> ImageModality:
    return ImageModality(encoder="none", **fields)


def refusal(source: Any, **fields: Any) -> str:
    for read in (image(**fields).load, image(**fields).size_from_header):
        with pytest.raises(MediaError) as caught:
            read(source, Fetch())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dpi", [72, 144, 100])
def test_a_page_is_the_image_that_pdfium_renders_and_its_size_is_known_before(
    pdf: str, dpi: int
) -> None:
    oracle = pypdfium2.PdfDocument(pdf)
    modality = image(page_dpi=dpi)
    shown = []
    for number in range(1, 4):
        for source in (
            {"path": pdf, "page": number},
            {"bytes": Path(pdf).read_bytes(), "page": number, "path": None},
        ):
            found = modality.load(source, Fetch())
            theirs = oracle[number - 1].render(scale=dpi / 72).to_pil().convert("RGB")
            assert found.mode == "RGB" and np.array_equal(found, theirs)
            assert modality.size_from_header(source, Fetch()) == found.size
        shown.append(modality.content(source, Fetch()))
    assert len(set(shown)) == 3, "pages of one file are different items"
    oracle.close()


def test_a_pdf_of_one_page_needs_no_number(tmp_path: Path) -> None:
    path = str(write_pdf(tmp_path / "one.pdf", ["The only page."]))
    assert np.array_equal(
        image().load(path, Fetch()), image().load({"path": path, "page": 1}, Fetch())
    )


def test_pages_that_are_not_there_or_over_a_limit_are_refused(pdf: str, tmp_path: Path) -> None:
    assert "is a PDF of 3 pages; name the one to show" in refusal(pdf)
    assert "has 3 pages, and the item names page 4" in refusal({"path": pdf, "page": 4})
    assert "has 3 pages, and the limit is 2" in refusal({"path": pdf, "page": 1}, max_pages=2)
    said = refusal({"path": pdf, "page": 1}, max_pixels=1_000_000)
    assert "1190 x 1684" in said and "lower `page_dpi`" in said
    for wrong in ({"path": pdf, "page": 0}, {"path": pdf, "pages": [1, 2]}, {"page": 1}):
        assert "an item for each page" in refusal(wrong)
    assert "truncated or damaged" in refusal({"bytes": b"%PDF-1.4 cut", "page": 1})
    blank = tmp_path / "a.png"
    import PIL.Image

    PIL.Image.new("RGB", (9, 9)).save(blank)
    assert "is no PDF, and the item names page 1; remove `page`" in refusal(
        {"path": str(blank), "page": 1}
    )


def test_pages_are_frames_of_a_video(pdf: str, tmp_path: Path) -> None:
    modality = VideoModality(encoder=tiny_image_encoder(tmp_path / "clip"), num_frames=2)
    pages = [{"path": pdf, "page": number} for number in (1, 2)]
    frames = modality.load(pages, Fetch())
    assert [frame.size for frame in frames] == [(1190, 1684)] * 2
    assert modality.num_features_from_header(pages, Fetch()) == 2
    assert modality.content(pages, Fetch()) != modality.content(pages[::-1], Fetch())
