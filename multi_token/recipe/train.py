"""The `train` section of a recipe: stages, their trainable parts and learning rates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from multi_token.recipe.data import DataSource, StrictModel

PositiveFloat = Annotated[float, Field(gt=0)]
"""A learning rate."""


class ClosedFormSpec(StrictModel):
    """The closed-form start: ridge regression from features to caption embeddings."""

    penalty: float = Field(default=100.0, gt=0)
    """Ridge penalty on standardized features."""
    caption_format: str = Field(default=" {caption}", pattern=r"\{caption\}")
    """Target of an item's tokens. A leading space makes a word's own token; a second time on
    a line of its own (" {caption}\\n{caption}") also gives the tokens that start an answer."""
    targets: Literal["mean", "by_position"] = "mean"
    """Target of each token of an item: the `mean` of its caption's embeddings, or, for
    speech and whatever else goes through its caption from first word to last, the caption's token
    at the same part of the way (`by_position`)."""
    rows: list[DataSource] | None = None
    """Captioned rows (one item, one answer); default: those among the training rows."""


class LoraSpec(StrictModel):
    """LoRA (PEFT): the rank, the scale and the dropout of what is learned beside frozen layers."""

    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)


class AdapterSpec(LoraSpec):
    """LoRA on the language model."""

    target_modules: str | list[str] = "all-linear"
    """Inside the language model only; encoders and projectors are never touched."""
    use_dora: bool = False
    """DoRA: each weight's length is learned apart from its direction (Liu et al.,
    arXiv:2402.09353); slower, and with a few more parameters."""
    use_rslora: bool = False
    """rsLoRA: scaled by lora_alpha / sqrt(r) instead of lora_alpha / r (Kalajdzievski,
    arXiv:2312.03732), so that higher ranks pay; set `lora_alpha` lower with it."""


class LearningRate(StrictModel):
    """How fast something learns; `2.0e-6` stands for `{lr: 2.0e-6}`."""

    lr: PositiveFloat
    """Learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of its matrices; default: `weight_decay` of `args` (transformers': 0)."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, fields: Any) -> Any:
        return {"lr": fields} if isinstance(fields, (int, float, str)) else fields


def _lr_kind(fields: Any) -> str:
    """Return True if a value is one learning rate, and not a mapping from instances to theirs."""
    by_instance = isinstance(fields, dict) and "lr" not in fields
    return "each" if by_instance else "all"


LearningRates = Annotated[
    Annotated[LearningRate, Tag("all")] | Annotated[dict[str, LearningRate], Tag("each")],
    Discriminator(_lr_kind),
]


class TrainableEncoder(LearningRate):
    """Trainable part of an encoder: all of it, its last layers, or LoRA on its linear layers."""

    last_layers: int | None = Field(default=None, ge=1)
    """So many of its last layers, and nothing before or behind them (a final norm stays)."""
    lora: LoraSpec | None = None
    """LoRA on all of its linear layers, which stay as they are."""


class Trainable(StrictModel):
    """Trainable parts of a stage and their learning rates; the rest is frozen.

    Each value is a learning rate, or `{lr, weight_decay}`.
    """

    projectors: LearningRates | None = None
    """The projectors, or some of them by instance (`{sound: 1.0e-3}`). An encoder that starts from
    random weights learns with its projector."""
    projector_biases: LearningRate | None = None
    """Their last biases, the part of a token that all items share (a soft prompt), which are
    decayed only if a `weight_decay` is given here; default: they learn as `projectors`. After a
    closed-form start ten times the rate pays: see benchmarks/closed_form.py."""
    encoders: dict[str, TrainableEncoder] = Field(default_factory=dict)
    """Encoders that learn, by instance: a rate, or a section with more."""
    adapter: LearningRate | None = None
    """LoRA on the language model, as `train.adapter` says."""
    language_model: LearningRate | None = None
    """All weights of the language model, in float32. It is then saved inside the run."""

    @model_validator(mode="after")
    def _check_anything_trains(self) -> Trainable:
        if not (self.projectors or self.encoders or self.adapter or self.language_model):
            raise ValueError(
                "a stage must learn something: set `projectors`, `encoders`, `adapter` or "
                "`language_model`"
            )
        return self

    def projector(self, name: str) -> LearningRate | None:
        """How fast an instance's projector learns, or None if it is frozen."""
        return self.projectors.get(name) if isinstance(self.projectors, dict) else self.projectors

    @property
    def logged_lr(self) -> float:
        """The rate that stands for the stage where there is room for one."""
        of_projectors = (
            self.projectors.values() if isinstance(self.projectors, dict) else [self.projectors]
        )
        paces = (*of_projectors, self.adapter, self.language_model, *self.encoders.values())
        return next(pace.lr for pace in paces if pace is not None)


class DistillationSpec(StrictModel):
    """The language model without its adapter, which reads texts in place of media (Ultravox)."""

    weight: float = Field(default=1.0, gt=0, le=1)
    """Share of the divergence from the teacher's answer in the loss; the rest is cross entropy."""
    temperature: float = Field(default=1.0, gt=0)
    """Both answers' logits are divided by it (Hinton et al., arXiv:1503.02531)."""
    missing: Literal["raise", "cross_entropy"] = "raise"
    """A row with an item that has no text: bad, or learned by cross entropy alone."""


class DpoSpec(StrictModel):
    """Learn to prefer a row's `chosen` answer to its `rejected` one; see docs/preferences.md."""

    beta: float = Field(default=0.1, gt=0)
    """How much the model is held to what it was when the stage began."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """The formulas are in train/dpo.py."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """With `sigmoid`: the share of rows whose answers may have been swapped by mistake."""
    missing: Literal["raise", "skip"] = "raise"
    """A row without the two answers: bad, or left out of this stage."""


class Stage(StrictModel):
    """One run of the trainer inside the run's folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    learn: Trainable
    distillation: DistillationSpec | None = None
    """Aim at what the language model answers to the rows' `media_texts`; `{}` for the defaults."""
    dpo: DpoSpec | None = None
    """Learn from pairs of answers (`chosen`, `rejected`); `{}` for the defaults."""
    args: dict[str, Any] = Field(default_factory=dict)
    """transformers.TrainingArguments fields of this stage, over those of `train.args`."""


class FeatureCacheSpec(StrictModel):
    """Feature cache of frozen encoders: folder and precision."""

    path: str | None = None
    """The folder, which runs and machines may share; default: `cache` in the run's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of stored features; bfloat16 halves them, and rounds what the encoder gave."""
    shard_megabytes: int = Field(default=256, ge=1)
    """A file of the folder is closed once it holds so much."""
    auto: bool = False
    """Measure on the first items whether keeping features pays, and only then do it."""


class FsdpSpec(StrictModel):
    """How the language model is shared out among processes; see docs/scale-out.md."""

    replicas: int = Field(default=1, ge=1)
    """Groups of processes with all pieces each (HSDP), for several machines: the number of them."""


class PackingSpec(StrictModel):
    """How rows of a batch share one row of tokens."""

    share: bool = False
    """Compute a prefix that rows of a pack share (a system message, an image, or both) once. Rows
    that begin with the same media come into one pack. The loss stays the same."""


class TrainSpec(StrictModel):
    """How it is learned."""

    output_dir: str
    init_from: str | None = None
    """A trained run (folder or hub name) whose projectors, trained encoders, adapter and trained
    language model are taken over as they are; instances that it does not have start again."""
    seed: int = 0
    closed_form: ClosedFormSpec | None = Field(default_factory=ClosedFormSpec)
    """Stage zero; `null` turns it off."""
    feature_cache: FeatureCacheSpec | None = None
    """Run frozen encoders once and keep every item's features on disk: `true`, `false`, `auto`, or
    a section with more. See docs/feature-cache.md."""
    packing: PackingSpec | None = None
    """Rows of a batch stand one after the other in one row of tokens, without padding; each attends
    to itself alone. A batch is then one pack (`pack_tokens`), not `per_device_train_batch_size`
    rows. The loss stays the same. `true`, `false`, or `{share: true}`."""
    pack_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a pack; default: `per_device_train_batch_size` times the mean length of a row, and
    at least the longest row."""
    pack_items: int | None = Field(default=None, ge=1)
    """The most media items in a pack, where encoders need the memory; default: no limit."""
    fsdp: FsdpSpec | None = None
    """Each process holds a piece of the language model's weights, gradients and optimizer state
    (FSDP2): `true`, or a section. Needs several processes; one alone trains without."""
    compile_layers: bool = False
    """Each layer of the language model is compiled by torch (inductor); see docs/scale-out.md."""
    liger: bool = False
    """Liger's kernels in the language model's layers; needs a GPU and the package liger-kernel."""
    calibration_items: int = Field(default=4096, ge=1)
    """Items of each modality whose features fix the projector's statistics."""
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    stages: list[Stage] = Field(min_length=1)
    num_samples: int = Field(default=4, ge=0)
    """Rows of `data.eval` whose answers are shown at each evaluation."""
    blind: bool = True
    """Test at each evaluation and at the end whether the model uses its media: rows of `data.eval`
    with original, shuffled and ablated media."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of one device, in TFLOP/s of the precision used, for `mfu` in the log."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Any transformers.TrainingArguments field, for every stage."""

    @field_validator("fsdp", "packing", mode="before")
    @classmethod
    def _section_from_bool(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("feature_cache", mode="before")
    @classmethod
    def _feature_cache_from_word(cls, value: Any) -> Any:
        words: dict[Any, Any] = {True: {}, False: None, "auto": {"auto": True}, None: None}
        if isinstance(value, (bool, str)):
            if value not in words:
                raise ValueError(
                    "expected true, false, auto or a section such as {path: FOLDER}, got "
                    f"{value!r}"
                )
            return words[value]
        return value

    @property
    def distillation_mode(self) -> Literal["required", "optional"] | None:
        """How rows are also read with texts in place of their media, for distillation."""
        teachers = [stage.distillation for stage in self.stages if stage.distillation is not None]
        if not teachers:
            return None
        return "required" if any(t.missing == "raise" for t in teachers) else "optional"

    @property
    def preference_mode(self) -> Literal["required", "optional"] | None:
        """How rows are also read with their rejected answers, for stages with `dpo`."""
        missing = [stage.dpo.missing for stage in self.stages if stage.dpo is not None]
        return None if not missing else "required" if "raise" in missing else "optional"

    @model_validator(mode="after")
    def _check_stage_names(self) -> TrainSpec:
        stage_names = [stage.name for stage in self.stages]
        if len(set(stage_names)) < len(stage_names):
            raise ValueError(f"stages need different names, got {stage_names}")
        return self
