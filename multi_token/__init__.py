"""multi_token gives any language model new modalities: its public names.

    from multi_token import train

    model = train("recipe.yaml")
    print(model.generate([{"images": ["cat.png"], "messages": [...]}]))

Users, notebooks and plug-ins import from this module alone; all other modules may move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from multi_token.convert.combine import combine
    from multi_token.errors import (
        ChatTemplateError,
        CheckpointError,
        ConvertError,
        Interrupted,
        LanguageModelError,
        MediaError,
        MultiTokenError,
        RecipeError,
        RegistryError,
        RowError,
        SpliceError,
    )
    from multi_token.generate import single_question
    from multi_token.media.fetch import Fetch
    from multi_token.media.sniff import FileKind
    from multi_token.modalities.base import AnyProjector, Encoder, Modality, PretrainedModality
    from multi_token.model import MultiTokenConfig, MultiTokenForConditionalGeneration
    from multi_token.processor import MultiTokenProcessor
    from multi_token.projectors.base import Projector, ProjectorSpec
    from multi_token.projectors.kinds import Expand, Linear, Mlp, PixelShuffle, Pool, Stack
    from multi_token.projectors.resampler import Resample
    from multi_token.ray_data import EncodeRows, EvaluateRows, PredictRows
    from multi_token.recipe.model import ModelSpec
    from multi_token.recipe.recipe import Recipe, load_recipe
    from multi_token.registry import register_modality, register_projector
    from multi_token.train.plan.run_plan import plan_run as plan
    from multi_token.train.run import train
    from multi_token.types import Conversation, Fact, Features, Media, Message, Prepared, Text

_HOMES = {
    "AnyProjector": "multi_token.modalities.base:AnyProjector",
    "ChatTemplateError": "multi_token.errors:ChatTemplateError",
    "CheckpointError": "multi_token.errors:CheckpointError",
    "Conversation": "multi_token.types:Conversation",
    "ConvertError": "multi_token.errors:ConvertError",
    "EncodeRows": "multi_token.ray_data:EncodeRows",
    "Encoder": "multi_token.modalities.base:Encoder",
    "EvaluateRows": "multi_token.ray_data:EvaluateRows",
    "Expand": "multi_token.projectors.kinds:Expand",
    "Fact": "multi_token.types:Fact",
    "Features": "multi_token.types:Features",
    "Fetch": "multi_token.media.fetch:Fetch",
    "FileKind": "multi_token.media.sniff:FileKind",
    "Interrupted": "multi_token.errors:Interrupted",
    "LanguageModelError": "multi_token.errors:LanguageModelError",
    "Linear": "multi_token.projectors.kinds:Linear",
    "Media": "multi_token.types:Media",
    "MediaError": "multi_token.errors:MediaError",
    "Message": "multi_token.types:Message",
    "Mlp": "multi_token.projectors.kinds:Mlp",
    "Modality": "multi_token.modalities.base:Modality",
    "ModelSpec": "multi_token.recipe.model:ModelSpec",
    "MultiTokenConfig": "multi_token.model:MultiTokenConfig",
    "MultiTokenError": "multi_token.errors:MultiTokenError",
    "MultiTokenForConditionalGeneration": "multi_token.model:MultiTokenForConditionalGeneration",
    "MultiTokenProcessor": "multi_token.processor:MultiTokenProcessor",
    "PixelShuffle": "multi_token.projectors.kinds:PixelShuffle",
    "Pool": "multi_token.projectors.kinds:Pool",
    "PredictRows": "multi_token.ray_data:PredictRows",
    "Prepared": "multi_token.types:Prepared",
    "PretrainedModality": "multi_token.modalities.base:PretrainedModality",
    "Projector": "multi_token.projectors.base:Projector",
    "ProjectorSpec": "multi_token.projectors.base:ProjectorSpec",
    "Recipe": "multi_token.recipe.recipe:Recipe",
    "RecipeError": "multi_token.errors:RecipeError",
    "RegistryError": "multi_token.errors:RegistryError",
    "Resample": "multi_token.projectors.resampler:Resample",
    "RowError": "multi_token.errors:RowError",
    "SpliceError": "multi_token.errors:SpliceError",
    "Stack": "multi_token.projectors.kinds:Stack",
    "Text": "multi_token.types:Text",
    "combine": "multi_token.convert.combine:combine",
    "load_recipe": "multi_token.recipe.recipe:load_recipe",
    "plan": "multi_token.train.plan.run_plan:plan_run",
    "register_modality": "multi_token.registry:register_modality",
    "register_projector": "multi_token.registry:register_projector",
    "single_question": "multi_token.generate:single_question",
}
"""Public name -> `module:name`. `train` is missing: it is the package of that name, which can be
called (see train/__init__.py)."""

__all__ = [
    "AnyProjector",
    "ChatTemplateError",
    "CheckpointError",
    "Conversation",
    "ConvertError",
    "EncodeRows",
    "Encoder",
    "EvaluateRows",
    "Expand",
    "Fact",
    "Features",
    "Fetch",
    "FileKind",
    "Interrupted",
    "LanguageModelError",
    "Linear",
    "Media",
    "MediaError",
    "Message",
    "Mlp",
    "Modality",
    "ModelSpec",
    "MultiTokenConfig",
    "MultiTokenError",
    "MultiTokenForConditionalGeneration",
    "MultiTokenProcessor",
    "PixelShuffle",
    "Pool",
    "PredictRows",
    "Prepared",
    "PretrainedModality",
    "Projector",
    "ProjectorSpec",
    "Recipe",
    "RecipeError",
    "RegistryError",
    "Resample",
    "RowError",
    "SpliceError",
    "Stack",
    "Text",
    "__version__",
    "combine",
    "load_recipe",
    "plan",
    "register_modality",
    "register_projector",
    "single_question",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `multi-token --help` loads no torch."""
    if name == "train":
        return import_module("multi_token.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'multi_token' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
