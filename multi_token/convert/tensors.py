"""Tensors of other people's folders: safetensors, shards, and pickles that hold only tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# what torch.load raises for a file that is more, or less, than plain data
from torch.serialization import pickle as _torch_pickle

from multi_token.errors import ConvertError

_SHARDED = ".index.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.safetensors` or `.bin` file, on the CPU.

    A pickle is read with `weights_only=True`: one that names code is refused, and none of it runs.

    Raises ConvertError.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
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
    """The files of a whole model as `save_pretrained` leaves it, in one piece or in shards.

    Raises ConvertError for shards that an index names and that are not there.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}{_SHARDED}"
        if index.is_file():
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ConvertError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
            yield from (folder / name for name in names)
            return
        if (folder / stem).is_file():
            yield folder / stem
            return
