"""Features of frozen encoders, kept by content: every item is encoded once.

Border: maps an item to features [length, dim], and where lines end among them; knows nothing of
rows or training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from multi_token.collate import BREAKS_KEY, FEATURES_KEY
from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Encoder, Modality
from multi_token.types import Media, Prepared

_BREAKS = ".breaks"


class FeatureCache:
    """Content and encoder settings -> features, in memory and in one safetensors file."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: where the features lie between runs; read now if it exists."""
        self.path = path
        kept = load_file(path) if path is not None and path.is_file() else {}
        self.features = {k: v for k, v in kept.items() if not k.endswith(_BREAKS)}
        self.breaks = {k.removesuffix(_BREAKS): v for k, v in kept.items() if k.endswith(_BREAKS)}
        self._keys: dict[tuple[str, str | None, str], str] = {}

    def find(self, item: Media, modality: Modality, fetch: Fetch) -> Prepared | None:
        """The item with its features [length, dim], if it was encoded. Raises MediaError."""
        key = self._key(item, modality, fetch)
        if key not in self.features:
            return None
        inputs = {FEATURES_KEY: self.features[key]}
        if key in self.breaks:
            inputs[BREAKS_KEY] = self.breaks[key]
        return Prepared(inputs, num_features=len(inputs[FEATURES_KEY]))

    def fill(
        self,
        items: Iterable[tuple[Media, Fetch]],
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        *,
        batch_size: int | None = None,
        on_items: Callable[[int], None] | None = None,
    ) -> int:
        """Encode what is not there yet; returns how many items were encoded.

        An item that cannot be read is passed over here: reading its row names it. `batch_size`:
        items encoded together; by default few on a CPU, whose caches a large batch would leave.
        """
        if batch_size is None:
            on_cpu = all(p.device.type == "cpu" for e in encoders.values() for p in e.parameters())
            batch_size = 4 if on_cpu else 32
        waiting: dict[str, list[tuple[str, Prepared]]] = {name: [] for name in modalities}
        num_encoded = 0
        seen: set[str] = set()
        for item, fetch in items:
            modality = modalities[item.modality]
            try:
                key = self._key(item, modality, fetch)
                if key not in self.features and key not in seen:
                    prepared = modality.prepare(modality.load(item.source, fetch))
                    waiting[item.modality].append((key, prepared))
                    seen.add(key)
            except MediaError:
                continue
            finally:
                if on_items is not None:
                    on_items(1)
            if len(waiting[item.modality]) == batch_size:
                num_encoded += self._encode(
                    modality, encoders[item.modality], waiting[item.modality]
                )
                waiting[item.modality] = []
        for name, rest in waiting.items():
            if rest:
                num_encoded += self._encode(modalities[name], encoders[name], rest)
        if num_encoded and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            save_file(self.features | {k + _BREAKS: v for k, v in self.breaks.items()}, partial)
            partial.replace(self.path)
        return num_encoded

    @torch.no_grad()
    def _encode(
        self, modality: Modality, encoder: Encoder, items: Sequence[tuple[str, Prepared]]
    ) -> int:
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        inputs = modality.collate([prepared for _, prepared in items])
        features = encoder(**{key: value.to(device) for key, value in inputs.items()})
        for i, (key, _) in enumerate(items):
            real = slice(None) if features.mask is None else features.mask[i]
            self.features[key] = features.values[i][real].float().cpu().contiguous()
            if features.breaks is not None:
                self.breaks[key] = features.breaks[i][real].cpu().contiguous()
        return len(items)

    def _key(self, item: Media, modality: Modality, fetch: Fetch) -> str:
        path = str(item.source) if isinstance(item.source, (str, Path)) else None
        known = (path or "", fetch.root, item.modality)
        if path is not None and known in self._keys:
            return self._keys[known]
        settings = json.dumps(modality.model_dump(mode="json", exclude={"projector"}))
        digest = hashlib.sha256(settings.encode())
        digest.update(modality.content(item.source, fetch))
        if path is not None:
            self._keys[known] = digest.hexdigest()
        return digest.hexdigest()
