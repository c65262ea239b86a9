"""The `train` section of a recipe: stages, their trainable parts and learning rates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from multi_token.recipe.data import DataSource, StrictModel

LOGITS_MEGABYTES = 256


class ClosedFormSpec(StrictModel):
    """The closed-form start: ridge regression from features to caption embeddings."""

    penalty: float = Field(default=100.0, gt=0)
    """Ridge penalty on standardized features."""
    caption_format: str = Field(default=" {caption}", pattern=r"\{caption\}")
    """Text whose embeddings are the target of an item's tokens. With the leading space, a word
    has the token that it has inside a sentence; " {caption}\\n{caption}" adds the tokens at the
    start of an answer."""
    targets: Literal["mean", "by_position"] = "mean"
    """Target of each token of an item: the `mean` of its caption's embeddings, or the caption's
    token at the same relative position (`by_position`), for speech and other media in the order
    of their caption."""
    rows: list[DataSource] | None = None
    """Captioned rows (one item, one answer); default: those among the training rows."""
    max_items: int = Field(default=50_000, ge=1)
    """Most captioned rows of each modality that it is fitted to, spread evenly over all. A
    regression of a few thousand unknowns gains nothing from more."""


class LoraSpec(StrictModel):
    """LoRA (PEFT): rank, scale and dropout."""

    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)


class AdapterSpec(LoraSpec):
    """LoRA on the language model."""

    target_modules: str | list[str] = "all-linear"
    """Layers of the language model; never those of encoders or projectors."""
    use_dora: bool = False
    """DoRA: each weight's magnitude is trained apart from its direction (Liu et al.,
    arXiv:2402.09353); slower, and with a few more parameters."""
    use_rslora: bool = False
    """rsLoRA: scaled by lora_alpha / sqrt(r) instead of lora_alpha / r (Kalajdzievski,
    arXiv:2312.03732), for high ranks; it needs a lower `lora_alpha`."""


class LearningRate(StrictModel):
    """Learning rate and weight decay; `2.0e-6` is short for `{lr: 2.0e-6}`."""

    lr: float = Field(gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of its matrices; default: `weight_decay` of `args` (transformers': 0)."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, fields: Any) -> Any:
        return {"lr": fields} if isinstance(fields, (int, float, str)) else fields


def _lr_kind(fields: Any) -> str:
    """`all` for one learning rate, `each` for a mapping from instances to theirs."""
    # no modality can be named `lr` (recipe/model.py), so the key decides
    by_instance = isinstance(fields, dict) and "lr" not in fields
    return "each" if by_instance else "all"


LearningRates = Annotated[
    Annotated[LearningRate, Tag("all")] | Annotated[dict[str, LearningRate], Tag("each")],
    Discriminator(_lr_kind),
]


class TrainableEncoder(LearningRate):
    """Trainable part of an encoder: all of it, its last layers, or LoRA on its linear layers."""

    last_layers: int | None = Field(default=None, ge=1)
    """Number of its last layers to train; a norm after them stays frozen."""
    lora: LoraSpec | None = None
    """LoRA on all of its linear layers, which stay frozen."""


class Trainable(StrictModel):
    """Trainable parts of a stage and their learning rates; the rest is frozen.

    Each value is a learning rate, or `{lr, weight_decay}`.
    """

    projectors: LearningRates | None = None
    """The projectors, or some of them by instance (`{sound: 1.0e-3}`). An encoder that starts from
    random weights is trained with its projector."""
    projector_biases: LearningRate | None = None
    """Their last biases, the part of a token that all items share (a soft prompt). They are
    decayed only if a `weight_decay` is set here; default: as `projectors`. After a
    closed-form start ten times the rate pays: see benchmarks/closed_form.py."""
    encoders: dict[str, TrainableEncoder] = Field(default_factory=dict)
    """Trainable encoders, by instance: a learning rate, or a section with more."""
    adapter: LearningRate | None = None
    """LoRA on the language model, with the settings of `train.adapter`."""
    language_model: LearningRate | None = None
    """All weights of the language model, in float32. It is then saved inside the run."""

    @model_validator(mode="after")
    def _check_anything_trains(self) -> Trainable:
        if not (self.projectors or self.encoders or self.adapter or self.language_model):
            raise ValueError(
                "a stage must train something: set `projectors`, `encoders`, `adapter` or "
                "`language_model`"
            )
        return self

    def projector(self, name: str) -> LearningRate | None:
        """Learning rate of an instance's projector, or None if it is frozen."""
        return self.projectors.get(name) if isinstance(self.projectors, dict) else self.projectors

    @property
    def logged_lr(self) -> float:
        """The learning rate that the log and transformers show for the stage."""
        of_projectors = (
            self.projectors.values() if isinstance(self.projectors, dict) else [self.projectors]
        )
        rates = (*of_projectors, self.adapter, self.language_model, *self.encoders.values())
        return next(rate.lr for rate in rates if rate is not None)


class DistillationSpec(StrictModel):
    """Distillation from the language model without adapter, on texts in place of media.

    The loss is Ultravox's: KL(teacher, student) at the supervised tokens.
    """

    weight: float = Field(default=1.0, gt=0, le=1)
    """Share of the KL divergence in the loss; the rest is cross entropy."""
    temperature: float = Field(default=1.0, gt=0)
    """Divisor of both logits (Hinton et al., arXiv:1503.02531)."""
    missing: Literal["raise", "cross_entropy"] = "raise"
    """A row with an item without text: a bad row, or trained by cross entropy alone."""


class DpoSpec(StrictModel):
    """Preference training on `chosen` and `rejected` answers (DPO); see docs/preferences.md."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the model at the start of the stage."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Loss; train/dpo.py has the formulas."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """With `sigmoid`: assumed share of rows whose two answers are swapped."""
    missing: Literal["raise", "skip"] = "raise"
    """A row without the two answers: a bad row, or left out of this stage."""


class Stage(StrictModel):
    """One run of the trainer inside the run's folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    learn: Trainable
    distillation: DistillationSpec | None = None
    """Train on the language model's answers to the rows' `media_texts`; `{}`: the defaults."""
    dpo: DpoSpec | None = None
    """Train on pairs of answers (`chosen`, `rejected`); `{}`: the defaults."""
    data: list[DataSource] = Field(default_factory=list)
    """Training rows of this stage, in place of `data.train`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """transformers.TrainingArguments fields of this stage, over those of `train.args`."""


class FeatureCacheSpec(StrictModel):
    """Feature cache of frozen encoders: folder and precision."""

    path: str | None = None
    """Folder, which runs and machines may share; default: `cache` in the run's folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of stored features; bfloat16 takes half the space, and rounds them."""
    shard_megabytes: int = Field(default=256, ge=1)
    """Size of a file of the folder."""
    auto: bool = False
    """Measure on the first items whether caching is faster, and cache only then."""


class FsdpSpec(StrictModel):
    """Sharding of the language model over processes (FSDP2); see docs/scale-out.md."""

    replicas: int = Field(default=1, ge=1)
    """Number of replicas, each sharded over a group of processes (HSDP): that of machines."""


class PackingSpec(StrictModel):
    """Packing: several rows in one row of tokens."""

    share: bool = False
    """Compute a prefix that rows of a pack share (a system message, an image, or both) once. Rows
    that begin with the same media come into one pack. The loss stays the same."""


class TrainSpec(StrictModel):
    """The `train` section of a recipe."""

    output_dir: str
    init_from: str | None = None
    """A trained run (folder or hub name) to initialize from: projectors, trained encoders, adapter,
    fully trained language model. Modalities that it does not have are new."""
    seed: int = 0
    closed_form: ClosedFormSpec | None = Field(default_factory=ClosedFormSpec)
    """Closed-form start before the first stage; `null` turns it off."""
    feature_cache: FeatureCacheSpec | None = None
    """Run frozen encoders once and keep every item's features on disk: `true`, `false`, `auto`, or
    a section with more. See docs/feature-cache.md."""
    packing: PackingSpec | None = None
    """Lay rows one after the other in one row of tokens, without padding; each attends to itself
    alone. A batch is then one pack (`pack_tokens`), not `per_device_train_batch_size`
    rows. The loss stays the same. `true`, `false`, or `{share: true}`."""
    pack_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a pack; default: `per_device_train_batch_size` times the mean length of a row, and
    at least the longest row."""
    pack_items: int | None = Field(default=None, ge=1)
    """Most media items in a pack, a limit on the encoders' memory; default: none."""
    fsdp: FsdpSpec | None = None
    """Shard the language model's weights, gradients and optimizer state over the processes
    (FSDP2): `true`, or a section. A single process trains without."""
    compile_layers: bool = False
    """Compile each layer of the language model (torch, inductor); see docs/scale-out.md."""
    liger: bool = False
    """Use Liger's kernels in the language model; needs a GPU and the package liger-kernel."""
    logits_megabytes: float = Field(default=LOGITS_MEGABYTES, gt=0)
    """Most memory of logits that exist at a time, in float32. The loss of a batch with more is
    computed in chunks, each one twice: for the loss and for the gradient. A chunk needs up to four
    times as much for its loss."""
    calibration_items: int = Field(default=4096, ge=1)
    """Most items of each modality whose features fix the projector's statistics, spread evenly
    over the training rows."""
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    stages: list[Stage] = Field(min_length=1)
    num_samples: int = Field(default=4, ge=0)
    """Number of `data.eval` rows whose answers are shown at each evaluation."""
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
        # `model_dump` writes the section, so a saved recipe comes back as it was
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
        """Processor's mode for the teacher's samples; None without distillation."""
        teachers = [stage.distillation for stage in self.stages if stage.distillation is not None]
        if not teachers:
            return None
        return "required" if any(t.missing == "raise" for t in teachers) else "optional"

    @property
    def preference_mode(self) -> Literal["required", "optional"] | None:
        """Processor's mode for rejected answers; None without a stage with `dpo`."""
        missing = [stage.dpo.missing for stage in self.stages if stage.dpo is not None]
        return None if not missing else "required" if "raise" in missing else "optional"

    @model_validator(mode="after")
    def _check_stage_names(self) -> TrainSpec:
        stage_names = [stage.name for stage in self.stages]
        if len(set(stage_names)) < len(stage_names):
            raise ValueError(f"stages need different names, got {stage_names}")
        return self
