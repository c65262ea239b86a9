"""A thin subclass of transformers' Trainer: what learns, what is saved, what is counted.

Border: the loop is transformers'. Batches come from collate.py, folders from checkpoint/load.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from multi_token.checkpoint.load import load_trained, save
from multi_token.data.packing import PackingPlan
from multi_token.data.stream_loader import StreamProgress, save_states
from multi_token.data.streaming import StreamDataset
from multi_token.distributed import all_gather, barrier, is_main_process
from multi_token.errors import RecipeError
from multi_token.language_model.segment_attention import segment_attention_enabled
from multi_token.modalities.base import PretrainedModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import DistillationSpec, DpoSpec, FsdpSpec, Trainable
from multi_token.train.compile import compile_enabled, compiled_layers
from multi_token.train.consistency import check_losses_finite, check_weights_finite
from multi_token.train.distillation import DistillationLoss
from multi_token.train.dpo import DpoLoss
from multi_token.train.fsdp import FsdpShards, full_optimizer_state, load_full_optimizer_state
from multi_token.train.metrics import ROW_IDS, StepMetrics, WithRowIds, group_lrs
from multi_token.train.parameter_groups import (
    freeze_and_unfreeze,
    optimizer_groups,
    parameter_groups,
)
from multi_token.train.plan.oom import OomFacts
from multi_token.train.resume import (
    atomic_checkpoint,
    check_same_batching,
    prune_checkpoints,
    raise_on_read_error,
)
from multi_token.train.samplers import LengthGroupedSampler, PackSampler, SetEpochCallback


class MultiTokenTrainer(Trainer):
    """Learning rates by group, our checkpoints, and counts of real and supervised tokens."""

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        learn: Trainable,
        lengths: Sequence[int],
        peak_tflops: float | None = None,
        packing: PackingPlan | None = None,
        fsdp: FsdpSpec | None = None,
        teacher: DistillationSpec | None = None,
        dpo: DpoSpec | None = None,
        compile_layers: bool = False,
        print_fn: Callable[[str], object] = print,
        **options: Any,
    ) -> None:
        """`lengths`: tokens of each row, for `train_sampling_strategy: group_by_length`.

        `peak_tflops`: what one device can do at most, for `mfu` in the log.
        `packing`: rows are packed, one pack a batch; `data_collator` is then `Collator.pack`.
        `fsdp`: the language model is cut into pieces when training begins, if there are several
        processes; the model is of no use for anything else afterwards.
        `distillation_loss`: part of the loss; `data_collator` is then a `WithTeacher`.
        `dpo`: the loss, of a dataset of `Pairs`; `data_collator` is then a `PairCollator`.
        `compile_layers`: of the language model, while it trains.
        `say`: hears of bad rows where `train_dataset` is a `StreamDataset`.
        """
        self.packing = packing
        self.fsdp = fsdp
        self.compile_layers = compile_layers
        self.sharding: FsdpShards | None = None
        self._full_optimizer_state: dict[str, Any] | None = None
        self._losses: list[tuple[Tensor, list[str]]] = []
        freeze_and_unfreeze(model, learn)
        self.learn = learn
        self.lengths = list(lengths)
        self.step_metrics = StepMetrics(model, peak_tflops=peak_tflops)
        self.distillation_loss = None if teacher is None else DistillationLoss(teacher)
        if self.distillation_loss is not None:
            options["compute_loss_func"] = self.distillation_loss.loss
        self.dpo_loss = None if dpo is None else DpoLoss(dpo)
        if self.dpo_loss is not None:
            options["compute_loss_func"] = self.dpo_loss.loss
        if "data_collator" in options:
            options["data_collator"] = WithRowIds(options["data_collator"])
        super().__init__(model=model, **options)
        rows = self.train_dataset
        self.streamed = StreamProgress(rows, print_fn) if isinstance(rows, StreamDataset) else None
        if self.streamed is not None:
            self.args.ignore_data_skip = True  # a stream goes on where it shall by itself
        self.add_callback(self.step_metrics)
        self.add_callback(SetEpochCallback())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A group for each that learns, split into matrices (decayed) and vectors (not)."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self._multi_token_model())
            decay = self.args.weight_decay
            groups = parameter_groups(self._multi_token_model(), self.learn, weight_decay=decay)
            self.optimizer = cls(optimizer_groups(groups), **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As transformers', but lengths are known: it would decode all media to see them."""
        if self.args.train_sampling_strategy == "group_by_length":
            return LengthGroupedSampler(
                self.lengths,
                batch_size=self.args.train_batch_size
                * self.args.gradient_accumulation_steps
                * self.args.world_size,
                seed=self.args.data_seed or self.args.seed,
            )
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        """As transformers', or of packs: each process walks through its own part of one plan.

        The same of a stream. Raises RecipeError for arguments that packing leaves no room for.
        """
        args = self.args
        dataset: Any = self.train_dataset
        if dataset is None or (self.packing is None and self.streamed is None):
            return super().get_train_dataloader()
        if args.train_sampling_strategy != "random":
            raise RecipeError(
                f"train args: train_sampling_strategy is {args.train_sampling_strategy!r}, but "
                "packs are batches of their own; leave it out, or set train.packing to false"
            )
        if args.n_gpu > 1 and self.packing is not None:
            raise RecipeError(
                f"a pack is one row, which {args.n_gpu} devices of one process cannot share; start "
                "a process for each device (torchrun), or set train.packing to false"
            )
        if self.streamed is not None:
            return self.streamed.loader(args, self.data_collator, self.packing)
        assert self.packing is not None
        loader = DataLoader(
            dataset,
            batch_sampler=PackSampler(
                self.packing,
                seed=args.data_seed or args.seed,
                num_processes=args.world_size,
                process=args.process_index,
                num_accumulated=args.gradient_accumulation_steps,
            ),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        # one process as far as accelerate knows: it would cut the plan into parts once more
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=self.accelerator.non_blocking,
        )

    def train(self, *args: Any, **options: Any) -> Any:
        """As transformers'; packs are attended to by segment where the model takes that."""
        ours = self._multi_token_model()
        with ExitStack() as stack:
            if self.packing is not None and ours.capabilities.supports_segment_attention:
                stack.enter_context(segment_attention_enabled(ours.language_model))
            if self.compile_layers:
                stack.enter_context(compiled_layers(ours.language_model))
            checkpoint = options.get("resume_from_checkpoint")
            if self.streamed is not None and checkpoint is not None:
                self.streamed.resume(checkpoint, self.args)
            output = super().train(*args, **options)
        if self.streamed is not None:
            self.streamed.finish()
        return output

    def _multi_token_model(self) -> MultiTokenForConditionalGeneration:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, MultiTokenForConditionalGeneration)
        return model

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As transformers', but measured, and a loss that is no number is refused with its rows."""
        row_ids = inputs.pop(ROW_IDS, [])
        with self.step_metrics.timing_step(inputs), compile_enabled(self.compile_layers):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.sharding is not None and self.accelerator.sync_gradients:
                self.sharding.average_gradients()
        self._losses.append((loss, row_ids))
        if self.accelerator.sync_gradients:
            losses, self._losses = self._losses, []
            check_losses_finite(losses, self.state.global_step + 1)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """As transformers'; a teacher answers first."""
        if self.distillation_loss is not None:
            inputs = self.distillation_loss.read(self._multi_token_model(), inputs)
        if self.dpo_loss is not None:
            inputs = self.dpo_loss.read(inputs)
        return super().compute_loss(model, inputs, *args, **kw)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As transformers', without the names of rows, which the model does not take."""
        inputs.pop(ROW_IDS, None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As transformers'; of pairs, what is logged of them in training, and their own loss."""
        if self.dpo_loss is None:
            return super().evaluation_loop(*args, **options)
        gather: Any = self.accelerator.gather_for_metrics
        with self.dpo_loss.evaluation_mode(gather):
            output: Any = super().evaluation_loop(*args, **options)
            found = self.dpo_loss.metrics()
        prefix = options.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As transformers', with the time measured that a step waits for its batches."""
        with self.step_metrics.timing_data_wait():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As transformers', of supervised tokens; but a preference is learned by the pair."""
        if self.dpo_loss is not None:
            batch_samples = self.dpo_loss.as_pair_counts(batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers'; a step's loss comes with what the step did (train/metrics.py)."""
        if self.streamed is not None:
            # it has no epochs, and transformers counts from the start of this process
            self.state.epoch = self.state.global_step / self.state.max_steps
        if "loss" in logs:
            if self.streamed is not None and self.streamed.streams.skip_bad:
                bad = torch.tensor([float(self.streamed.state.num_bad)])
                logs["bad_rows"] = float(
                    self._over_devices(bad) if self.args.world_size > 1 else bad
                )
            reduce = self._over_devices if self.args.world_size > 1 else None
            logs |= self.step_metrics.pop(reduce)
            if self.dpo_loss is not None:
                logs |= self.dpo_loss.metrics(reduce)
            logs |= self.step_metrics.gradient_norms(logs.get("grad_norm"))
            assert self.optimizer is not None
            logs |= group_lrs(self.optimizer.param_groups)
        super().log(logs, start_time)

    def _over_devices(self, sums: Tensor) -> Tensor:
        total: Any = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum")
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the batch that was just run; transformers' formula knows nothing of frozen parts."""
        return int(self.step_metrics.last_flops)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """As transformers', but the language model is cut into pieces first, if it shall be.

        By now it has the weights of the checkpoint, and the optimizer is made of what it has then.
        """
        if self.fsdp is not None and self.args.world_size > 1 and self.sharding is None:
            self.sharding = FsdpShards(self._multi_token_model(), replicas=self.fsdp.replicas)
            # so that accelerate neither wraps nor cuts it
            self.is_distributed_loading_by_transformers = True
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            check_same_batching(
                Path(resume_from_checkpoint), self.batching_facts
            )  # it loads by itself
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """What is whole is equal already; `training_step` averages its gradients."""

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Not deferred: gradients of pieces are summed as pieces, or each process held all."""
        return nullcontext()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.sharding is None:
            return super()._clip_grad_norm(model)
        return self._mixed_mesh_grad_norm(model, self.args.max_grad_norm)

    def save_result(self, folder: str | Path) -> None:
        """The model into a folder; all processes take part, the first one writes."""
        check_weights_finite(self._multi_token_model(), self.state.global_step)
        if self.sharding is not None:
            self.sharding.gather()
        self._save(str(folder))
        barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            with self.sharding.unsharded() if self.sharding else nullcontext():
                save(self._multi_token_model(), output_dir or str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but whole or not at all. Raises CheckpointError, of a full disk say."""
        check_weights_finite(self._multi_token_model(), self.state.global_step)
        run = Path(self._get_output_dir(trial))
        # asked before anything is written: a process that cannot write would leave others waiting
        places = None if self.streamed is None else all_gather(self.streamed.state)
        num_kept, self.args.save_total_limit = self.args.save_total_limit, None
        if self.sharding is not None:
            # before anything is written: a process that cannot write would leave others waiting
            self.sharding.gather()
            assert self.optimizer is not None
            self._full_optimizer_state = full_optimizer_state(self.optimizer)
        try:
            with atomic_checkpoint(
                run / f"checkpoint-{self.state.global_step}", self.batching_facts
            ):
                super()._save_checkpoint(model, trial)
                if places is not None and is_main_process():
                    step = self.state.global_step
                    save_states(run / f"checkpoint-{step}", step, places)
        finally:
            self.args.save_total_limit = num_kept
            self._full_optimizer_state = None
        if is_main_process():
            prune_checkpoints(run, num_kept, best=self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self.optimizer
        if self._full_optimizer_state is not None:
            whole_one: Any = _StateOf(self._full_optimizer_state)
            self.optimizer = whole_one
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            self.optimizer = optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self.optimizer
        if self.sharding is not None and optimizer is not None:
            cutting: Any = _StateOf({}, lambda state: load_full_optimizer_state(optimizer, state))
            self.optimizer = cutting
        try:
            with raise_on_read_error(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.optimizer = optimizer

    def oom_facts(self) -> OomFacts:
        """State of the stage that decides which changes to the recipe save memory."""
        model = self._multi_token_model()
        language_model = model.language_model
        return OomFacts(
            device=self.args.device,
            step=self.state.global_step + 1,
            frozen_language_model=not any(
                p.requires_grad for n, p in language_model.named_parameters() if "lora_" not in n
            ),
            frozen_dtypes=frozenset(
                p.dtype for p in language_model.parameters() if not p.requires_grad
            ),
            float32_encoders=tuple(
                name
                for name, modality in model.modalities.items()
                if isinstance(modality, PretrainedModality)
                and modality.dtype == "float32"
                and not any(p.requires_grad for p in model.encoder(name).parameters())
            ),
            batch_size=self.args.per_device_train_batch_size,
            longest_row=max(self.lengths, default=0),
            pack_tokens=None if self.packing is None else self.packing.max_tokens,
            activation_checkpointing=bool(self.args.activation_checkpointing),
        )

    @property
    def batching_facts(self) -> dict[str, int]:
        """What a run that goes on from a checkpoint must share with the one that wrote it."""
        args = self.args
        pieces = {"processes": args.world_size} if self.is_deepspeed_enabled else {}
        if self.packing is not None:
            if self.streamed is not None:
                pieces = {"processes": args.world_size}  # each packs the rows that it reads
            return pieces | {
                "packs_per_step": args.world_size * args.gradient_accumulation_steps,
                "tokens_per_pack": self.packing.max_tokens,
            }
        each = args.train_batch_size * args.gradient_accumulation_steps
        return pieces | {"rows_per_step": each * args.world_size}

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        check_same_batching(Path(resume_from_checkpoint), self.batching_facts)
        load_trained(self._multi_token_model(), resume_from_checkpoint)
        freeze_and_unfreeze(self._multi_token_model(), self.learn)


class _StateOf:
    """What transformers saves and loads in the optimizer's place, when that is cut into pieces."""

    def __init__(self, state: dict[str, Any], load: Any = None) -> None:
        self.state_dict = lambda: state
        self.load_state_dict = load
