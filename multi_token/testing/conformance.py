"""Conformance kit: everything that a modality promises, one function per claim.

A claim returns what it saw, or raises `ClaimFailed`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multi_token import registry
from multi_token.encoders import cast_encoder
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Encoder, Modality, PretrainedModality
from multi_token.modalities.facts import fault_of_facts
from multi_token.projectors.base import ProjectorSpec
from multi_token.types import Features, Prepared

_SIZES = frozenset(("pixels", "frames", "seconds", "characters"))
_WIDTH = 16  # of a language model that is not built
_TOLERANCE = 1e-3  # relative to the features: rounding is far below it, a fault far above
_ROUNDING = 0.1  # relative to the features: bfloat16 weights have a mantissa of 8 bits


class ClaimFailed(Exception):
    """A claim that does not hold; the message says what was seen."""


@dataclass(frozen=True)
class Subject:
    """A modality and its sources; items, encoder and features are computed on first use."""

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
        """Features of all items in one batch."""
        return self.encode(self.items)

    def encode(self, items: Sequence[Prepared], encoder: Encoder | None = None) -> Features:
        with torch.no_grad():
            return (encoder or self.encoder)(**self.modality.collate(items))


def _is_found_by_name(subject: Subject) -> str:
    name, cls = subject.modality.type, type(subject.modality)
    if name not in registry.registered_names("modality"):
        raise ClaimFailed(
            f"no modality {name!r} is registered, so no recipe can name it: declare it under the "
            "entry point group 'multi_token.modalities' and install the package, or call "
            "register_modality"
        )
    # Another package may own the name, and a recipe would get its class.
    found = registry.resolve("modality", name)
    if found is not cls:
        raise ClaimFailed(f"type {name!r} is {found.__qualname__}, not {cls.__qualname__}")
    return f"type: {name}"


def _round_trips(subject: Subject) -> str:
    # Through JSON, as a checkpoint stores it: tuples become lists on the way.
    fields = json.loads(json.dumps(subject.modality.model_dump(mode="json")))
    again = type(subject.modality).model_validate(fields)
    if again != subject.modality:
        changed = [key for key in fields if getattr(again, key) != getattr(subject.modality, key)]
        raise ClaimFailed(f"{', '.join(changed) or 'something'} changed in a round trip")
    return f"{len(fields)} fields"


def _loads_nothing(subject: Subject) -> str:
    fields = subject.modality.model_dump()
    # With paths that do not exist, so that reading any of them fails.
    moved = {
        key: f"{value}-elsewhere"
        for key, value in fields.items()
        if isinstance(value, str) and Path(value).exists()
    }
    try:
        type(subject.modality).model_validate({**fields, **moved})
    except Exception as error:
        raise ClaimFailed(
            f"it cannot be constructed where {', '.join(moved) or 'its files'} cannot be read "
            f"({type(error).__name__}); only `build_encoder` and `prepare` may load"
        ) from error
    again = type(subject.modality).model_validate(fields)
    # Private attributes too: pydantic neither dumps nor compares them.
    for value in [*vars(again).values(), *(again.__pydantic_private__ or {}).values()]:
        if isinstance(value, (Tensor, nn.Module)):
            raise ClaimFailed(f"it holds {_named(value)}; only `build_encoder` makes weights")
    return f"without {', '.join(moved)}" if moved else "it holds numbers and names only"


def _pickles(subject: Subject) -> str:
    _ = subject.items, subject.encoder  # a modality may keep something when it is first used
    # Looked for while pickling, since weights may hide anywhere in the object.
    inventory = _Inventory()
    inventory.dump(subject.modality)
    if inventory.found:
        raise ClaimFailed(
            f"each data worker would get {inventory.found[0]}; keep it in the encoder"
        )
    data = ForkingPickler.dumps(subject.modality)
    again = ForkingPickler.loads(data)  # type: ignore[reportAttributeAccessIssue]
    if again != subject.modality:
        raise ClaimFailed("a pickled copy is not equal to the instance")
    return f"{len(data):,} bytes"


def _predicts_num_features(subject: Subject) -> str:
    features, dim = subject.features, subject.encoder.dim
    if features.values.ndim != 3 or len(features.values) != len(subject.items):
        raise ClaimFailed(
            f"expected values [{len(subject.items)}, length, {dim}], got "
            f"{list(features.values.shape)}"
        )
    if features.values.shape[-1] != dim:
        raise ClaimFailed(f"encoder.dim is {dim}, and the features are {features.values.shape[-1]}")
    # Real features alone: padding belongs to the batch and not to the item.
    counts = [len(rows) for rows in _rows(features)]
    for index, (item, count) in enumerate(zip(subject.items, counts, strict=True)):
        if item.num_features != count:
            raise ClaimFailed(
                f"source {index}: `prepare` promises {item.num_features} features, the encoder "
                f"gives {count}"
            )
    if not all(rows.isfinite().all() for rows in _rows(features)):
        raise ClaimFailed("there are features with NaN or inf")
    return f"{_count_text(counts)} of width {dim}"


def _makes_embeddings(subject: Subject) -> str:
    return _project(subject, subject.modality.projector, subject.modality.num_tokens)


def works_with_projector(subject: Subject, *, kind: str) -> str:
    # `line_break` has to agree with the modality, every other field is the default.
    fields = {"type": kind, "line_break": subject.modality.projector.line_break}
    try:
        spec = registry.build("projector", fields, ProjectorSpec)
        return _project(subject, spec, spec.num_tokens)
    except MultiTokenError as refusal:
        return f"does not fit: {refusal}"


def _project(subject: Subject, spec: ProjectorSpec, num_tokens: Callable[[int], int]) -> str:
    """Compare the embeddings of a batch with the promised number, and with one item at a time."""
    promised = [num_tokens(item.num_features) for item in subject.items]
    projector = spec.build(subject.encoder.dim, _WIDTH).eval()
    with torch.no_grad():
        together = projector(subject.features)
        alone = [projector(subject.encode([item])) for item in subject.items]
    if together.shape != (sum(promised), _WIDTH):
        raise ClaimFailed(
            f"expected {sum(promised)} embeddings of width {_WIDTH} for a batch, got "
            f"{list(together.shape)}"
        )
    counts = [len(tokens) for tokens in alone]
    if counts != promised:
        raise ClaimFailed(
            f"expected {_count_text(promised)} embeddings one by one, got {_count_text(counts)}"
        )
    # Not bit-identical: kernels sum in another order for another batch size.
    difference = _difference(together, torch.cat(alone))
    if difference > _TOLERANCE:
        raise ClaimFailed(f"a batch differs from one by one by {difference:.0%} of its embeddings")
    return (
        f"{_count_text([item.num_features for item in subject.items])} -> "
        f"{_count_text(promised)} tokens"
    )


def _batches(subject: Subject) -> str:
    # Each item twice, in two places: an encoder that mixes up its items shows here.
    items = [*subject.items, *reversed(subject.items)]
    together = _rows(subject.encode(items))
    for index, (rows, item) in enumerate(zip(together, items, strict=True)):
        alone = _rows(subject.encode([item]))[0]
        if rows.shape != alone.shape:
            raise ClaimFailed(f"item {index}: {len(rows)} features in a batch, {len(alone)} alone")
        difference = _difference(rows, alone)
        if difference > _TOLERANCE:
            raise ClaimFailed(
                f"item {index} differs by {difference:.0%} of its features' size; is something "
                "computed over the batch, or over padding?"
            )
    return f"{len(items)} items at once"


def _is_deterministic(subject: Subject) -> str:
    # From the source again, since `load` may choose frames or crops at random.
    for source, first in zip(subject.sources, subject.items, strict=True):
        again = subject.prepare(source)
        for key, value in first.inputs.items():
            if not torch.equal(value, again.inputs[key]):
                raise ClaimFailed(f"`load` and `prepare` give other {key!r} the second time")
    if not _is_same(subject.encode(subject.items), subject.encode(subject.items)):
        raise ClaimFailed(
            "two passes over one batch differ, in eval mode; dropout without "
            "`training=self.training`, or sampling?"
        )
    return "twice the same, exactly"


def _encoder_stays_frozen(subject: Subject) -> str:
    encoder = subject.encoder
    # Buffers too: running statistics change in a forward pass in train mode.
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    first = subject.encode(subject.items)
    encoder.train()
    encoder.eval()  # the model does both before each step
    for name, module in encoder.named_modules():
        if module.training:
            raise ClaimFailed(f"{name or 'the encoder'} is in training mode after eval()")
    if not _is_same(first, subject.encode(subject.items)):
        raise ClaimFailed("train() and eval() changed its features")
    for key, tensor in encoder.state_dict().items():
        if not torch.equal(before[key], tensor):
            raise ClaimFailed(f"a forward pass changed {key}")
    return f"{sum(p.numel() for p in encoder.parameters()):,} weights"


def _can_be_built_again(subject: Subject) -> str:
    second = _frozen(subject.modality.build_encoder())
    # Exactly equal, because the same weights compute the same features in one order.
    if _is_same(subject.features, subject.encode(subject.items, second)):
        return "twice the same, exactly"
    if subject.encoder.pretrained:
        raise ClaimFailed(
            "two encoders of one config differ, so weights are random, and no checkpoint has them: "
            f"set `pretrained = False` on {type(second).__name__}"
        )
    # Random weights are saved with the run, so the state_dict has to hold all of them.
    second.load_state_dict(subject.encoder.state_dict())
    if not _is_same(subject.features, subject.encode(subject.items, second)):
        raise ClaimFailed("its state_dict does not hold all of its weights")
    return "random at the start, and its state_dict holds all weights"


def works_in_micro_batches(subject: Subject) -> str:
    modality = subject.modality.model_copy(update={"micro_batch": 1})
    one_by_one = subject.encode(subject.items, _frozen(modality.build_encoder()))
    for index, (few, many) in enumerate(
        zip(_rows(one_by_one), _rows(subject.features), strict=True)
    ):
        if few.shape != many.shape or _difference(few, many) > _TOLERANCE:
            raise ClaimFailed(f"source {index} has other features with `micro_batch: 1`")
    return "micro_batch: 1"


def works_in_bfloat16(subject: Subject) -> str:
    encoder = _frozen(subject.modality.build_encoder())
    cast_encoder(encoder, torch.bfloat16)
    lowered = subject.encode(subject.items, encoder)
    for index, (few, many) in enumerate(zip(_rows(lowered), _rows(subject.features), strict=True)):
        off = float((few - many).norm() / many.norm().clamp(min=1e-6))
        if few.shape != many.shape or not off < _ROUNDING:
            raise ClaimFailed(
                f"source {index} has other features with `dtype: bfloat16`: {off:.1%} off"
            )
    return "dtype: bfloat16"


def _distinguishes_items(subject: Subject) -> str:
    # Twice, since an address or a time in the bytes would change them.
    contents = [subject.modality.content(source, subject.fetch) for source in subject.sources]
    if contents != [subject.modality.content(source, subject.fetch) for source in subject.sources]:
        raise ClaimFailed(
            "`content` gives other bytes the second time: no cached feature would be found"
        )
    if len(set(contents)) < len(contents):
        raise ClaimFailed(
            "`content` gives the same bytes for different sources, so they would share features"
        )
    return f"{len(contents)} sources, {len(contents)} contents"


def _raises_on_bad_input(subject: Subject) -> str:
    try:
        # No modality can read a bare object.
        subject.prepare(object())
    except MultiTokenError as refusal:
        if "\n" in str(refusal).strip():
            raise ClaimFailed(f"the refusal is not one sentence: {refusal}") from None
        return str(refusal)
    except Exception as error:
        raise ClaimFailed(
            f"`load` of an object that is no source raises {type(error).__name__} ({error}), "
            "expected a MediaError"
        ) from error
    raise ClaimFailed("an object that is no source was read without an error")


def _header_length_is_exact(subject: Subject) -> str:
    counts = [subject.modality.num_features_from_header(s, subject.fetch) for s in subject.sources]
    for index, (number, item) in enumerate(zip(counts, subject.items, strict=True)):
        # None is allowed: decoding tells the length then.
        if number is not None and number != item.num_features:
            raise ClaimFailed(
                f"source {index}: its header promises {number} features, `prepare` "
                f"{item.num_features}; let `count_features` count as `prepare` does"
            )
    num_known = sum(number is not None for number in counts)
    return f"{num_known} of {len(counts)} lengths are known from headers"


def _gives_facts(subject: Subject) -> str:
    for index, source in enumerate(subject.sources):
        if fault := fault_of_facts(subject.modality, source, subject.fetch):
            raise ClaimFailed(f"source {index}: {fault}")
    return ", ".join(subject.modality.fact_names) or "it has none"


def _examples_are_read(subject: Subject) -> str:
    # The examples of a server, and not those of the kit.
    sources = subject.modality.example_sources()
    for index, source in enumerate(sources):
        # As the media worker of a server, which opens no file.
        raw = subject.modality.load(source, Fetch(allow_paths=False))
        subject.modality.prepare(raw)
        unknown = subject.modality.size_of(raw).keys() - _SIZES
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
    "different items have different content": _distinguishes_items,
    "the encoder gives the promised features": _predicts_num_features,
    "its projector makes the promised embeddings": _makes_embeddings,
    "a mixed batch equals one by one": _batches,
    "the same input gives the same features": _is_deterministic,
    "a frozen encoder stays as it is": _encoder_stays_frozen,
    "an encoder can be built again": _can_be_built_again,
    "its example sources can be decoded": _examples_are_read,
    "the length from the header is the prepared length": _header_length_is_exact,
    "its facts are given, and stay the same": _gives_facts,
}


class _Inventory(ForkingPickler):
    """The pickler of data workers, which records the weights that it meets."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[str] = []

    def persistent_id(self, obj: Any) -> None:
        """Record an object; pickle calls this with each one."""
        if isinstance(obj, (Tensor, nn.Module)):
            self.found.append(_named(obj))


def _named(weights: Tensor | nn.Module) -> str:
    is_tensor = isinstance(weights, Tensor)
    return f"a tensor {list(weights.shape)}" if is_tensor else type(weights).__name__


def _frozen(encoder: Encoder) -> Encoder:
    return encoder.requires_grad_(False).eval()


def _rows(features: Features) -> list[Tensor]:
    """Real features of each item, [length_i, dim] each."""
    if features.mask is None:
        return list(features.values)
    return [values[mask] for values, mask in zip(features.values, features.mask, strict=True)]


def _is_same(first: Features, second: Features) -> bool:
    pairs = zip(_rows(first), _rows(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _difference(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the root mean square."""
    size = second.float().square().mean().sqrt().clamp(min=1e-12)
    return float((first.float() - second.float()).abs().max() / size)


def _count_text(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


@dataclass(frozen=True)
class Result:
    """One claim, its outcome, and what was seen."""

    claim: str
    passed: bool
    detail: str


def check_modality(
    modality: Modality, sources: Sequence[Any], *, fetch: Fetch | None = None
) -> list[Result]:
    """Check every claim of the kit.

    Args:
        modality: The instance to check.
        sources: At least two different sources of different sizes.
        fetch: Reader of paths and URLs. Default: `Fetch()`.

    Returns:
        One result per claim. A claim that crashes has failed; the others are checked all the same.

    Raises:
        MultiTokenError: There are fewer than two sources.
    """
    if len(sources) < 2:
        raise MultiTokenError(
            f"the conformance kit needs at least two different sources for a batch of "
            f"{modality.type}, got {len(sources)}"
        )
    subject = Subject(modality, tuple(sources), fetch or Fetch())
    claims = dict(CLAIMS)
    if isinstance(modality, PretrainedModality):
        claims["small micro-batches give the same features"] = works_in_micro_batches
        claims["bfloat16 gives nearly the same features"] = works_in_bfloat16
    for kind in registry.registered_names("projector"):
        if registry.entry("projector", kind, ProjectorSpec).state == "ready":
            claims[f"projector {kind} makes the promised embeddings"] = partial(
                works_with_projector, kind=kind
            )
    return [_check_claim(claim, partial(check, subject)) for claim, check in claims.items()]


def check_named(name: str, folder: Path) -> list[Result]:
    """Check a registered modality on its own example.

    Args:
        name: Registered name.
        folder: Empty folder for the example's files.

    Raises:
        RegistryError: The name is unknown.
        MultiTokenError: The modality has no example.
    """
    cls = registry.resolve("modality", name)
    if not (isinstance(cls, type) and issubclass(cls, Modality)):
        raise MultiTokenError(f"modality {name!r} is {cls!r}, not a Modality")
    example = cls.example(folder)
    if example is None:
        raise MultiTokenError(
            f"there is nothing to check {name!r} on: let {cls.__name__}.example(folder) return the "
            "fields of a small instance and a list of sources for it"
        )
    fields, sources = example
    return check_modality(registry.build("modality", {**fields, "type": name}, Modality), sources)


def assert_conforms(
    modality: Modality, sources: Sequence[Any], *, fetch: Fetch | None = None
) -> None:
    """Raise an AssertionError that lists every claim that does not hold; for tests."""
    failed = [r for r in check_modality(modality, sources, fetch=fetch) if not r.passed]
    if failed:
        lines = "".join(f"\n- {result.claim}: {result.detail}" for result in failed)
        raise AssertionError(f"{type(modality).__name__} does not keep its contract:{lines}")


def _check_claim(claim: str, check: Callable[[], str]) -> Result:
    try:
        return Result(claim, True, check())
    # A claim is independent of the others, so a crash is a result and not an end.
    except ClaimFailed as broken:
        return Result(claim, False, str(broken))
    except Exception as error:  # noqa: BLE001 - a crash is the finding, and the other claims go on
        sentence = str(error).strip().partition("\n")[0]
        return Result(claim, False, f"{type(error).__name__}: {sentence}".removesuffix(": "))
