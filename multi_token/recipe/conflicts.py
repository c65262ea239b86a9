"""Recipe keys that earlier versions had, with the key that each one is called now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def check_renamed(fields: Any, at: str = "") -> None:
    """Raise ValueError with the new name of every key of an earlier version.

    Args:
        fields: A recipe, or a section of one, as YAML gives it.
        at: Path of that section in a recipe: `model` for the one that a checkpoint holds.
    """
    sentences = []
    for path, value in _walk(fields, tuple(at.split(".")) if at else ()):
        dotted = ".".join(path)
        new = next((new for old, new in RENAMED_KEYS.items() if _matches(path, old)), None)
        if new is not None:
            sentences.append(f"`{dotted}` is now called `{new}`; rename the key")
        elif isinstance(value, str) and (dotted, value) in RENAMED_VALUES:
            now = RENAMED_VALUES[dotted, value]
            sentences.append(f"`{dotted}: {value}` is now `{dotted}: {now}`; change the value")
    if sentences:
        raise ValueError("; ".join(sentences))


def _walk(fields: Any, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value under a mapping or list, with its path."""
    if isinstance(fields, Mapping):
        pairs = [(str(key), value) for key, value in fields.items()]
    elif isinstance(fields, (list, tuple)):
        pairs = [(str(i), value) for i, value in enumerate(fields)]
    else:
        return
    for key, value in pairs:
        yield (*at, key), value
        yield from _walk(value, (*at, key))


def _matches(path: Sequence[str], pattern: str) -> bool:
    parts = pattern.split(".")
    return len(path) == len(parts) and all(
        expected in ("*", part) for part, expected in zip(path, parts, strict=True)
    )
