"""Something small of each kind, by which a media worker loads what it decodes with.

Border: sources as requests give them; what they become is not looked at.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch


def warm_up(modality: Any) -> None:
    """Let a modality read something small: its processor and the decoders are loaded by that."""
    own = modality.type in _SAMPLES
    for make in _SAMPLES.get(modality.type, (*_SAMPLE_BYTES, *_SAMPLE_TEXTS)):
        try:
            modality.prepare(modality.load(make(modality), Fetch(allow_paths=False)))
        except MediaError:
            continue  # a kind that this encoder has no tower for, or a plug-in of another
        except Exception:
            if own:
                raise
            continue
        if not own:
            return


def _sample_image(_: Any = None) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "PNG")
    return file.getvalue()


def _sample_video(_: Any) -> bytes:
    pictures = [Image.effect_noise((64, 64), 50) for _ in range(4)]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=250)
    return file.getvalue()


def _sample_audio(_: Any) -> bytes:
    samples = (np.sin(np.arange(16_000) * 0.17) * 9_000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def _sample_text(_: Any) -> Any:
    return {"text": "A text of a few words."}


def _sample_document(_: Any) -> bytes:
    return b"<html><body><p>A text of a few words.</p></body></html>"


def _sample_vector(modality: Any) -> list[float]:
    return [0.5] * modality.dim


def _sample_series(modality: Any) -> list[list[float]]:
    return [[float(step)] * modality.channels for step in range(64)]


_SAMPLE_BYTES: Sequence[Any] = (_sample_image, _sample_audio, _sample_video)
_SAMPLE_TEXTS: Sequence[Any] = (_sample_text, _sample_document)
_SAMPLES: Mapping[str, Sequence[Any]] = {
    "image": (_sample_image,),
    "speech": (_sample_audio,),
    "sound": (_sample_audio,),
    "video": (_sample_video,),
    "document": (_sample_text, _sample_document),
    "joint": (_sample_image, _sample_audio, _sample_video, _sample_text),
    "vector": (_sample_vector,),
    "timeseries": (_sample_series,),
}
