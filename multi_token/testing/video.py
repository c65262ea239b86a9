"""Tiny video encoders and real video files, built in process, random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from multi_token.testing.vision import tiny_image_encoder


def tiny_video_encoder(folder: Path, kind: str, *, num_frames: int = 8, seed: int = 0) -> str:
    """A random video encoder with its processor, saved; returns the folder's name.

    `kind`: xclip, videomae, timesformer, vivit, vjepa2. All see frames of 32 x 32 in 16 patches,
    and have an image processor, so that torchvision is not needed.
    """
    import torch
    import transformers as hf

    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vit = {**small, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
    size = {"height": 32, "width": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "xclip":
            text = {**small, "intermediate_size": 48, "vocab_size": 64}
            # more layers than its vision half: those must never be taken for the encoder's
            text |= {"num_hidden_layers": 5, "bos_token_id": 0, "eos_token_id": 1}
            across = {"mit_hidden_size": 16, "mit_intermediate_size": 24}
            across |= {"mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}
            vision = {**vit, **across, "num_frames": num_frames, "drop_path_rate": 0.0}
            config: Any = hf.XCLIPConfig(
                text_config=text,
                vision_config=vision,
                projection_dim=16,
                prompt_layers=1,
                prompt_num_attention_heads=2,
            )
            model: Any = hf.XCLIPModel(config)
        elif kind == "videomae":
            model = hf.VideoMAEModel(hf.VideoMAEConfig(**vit, num_frames=num_frames))
        elif kind == "timesformer":
            model = hf.TimesformerModel(hf.TimesformerConfig(**vit, num_frames=num_frames))
        elif kind == "vivit":
            tube = {"tubelet_size": [2, 8, 8], "num_frames": num_frames}
            config = hf.VivitConfig(**{**vit, **tube}, hidden_dropout_prob=0.0)
            model = hf.VivitModel(config)
        elif kind == "vjepa2":
            config = hf.VJEPA2Config(
                **small,
                patch_size=8,
                crop_size=32,
                frames_per_clip=num_frames,
                mlp_ratio=1.5,
                pred_hidden_size=24,
                pred_num_attention_heads=2,
                pred_num_hidden_layers=4,
                pred_num_mask_tokens=1,
            )
            model = hf.VJEPA2Model(config)
        else:
            raise ValueError(f"no tiny video encoder of kind {kind!r}")
        # from the usual start all frames would look nearly alike to it
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor = hf.VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    processor.save_pretrained(folder)
    return str(folder)


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: int = 10,
    codec: str = "libx264",
    **options: str,
) -> str:
    """Frames uint8 [frames, height, width, 3], of even sizes, as a file; returns its name.

    The name's end says which kind. `codec`: of FFmpeg (libx264, libvpx-vp9, mpeg4, gif);
    `options`: the codec's own.
    """
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        container.start_encoding()
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def noise_frames(
    num_frames: int, *, height: int = 48, width: int = 64, seed: int = 0
) -> np.ndarray:
    """Random frames uint8 [frames, height, width, 3]."""
    shape = (num_frames, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def video_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Fields of a small video modality and sources for it: what the conformance kit tries."""
    fields = {
        "type": "video",
        "encoder": tiny_image_encoder(folder / "encoder"),
        "fps": 2.0,
        "projector": {"type": "linear"},
    }
    long = write_video(folder / "long.mp4", noise_frames(30))
    short = write_video(
        folder / "short.webm", noise_frames(12, height=32, seed=1), codec="libvpx-vp9"
    )
    return fields, [long, short, {"path": long, "start": 0.5, "end": 2.0}]
