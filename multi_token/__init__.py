"""multi_token gives any language model new senses. The public names, and a map of the house.

row -> data/formats -> reader (modalities, chat) -> collate -> model (encode, project, splice)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from multi_token.errors import MediaError, MultiTokenError
    from multi_token.media.fetch import Fetch
    from multi_token.media.sniff import FileKind
    from multi_token.modalities.base import (
        AnyProjector,
        Encoder,
        Modality,
        OpenAIKind,
        PretrainedModality,
    )
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.projectors.base import ProjectorSpec
    from multi_token.projectors.kinds import Expand, Linear, Mlp, PixelShuffle, Pool, Stack
    from multi_token.projectors.resampler import Resample
    from multi_token.recipe.recipe import Recipe, load_recipe
    from multi_token.registry import register_modality, register_projector
    from multi_token.types import Conversation, Features, Media, Message, Prepared, Text

_HOMES = {
    "AnyProjector": "multi_token.modalities.base",
    "Conversation": "multi_token.types",
    "Encoder": "multi_token.modalities.base",
    "Expand": "multi_token.projectors.kinds",
    "Features": "multi_token.types",
    "Fetch": "multi_token.media.fetch",
    "FileKind": "multi_token.media.sniff",
    "Linear": "multi_token.projectors.kinds",
    "Media": "multi_token.types",
    "MediaError": "multi_token.errors",
    "Message": "multi_token.types",
    "Mlp": "multi_token.projectors.kinds",
    "Modality": "multi_token.modalities.base",
    "MultiTokenError": "multi_token.errors",
    "MultiTokenForConditionalGeneration": "multi_token.model",
    "OpenAIKind": "multi_token.modalities.base",
    "PixelShuffle": "multi_token.projectors.kinds",
    "Pool": "multi_token.projectors.kinds",
    "Prepared": "multi_token.types",
    "PretrainedModality": "multi_token.modalities.base",
    "ProjectorSpec": "multi_token.projectors.base",
    "Recipe": "multi_token.recipe.recipe",
    "Resample": "multi_token.projectors.resampler",
    "Stack": "multi_token.projectors.kinds",
    "Text": "multi_token.types",
    "load_recipe": "multi_token.recipe.recipe",
    "register_modality": "multi_token.registry",
    "register_projector": "multi_token.registry",
}

__all__ = [
    "AnyProjector",
    "Conversation",
    "Encoder",
    "Expand",
    "Features",
    "Fetch",
    "FileKind",
    "Linear",
    "Media",
    "MediaError",
    "Message",
    "Mlp",
    "Modality",
    "MultiTokenError",
    "MultiTokenForConditionalGeneration",
    "OpenAIKind",
    "PixelShuffle",
    "Pool",
    "Prepared",
    "PretrainedModality",
    "ProjectorSpec",
    "Recipe",
    "Resample",
    "Stack",
    "Text",
    "__version__",
    "load_recipe",
    "register_modality",
    "register_projector",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when asked for: `multi-token --help` need not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'multi_token' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
