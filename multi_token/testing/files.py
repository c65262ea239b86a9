"""Real files to test with: audio, video, PDF and recordings."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def tone(seconds: float, rate: int = 16_000, *, hertz: float = 440.0, num_channels: int = 1) -> Any:
    """Return a tone with a soft beat, float32 [samples], or [samples, channels] for several."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * hertz * time) * (0.7 + 0.3 * np.sin(2 * np.pi * 3 * time))
    wave = wave.astype(np.float32)
    if num_channels == 1:
        return wave
    # Channels differ, so that a test sees if they are averaged or one is taken.
    return np.stack([wave * (1 - 0.2 * channel) for channel in range(num_channels)], axis=1)


def write_tone(
    path: Path,
    seconds: float,
    rate: int = 16_000,
    *,
    hertz: float = 440.0,
    num_channels: int = 1,
    format: str = "WAV",
    subtype: str | None = None,
) -> str:
    """Write a tone in any format of libsndfile; return the file's name."""
    import soundfile

    samples = tone(seconds, rate, hertz=hertz, num_channels=num_channels)
    soundfile.write(path, samples, rate, format=format, subtype=subtype)
    return str(path)


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: int = 10,
    codec: str = "libx264",
    **options: str,
) -> str:
    """Write frames uint8 [frames, height, width, 3] of even sizes; return the file's name.

    The suffix selects the container. `codec`: of FFmpeg (libx264, libvpx-vp9, mpeg4, gif);
    `options`: the codec's own.
    """
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        # yuv420p is what cameras write; it needs even sides.
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        # Without it PyAV writes no header for a video without frames.
        container.start_encoding()
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def noise_frames(
    num_frames: int, *, height: int = 48, width: int = 64, seed: int = 0
) -> np.ndarray:
    """Return random frames, uint8 [frames, height, width, 3]."""
    shape = (num_frames, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_pdf(path: Path, pages: Sequence[str]) -> Path:
    """Write a PDF with these pages, a line of text for each line; an empty page has no text."""
    page_ids = [4 + 2 * i for i in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in page_ids)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, text in zip(page_ids, pages, strict=True):
        # Written by hand, because no dependency writes PDF.
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
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    data += (
        f"xref\n0 {size}\n0000000000 65535 f \n{table}"
        f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    ).encode()
    path.write_bytes(data)
    return path


def recordings() -> dict[str, bytes]:
    """Return one recording of two channels in each format of series, by its suffix.

    `zip` is a WFDB record of format 16.
    """
    import pyarrow as pa
    import soundfile
    from pyarrow import parquet

    values = np.random.default_rng(0).integers(-999, 999, (100, 2))
    table, sound, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    parquet.write_table(pa.table({"x": values[:, 0], "y": values[:, 1]}), table)
    soundfile.write(sound, values / 1000, 100, format="WAV")
    with zipfile.ZipFile(archive, "w") as record:
        line = "a.dat 16 1(0)/mV 16 0 0 0 0"
        record.writestr("a.hea", f"a 2 100 100\n{line} x\n{line} y\n")
        record.writestr("a.dat", values.astype("<i2").tobytes())
    lines = "\n".join(f"{x},{y}" for x, y in values)
    cells = [["x", "y"], [""] * 2, ["mV"] * 2, ["-999"] * 2, ["999"] * 2, ["-999"] * 2]
    cells += [["999"] * 2, [""] * 2, ["50"] * 2, [""] * 2]
    head = f"{'0':<8}{'':<80}{'':<80}01.01.0101.01.01{768:<8}{'':<44}{2:<8}{1:<8}{2:<4}"
    for width, pair in zip((16, 80, 8, 8, 8, 8, 8, 80, 8, 32), cells, strict=True):
        head += "".join(f"{cell:<{width}}" for cell in pair)
    # Two data records of one second, in which each channel has 50 samples side by side.
    samples = values.reshape(2, 50, 2).transpose(0, 2, 1).astype("<i2").tobytes()
    return {
        "csv": f"x,y\n{lines}\n".encode(),
        "parquet": table.getvalue(),
        "wav": sound.getvalue(),
        "edf": head.encode() + samples,
        "zip": archive.getvalue(),
    }
