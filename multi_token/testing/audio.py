"""Tiny encoders of speech and sound, built in process, random, and tones to feed them with.

Border: parts only; nothing here is used at run time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def tiny_whisper(folder: Path, *, chunk_seconds: int = 1, seed: int = 0) -> str:
    """A random Whisper that takes chunks of `chunk_seconds` at 16 kHz, with its feature extractor.

    Like the published ones it makes 50 frames of a second. Returns the folder's name.
    """
    import torch
    import transformers as hf

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.WhisperModel(
            hf.WhisperConfig(
                vocab_size=64,
                num_mel_bins=16,
                d_model=32,
                encoder_layers=3,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=50 * chunk_seconds,
                max_target_positions=8,
                decoder_start_token_id=5,
                pad_token_id=1,
                bos_token_id=2,
                eos_token_id=3,
                suppress_tokens=None,
                begin_suppress_tokens=None,
                init_std=0.3,
            )
        )
    model.save_pretrained(folder)
    extractor = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=chunk_seconds)
    extractor.save_pretrained(folder)
    return str(folder)


def tiny_wav2vec2(
    folder: Path, kind: Literal["wav2vec2", "hubert", "wavlm"] = "wav2vec2", *, seed: int = 0
) -> str:
    """A random encoder of raw waveforms at 16 kHz with its feature extractor, saved.

    It normalises over time, as the published base sizes do, so that padding would change its
    numbers. Returns the folder's name.
    """
    import torch
    import transformers as hf

    fields: dict[str, Any] = {
        **_LAYERS,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (80, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 16,
        # 16 channels per group: with 8, oneDNN computes bfloat16 wrongly on CPUs with AMX
        # (torch 2.13).
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "group",
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "wav2vec2":
            model: Any = hf.Wav2Vec2Model(hf.Wav2Vec2Config(**fields))
        elif kind == "hubert":
            model = hf.HubertModel(hf.HubertConfig(**fields))
        else:
            model = hf.WavLMModel(hf.WavLMConfig(**fields))
    model.save_pretrained(folder)
    hf.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return str(folder)


def tiny_clap(folder: Path, *, fused: bool = False, seed: int = 0) -> str:
    """A random CLAP with windows of 1 s at 48 kHz and its feature extractor, saved.

    Returns the folder's name.
    """
    import torch
    import transformers as hf

    audio: dict[str, Any] = {
        "num_mel_bins": 64,  # transformers' own fusion takes no other number
        "spec_size": 128,
        "patch_size": 8,
        "patch_stride": [8, 8],
        "window_size": 4,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [1, 2],
        "num_attention_heads": [2, 4],
        "num_hidden_layers": 2,
        "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None,
    }
    text = {**_LAYERS, "num_hidden_layers": 1, "vocab_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.ClapModel(hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=24))
    model.save_pretrained(folder)
    hf.ClapFeatureExtractor(
        max_length_s=1, truncation="fusion" if fused else "rand_trunc"
    ).save_pretrained(folder)
    return str(folder)


def tone(seconds: float, rate: int = 16_000, *, hertz: float = 440.0, num_channels: int = 1) -> Any:
    """A tone with a soft beat, float32 [samples], or [samples, channels] if there are several."""
    import numpy as np

    time = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * hertz * time) * (0.7 + 0.3 * np.sin(2 * np.pi * 3 * time))
    wave = wave.astype(np.float32)
    if num_channels == 1:
        return wave
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
    """A tone in a file of any format that libsndfile writes; returns the file's name."""
    import soundfile

    samples = tone(seconds, rate, hertz=hertz, num_channels=num_channels)
    soundfile.write(path, samples, rate, format=format, subtype=subtype)
    return str(path)


def speech_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Fields of a small speech modality, and audio of less and of more than one chunk for it."""
    fields = {
        "type": "speech",
        "encoder": tiny_whisper(folder / "whisper"),
        "projector": {"type": "stack", "factor": 8},
    }
    short = write_tone(folder / "short.wav", 0.4)
    long = {"array": tone(2.5, 8_000, hertz=300.0), "sampling_rate": 8_000}
    return fields, [short, long]


def sound_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Fields of a small sound modality, and audio of less and of more than one window for it."""
    fields = {
        "type": "sound",
        "encoder": tiny_clap(folder / "clap", fused=True),
        "projector": {"type": "expand", "factor": 4},
    }
    short = write_tone(folder / "short.flac", 0.4, 44_100, num_channels=2, format="FLAC")
    long = {"array": tone(2.5, 8_000, hertz=300.0), "sampling_rate": 8_000}
    return fields, [short, long]
