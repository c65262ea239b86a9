"""A thin subclass of transformers' Trainer: what learns, what is saved, what is counted.

Border: the loop is transformers'. Batches come from collate.py, folders from checkpoint.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from multi_token.checkpoint import CONFIG, load_trained, save
from multi_token.encoders import learning_parameters, open_to_learn
from multi_token.errors import MultiTokenError, RecipeError
from multi_token.language_model import adapter_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.projectors import Projector
from multi_token.registry import nearest
from multi_token.train_spec import Learn, LearnEncoder
from multi_token.types import IGNORE_INDEX

# what a run needs to be right, whatever the recipe says
_FIXED: dict[str, Any] = {
    "remove_unused_columns": False,  # media are no columns of forward's signature
    "label_names": ["labels"],
    "logging_nan_inf_filter": False,  # it would hide a diverging loss
    "prediction_loss_only": True,  # logits at supervised positions have no common length
    "disable_tqdm": True,  # train/report.py draws the bar
}
_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "logging_steps": 5,
    "save_steps": 200,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_grad_norm": 1.0,
    "report_to": "none",
}


def training_arguments(
    output_dir: Path, fields: Mapping[str, Any], *, seed: int, learning_rate: float
) -> TrainingArguments:
    """TrainingArguments of a stage: our defaults, the recipe's fields over them.

    Raises RecipeError for a field that transformers does not have, or that must stay as it is.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in fields:
        if key not in known:
            raise RecipeError(
                f"train args: {key!r} is no field of transformers.TrainingArguments"
                + nearest(key, known)
            )
        if key in _FIXED or key in ("output_dir", "learning_rate", "seed"):
            raise RecipeError(
                f"train args: {key!r} is not set here; learning rates are under `learn`, "
                "`output_dir` and `seed` under `train`, and the rest of "
                f"{sorted(_FIXED)} is needed as it is"
            )
    on_cpu = bool(fields.get("use_cpu")) or not torch.accelerator.is_available()
    values = {**_DEFAULTS, "dataloader_pin_memory": not on_cpu, **fields, **_FIXED}
    # rows are read where they are needed: rank 0 must not read for all and cut batches of media
    accelerator = {"dispatch_batches": False, **dict(fields.get("accelerator_config") or {})}
    values["accelerator_config"] = accelerator
    try:
        return TrainingArguments(
            output_dir=str(output_dir), seed=seed, learning_rate=learning_rate, **values
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train args: {error}") from None


class MultiTokenTrainer(Trainer):
    """Learning rates by group, our checkpoints, and counts of real and supervised tokens."""

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        learn: Learn,
        lengths: Sequence[int],
        **options: Any,
    ) -> None:
        """`lengths`: tokens of each row, for `train_sampling_strategy: group_by_length`."""
        select_parameters(model, learn)
        self.learn = learn
        self.lengths = list(lengths)
        self.num_tokens = 0
        self.num_supervised = 0
        super().__init__(model=model, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group a learning rate, each split into decayed and undecayed parameters."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self._ours())
            groups = []
            for name, rate, parameters in parameter_groups(self._ours(), self.learn):
                for decayed in (True, False):
                    chosen = [p for p in parameters if (p.ndim > 1) == decayed]
                    if chosen:
                        decay = self.args.weight_decay if decayed else 0.0
                        groups.append(
                            {"params": chosen, "lr": rate, "weight_decay": decay, "name": name}
                        )
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As transformers', but lengths are known: it would decode all media to see them."""
        if self.args.train_sampling_strategy == "group_by_length":
            return ByLength(
                self.lengths,
                batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
                seed=self.args.data_seed or self.args.seed,
            )
        return super()._get_train_sampler(train_dataset)

    def _ours(self) -> MultiTokenForConditionalGeneration:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, MultiTokenForConditionalGeneration)
        return model

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As transformers', with tokens counted and a loss that is no number refused."""
        self.num_tokens += int(inputs["attention_mask"].sum())
        self.num_supervised += int((inputs["shift_labels"] != IGNORE_INDEX).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise MultiTokenError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}; lower the "
                "learning rates under `learn`, or look for extreme values in the data"
            )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers' formula knows nothing of frozen parts or encoders."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save(self._ours(), output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_trained(self._ours(), resume_from_checkpoint)
        select_parameters(self._ours(), self.learn)


class ByLength(Sampler[int]):
    """Batches of rows of about one length, in random order; the same again after a resume."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The trainer's loader calls this before each epoch, also when it resumes within one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # within a megabatch the longest come first, which would be a curriculum
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        # a batch that is not full stays last, or it would shift the borders of those behind it
        full = [i for i in shuffled if len(batches[i]) == self.batch_size]
        rest = [i for i in shuffled if len(batches[i]) < self.batch_size]
        return iter([index for i in (*full, *rest) for index in batches[i]])


def parameter_groups(
    model: MultiTokenForConditionalGeneration, learn: Learn
) -> list[tuple[str, float, list[nn.Parameter]]]:
    """(name, learning rate, parameters) of what learns in a stage."""
    groups: list[tuple[str, float, list[nn.Parameter]]] = []
    biases: list[nn.Parameter] = []
    # one group where all learn alike, one for each instance where the recipe tells them apart
    rest: dict[str, tuple[float, list[nn.Parameter]]] = {}
    for name, projector in model.projectors.items():
        rate = learn.projector_rate(name)
        if rate is None:
            continue
        apart: set[int] = set()
        if isinstance(projector, Projector):
            if projector.closed_form:
                apart |= {id(p) for p in projector.closed_form.parameters()}
            if learn.projector_biases is not None:
                last = [layer.bias for layer in projector.final_layers()]
                apart |= {id(p) for p in last}
                biases += last
        group = f"projector {name}" if isinstance(learn.projectors, dict) else "projectors"
        rest.setdefault(group, (rate, []))[1].extend(
            p for p in projector.parameters() if id(p) not in apart
        )
    if learn.projector_biases is not None:
        groups.append(("projector_biases", learn.projector_biases, biases))
    groups += [(group, rate, parameters) for group, (rate, parameters) in rest.items()]
    if learn.adapter is not None:
        groups.append(("adapter", learn.adapter, adapter_parameters(model.language_model)))
    for name, spec in learning_encoders(model, learn).items():
        parameters = learning_parameters(name, model.encoder(name), spec)
        groups.append((f"encoder {name}", spec.rate, parameters))
    return groups


def learning_encoders(
    model: MultiTokenForConditionalGeneration, learn: Learn
) -> dict[str, LearnEncoder]:
    """What of which encoder learns in a stage, by instance.

    One that starts from random weights learns with its projector, unless the recipe says more.
    """
    found = {}
    for name in model.modalities:
        encoder, rate = model.encoder(name), learn.projector_rate(name)
        if name in learn.encoders:
            found[name] = learn.encoders[name]
        elif (
            rate is not None and not encoder.pretrained and any(True for _ in encoder.parameters())
        ):
            found[name] = LearnEncoder(rate=rate)
    return found


def select_parameters(model: MultiTokenForConditionalGeneration, learn: Learn) -> None:
    """Let the stage's parameters learn, freeze all others. Raises MultiTokenError if none learn."""
    model.requires_grad_(False)
    for name, spec in learning_encoders(model, learn).items():
        model.trained_encoders[name] = open_to_learn(
            name, model.encoder(name), spec, model.trained_encoders.get(name)
        )
    for name, _, parameters in parameter_groups(model, learn):
        if not parameters:
            raise MultiTokenError(f"nothing to learn under {name!r}")
        for parameter in parameters:
            parameter.requires_grad_(True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage; one that was cut off while being written is left."""
    whole = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
        and (path / CONFIG).is_file()
        and (path / "trainer_state.json").is_file()
    ]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
