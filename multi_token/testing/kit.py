"""The conformance kit: everything a modality promises, each promise tried on a small instance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from multi_token import registry
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Modality, PretrainedModality
from multi_token.projectors.base import ProjectorSpec
from multi_token.testing.claims import (
    CLAIMS,
    ClaimFailed,
    Subject,
    works_in_bfloat16,
    works_in_micro_batches,
    works_with_projector,
)


@dataclass(frozen=True)
class Result:
    """One claim, whether it holds, and what was seen."""

    claim: str
    passed: bool
    detail: str


def check_modality(
    modality: Modality, sources: Sequence[Any], *, fetch: Fetch | None = None
) -> list[Result]:
    """Try every claim on `modality`, with at least two different `sources` of different sizes.

    Claims are independent: one that crashes has failed, and the others are tried all the same.
    """
    if len(sources) < 2:
        raise MultiTokenError(
            f"the conformance kit needs at least two different sources for a batch of "
            f"{modality.type}, got {len(sources)}"
        )
    trial = Subject(modality, tuple(sources), fetch or Fetch())
    claims = dict(CLAIMS)
    if isinstance(modality, PretrainedModality):
        claims["small micro-batches give the same features"] = works_in_micro_batches
        claims["bfloat16 gives nearly the same features"] = works_in_bfloat16
    for kind in registry.registered_names("projector"):
        if registry.entry("projector", kind, ProjectorSpec).state == "ready":
            claims[f"projector {kind} keeps its promise"] = partial(works_with_projector, kind=kind)
    return [_try_claim(claim, partial(check, trial)) for claim, check in claims.items()]


def check_named(name: str, folder: Path) -> list[Result]:
    """`check_modality` on the example of a registered modality; `folder` is an empty one for it.

    Raises RegistryError for an unknown name and MultiTokenError for one without an example.
    """
    cls = registry.resolve("modality", name)
    if not (isinstance(cls, type) and issubclass(cls, Modality)):
        raise MultiTokenError(f"modality {name!r} is {cls!r}, not a Modality")
    example = cls.example(folder)
    if example is None:
        raise MultiTokenError(
            f"there is nothing to try {name!r} on: let {cls.__name__}.example(folder) return the "
            "fields of a small instance and a list of sources for it"
        )
    fields, sources = example
    return check_modality(registry.build("modality", {**fields, "type": name}, Modality), sources)


def assert_conforms(
    modality: Modality, sources: Sequence[Any], *, fetch: Fetch | None = None
) -> None:
    """For a test: an AssertionError with every claim that does not hold."""
    failed = [r for r in check_modality(modality, sources, fetch=fetch) if not r.passed]
    if failed:
        lines = "".join(f"\n- {result.claim}: {result.detail}" for result in failed)
        raise AssertionError(f"{type(modality).__name__} does not keep its contract:{lines}")


def _try_claim(claim: str, check: Callable[[], str]) -> Result:
    try:
        return Result(claim, True, check())
    except ClaimFailed as broken:
        return Result(claim, False, str(broken))
    except Exception as error:  # noqa: BLE001 - a crash is the finding, and the other claims go on
        sentence = str(error).strip().partition("\n")[0]
        return Result(claim, False, f"{type(error).__name__}: {sentence}".removesuffix(": "))
