"""The recipe of a run: model, data, training. YAML with `key=value` overrides -> checked objects.

Border: names, numbers and defaults only; nothing is loaded. A run's folder holds its resolved copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from multi_token.errors import RecipeError
from multi_token.modalities.base import AnyModality, Modality
from multi_token.registry import nearest, validated
from multi_token.types import LearnTurns

Rate = Annotated[float, Field(gt=0)]
"""A learning rate."""

_TAKEN = frozenset({"id", "text", "message", "messages", "conversation", "conversations"})


class Section(BaseModel):
    """What all parts of a recipe share: unknown keys are refused, nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Quantization(Section):
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
    def _from_its_kind(cls, fields: Any) -> Any:
        return {"kind": fields} if isinstance(fields, str) else fields

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Quantization:
        for name in ("double_quant", "compute_dtype"):
            if self.kind != "4bit" and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for 4bit; {self.kind} has nothing like it")
        return self


class ModelSpec(Section):
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
    learn_turns: LearnTurns = "all"
    """Which assistant turns of a conversation are learned: `all` of them, or the `last` alone."""
    modalities: dict[str, AnyModality] = Field(min_length=1)
    """Instance name -> modality. The name is the part type in rows and the slot `<name>`."""

    @field_validator("modalities")
    @classmethod
    def _names_are_free(cls, modalities: dict[str, Modality]) -> dict[str, Modality]:
        for name in modalities:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in _TAKEN:
                raise ValueError(
                    f"{name!r} cannot name a modality: expected letters, digits, - and _, and none "
                    f"of the words that rows use ({', '.join(sorted(_TAKEN))})"
                )
        return modalities


class DataSource(Section):
    """Rows from one place."""

    rows: str
    """A .json, .jsonl or .parquet file, a folder saved by `datasets`, or a hub name."""
    split: str = "train"
    """Which split, where the source has several."""


class DataSpec(Section):
    """What is learned from."""

    train: list[DataSource] = Field(min_length=1)
    max_tokens: int = Field(default=2048, ge=1)
    """A longer row is never cut: see `on_bad_row`."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """`raise`: stop and say which rows are bad; `skip`: leave them out whole and count them."""


class AlignSpec(Section):
    """The closed-form start: ridge regression from features to caption embeddings."""

    penalty: float = Field(default=100.0, gt=0)
    """Ridge penalty on standardized features."""
    caption_format: str = Field(default=" {caption}", pattern=r"\{caption\}")
    """What the tokens of an item aim at. A leading space makes a word's own token; a second time on
    a line of its own (" {caption}\\n{caption}") also gives the tokens that start an answer."""
    targets: Literal["mean", "in_order"] = "mean"
    """What each of an item's many tokens aims at: the `mean` of its caption's embeddings, or, for
    speech and whatever else goes through its caption from first word to last, the caption's token
    at the same part of the way (`in_order`)."""
    rows: list[DataSource] | None = None
    """Captioned rows (one item, one answer); default: those among the training rows."""


class LoraSpec(Section):
    """LoRA (PEFT): the rank, the scale and the dropout of what is learned beside frozen layers."""

    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)


class AdapterSpec(LoraSpec):
    """LoRA on the language model."""

    target_modules: str | list[str] = "all-linear"
    """Inside the language model only; encoders and projectors are never touched."""


class LearnEncoder(Section):
    """What of an encoder learns: all of it, its last layers, or LoRA on its linear layers."""

    rate: Rate
    """Learning rate; `image: 2.0e-6` stands for `image: {rate: 2.0e-6}`."""
    last: int | None = Field(default=None, ge=1)
    """So many of its last layers, and nothing before or behind them (a final norm stays)."""
    lora: LoraSpec | None = None
    """LoRA on all of its linear layers, which stay as they are."""

    @model_validator(mode="before")
    @classmethod
    def _from_its_rate(cls, fields: Any) -> Any:
        return {"rate": fields} if isinstance(fields, (int, float)) else fields

    @model_validator(mode="after")
    def _one_of_them(self) -> LearnEncoder:
        if self.last is not None and self.lora is not None:
            raise ValueError("`last` and `lora` exclude each other; keep one")
        return self


class Learn(Section):
    """What learns in a stage, and how fast; the rest is frozen."""

    projectors: Rate | dict[str, Rate] | None = None
    """Learning rate of the projectors, or of some of them by instance (`{sound: 1.0e-3}`). An
    encoder that starts from random weights learns with its projector."""
    projector_biases: float | None = Field(default=None, gt=0)
    """Learning rate of their last biases, the part of a token that all items share (a soft prompt);
    default: that of `projectors`. After a closed-form start ten times as much pays: see
    benchmarks/align.py."""
    encoders: dict[str, LearnEncoder] = Field(default_factory=dict)
    """Encoders that learn, by instance: a rate, or a section with more."""
    adapter: float | None = Field(default=None, gt=0)
    """Learning rate of LoRA on the language model."""

    @model_validator(mode="after")
    def _something_learns(self) -> Learn:
        if not self.projectors and not self.encoders and self.adapter is None:
            raise ValueError(
                "a stage must learn something: set `projectors`, `encoders` or `adapter`"
            )
        if self.projector_biases is not None and not self.projectors:
            raise ValueError("`projector_biases` needs `projectors`")
        return self

    def projector_rate(self, name: str) -> float | None:
        """The learning rate of an instance's projector, or None if it is frozen."""
        return self.projectors.get(name) if isinstance(self.projectors, dict) else self.projectors

    @property
    def first_rate(self) -> float:
        """The rate that stands for the stage where there is room for one."""
        of_projectors = (
            self.projectors.values() if isinstance(self.projectors, dict) else [self.projectors]
        )
        of_encoders = [encoder.rate for encoder in self.encoders.values()]
        return next(r for r in (*of_projectors, self.adapter, *of_encoders) if r is not None)


class Stage(Section):
    """One run of the trainer inside the run's folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    learn: Learn
    args: dict[str, Any] = Field(default_factory=dict)
    """transformers.TrainingArguments fields of this stage, over those of `train.args`."""


class TrainSpec(Section):
    """How it is learned."""

    output_dir: str
    start_from: str | None = None
    """A trained run (folder or hub name) whose projectors, trained encoders and adapter are taken
    over as they are; instances that it does not have start anew."""
    seed: int = 0
    align: AlignSpec | None = Field(default_factory=AlignSpec)
    """Stage zero; `null` turns it off."""
    feature_cache: bool = False
    """Run frozen encoders once; keep every item's features in memory and the run's folder."""
    share_prefix: bool = False
    """Compute the text that all rows of a batch begin with (a system message, say) once and without
    gradients. The loss stays the same; for stages in which the language model is frozen."""
    calibration_items: int = Field(default=4096, ge=1)
    """Items of each modality whose features fix the projector's statistics."""
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    stages: list[Stage] = Field(min_length=1)
    args: dict[str, Any] = Field(default_factory=dict)
    """Any transformers.TrainingArguments field, for every stage."""

    @model_validator(mode="after")
    def _stages_fit(self) -> TrainSpec:
        stage_names = [stage.name for stage in self.stages]
        if len(set(stage_names)) < len(stage_names):
            raise ValueError(f"stages need different names, got {stage_names}")
        learning = [stage.name for stage in self.stages if stage.learn.adapter is not None]
        if self.share_prefix and learning:
            raise ValueError(
                f"`share_prefix` needs a frozen language model, but stage {learning[0]!r} learns "
                "an adapter"
            )
        if self.start_from is not None and (
            Path(self.start_from).absolute() == Path(self.output_dir).absolute()
        ):
            raise ValueError("`start_from` is the run's own `output_dir`; choose another for one")
        of_encoders = [
            (stage.name, *pair) for stage in self.stages for pair in stage.learn.encoders.items()
        ]
        if self.feature_cache and of_encoders:
            stage_name, name, _ = of_encoders[0]
            raise ValueError(
                f"`feature_cache` keeps the features of frozen encoders, but stage {stage_name!r} "
                f"learns the encoder of {name!r}; set it to false"
            )
        ways: dict[str, LoraSpec | None] = {}
        for stage_name, name, encoder in of_encoders:
            if ways.setdefault(name, encoder.lora) != encoder.lora:
                raise ValueError(
                    f"the encoder of {name!r} learns by other means in stage {stage_name!r} than "
                    "before: LoRA must be the same in all stages that name it, or in none"
                )
        return self


class Recipe(Section):
    """The tree of a run."""

    model: ModelSpec
    data: DataSpec
    train: TrainSpec

    @model_validator(mode="after")
    def _what_learns_is_there(self) -> Recipe:
        known = list(self.model.modalities)
        for stage in self.train.stages:
            projectors = stage.learn.projectors
            for part, names in (
                ("projectors", projectors if isinstance(projectors, dict) else ()),
                ("encoders", stage.learn.encoders),
            ):
                for name in names:
                    if name not in known:
                        raise RecipeError(
                            f"stage {stage.name!r} learns `{part}` of {name!r}, which is no "
                            f"modality of the recipe{nearest(name, known)} (known: "
                            f"{', '.join(known)})"
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
        _set(tree, key.split("."), _read_yaml(value, override), override)
    return validated(Recipe, tree, where=where)


def _set(tree: Any, keys: list[str], value: Any, override: str) -> None:
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
