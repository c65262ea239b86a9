"""multi_token gives any language model new senses. The public names, and a map of the house.

row -> data/formats -> reader (modalities, chat) -> collate -> model (encode, project, splice)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from multi_token.errors import MultiTokenError
    from multi_token.modalities.base import Encoder, Modality
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.projectors.base import ProjectorSpec
    from multi_token.recipe.recipe import Recipe, load_recipe
    from multi_token.registry import register_modality, register_projector
    from multi_token.types import Conversation, Features, Media, Message, Prepared, Text

_HOMES = {
    "Conversation": "multi_token.types",
    "Encoder": "multi_token.modalities.base",
    "Features": "multi_token.types",
    "Media": "multi_token.types",
    "Message": "multi_token.types",
    "Modality": "multi_token.modalities.base",
    "MultiTokenError": "multi_token.errors",
    "MultiTokenForConditionalGeneration": "multi_token.model",
    "Prepared": "multi_token.types",
    "ProjectorSpec": "multi_token.projectors.base",
    "Recipe": "multi_token.recipe.recipe",
    "Text": "multi_token.types",
    "load_recipe": "multi_token.recipe.recipe",
    "register_modality": "multi_token.registry",
    "register_projector": "multi_token.registry",
}

__all__ = [
    "Conversation",
    "Encoder",
    "Features",
    "Media",
    "Message",
    "Modality",
    "MultiTokenError",
    "MultiTokenForConditionalGeneration",
    "Prepared",
    "ProjectorSpec",
    "Recipe",
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
