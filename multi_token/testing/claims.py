"""Claims of a modality, one function each: returns its result, or raises `ClaimFailed`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multi_token import registry
from multi_token.encoders import cast_encoder
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Encoder, Modality
from multi_token.projectors.base import ProjectorSpec
from multi_token.types import Features, Prepared

_SIZES = frozenset(("pixels", "frames", "seconds", "characters"))
_WIDTH = 16  # of the language model that is not there
_TOLERANCE = 1e-3  # of the features' size: rounding stays far below it, and a fault far above
_ROUNDING = 0.1  # of the features' length: what weights of 8 bits of mantissa may cost


class ClaimFailed(Exception):
    """A claim does not hold; the message says what was seen."""


@dataclass(frozen=True)
class Subject:
    """A modality, its sources, and what becomes of them: made when first asked for."""

    modality: Modality
    sources: tuple[Any, ...]
    fetch: Fetch

    def prepare(self, source: Any) -> Prepared:
        return self.modality.prepare(self.modality.load(source, self.fetch))

    @cached_property
    def items(self) -> list[Prepared]:
        return [self.prepare(source) for source in self.sources]

    @cached_property
    def encoder(self) -> Encoder:
        return _frozen(self.modality.build_encoder())

    @cached_property
    def features(self) -> Features:
        """All items in one batch."""
        return self.encode(self.items)

    def encode(self, items: Sequence[Prepared], encoder: Encoder | None = None) -> Features:
        with torch.no_grad():
            return (encoder or self.encoder)(**self.modality.collate(items))


def _is_found_by_name(trial: Subject) -> str:
    name, cls = trial.modality.type, type(trial.modality)
    if name not in registry.registered_names("modality"):
        raise ClaimFailed(
            f"no modality {name!r} is known, so no recipe can name it: declare it under the entry "
            "point group 'multi_token.modalities' and install the package, or call "
            "register_modality"
        )
    found = registry.resolve("modality", name)
    if found is not cls:
        raise ClaimFailed(
            f"type {name!r} stands for {found.__qualname__}, not for {cls.__qualname__}"
        )
    return f"type: {name}"


def _round_trips(trial: Subject) -> str:
    fields = json.loads(json.dumps(trial.modality.model_dump(mode="json")))
    again = type(trial.modality).model_validate(fields)
    if again != trial.modality:
        changed = [key for key in fields if getattr(again, key) != getattr(trial.modality, key)]
        raise ClaimFailed(f"{', '.join(changed) or 'something'} changed on the way")
    return f"{len(fields)} fields"


def _loads_nothing(trial: Subject) -> str:
    fields = trial.modality.model_dump()
    moved = {
        key: f"{value}-elsewhere"
        for key, value in fields.items()
        if isinstance(value, str) and Path(value).exists()
    }
    try:
        type(trial.modality).model_validate({**fields, **moved})
    except Exception as error:
        raise ClaimFailed(
            f"it cannot be constructed where {', '.join(moved) or 'its files'} cannot be read "
            f"({type(error).__name__}); only `build_encoder` and `prepare` may load"
        ) from error
    again = type(trial.modality).model_validate(fields)
    for value in [*vars(again).values(), *(again.__pydantic_private__ or {}).values()]:
        if isinstance(value, (Tensor, nn.Module)):
            raise ClaimFailed(f"it holds {_named(value)}; only `build_encoder` makes weights")
    return f"without {', '.join(moved)}" if moved else "it holds numbers and names only"


def _pickles(trial: Subject) -> str:
    _ = trial.items, trial.encoder  # as after use
    inventory = _Inventory()
    inventory.dump(trial.modality)
    if inventory.found:
        raise ClaimFailed(
            f"each data worker would get {inventory.found[0]}; keep it in the encoder"
        )
    data = ForkingPickler.dumps(trial.modality)
    again = ForkingPickler.loads(data)  # type: ignore[reportAttributeAccessIssue]
    if again != trial.modality:
        raise ClaimFailed("what comes out is another instance")
    return f"{len(data):,} bytes"


def _predicts_num_features(trial: Subject) -> str:
    features, dim = trial.features, trial.encoder.dim
    if features.values.ndim != 3 or len(features.values) != len(trial.items):
        raise ClaimFailed(
            f"expected values [{len(trial.items)}, length, {dim}], got "
            f"{list(features.values.shape)}"
        )
    if features.values.shape[-1] != dim:
        raise ClaimFailed(f"encoder.dim is {dim}, and the features are {features.values.shape[-1]}")
    counts = [len(rows) for rows in _rows(features)]
    for index, (item, count) in enumerate(zip(trial.items, counts, strict=True)):
        if item.num_features != count:
            raise ClaimFailed(
                f"source {index}: `prepare` promises {item.num_features} features, the encoder "
                f"gives {count}"
            )
    if not all(rows.isfinite().all() for rows in _rows(features)):
        raise ClaimFailed("there are features that are no finite numbers")
    return f"{_count_text(counts)} of width {dim}"


def _makes_embeddings(trial: Subject) -> str:
    promised = [trial.modality.num_tokens(item.num_features) for item in trial.items]
    return _project(trial, trial.modality.projector, promised)


def works_with_projector(trial: Subject, *, kind: str) -> str:
    fields = {"type": kind, "line_break": trial.modality.projector.line_break}
    try:
        spec = registry.build("projector", fields, ProjectorSpec)
        promised = [spec.num_tokens(item.num_features) for item in trial.items]
        return _project(trial, spec, promised)
    except MultiTokenError as refusal:
        return f"does not fit: {refusal}"


def _project(trial: Subject, spec: ProjectorSpec, promised: list[int]) -> str:
    """Tokens of a batch are as many as promised, and those of each item alone."""
    projector = spec.build(trial.encoder.dim, _WIDTH).eval()
    with torch.no_grad():
        together = projector(trial.features)
        alone = [projector(trial.encode([item])) for item in trial.items]
    if together.shape != (sum(promised), _WIDTH):
        raise ClaimFailed(
            f"expected {sum(promised)} tokens of width {_WIDTH} for a batch, got "
            f"{list(together.shape)}"
        )
    counts = [len(tokens) for tokens in alone]
    if counts != promised:
        raise ClaimFailed(
            f"expected {_count_text(promised)} tokens one by one, got {_count_text(counts)}"
        )
    difference = _difference(together, torch.cat(alone))
    if difference > _TOLERANCE:
        raise ClaimFailed(f"tokens of a batch differ from those of one by one by {difference:.0%}")
    return (
        f"{_count_text([item.num_features for item in trial.items])} -> "
        f"{_count_text(promised)} tokens"
    )


def _batches(trial: Subject) -> str:
    items = [*trial.items, *reversed(trial.items)]
    together = _rows(trial.encode(items))
    for index, (rows, item) in enumerate(zip(together, items, strict=True)):
        alone = _rows(trial.encode([item]))[0]
        if rows.shape != alone.shape:
            raise ClaimFailed(f"item {index}: {len(rows)} features in a batch, {len(alone)} alone")
        difference = _difference(rows, alone)
        if difference > _TOLERANCE:
            raise ClaimFailed(
                f"item {index} differs by {difference:.0%} of its features' size; is something "
                "computed over the batch, or over padding?"
            )
    return f"{len(items)} items at once"


def _is_deterministic(trial: Subject) -> str:
    for source, first in zip(trial.sources, trial.items, strict=True):
        again = trial.prepare(source)
        for key, value in first.inputs.items():
            if not torch.equal(value, again.inputs[key]):
                raise ClaimFailed(f"`load` and `prepare` give other {key!r} the second time")
    if not _is_same(trial.encode(trial.items), trial.encode(trial.items)):
        raise ClaimFailed(
            "two passes over one batch differ, in eval mode; dropout without "
            "`training=self.training`, or sampling?"
        )
    return "twice the same, exactly"


def _encoder_stays_frozen(trial: Subject) -> str:
    encoder = trial.encoder
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    first = trial.encode(trial.items)
    encoder.train()
    encoder.eval()  # as the model does before each step
    loud = [name or "the encoder" for name, module in encoder.named_modules() if module.training]
    if loud:
        raise ClaimFailed(f"{loud[0]} is in training mode after eval()")
    if not _is_same(first, trial.encode(trial.items)):
        raise ClaimFailed("train() and eval() changed what it gives")
    for key, tensor in encoder.state_dict().items():
        if not torch.equal(before[key], tensor):
            raise ClaimFailed(f"a pass changed {key}")
    return f"{sum(p.numel() for p in encoder.parameters()):,} weights"


def _can_be_built_again(trial: Subject) -> str:
    second = _frozen(trial.modality.build_encoder())
    if _is_same(trial.features, trial.encode(trial.items, second)):
        return "twice the same, exactly"
    if trial.encoder.pretrained:
        raise ClaimFailed(
            "two encoders of one config differ, so weights are random, and no checkpoint has them: "
            f"set `pretrained = False` on {type(second).__name__}"
        )
    second.load_state_dict(trial.encoder.state_dict())
    if not _is_same(trial.features, trial.encode(trial.items, second)):
        raise ClaimFailed("its state_dict does not hold all that it computes with")
    return "random at the start, as it says, and its state_dict holds all of it"


def works_in_micro_batches(trial: Subject) -> str:
    modality = trial.modality.model_copy(update={"micro_batch": 1})
    trickle = trial.encode(trial.items, _frozen(modality.build_encoder()))
    for index, (few, many) in enumerate(zip(_rows(trickle), _rows(trial.features), strict=True)):
        if few.shape != many.shape or _difference(few, many) > _TOLERANCE:
            raise ClaimFailed(f"source {index} has other features with `micro_batch: 1`")
    return "micro_batch: 1"


def works_in_bfloat16(trial: Subject) -> str:
    encoder = _frozen(trial.modality.build_encoder())
    cast_encoder(encoder, torch.bfloat16)
    lowered = trial.encode(trial.items, encoder)
    for index, (few, many) in enumerate(zip(_rows(lowered), _rows(trial.features), strict=True)):
        off = float((few - many).norm() / many.norm().clamp(min=1e-6))
        if few.shape != many.shape or not off < _ROUNDING:
            raise ClaimFailed(
                f"source {index} has other features with `dtype: bfloat16`: {off:.1%} off"
            )
    return "dtype: bfloat16"


def _distinguishes_items(trial: Subject) -> str:
    contents = [trial.modality.content(source, trial.fetch) for source in trial.sources]
    if contents != [trial.modality.content(source, trial.fetch) for source in trial.sources]:
        raise ClaimFailed("`content` gives other bytes the second time: no feature would be found")
    if len(set(contents)) < len(contents):
        raise ClaimFailed(
            "`content` gives the same bytes for different sources, which would be mixed"
        )
    return f"{len(contents)} sources, {len(contents)} contents"


def _raises_on_bad_input(trial: Subject) -> str:
    try:
        trial.prepare(object())
    except MultiTokenError as refusal:
        if "\n" in str(refusal).strip():
            raise ClaimFailed(f"the refusal is not one sentence: {refusal}") from None
        return str(refusal)
    except Exception as error:
        raise ClaimFailed(
            f"`load` of an object that is no source raises {type(error).__name__} ({error}), "
            "expected a MediaError"
        ) from error
    raise ClaimFailed("an object that is no source was read without a word")


def _header_length_is_exact(trial: Subject) -> str:
    told = [trial.modality.num_features_from_header(s, trial.fetch) for s in trial.sources]
    for index, (number, item) in enumerate(zip(told, trial.items, strict=True)):
        if number is not None and number != item.num_features:
            raise ClaimFailed(
                f"source {index}: its header promises {number} features, `prepare` "
                f"{item.num_features}; let `count_features` count as `prepare` does"
            )
    num_told = sum(number is not None for number in told)
    return f"{num_told} of {len(told)} lengths are known from headers"


def _examples_are_read(trial: Subject) -> str:
    sources = trial.modality.example_sources()
    for index, source in enumerate(sources):
        raw = trial.modality.load(source, Fetch(allow_paths=False))
        trial.modality.prepare(raw)
        unknown = trial.modality.size_of(raw).keys() - _SIZES
        if unknown:
            raise ClaimFailed(
                f"`size_of` of example {index} names {sorted(unknown)[0]!r}; a server adds up "
                f"{', '.join(sorted(_SIZES))}"
            )
    return f"{len(sources)} examples"


CLAIMS: dict[str, Callable[[Subject], str]] = {
    "its name leads to its class": _is_found_by_name,
    "its config round-trips": _round_trips,
    "constructing loads nothing": _loads_nothing,
    "it pickles without weights": _pickles,
    "a source that cannot be read is refused in one sentence": _raises_on_bad_input,
    "different items are told apart": _distinguishes_items,
    "the encoder gives the promised features": _predicts_num_features,
    "its projector makes the promised tokens": _makes_embeddings,
    "a mixed batch equals one by one": _batches,
    "the same input gives the same features": _is_deterministic,
    "a frozen encoder stays as it is": _encoder_stays_frozen,
    "an encoder can be built again": _can_be_built_again,
    "its example sources can be decoded": _examples_are_read,
    "the length told by the header is the prepared length": _header_length_is_exact,
}


class _Inventory(ForkingPickler):
    """The pickler of data workers, noting weights on the way."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[str] = []

    def persistent_id(self, obj: Any) -> None:
        """Called with every object that goes in."""
        if isinstance(obj, (Tensor, nn.Module)):
            self.found.append(_named(obj))


def _named(weights: Tensor | nn.Module) -> str:
    is_tensor = isinstance(weights, Tensor)
    return f"a tensor {list(weights.shape)}" if is_tensor else type(weights).__name__


def _frozen(encoder: Encoder) -> Encoder:
    return encoder.requires_grad_(False).eval()


def _rows(features: Features) -> list[Tensor]:
    """The real features of each item, [length_i, dim] each."""
    if features.mask is None:
        return list(features.values)
    return [values[mask] for values, mask in zip(features.values, features.mask, strict=True)]


def _is_same(first: Features, second: Features) -> bool:
    pairs = zip(_rows(first), _rows(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _difference(first: Tensor, second: Tensor) -> float:
    """The largest difference, as a share of the root mean square."""
    size = second.float().square().mean().sqrt().clamp(min=1e-12)
    return float((first.float() - second.float()).abs().max() / size)


def _count_text(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))
