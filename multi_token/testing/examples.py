"""Examples of the conformance kit, one for each built-in modality.

Each function writes its files into an empty folder, and returns the fields of a small instance and
sources of different sizes for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multi_token.testing.encoders import (
    SENTENCES,
    tiny_clap,
    tiny_image_encoder,
    tiny_joint_clip,
    tiny_patchtst,
    tiny_protein_encoder,
    tiny_sentence_encoder,
    tiny_whisper,
)
from multi_token.testing.files import noise_frames, tone, write_pdf, write_tone, write_video

Example = tuple[dict[str, Any], list[Any]]


def image_example(folder: Path) -> Example:
    """Patches of a tiny CLIP, of a file and of an image in memory."""
    path = folder / "wide.png"
    Image.radial_gradient("L").resize((60, 30)).save(path)
    image = Image.linear_gradient("L").resize((32, 48)).convert("RGB")
    return {"encoder": tiny_image_encoder(folder / "clip")}, [str(path), image]


def speech_example(folder: Path) -> Example:
    """Audio of less and of more than one window of a tiny Whisper."""
    fields = {
        "encoder": tiny_whisper(folder / "whisper"),
        "projector": {"type": "stack", "factor": 8},
    }
    # Two sampling rates and two kinds of source, so that resampling is checked too.
    short = write_tone(folder / "short.wav", 0.4)
    long = {"array": tone(2.5, 8_000, hertz=300.0), "sampling_rate": 8_000}
    return fields, [short, long]


def sound_example(folder: Path) -> Example:
    """Audio of less and of more than one window of a tiny CLAP."""
    fields = {
        "encoder": tiny_clap(folder / "clap", fused=True),
        "projector": {"type": "expand", "factor": 4},
    }
    short = write_tone(folder / "short.flac", 0.4, 44_100, num_channels=2, format="FLAC")
    long = {"array": tone(2.5, 8_000, hertz=300.0), "sampling_rate": 8_000}
    return fields, [short, long]


def video_example(folder: Path) -> Example:
    """Two files and a part of one, through a tiny CLIP."""
    fields = {
        "encoder": tiny_image_encoder(folder / "encoder"),
        "fps": 2.0,
        "projector": {"type": "linear"},
    }
    # Two containers and codecs of different size.
    long = write_video(folder / "long.mp4", noise_frames(30))
    short = write_video(
        folder / "short.webm", noise_frames(12, height=32, seed=1), codec="libvpx-vp9"
    )
    return fields, [long, short, {"path": long, "start": 0.5, "end": 2.0}]


def document_example(folder: Path) -> Example:
    """Documents of one chunk and of many."""
    note = folder / "note.txt"
    note.write_text("The red lamp is in Oslo.", encoding="utf-8")
    book = write_pdf(folder / "book.pdf", ["\n".join(SENTENCES)] * 3)
    fields = {"encoder": tiny_sentence_encoder(folder / "sentence_encoder"), "chunk_tokens": 32}
    return fields, [str(note), {"text": " ".join(SENTENCES)}, str(book)]


def joint_example(folder: Path) -> Example:
    """Two images and two texts."""
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    (folder / "note.txt").write_text("a blue circle and a red square", encoding="utf-8")
    sources: list[Any] = [
        str(folder / "red.png"),
        {"text": "a cat"},
        Image.new("RGB", (20, 64), "blue"),
        str(folder / "note.txt"),
    ]
    return {"encoder": tiny_joint_clip(folder / "clip")}, sources


def timeseries_example(folder: Path) -> Example:
    """Series of two channels and several lengths, through a tiny PatchTST."""
    generator = np.random.default_rng(0)
    np.save(folder / "series.npy", generator.normal(size=(50, 2)))
    fields = {"channels": 2, "rate": 50.0, "encoder": tiny_patchtst(folder / "patchtst")}
    sources: list[Any] = [
        str(folder / "series.npy"),
        {"array": generator.normal(size=(33, 2)).tolist(), "sampling_rate": 100},
        [[1.0, -1.0]] * 5,
    ]
    return fields, sources


def vector_example(folder: Path) -> Example:
    """One vector as a row holds it, and a file with a sequence of them."""
    path = folder / "five.npy"
    np.save(path, np.sin(np.arange(20.0)).reshape(5, 4))
    return {"dim": 4}, [[0.5, -1.0, 2.0, 0.0], str(path)]


def sequence_example(folder: Path) -> Example:
    """A protein as a row holds it, and records of a FASTA file."""
    path = folder / "proteins.fasta"
    path.write_text(">first one\nMKTAY\nIAKQR\n>second\nGAVL\n", encoding="utf-8")
    sources: list[Any] = ["MKVLAAGIVG", str(path), {"path": str(path), "record": "second"}]
    return {"encoder": tiny_protein_encoder(folder / "esm")}, sources


def volume_example(folder: Path) -> Example:
    """Two volumes of different size and orientation, through a tiny CLIP."""
    import nibabel as nib

    noise = np.random.default_rng(0)
    sources: list[Any] = []
    for name, shape, steps in (
        ("a.nii", (20, 24, 12), (1, 1, 1)),
        ("b.nii.gz", (9, 30, 5), (-1, 2, 3)),
    ):
        voxels = noise.integers(0, 900, shape).astype(np.int16)
        nib.Nifti1Image(voxels, np.diag([*steps, 1.0])).to_filename(folder / name)
        sources.append(str(folder / name))
    return {"encoder": tiny_image_encoder(folder / "clip"), "num_slices": 6}, sources
