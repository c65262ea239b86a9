"""Recipe keys and values of earlier versions, answered with their names now."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

RENAMED_KEYS = {
    "model.learn_turns": "train_on_turns",
    "train.align": "closed_form",
    "train.start_from": "init_from",
    "train.share_media": "packing: {share: true}",
    "train.share_prefix": "packing: {share: true}",
    "train.stages.*.teacher": "distillation",
    "train.stages.*.learn.projectors.rate": "lr",
    "train.stages.*.learn.projectors.*.rate": "lr",
    "train.stages.*.learn.projector_biases.rate": "lr",
    "train.stages.*.learn.encoders.*.rate": "lr",
    "train.stages.*.learn.encoders.*.last": "last_layers",
    "train.stages.*.learn.adapter.rate": "lr",
    "train.stages.*.learn.language_model.rate": "lr",
}
"""Path of a key of an earlier version -> its name now. `*`: any key or index."""

RENAMED_VALUES = {("train.closed_form.targets", "in_order"): "by_position"}
"""(Path, value of an earlier version) -> its value now."""

RENAMED_WORDS = frozenset({"rate", "surrogates"})
"""Keys of earlier versions beside names of modalities: a modality cannot have such a name."""

_PATTERNS = {
    re.compile(re.escape(old).replace(r"\*", r"[^.]+")): new for old, new in RENAMED_KEYS.items()
}


def check_renamed(fields: Any, at: str = "") -> None:
    """Raise ValueError with the new name of every key of an earlier version.

    Args:
        fields: A recipe, or a section of one, as YAML gives it.
        at: Path of that section in a recipe: `model` for the one that a checkpoint holds.
    """
    # all at once, so that an old recipe needs one correction and not one per start
    sentences = []
    for path, value in _walk(fields, at):
        new = next((new for old, new in _PATTERNS.items() if old.fullmatch(path)), None)
        if new is not None:
            sentences.append(f"`{path}` is now `{new}`; change the key")
        elif isinstance(value, str) and (path, value) in RENAMED_VALUES:
            now = RENAMED_VALUES[path, value]
            sentences.append(f"`{path}: {value}` is now `{path}: {now}`; change the value")
    if sentences:
        raise ValueError("; ".join(sentences))


def _walk(fields: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Every value under a mapping or list, with its dotted path."""
    if isinstance(fields, Mapping):
        pairs: Any = fields.items()
    else:
        pairs = enumerate(fields) if isinstance(fields, (list, tuple)) else ()
    for key, value in pairs:
        path = f"{at}.{key}" if at else str(key)
        yield path, value
        yield from _walk(value, path)
