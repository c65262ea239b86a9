"""Decoder objects of torchcodec, as `datasets` returns them -> sources that we read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def encoded_source(source: Any) -> Any:
    """Return the encoded file, or the decoded values, of a decoder; any other source unchanged.

    | decoder                                         | source                                  |
    |-------------------------------------------------|-----------------------------------------|
    | of `datasets.Audio` or `datasets.Video`         | the bytes or the path that it has read  |
    | `torchcodec.decoders.AudioDecoder`              | `{"array", "sampling_rate"}`, mono      |
    | `torchcodec.decoders.VideoDecoder`              | `{"array", "fps"}`                      |
    """
    # of `datasets`: what the decoder was made from; decoding it again would need no torchcodec
    encoded = getattr(source, "_hf_encoded", None)
    if isinstance(encoded, Mapping):
        data = encoded.get("bytes")
        return encoded.get("path") if data is None else data
    if hasattr(source, "get_all_samples"):
        samples = source.get_all_samples()
        mono = samples.data.mean(dim=0)  # float32 [channels, samples]
        return {"array": mono.cpu().numpy(), "sampling_rate": samples.sample_rate}
    if hasattr(source, "get_frames_in_range"):
        frames = source.get_frames_in_range(0, len(source)).data
        # uint8 [frames, 3, height, width] by default; width comes first where it is not 3 channels
        if frames.shape[1] == 3 != frames.shape[-1]:
            frames = frames.permute(0, 2, 3, 1)
        return {"array": frames.cpu().numpy(), "fps": source.metadata.average_fps}
    return source
