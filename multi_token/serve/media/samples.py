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


def warm(modality: Any) -> None:
    """Let a modality read something small: its processor and the decoders are loaded by that."""
    own = modality.type in _SAMPLES
    for make in _SAMPLES.get(modality.type, (*_BYTES, *_TEXTS)):
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


def _picture(_: Any = None) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "PNG")
    return file.getvalue()


def _film(_: Any) -> bytes:
    pictures = [Image.effect_noise((64, 64), 50) for _ in range(4)]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=250)
    return file.getvalue()


def _sound(_: Any) -> bytes:
    samples = (np.sin(np.arange(16_000) * 0.17) * 9_000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def _text(_: Any) -> Any:
    return {"text": "A text of a few words."}


def _page(_: Any) -> bytes:
    return b"<html><body><p>A text of a few words.</p></body></html>"


def _vector(modality: Any) -> list[float]:
    return [0.5] * modality.dim


def _series(modality: Any) -> list[list[float]]:
    return [[float(step)] * modality.channels for step in range(64)]


_BYTES: Sequence[Any] = (_picture, _sound, _film)
_TEXTS: Sequence[Any] = (_text, _page)
_SAMPLES: Mapping[str, Sequence[Any]] = {
    "image": (_picture,),
    "speech": (_sound,),
    "sound": (_sound,),
    "video": (_film,),
    "document": (_text, _page),
    "joint": (_picture, _sound, _film, _text),
    "vector": (_vector,),
    "timeseries": (_series,),
}
