"""Small items of each kind, in memory, which a server decodes before its first request."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence

import numpy as np
from PIL import Image

from multi_token.media.errors import require_package

EXAMPLE_TEXT = "A text of a few words."
EXAMPLE_HTML = f"<html><body><p>{EXAMPLE_TEXT}</p></body></html>".encode()


def example_image() -> bytes:
    """Return a grey PNG of 64 x 64 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "PNG")
    return file.getvalue()


def example_video() -> bytes:
    """Return an animated GIF of one second, with four frames."""
    # Noise, because the GIF writer merges equal frames.
    frames = [Image.effect_noise((64, 64), 50) for _ in range(4)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=250)
    return file.getvalue()


def example_audio() -> bytes:
    """Return a tone of one second as WAV: 16 bits, mono, 16 kHz."""
    samples = (np.sin(np.arange(16_000) * 0.17) * 9_000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def example_tables(series: np.ndarray, names: Sequence[str] | None) -> list[bytes]:
    """Return a series [time, channels] as CSV and as Parquet, with these names of channels."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = list(names or (f"channel {i}" for i in range(series.shape[1])))
    head = ",".join('"' + name.replace('"', '""') + '"' for name in columns)
    body = "\n".join(",".join(map(str, row)) for row in series.tolist())
    file = io.BytesIO()
    parquet.write_table(pa.table(list(series.T), names=columns), file)
    return [f"{head}\n{body}\n".encode(), file.getvalue()]


def example_volume() -> bytes:
    """Return a NIfTI file of 16 x 16 x 4 voxels."""
    nib = require_package("nibabel", "volume")
    voxels = np.arange(1024, dtype=np.int16).reshape(16, 16, 4)
    return nib.Nifti1Image(voxels, np.eye(4)).to_bytes()
