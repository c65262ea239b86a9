"""What the `train` section of a recipe says: stages, what learns in them and how fast.

Border: names, numbers and defaults only; the whole recipe, and reading it, stand in recipe.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Rate = Annotated[float, Field(gt=0)]
"""A learning rate."""


class Section(BaseModel):
    """What all parts of a recipe share: unknown keys are refused, nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSource(Section):
    """Rows from one place."""

    rows: str
    """A .json, .jsonl or .parquet file, a folder saved by `datasets`, or a hub name."""
    split: str = "train"
    """Which split, where the source has several."""


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
