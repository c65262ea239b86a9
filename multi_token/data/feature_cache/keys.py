"""Keys of cached features: digests of item content, encoder weights and preprocessing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import digest
from multi_token.modalities.base import Encoder, Modality
from multi_token.types import Media

_NOT_FEATURES = {"projector", "micro_batch", "dtype", "facts"}
"""Fields of a modality that features do not depend on, or that follow from the weights."""
_SETTINGS = (".json", ".txt", ".model", ".vocab", ".py")
"""Suffixes of a model folder's files without weights: config, preprocessor, tokenizer."""
_DIGITS = 32
"""Hexadecimal digits of a key: 128 bits, enough that no two items of any data set collide."""


def encoder_fingerprint(modality: Modality, encoder: Encoder) -> str:
    """Digest of encoder and settings that features depend on: 32 hexadecimal digits.

    It covers every weight of the encoder in memory (training changes them), the files beside the
    weights in its folder (config, preprocessor, tokenizer) or its hub name with the commit, and the
    modality's settings without the projector. Features with facts beside them have keys of their
    own, whatever text is made of the facts.
    """
    names = [_class_name(modality), _class_name(encoder)]
    names += [] if modality.facts is None else ["facts"]
    parts = names, _settings(modality, _NOT_FEATURES)
    return digest(json.dumps(parts, sort_keys=True).encode(), weights_digest(encoder).encode())


def settings_fingerprint(modality: Modality) -> str:
    """Digest of the settings that an item's number of tokens depends on: 32 hexadecimal digits.

    It covers all settings with projector and `facts`, and the origin of the encoder, but no
    weights.
    """
    written = {"projector"} if modality.facts is None else {"projector", "facts"}
    parts = _class_name(modality), _settings(modality, _NOT_FEATURES - written)
    return digest(json.dumps(parts, sort_keys=True).encode())


def _class_name(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _settings(modality: Modality, excluded: set[str]) -> dict[str, Any]:
    settings = modality.model_dump(mode="json", exclude=excluded)
    name = settings.get("encoder")
    if isinstance(name, str):
        settings["encoder"] = _origin(name, settings.pop("revision", None))
    return settings


@torch.no_grad()
def weights_digest(encoder: Encoder) -> str:
    """Digest of all parameters and buffers: names, shapes, precision and every byte."""
    whole = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        # as bytes, since numpy has no bfloat16
        whole.update(values.view(torch.uint8).numpy().data)
    return whole.hexdigest()[:_DIGITS]


def _origin(name: str, revision: str | None) -> list[Any]:
    """Return the origin of an encoder: files of its folder without its path, or name and commit."""
    folder = Path(name)
    if not folder.is_dir():
        return [name, revision, _commit(name, revision)]
    # no weights, which `weights_digest` reads in memory, and no index of their shards
    files = {
        path.relative_to(folder).as_posix(): digest(path.read_bytes())
        # one folder down as well: sentence-transformers keeps a config for each module there
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.suffix in _SETTINGS and not path.name.endswith(".index.json") and path.is_file()
    }
    return [files]


def _commit(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # not a hub name
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def canonical_source(source: Any) -> str | None:
    """Return the name of a source (a path, a URL, a list or mapping of these) as text, or None.

    Equal names are equal sources in every process.
    """
    if isinstance(source, (str, PurePath)):
        return str(source)
    if isinstance(source, Mapping) and all(
        isinstance(value, (str, int, float, PurePath, type(None))) for value in source.values()
    ):
        return repr(sorted((str(key), str(value)) for key, value in source.items()))
    # frames of a video; a list of numbers is an item itself
    frames = isinstance(source, (list, tuple)) and bool(source)
    if frames and all(isinstance(value, (str, PurePath)) for value in source):
        return repr([str(value) for value in source])
    return None


def item_key(item: Media, modality: Modality, fetch: Fetch, otherwise: str) -> str:
    """Digest of an item's name, or of its content where it has none; `otherwise` if it has neither.

    Reads no file. Equal keys are equal items.
    """
    text = canonical_source(item.source)
    # the root too: a relative path names another file in another folder
    parts = [item.modality, repr(fetch.root)]
    if text is not None:
        return digest(*(p.encode(errors="surrogatepass") for p in (*parts, "name", text)))
    try:
        content = modality.content(item.source, fetch)
    except MediaError:  # named when the item is read
        return digest(*(p.encode() for p in (*parts, "row", otherwise)))
    return digest(item.modality.encode(), b"content", content)


def hex_digits(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Digests, uint8 [digests, 16] -> their hexadecimal digits, S32 [digests]."""
    return np.frombuffer(digests.tobytes().hex().encode(), f"S{_DIGITS}")


class KeyTable:
    """Keys of 32 hexadecimal digits -> numbers or keys, in sorted arrays.

    A dict would take four times the memory, and forked workers would copy its pages by counting
    references. The first value of a key stays.
    """

    _MAX_NEW = 8192

    def __init__(self, dtype: DTypeLike) -> None:
        self._keys = np.empty(0, f"S{_DIGITS}")
        self._values = np.empty(0, dtype)
        self._new: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._keys) + len(self._new)

    def get(self, key: str) -> Any:
        """Return the value, or None."""
        if key in self._new:
            return self._new[key]
        wanted = np.array(key.encode(), self._keys.dtype)
        at = int(np.searchsorted(self._keys, wanted))
        if at < len(self._keys) and self._keys[at] == wanted:
            return self._values[at]
        return None

    def add(self, key: str, value: Any) -> None:
        """Store a value, unless the key has one."""
        if self.get(key) is None:
            self._new[key] = value
            # merged in steps that grow with the table, so that n keys cost n log n
            if len(self._new) >= max(self._MAX_NEW, len(self._keys) // 8):
                self._merge()

    def add_arrays(self, keys: NDArray[np.uint8], values: NDArray[Any]) -> None:
        """Store the values of keys, uint8 [keys, 16]; first values of keys stay."""
        self._merge(hex_digits(keys), np.asarray(values, self._values.dtype))

    def _merge(
        self, more_keys: NDArray[np.bytes_] | None = None, more_values: NDArray[Any] | None = None
    ) -> None:
        keys = np.array([key.encode() for key in self._new], self._keys.dtype)
        values = np.array(list(self._new.values()), self._values.dtype)
        if more_keys is not None and more_values is not None:
            keys, values = np.concatenate([keys, more_keys]), np.concatenate([values, more_values])
        keys, values = np.concatenate([self._keys, keys]), np.concatenate([self._values, values])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        # two writers may have stored one key
        is_first = np.ones(len(keys), np.bool_)
        is_first[1:] = keys[1:] != keys[:-1]
        self._keys, self._values, self._new = keys[is_first], values[order][is_first], {}
