"""Damaged and hostile media in real workers: decoded or refused with 4xx, without memory growth.

5,000 mutated files (`slow`), and 200 of the same kind.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multi_token.media.examples import example_volume
from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import MediaLimits
from multi_token.serve.media.pool import MediaPool
from multi_token.testing.files import noise_frames, recordings, tone, write_pdf, write_video
from multi_token.types import Media

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
GROWTH = 1.05
"""Largest ratio of the workers' memory after the second half to that after the first."""


@pytest.fixture(scope="module")
def pool(all_modalities: dict[str, Any]) -> Iterator[MediaPool]:
    made = MediaPool(
        all_modalities,
        num_workers=1,
        timeout_s=5.0,
        memory_bytes=512 * MIB,
        limits=MediaLimits(max_bytes=8 * MIB, max_prepared_bytes=64 * MIB),
    )
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    """(modality, valid file) for each file format."""
    folder = tmp_path_factory.mktemp("seeds")
    found: list[tuple[str, bytes]] = []
    noise = Image.effect_noise((48, 32), 80).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF"):
        if kind not in Image.SAVE and kind != "AVIF":
            continue
        file = io.BytesIO()
        noise.save(file, kind)
        found.append(("image", file.getvalue()))
        if kind != "PPM":  # its first bytes could begin a text
            found.append(("joint", file.getvalue()))
    import soundfile

    for kind, subtype in (
        ("WAV", "PCM_16"),
        ("WAV", "IMA_ADPCM"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
        ("AIFF", "PCM_16"),
        ("AU", "ULAW"),
        ("CAF", "PCM_16"),
    ):
        file = io.BytesIO()
        soundfile.write(file, tone(0.5, 16_000), 16_000, subtype, format=kind)
        found += [("speech", file.getvalue()), ("sound", file.getvalue())]
    for name, codec in (
        ("a.mp4", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.gif", "gif"),
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),
        ("a.mkv", "ffv1"),
        ("a.flv", "flv"),
    ):
        path = write_video(folder / name, noise_frames(8), codec=codec)
        found += [("video", Path(path).read_bytes())] * 2
    pdf = write_pdf(folder / "a.pdf", ["some words of a page\nand a line"] * 2).read_bytes()
    page = b"<html><head><title>a</title></head><body><p>b<br>c</p><pre> d </pre></body></html>"
    found += [("document", pdf)] * 4 + [
        ("document", page),
        ("document", "Ünïcode. Words!".encode()),
    ]
    one_page = write_pdf(folder / "b.pdf", ["a page"]).read_bytes()
    found += [("timeseries", data) for data in recordings().values()]
    found += [("sequence", b">one two\nMKTAYIAKQR\n>three\nGAVL\n"), ("volume", example_volume())]
    found += [("volume", gzip.compress(example_volume())), ("image", one_page)]
    for name, shape in (("vector", (3, 4)), ("timeseries", (40, 2))):
        file = io.BytesIO()
        np.save(file, np.random.default_rng(0).normal(size=shape).astype(np.float32))
        found += [(name, file.getvalue())] * 2
    return found


def mutated(data: bytes, chance: random.Random, others: list[tuple[str, bytes]]) -> bytes:
    """The file with one to four random faults, as fuzzers make them."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(out)) if out else 0
        # half of the faults are in the header, which decides most
        at = min(at, chance.randrange(128)) if chance.random() < 0.5 else at
        end = at + chance.choice((1, 2, 4, 8, 64))
        kind = chance.randrange(8)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            out[at:end] = bytes(chance.randrange(256) for _ in range(end - at))
        elif kind == 2:
            out[at:end] = chance.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * (end - at)
        elif kind == 3:
            del out[at:end]
        elif kind == 4:
            out[at:at] = out[at:end] * chance.choice((1, 3, 50))
        elif kind == 5:
            del out[chance.randrange(len(out) + 1) :]
        elif kind == 6:
            other = chance.choice(others)[1]
            out[at:end] = other[at : end + 64]
        else:
            size = chance.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
            out[at : at + 4] = size.to_bytes(4, chance.choice(("little", "big")))
    return bytes(out)


def refusal_of(error: ServeError) -> str:
    """Status and code; the message must contain no path and no memory address."""
    message = str(error)
    assert 400 <= error.status < 500, message
    assert re.fullmatch(r"[\x20-\x7e]{1,300}", message), message
    assert "0x" not in message and not re.search(r"(^|\s)\S*/\S", message), message
    return f"{error.status} {error.code}"


def memory(pool: MediaPool) -> int:
    """Resident bytes of the workers and their forks."""
    total = 0
    for worker in pool._workers:
        assert worker._process is not None
        pid = worker._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (str(pid), *children):
            status = Path(f"/proc/{one}/status").read_text()
            total += int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024
    return total


async def decode(pool: MediaPool, name: str, data: bytes) -> str:
    try:
        await pool.prepare(Media(name, data))
    except ServeError as error:
        return refusal_of(error)
    return "read"


def fuzz(
    pool: MediaPool, seeds: list[tuple[str, bytes]], num_files: int, seed: int
) -> Counter[str]:
    chance = random.Random(seed)

    async def all_of_them() -> Counter[str]:
        counts: Counter[str] = Counter()
        for number in range(num_files):
            name, data = seeds[number % len(seeds)]
            counts[await decode(pool, name, mutated(data, chance, seeds))] += 1
        return counts

    return asyncio.run(all_of_them())


def test_the_files_are_valid_before_they_are_mutated(
    pool: MediaPool, seeds: list[tuple[str, bytes]]
) -> None:
    for name, data in seeds:
        assert asyncio.run(decode(pool, name, data)) == "read", (name, data[:16])


def test_200_mutated_files_are_read_or_refused(
    pool: MediaPool, seeds: list[tuple[str, bytes]]
) -> None:
    counts = fuzz(pool, seeds, 200, seed=0)
    assert counts["read"] > 10 and counts["400 invalid_media"] > 50, counts


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_5000_mutated_files_leave_no_trace(pool: MediaPool, seeds: list[tuple[str, bytes]]) -> None:
    counts = fuzz(pool, seeds, 2_500, seed=1)
    before = memory(pool)
    counts += fuzz(pool, seeds, 2_500, seed=2)
    assert memory(pool) < GROWTH * before
    assert counts.total() == 5_000
    assert counts["read"] > 500 and counts["400 invalid_media"] > 1_000, counts
    for name, data in seeds:
        assert asyncio.run(decode(pool, name, data)) == "read"


def pages_within_pages(depth: int) -> bytes:
    """A PDF of ten to the power of `depth` pages, each level naming the next ten times."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    for level in range(depth):
        kids = b" ".join([b"%d 0 R" % (level + 3)] * 10)
        objects.append(b"<< /Type /Pages /Count 1 /Kids [%s] >>" % kids)
    objects.append(b"<< /Type /Page /MediaBox [0 0 9 9] >>")
    return pdf_of(objects)


def form_within_itself() -> bytes:
    """A PDF whose page shows a form that shows itself, twice."""
    resources = b"/Resources << /XObject << /A 4 0 R >> >>"
    body = b"/A Do /A Do"
    return pdf_of(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] %s /Contents 4 0 R >>" % resources,
            b"<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] %s " % resources
            + b"/Length %d >>\n" % len(body)
            + b"stream\n%s\nendstream" % body,
        ]
    )


def pdf_of(objects: list[bytes]) -> bytes:
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    end = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + end


def test_a_document_without_an_end_is_stopped(pool: MediaPool) -> None:
    for data in (pages_within_pages(9), form_within_itself()):
        assert asyncio.run(decode(pool, "document", data)) != "read"
    assert asyncio.run(decode(pool, "document", b"Still here.")) == "read"


def test_15000_nested_tags_are_refused(pool: MediaPool) -> None:
    page = b"<html><body>" + b"<div>" * 15_000
    assert asyncio.run(decode(pool, "document", page)) != "read"
    assert asyncio.run(decode(pool, "document", b"Still here.")) == "read"
