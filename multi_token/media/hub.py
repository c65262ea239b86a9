"""Options of the hub for all parts of one run: token, cache folder, no network.

A run names its language model and encoders, which plug-ins load. So the options are not arguments
of each load: they hold within a block, and `hub_arguments` returns them to whatever loads there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HubOptions:
    """Arguments of `from_pretrained` for everything that is read from the hub."""

    token: str | bool | None = None
    """Token of a private or gated repository; default: the one of `hf auth login`."""
    cache_dir: str | None = None
    """Folder of downloads; default: that of huggingface_hub."""
    local_files_only: bool = False
    """Download nothing; what is missing is an error."""


DEFAULT_HUB = HubOptions()
"""Options of `hf auth login` and the environment variables of huggingface_hub."""
_CURRENT: ContextVar[HubOptions] = ContextVar("hub_options", default=DEFAULT_HUB)


@contextmanager
def hub_options(options: HubOptions) -> Iterator[None]:
    """Within, `hub_arguments` returns these options; defaults change nothing."""
    if options == DEFAULT_HUB:
        yield
        return
    token = _CURRENT.set(options)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def hub_arguments() -> dict[str, Any]:
    """Return the options that differ from their defaults, as arguments of `from_pretrained`."""
    return {
        name: value
        for name, value in asdict(_CURRENT.get()).items()
        if value != getattr(DEFAULT_HUB, name)
    }
