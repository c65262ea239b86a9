"""What an item is once it is decoded: pixels, frames, seconds, characters.

Border: looks at what `Modality.load` gave, in the process that decodes; what is too much is
media_totals.py's to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_WITH_A_RATE = frozenset(("speech", "sound", "joint"))
"""Types whose one-dimensional arrays are samples of a sound."""


def size_of(modality: Any, raw: Any) -> dict[str, float]:
    """`pixels`, `frames`, `seconds` or `characters` of a decoded item; nothing for what has none.

    A plug-in's pictures, lists of pictures and texts are known as such; its arrays are not.
    """
    if modality.type == "joint":  # its items are a kind and the thing
        _, raw = raw
    if isinstance(raw, Image.Image):
        return {"pixels": raw.width * raw.height}
    if isinstance(raw, str):
        return {"characters": len(raw)}
    if isinstance(raw, (list, tuple)) and all(isinstance(one, Image.Image) for one in raw):
        return {"pixels": sum(one.width * one.height for one in raw), "frames": len(raw)}
    if modality.type in _WITH_A_RATE and isinstance(raw, np.ndarray):
        from multi_token.modalities.audio_chunks import feature_extractor

        rate = feature_extractor(modality.encoder, modality.revision).sampling_rate
        return {"seconds": raw.shape[-1] / rate}
    return {}
