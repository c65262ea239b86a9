"""Keys of cached features: digests of item content, encoder weights and preprocessing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from multi_token.media.hashing import digest
from multi_token.modalities.base import Encoder, Modality

_NOT_FEATURES = {"projector", "micro_batch", "dtype"}
"""Fields of a modality that features do not hang on, or that the encoder's weights tell."""
_SETTINGS = (".json", ".txt", ".model", ".vocab", ".py")
"""Suffixes of a model folder's files that are no weights: config, preprocessor, tokenizer."""
_DIGITS = 32
"""Hexadecimal digits of a key: 128 bits, at which no two of any real number of items collide."""


def encoder_fingerprint(modality: Modality, encoder: Encoder) -> str:
    """Digest of encoder and settings that features depend on: 32 hexadecimal digits.

    Every weight of the encoder as it is in memory (an encoder that a run has trained is another
    than the one it began as), the files beside the weights of its folder (config, preprocessor,
    tokenizer) or its hub name with the commit, and the modality's settings without the projector.
    """
    settings = modality.model_dump(mode="json", exclude=_NOT_FEATURES)
    name = settings.get("encoder")
    if isinstance(name, str):
        settings["encoder"] = _origin(name, settings.pop("revision", None))
    kind = [f"{type(part).__module__}.{type(part).__qualname__}" for part in (modality, encoder)]
    text = json.dumps([kind, settings], sort_keys=True)
    return digest(text.encode(), weights_digest(encoder).encode())


def settings_fingerprint(modality: Modality) -> str:
    """Digest of the settings that an item's number of tokens depends on: 32 hexadecimal digits.

    All settings with the projector, and where the encoder comes from; no weights.
    """
    settings = modality.model_dump(mode="json", exclude={"micro_batch", "dtype"})
    name = settings.get("encoder")
    if isinstance(name, str):
        settings["encoder"] = _origin(name, settings.pop("revision", None))
    kind = f"{type(modality).__module__}.{type(modality).__qualname__}"
    return digest(json.dumps([kind, settings], sort_keys=True).encode())


@torch.no_grad()
def weights_digest(encoder: Encoder) -> str:
    """A digest of all parameters and buffers: names, shapes, precision and every byte."""
    whole = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        whole.update(values.view(torch.uint8).numpy().data)
    return whole.hexdigest()[:_DIGITS]


def _origin(name: str, revision: str | None) -> list[Any]:
    """Return the origin of an encoder: files of its folder (not its path), or name and commit."""
    folder = Path(name)
    if not folder.is_dir():
        return [name, revision, _commit(name, revision)]
    files = {
        path.relative_to(folder).as_posix(): digest(path.read_bytes())
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.suffix in _SETTINGS and not path.name.endswith(".index.json") and path.is_file()
    }
    return [files]


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub name was fetched at, or None: then its weights alone tell it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a name of something else than the hub
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def source_name(source: Any) -> str | None:
    """A source that is named in words (a path, an address, a mapping of such) as text, or None.

    Equal texts are equal sources in every process.
    """
    if isinstance(source, (str, PurePath)):
        return str(source)
    if isinstance(source, Mapping) and all(
        isinstance(value, (str, int, float, PurePath, type(None))) for value in source.values()
    ):
        return repr(sorted((str(key), str(value)) for key, value in source.items()))
    return None


class KeyTable:
    """Keys of 32 hexadecimal digits -> numbers or keys, in sorted arrays.

    A dict would take four times the memory, and forked workers would copy its pages by counting
    references. What was added first stays.
    """

    _MAX_NEW = 8192

    def __init__(self, dtype: DTypeLike) -> None:
        self._keys = np.empty(0, f"S{_DIGITS}")
        self._values = np.empty(0, dtype)
        self._new: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._keys) + len(self._new)

    def get(self, key: str) -> Any:
        """The value, or None."""
        if key in self._new:
            return self._new[key]
        wanted = np.array(key.encode(), self._keys.dtype)
        at = int(np.searchsorted(self._keys, wanted))
        if at < len(self._keys) and self._keys[at] == wanted:
            return self._values[at]
        return None

    def add(self, key: str, value: Any) -> None:
        """Remember a value, unless there is one."""
        if self.get(key) is None:
            self._new[key] = value
            # in steps that grow with the table, so that n keys cost n log n
            if len(self._new) >= max(self._MAX_NEW, len(self._keys) // 8):
                self._merge()

    def _merge(self) -> None:
        keys = np.array([key.encode() for key in self._new], self._keys.dtype)
        values = np.array(list(self._new.values()), self._values.dtype)
        keys, values = np.concatenate([self._keys, keys]), np.concatenate([self._values, values])
        order = np.argsort(keys, kind="stable")
        self._keys, self._values, self._new = keys[order], values[order], {}
