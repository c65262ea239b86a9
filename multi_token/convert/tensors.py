"""Files of foreign checkpoints: JSON, safetensors, shards, pickles of tensors alone, adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# what torch.load raises for a file that is more, or less, than plain data
from torch.serialization import pickle as _torch_pickle

from multi_token.checkpoint.load import load_adapter
from multi_token.checkpoint.save import ADAPTER
from multi_token.errors import ConvertError


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, empty if there is no file. Raises ConvertError."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConvertError(f"{path} is no mapping of keys to values")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.safetensors` or `.bin` file, on the CPU. Raises ConvertError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only: a pickle that names code is refused, and none of it runs
        found = torch.load(path, map_location="cpu", weights_only=True)
    except _torch_pickle.UnpicklingError as error:
        raise ConvertError(
            f"{path} is refused, and nothing in it was run: it is a pickle that holds more than "
            f"tensors ({_pickle_target(error)})"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ConvertError(f"{path} cannot be read, it may be cut off: {_reason(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConvertError(f"{path} is no mapping of names to tensors, as a state dict is")
    return {str(key): tensor for key, tensor in found.items()}


def _pickle_target(error: Exception) -> str:
    """Return the global that the pickle asked for, out of torch's long message."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it names {named[1]}" if named else "it is no state dict"


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__


def model_files(folder: Path) -> Iterator[Path]:
    """Weight files of a complete model as `save_pretrained` writes them: one, or shards.

    Raises ConvertError for shards that an index names and that are not there.
    """
    # safetensors first: a folder may hold both forms of the same weights
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ConvertError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
            yield from (folder / name for name in names)
            return
        if (folder / stem).is_file():
            yield folder / stem
            return


def load_foreign_adapter(model: Any, source: Path, partial: Path) -> None:
    """Load the LoRA of `source`, safetensors or pickle, into a composed model.

    `partial`: folder of the new run, where the tensors are staged as safetensors. Raises
    ConvertError, or CheckpointError for tensors that do not fit.
    """
    names = ("adapter_model.safetensors", "adapter_model.bin")
    files = [source / name for name in names if (source / name).is_file()]
    if not files:
        raise ConvertError(
            f"{source} has adapter_config.json, and neither {names[0]} nor {names[1]}: it is "
            "half-written or was copied in part"
        )
    tensors = read_tensors(files[0])
    staging = partial / ADAPTER
    staging.mkdir()
    shutil.copy(source / "adapter_config.json", staging)
    # torch.save may have kept views, which safetensors refuses
    kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(kept, staging / names[0], {"format": "pt"})
    load_adapter(model, staging, where=source)
