"""Tiny time series models, built in process, random."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_patchtst(folder: Path, *, channels: int = 2, seed: int = 0, **fields: Any) -> str:
    """A random PatchTST over windows of 32 steps in 4 patches, saved; returns the folder's name.

    `fields`: more of the model's configuration.
    """
    import torch
    from transformers import PatchTSTConfig, PatchTSTModel

    sizes: dict[str, Any] = {
        "num_input_channels": channels,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "ffn_dim": 32,
        "scaling": "std",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PatchTSTModel(PatchTSTConfig(**{**sizes, **fields}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def timeseries_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Fields of a small instance, and series of two channels and several lengths for it."""
    import numpy as np

    generator = np.random.default_rng(0)
    np.save(folder / "series.npy", generator.normal(size=(50, 2)))
    fields = {
        "type": "timeseries",
        "channels": 2,
        "rate": 50.0,
        "encoder": tiny_patchtst(folder / "patchtst"),
    }
    sources: list[Any] = [
        str(folder / "series.npy"),
        {"array": generator.normal(size=(33, 2)).tolist(), "sampling_rate": 100},
        [[1.0, -1.0]] * 5,
    ]
    return fields, sources
