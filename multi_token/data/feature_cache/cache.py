"""Features of frozen encoders by content of the item, so that each item is encoded once.

item -> source (path, size, time of change | URL) -> key (content, encoder, settings, dtype)
     -> features in memory or in store.py

Keys by source are stored beside the features, so the next start reads no file to find its key.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from multi_token.collate import FEATURES_KEY, NEWLINES_KEY
from multi_token.data.feature_cache.keys import KeyTable, canonical_source, encoder_fingerprint
from multi_token.data.feature_cache.store import FeatureStore, StoredFeatures
from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.fetch import MIB, Fetch
from multi_token.media.hashing import NoStamp, digest, source_stamp
from multi_token.modalities.base import Encoder, Modality
from multi_token.modalities.facts import facts_from_bytes, facts_to_bytes
from multi_token.types import Media, Prepared


@dataclass(frozen=True)
class PreparedItem:
    """An item that `FeatureCache.prepare` has read, perhaps in a data worker."""

    modality: str
    key: str
    """Key of its content."""
    new_source: str | None
    """Its source, if the source's key was not known before."""
    prepared: Prepared | None
    """Inputs of its encoder; None if its features are there."""


_MAX_WAIT_S = 300.0
"""Longest time between two shards, however small: the work that a kill may lose."""


class FeatureCache:
    """Features by content, encoder and settings, in memory or in a folder of shards.

    With a folder, features are memory-mapped, and memory holds the index alone. Picklable into data
    workers.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_shard_bytes: int = 256 * MIB,
    ) -> None:
        """`path`: folder that keeps features between runs; None keeps them in memory.

        `dtype`: precision of stored features; `find` returns float32.
        """
        self.path = path
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._shards = None if path is None else FeatureStore(path, max_bytes=max_shard_bytes)
        self._recent: dict[str, StoredFeatures] = {}
        self._num_recent_bytes = 0
        self._written_at = time.monotonic()
        self._keys = KeyTable("S32")  # keys of content, by name of the source
        self._new_sources: dict[str, str] = {}
        self._fingerprints: dict[str, tuple[Modality, str]] = {}
        self._versions: dict[str, tuple[weakref.ref[Encoder], list[Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # fingerprints travel to data workers; encoders do not
        return {**self.__dict__, "_versions": {}}

    def __len__(self) -> int:
        """Number of items with features."""
        return len(self._recent) + (0 if self._shards is None else len(self._shards))

    @property
    def damaged(self) -> list[str]:
        """Faults of files in the folder. Their items are encoded again."""
        return [] if self._shards is None else self._shards.damaged

    def register_encoder(self, name: str, modality: Modality, encoder: Encoder) -> None:
        """Set the encoder of the instance `name`, whose fingerprint becomes part of the keys.

        Hashes every weight once. `encode` calls this method for all its encoders.
        """
        # `_version` counts in-place changes, so unchanged weights are not hashed again
        tensors = encoder.state_dict().values()
        version = [modality, *((t.data_ptr(), t._version, t.dtype) for t in tensors)]
        known, before = self._versions.get(name, (None, None))
        if known is None or known() is not encoder or before != version:
            self._fingerprints[name] = (modality, encoder_fingerprint(modality, encoder))
            self._versions[name] = (weakref.ref(encoder), version)

    def register_encoders(
        self, modalities: Mapping[str, Modality], encoders: Mapping[str, Encoder]
    ) -> None:
        """Set the encoders of all instances."""
        for name, modality in modalities.items():
            self.register_encoder(name, modality, encoders[name])

    def find(self, item: Media, modality: Modality, fetch: Fetch) -> Prepared | None:
        """Return an item with its features float32 [length, dim], or None if it is not cached.

        Raises MediaError for an item that cannot be read, MultiTokenError for an instance without
        a registered encoder.
        """
        key, _ = self._key(item, modality, fetch)
        stored = self._recent.get(key)
        if stored is None and self._shards is not None:
            stored = self._shards.read(key, with_facts=modality.facts is not None)
        if stored is None:
            return None
        values, newlines, facts = stored
        inputs = {FEATURES_KEY: values.float()}
        if newlines is not None:
            inputs[NEWLINES_KEY] = newlines
        prepared = Prepared(inputs, num_features=len(values))
        if facts is not None:
            prepared.facts = facts_from_bytes(facts.numpy().tobytes(), len(values))
        return prepared

    def prepare(self, item: Media, modality: Modality, fetch: Fetch) -> PreparedItem:
        """Read an item for `encode`; decodes it unless its features are there. For data workers.

        Raises MediaError for an item that cannot be read, MultiTokenError for an instance without
        a registered encoder.
        """
        key, new_source = self._key(item, modality, fetch)
        known = self._has(key)
        prepared = None if known else modality.prepare(modality.load(item.source, fetch))
        return PreparedItem(item.modality, key, new_source, prepared)

    def encode(
        self,
        items: Iterable[PreparedItem],
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        *,
        batch_size: int | None = None,
    ) -> int:
        """Encode the prepared items that the cache lacks, and return their number.

        After Ctrl-C, the features of all items that were encoded are kept.

        Args:
            items: Results of `prepare`; of items with one content the first is encoded.
            modalities: Modalities by instance name.
            encoders: Encoders by instance name.
            batch_size: Items encoded together; default: 4 on a CPU, whose caches a larger batch
                exceeds, else 32.
        """
        self.register_encoders(modalities, encoders)
        if batch_size is None:
            on_cpu = all(p.device.type == "cpu" for e in encoders.values() for p in e.parameters())
            batch_size = 4 if on_cpu else 32
        # one batch for each modality, since each has its own encoder
        waiting: dict[str, dict[str, Prepared]] = {name: {} for name in modalities}
        num_encoded = 0
        self._written_at = time.monotonic()
        try:
            for item in items:
                name, key = item.modality, item.key
                if item.new_source is not None and self._shards is not None:
                    self._new_sources[item.new_source] = key
                if item.prepared is None or self._has(key) or key in waiting[name]:
                    continue
                waiting[name][key] = item.prepared
                if len(waiting[name]) == batch_size:
                    num_encoded += self._encode(modalities[name], encoders[name], waiting[name])
                    waiting[name] = {}
            for name, rest in waiting.items():
                if rest:
                    num_encoded += self._encode(modalities[name], encoders[name], rest)
        except KeyboardInterrupt:
            # the next start continues after these features
            self._flush()
            raise
        self._flush()
        return num_encoded

    def fill(
        self,
        items: Iterable[tuple[Media, Fetch]],
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        *,
        batch_size: int | None = None,
    ) -> int:
        """Prepare items, each with the access to its source, and `encode` them.

        For some items in this process; `encode_rows` has data workers. Raises MediaError.
        """
        prepared = (self.prepare(item, modalities[item.modality], fetch) for item, fetch in items)
        return self.encode(prepared, modalities, encoders, batch_size=batch_size)

    def refresh(self) -> None:
        """Read the index of shards that other processes have written since."""
        if self._shards is not None:
            self._shards.refresh()

    @property
    def shard_names(self) -> set[str]:
        """Names of the shards in the folder that this process knows."""
        return set() if self._shards is None else self._shards.names

    def has(self, item: Media, modality: Modality, fetch: Fetch) -> bool:
        """Return True if the features of an item are known to be there; reads no file."""
        try:
            key = self._known_key(item, modality, fetch)[1]
        except MediaError:  # an object in memory that is no item; `fill` reports it
            return False
        return key is not None and self._has(key)

    def _has(self, key: str) -> bool:
        return key in self._recent or (self._shards is not None and key in self._shards)

    @torch.no_grad()
    def _encode(self, modality: Modality, encoder: Encoder, items: Mapping[str, Prepared]) -> int:
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        inputs = modality.collate(list(items.values()))
        features = encoder(**{key: value.to(device) for key, value in inputs.items()})
        for i, key in enumerate(items):
            # without padding, so that the features of an item do not depend on its batch
            real = slice(None) if features.mask is None else features.mask[i]
            # a clone: a view would keep the whole batch in memory, and safetensors refuses tensors
            # that share memory
            values = features.values[i][real].to(self.dtype).cpu().clone()
            newlines = (
                None if features.newlines is None else features.newlines[i][real].cpu().clone()
            )
            facts = None
            if modality.facts is not None and (given := items[key].facts):
                facts = torch.frombuffer(bytearray(facts_to_bytes(given)), dtype=torch.uint8)
            self._recent[key] = (values.contiguous(), newlines, facts)
            stored = (values, newlines, facts)
            self._num_recent_bytes += sum(t.nbytes for t in stored if t is not None)
        if self._shards is not None and (
            self._num_recent_bytes >= self._shards.max_bytes
            or time.monotonic() - self._written_at > _MAX_WAIT_S
        ):
            self._flush()
        return len(items)

    def _flush(self) -> None:
        if self._shards is not None and self._recent:
            self._shards.write(self._recent)
            self._recent, self._num_recent_bytes = {}, 0
        # after their features, though a key without features would only be encoded again
        if self._shards is not None and self._new_sources:
            self._shards.add_sources(self._new_sources)
            self._new_sources = {}
        self._written_at = time.monotonic()

    def _key(self, item: Media, modality: Modality, fetch: Fetch) -> tuple[str, str | None]:
        """Return the key of the content, and the source (as a digest) if it was read for it."""
        source, key = self._known_key(item, modality, fetch)
        if key is not None:
            return key, None
        content = modality.content(item.source, fetch)
        key = self._digest(self._fingerprints[item.modality][1], content)
        self._remember(item, fetch, key)
        return key, source

    def _known_key(
        self, item: Media, modality: Modality, fetch: Fetch
    ) -> tuple[str | None, str | None]:
        """Return (source as a digest, key of the content), each None if it is not known."""
        known = self._fingerprints.get(item.modality)
        if known is None or known[0] != modality:
            raise MultiTokenError(
                f"the feature cache has no encoder for {item.modality!r}"
                + (" with these settings" if known else "")
                + "; call `fill` or `register_encoder` with its encoder first"
            )
        name = self._name_key(item, fetch)
        if name is None:  # an object in memory
            return None, self._digest(known[1], modality.content(item.source, fetch))
        # by name, so that a file is looked at once in a process and not in every epoch
        found = self._keys.get(name)
        if found is not None:
            return None, found if isinstance(found, str) else found.decode()
        try:
            stamp = source_stamp(item.source, fetch)
        except NoStamp:
            return None, None
        source = self._digest(known[1], json.dumps(stamp).encode())
        key = self._new_sources.get(source)
        if key is None and self._shards is not None:
            key = self._shards.key_of(source)
        if key is not None:
            self._remember(item, fetch, key)
        return source, key

    def _remember(self, item: Media, fetch: Fetch, key: str) -> None:
        name = self._name_key(item, fetch)
        if name is not None:
            self._keys.add(name, key)

    def _name_key(self, item: Media, fetch: Fetch) -> str | None:
        text = canonical_source(item.source)
        if text is None:
            return None
        fingerprint = self._fingerprints[item.modality][1]
        # the root too: a relative path names another file in another folder
        parts = fingerprint, repr(fetch.root), text
        return digest(*(part.encode(errors="surrogatepass") for part in parts))

    def _digest(self, identity: str, content: bytes) -> str:
        return digest(identity.encode(), str(self.dtype).encode(), content)
