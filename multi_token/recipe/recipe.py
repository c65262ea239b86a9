"""The recipe of a run: model, data, training. YAML with `key=value` overrides -> checked objects.

Border: names, numbers and defaults only; nothing is loaded. A run's folder holds its resolved copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from multi_token.errors import RecipeError
from multi_token.modalities.base import AnyModality, Modality
from multi_token.recipe.conflicts import check_renamed
from multi_token.recipe.data import DataSpec, StrictModel
from multi_token.recipe.train import TrainSpec
from multi_token.registry import did_you_mean, validate_fields
from multi_token.types import TrainOnTurns

_RESERVED_NAMES = frozenset(
    {"id", "text", "message", "messages", "conversation", "conversations", "lr", "media_texts"}
    | {"prompt", "chosen", "rejected"}
    # keys of earlier versions: a modality of that name would be taken for one
    | {"rate", "surrogates"}
)


class Quantization(StrictModel):
    """How the frozen language model's weights are stored; what is trained stays float32."""

    kind: Literal["4bit", "8bit", "int8"]
    """`4bit` (nf4) and `8bit` by bitsandbytes, `int8` (weight-only) by torchao."""
    double_quant: bool | None = None
    """4bit: the scales are quantized too, which saves another 0.4 bits a weight (default: true)."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """4bit: what weights are multiplied in (default: `model.dtype` if it names one, else bfloat16
    on an accelerator and float32 without)."""

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, fields: Any) -> Any:
        return {"kind": fields} if isinstance(fields, str) else fields

    @model_validator(mode="after")
    def _check_fields_of_kind(self) -> Quantization:
        for name in ("double_quant", "compute_dtype"):
            if self.kind != "4bit" and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for 4bit; {self.kind} has nothing like it")
        return self


class ModelSpec(StrictModel):
    """The language model and its senses."""

    language_model: str
    """Hub name or folder of a decoder-only model of transformers, or a GGUF file or folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen language model; trained parts are float32 always."""
    quantization: Quantization | None = None
    """`4bit`, `8bit`, `int8` or a section with more: the language model in fewer bits."""
    attn_implementation: str | None = None
    """Passed on to transformers (sdpa, flash_attention_2, ...)."""
    chat_template: str | None = None
    """Jinja text or the path of a file with it; default: the tokenizer's own, or the simple one of
    docs/chat-templates.md where it has none."""
    train_on_turns: TrainOnTurns = "all"
    """Which assistant turns of a conversation are learned: `all` of them, or the `last` alone."""
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


class Recipe(StrictModel):
    """The tree of a run."""

    model: ModelSpec
    data: DataSpec
    train: TrainSpec

    @model_validator(mode="before")
    @classmethod
    def _check_renamed_keys(cls, fields: Any) -> Any:
        check_renamed(fields)
        return fields

    @model_validator(mode="after")
    def _check_trainable_modalities(self) -> Recipe:
        known = list(self.model.modalities)
        quantized = None if self.model.quantization is None else self.model.quantization.kind
        if quantized and self.train.fsdp is not None:
            raise RecipeError(
                f"train.fsdp cuts floating-point weights, and model.quantization ({quantized}) "
                "stores integers; set one of them to null (QLoRA trains with a copy in each "
                "process)"
            )
        for stage in self.train.stages:
            if quantized and stage.learn.language_model is not None:
                raise RecipeError(
                    f"stage {stage.name!r} learns `language_model`, whose weights "
                    f"`model.quantization` ({quantized}) stores in integers; learn an `adapter` on "
                    "it (QLoRA), or set model.quantization to null"
                )
            if quantized == "8bit" and stage.learn.adapter and self.train.adapter.use_dora:
                raise RecipeError(
                    "train.adapter: `use_dora` reads whole weights, which 8bit does not keep; use "
                    "4bit, or set `use_dora` to false"
                )
            projectors = stage.learn.projectors
            for part, names in (
                ("projectors", projectors if isinstance(projectors, dict) else ()),
                ("encoders", stage.learn.encoders),
            ):
                for name in names:
                    if name not in known:
                        raise RecipeError(
                            f"stage {stage.name!r} learns `{part}` of {name!r}, which is no "
                            f"modality of the recipe{did_you_mean(name, known)} (known: "
                            f"{', '.join(known)})"
                        )
        return self

    @model_validator(mode="after")
    def _check_evaluation_rows(self) -> Recipe:
        for args in (self.train.args, *(stage.args for stage in self.train.stages)):
            if args.get("eval_strategy", "no") != "no" and not self.data.eval:
                raise RecipeError(
                    f"train args: eval_strategy={args['eval_strategy']} needs rows to evaluate on; "
                    "name held-out ones under `data.eval`, or remove it"
                )
        return self

    @model_validator(mode="after")
    def _check_streaming(self) -> Recipe:
        """What needs all rows before training begins does not go with a stream."""
        if self.data.stream is None:
            return self
        train = self.train
        for stage in train.stages:
            args = {**train.args, **stage.args}
            if int(args.get("max_steps", -1)) < 1:
                raise RecipeError(
                    f"stage {stage.name!r} learns from a stream (`data.stream`), which has no end: "
                    "set `max_steps` in its `args`"
                )
            way = args.get("train_sampling_strategy", "random")
            if way != "random":
                raise RecipeError(
                    f"train args: train_sampling_strategy is {way!r}, which needs the lengths of "
                    "all rows, and `data.stream` reads them on the way; leave one of them out"
                )
            if stage.dpo is not None:
                raise RecipeError(
                    f"`data.stream` and the `dpo` of stage {stage.name!r} exclude each other; "
                    "keep one"
                )
        cache = train.feature_cache
        if cache is not None and (cache.path is None or cache.auto):
            raise RecipeError(
                "train.feature_cache would be filled from all rows, which `data.stream` does not "
                "read before; fill a folder with `multi-token data encode` and name it as `path`, "
                "or set it to false"
            )
        if train.packing and (train.pack_tokens or 0) < self.data.max_tokens:
            raise RecipeError(
                f"train.pack_tokens is {train.pack_tokens}, but a stream may bring a row of "
                f"data.max_tokens ({self.data.max_tokens}); set it to at least as much"
            )
        return self

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), "utf-8")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (`train.stages.0.args.max_steps=10`).

    Raises RecipeError with the file, the key and the nearest known name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"expected a recipe file at {path.absolute()}: {error.strerror or error}"
        ) from None
    return parse_recipe(text, overrides, where=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """YAML text -> Recipe. Raises RecipeError."""
    fields = _read_yaml(text, where)
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{where}: expected keys model, data and train, got {fields!r}")
    tree = dict(fields)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"expected key=value (train.seed=1), got {override!r}")
        _set_override(tree, key.split("."), _read_yaml(value, override), override)
    return validate_fields(Recipe, tree, where=where)


def _set_override(tree: Any, keys: list[str], value: Any, override: str) -> None:
    """Write `value` at a dotted path of mappings and list indices."""
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(tree, list):
            if not key.isdigit() or int(key) >= len(tree):
                raise RecipeError(f"{override!r}: {key!r} is no index of a list of {len(tree)}")
            at: Any = int(key)
        elif isinstance(tree, dict):
            at = key
        else:
            raise RecipeError(f"{override!r}: {'.'.join(keys[:i])} is a value, not a section")
        if last:
            tree[at] = value
        else:
            tree = tree[at] if isinstance(tree, list) else tree.setdefault(at, {})


def differences(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Of two dumped recipes the values that differ: dotted name, `a`'s and `b`'s."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a.get(key), b.get(key)) for key in {**a, **b}]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b else [(at, a, b)]
    return [x for key, c, d in pairs for x in differences(c, d, f"{at}.{key}" if at else key)]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in Python and YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(  # after the float's, so that whole numbers stay whole
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None
