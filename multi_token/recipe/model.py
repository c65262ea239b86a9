"""The `model` section of a recipe: the language model and its modalities."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from multi_token.modalities.base import AnyModality, Modality
from multi_token.recipe.data import StrictModel
from multi_token.recipe.renamed import RENAMED_WORDS
from multi_token.types import TrainOnTurns

_RESERVED_NAMES = RENAMED_WORDS | {
    "id",
    "text",
    "message",
    "messages",
    "conversation",
    "conversations",
    "lr",
    "media_texts",
    "prompt",
    "chosen",
    "rejected",
}


class Quantization(StrictModel):
    """Storage of the frozen language model's weights; trained parameters stay float32."""

    kind: Literal["4bit", "8bit", "int8"]
    """`4bit` (nf4) and `8bit` by bitsandbytes, `int8` (weight-only) by torchao."""
    double_quant: bool | None = None
    """4bit: quantize the scales too, which saves another 0.4 bits a weight (default: true)."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """4bit: precision of products (default: `model.dtype` if that names one, else bfloat16 on an
    accelerator and float32 without)."""

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, fields: Any) -> Any:
        return {"kind": fields} if isinstance(fields, str) else fields

    @model_validator(mode="after")
    def _check_fields_of_kind(self) -> Quantization:
        # here and not in conflicts.py, because a checkpoint and `from_spec` have no recipe
        for name in ("double_quant", "compute_dtype"):
            if self.kind != "4bit" and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for 4bit; {self.kind} has nothing like it")
        return self


class ModelSpec(StrictModel):
    """The `model` section of a recipe, and of a checkpoint's config.json.

    Raises:
        ValueError: For a modality name that rows or recipes use, or a field of another kind of
            quantization.
    """

    language_model: str
    """Hub name or folder of a decoder-only model of transformers, or a GGUF file or folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen language model; while a part is trained, it is float32."""
    quantization: Quantization | None = None
    """`4bit`, `8bit`, `int8` or a section with more: the language model in fewer bits."""
    attn_implementation: str | None = None
    """Passed on to transformers (sdpa, flash_attention_2, ...)."""
    chat_template: str | None = None
    """Jinja text, the path of a file with it, or a name (`chatml`, `vicuna`, ...); default: the
    tokenizer's own, or the simple one of docs/chat-templates.md where it has none."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values of variables of the chat template (`enable_thinking: false`), in training and
    afterwards. A request may set others."""
    train_on_turns: TrainOnTurns = "all"
    """Supervised assistant turns of a conversation: `all` of them, or the `last` alone."""
    modalities: dict[str, AnyModality] = Field(min_length=1)
    """Instance name -> modality. The name is the part type in rows and the slot `<name>`."""

    @field_validator("modalities")
    @classmethod
    def _check_modality_names(cls, modalities: dict[str, Modality]) -> dict[str, Modality]:
        for name in modalities:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in _RESERVED_NAMES:
                raise ValueError(
                    f"{name!r} cannot name a modality: expected letters, digits, - and _, and none "
                    f"of the words that rows and `learn` use ({', '.join(sorted(_RESERVED_NAMES))})"
                )
        return modalities
