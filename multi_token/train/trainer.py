"""Thin subclass of transformers' Trainer: our parameter groups, checkpoints, metrics and checks.

The loss is an `Objective`, the batches are a `BatchPlan`, both handed in. The private methods of
transformers that are overridden here are listed in docs/decisions/0003.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils import serialization
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from multi_token.checkpoint.load import load_trained
from multi_token.checkpoint.save import save
from multi_token.distributed import (
    broadcast_from_main,
    is_main_process,
    num_processes,
    raise_together,
)
from multi_token.errors import CheckpointError, LanguageModelError, MultiTokenError, RecipeError
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.loss import num_bytes_per_token
from multi_token.language_model.segment_attention import (
    describe_pack_attention,
    segment_attention_enabled,
)
from multi_token.modalities.base import PretrainedModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import FsdpSpec, Trainable
from multi_token.train.batch_plan import BatchPlan, SetEpochCallback
from multi_token.train.compile import compile_enabled, compiled_layers
from multi_token.train.consistency import BatchResult, StepCheck, check_weights_finite
from multi_token.train.fsdp import FsdpShards, full_optimizer_state, shard_optimizer_state
from multi_token.train.metrics import ROW_IDS, StepMetrics, WithRowIds, group_lrs
from multi_token.train.objective import CrossEntropy, Objective
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
    raise_on_write_error,
)
from multi_token.train.training_args import checkpointing_options, mixed_precision


class MultiTokenTrainer(Trainer):
    """Trainer of one stage: learning rates by group, complete checkpoints, token counts."""

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        learn: Trainable,
        batches: BatchPlan,
        objective: Objective | None = None,
        peak_tflops: float | None = None,
        fsdp: FsdpSpec | None = None,
        compile_layers: bool = False,
        **options: Any,
    ) -> None:
        """`options`: arguments of transformers' Trainer.

        `learn`: what is trainable, with learning rates. `objective`: the loss; default: cross
        entropy. `data_collator` has to be what `objective.collator` returns.
        `peak_tflops`: peak of one device in TFLOP/s, for `mfu` in the log.
        `fsdp`: shard the language model when training begins, if there are several processes; the
        model can be used for nothing else afterwards.
        `compile_layers`: compile the language model's layers while training.
        """
        placement = getattr(base_language_model(model.language_model), "hf_device_map", {})
        if len(set(placement.values())) > 1:
            raise LanguageModelError(
                "a language model with a `device_map` over several devices generates, and cannot "
                "be trained; load it without one, and share it by train.fsdp if it is too large"
            )
        freeze_and_unfreeze(model, learn, to_be_sharded=fsdp is not None and num_processes() > 1)
        self.learn = learn
        self.batches = batches
        self.objective = CrossEntropy() if objective is None else objective
        self.fsdp = fsdp
        self.compile_layers = compile_layers
        self.step_metrics = StepMetrics(model, peak_tflops=peak_tflops)
        self.sharding: FsdpShards | None = None
        self._full_optimizer_state: dict[str, Any] | None = None
        self._results: list[BatchResult] = []
        self._step_check: StepCheck | None = None
        options["compute_loss_func"] = self.objective.loss
        if "data_collator" in options:
            options["data_collator"] = WithRowIds(options["data_collator"])
        # accelerate keeps the precision of the first trainer for all later ones of a process
        AcceleratorState._reset_state()
        super().__init__(model=model, **options)
        if learn.language_model is not None:
            # written in float32, and loaded in the precision that it computed in
            dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(self.args.mixed_precision, "auto")
            model.config.model = {**model.config.model, "dtype": dtype}
        self.batches.configure(self.args)
        self.add_callback(self.step_metrics)
        self.add_callback(SetEpochCallback())

    @property
    def multi_token_model(self) -> MultiTokenForConditionalGeneration:
        """The model without the wrappers of accelerate (DDP, DeepSpeed)."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, MultiTokenForConditionalGeneration)
        return model

    @property
    def batching_facts(self) -> dict[str, int]:
        """Numbers that a run must share with the checkpoint from which it resumes."""
        facts = self.batches.batching_facts(self.args)
        # DeepSpeed's optimizer state is cut into as many files as there are processes
        return facts | ({"processes": self.args.world_size} if self.is_deepspeed_enabled else {})

    def attention_mode(self) -> AbstractContextManager[Any]:
        """Attend to packs segment by segment within, where the language model supports it."""
        model = self.multi_token_model
        if self.batches.pack_tokens is None:
            return nullcontext()
        with mixed_precision(self.args):
            supported = model.capabilities.supports_segment_attention
            model.capabilities.segment_reach  # noqa: B018 - probed here, and not in a step
        return segment_attention_enabled(model.language_model) if supported else nullcontext()

    def describe_attention(self) -> str:
        """Return a line on how packs are attended to."""
        model, args = self.multi_token_model, self.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        dtype = dtype or next(model.language_model.parameters()).dtype
        language_model, capabilities = model.language_model, model.capabilities
        with mixed_precision(args):  # as its probes run in training
            return describe_pack_attention(language_model, capabilities, args.device, dtype)

    # ---- batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = self.batches.sampler(self.args)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # by length, transformers would look for the lengths in the samples, which have none
        return SequentialSampler(eval_dataset)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the batch plan. Raises RecipeError for arguments it excludes."""
        args, dataset, accelerator = self.args, self.train_dataset, self.accelerator
        loader = None
        if dataset is not None:
            loader = self.batches.loader(args, dataset, self.data_collator, accelerator)
        return super().get_train_dataloader() if loader is None else loader

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """As transformers', with the wait for data measured."""
        with self.step_metrics.timing_data_wait():
            return super().get_batch_samples(*args, **options)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        return super()._get_num_items_in_batch(self.objective.countable(batch_samples), device)

    # ---- steps

    def train(self, *args: Any, **options: Any) -> Any:
        """As transformers', with attention by segment, compiled layers and the batch plan's own
        position on a resume."""
        checkpoint = options.get("resume_from_checkpoint")
        if checkpoint is not None:
            self.batches.resume(checkpoint, self.args)
        with ExitStack() as stack:
            stack.enter_context(self.attention_mode())
            if self.compile_layers:
                stack.enter_context(compiled_layers(self.multi_token_model.language_model))
            output = super().train(*args, **options)
        self.finish_step_check()
        # accelerate leaves autocast around the forward, and a mark that keeps a later accelerator
        # from putting its own there: the next stage would train in this one's precision
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(self.multi_token_model).pop("_is_accelerate_prepared", None)
        self.batches.finish()
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per part that trains, split into matrices (decayed) and vectors (not)."""
        if self.optimizer is None:
            model, decay = self.multi_token_model, self.args.weight_decay
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(self.multi_token_model, self.learn, weight_decay=decay)
            self.optimizer = cls(optimizer_groups(groups), **options)
            if self.sharding is not None:
                # checkpoints hold the state of unsharded parameters, so that another number of
                # processes, or one without FSDP, can resume from them
                self.optimizer.register_state_dict_post_hook(
                    lambda _, state: self._full_optimizer_state or state
                )
                self.optimizer.register_load_state_dict_pre_hook(shard_optimizer_state)
        return self.optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if self.fsdp is not None and self.args.world_size > 1 and self.sharding is None:
            # here, since the checkpoint's weights are loaded by now and the optimizer is not made
            self.sharding = FsdpShards(
                self.multi_token_model,
                self.args.device,
                replicas=self.fsdp.replicas,
                bf16=self.args.mixed_precision == "bf16",
            )
            # accelerate then neither wraps the model in DDP nor shards it again
            self.is_distributed_loading_by_transformers = True
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            # DeepSpeed loads by itself and never calls `_load_from_checkpoint`
            check_same_batching(Path(resume_from_checkpoint), self.batching_facts)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # whole, a language model that is to be sharded may not fit a device
        if self.fsdp is None or self.args.world_size == 1:
            super()._move_model_to_device(model, device)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Do nothing: replicated parameters are equal, and `training_step` averages gradients."""

    def _defer_fsdp_gradient_reduction(self) -> Any:
        # deferred, each process would hold the gradients of the unsharded language model
        return nullcontext()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # transformers takes the norm over all shards only if gradients lie on more than one mesh;
        # with the language model alone there is one, and the logged norm would be this rank's
        if self.sharding is None:
            return super()._clip_grad_norm(model)
        return self._mixed_mesh_grad_norm(model, self.args.max_grad_norm)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        """As transformers', measured. Raises MultiTokenError for a loss of NaN or inf in the step
        before, with the ids of its rows."""
        row_ids = inputs.pop(ROW_IDS, [])
        with (
            self.step_metrics.timing_step(inputs),
            compile_enabled(self.compile_layers),
            self.multi_token_model.count_checks_deferred() as counts,
        ):
            loss = super().training_step(model, inputs, *args, **options)
            if self.sharding is not None and self.accelerator.sync_gradients:
                self.sharding.average_gradients()
        self._results.append(BatchResult(loss, row_ids, counts))
        if self.accelerator.sync_gradients:
            # Read one step late, so that the host queues this step while the device computes the
            # one before. Whatever is written or logged in between asks for the check first.
            self.finish_step_check()
            results, self._results = self._results, []
            self._step_check = StepCheck(results, self.state.global_step + 1)
        return loss

    def finish_step_check(self) -> None:
        """Finish the check of the last step, if it has not been; collective."""
        check, self._step_check = self._step_check, None
        if check is not None:
            check.finish()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """As transformers', of inputs from which the objective took its own tensors."""
        # Trial steps come before `train`, in which accelerate adds its own autocast. Entered twice:
        # casts that the teacher makes without gradients must not be kept for the student.
        with mixed_precision(self.args):
            inputs = self.objective.before_forward(self.multi_token_model, inputs)
        with mixed_precision(self.args):
            return super().compute_loss(model, inputs, *args, **kw)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        """As transformers', without row ids, which the model does not accept."""
        inputs.pop(ROW_IDS, None)
        return super().prediction_step(model, inputs, *args, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As transformers', with the objective's metrics of the held-out rows."""
        self.finish_step_check()
        gather: Any = self.accelerator.gather_for_metrics
        with self.objective.evaluation_mode(gather):
            output: Any = super().evaluation_loop(*args, **options)
            found = self.objective.metrics()
        if self.sharding is not None:
            self.sharding.reshard()
        prefix = options.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers'; the log of a training step carries the step's metrics too."""
        self.batches.set_epoch(self.state)
        if "loss" in logs:
            self.finish_step_check()
            reduce = self._sum_over_devices if self.args.world_size > 1 else None
            logs |= self.batches.metrics(reduce)
            logs |= self.step_metrics.pop(reduce)
            logs |= self.objective.metrics(reduce)
            logs |= self.step_metrics.gradient_norms(logs.get("grad_norm"))
            assert self.optimizer is not None
            logs |= group_lrs(self.optimizer.param_groups)
        super().log(logs, start_time)

    def _sum_over_devices(self, sums: Tensor) -> Tensor:
        total: Any = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum")
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of the last batch; transformers' formula counts frozen parts as trained."""
        return int(self.step_metrics.last_flops)

    def oom_facts(self) -> OomFacts:
        """State of the stage that decides which changes to the recipe save memory."""
        model = self.multi_token_model
        named = list(model.language_model.named_parameters())
        return OomFacts(
            device=self.args.device,
            step=self.state.global_step + 1,
            frozen_language_model=not any(p.requires_grad for n, p in named if "lora_" not in n),
            frozen_dtypes=frozenset(p.dtype for _, p in named if not p.requires_grad),
            float32_encoders=tuple(
                name
                for name, modality in model.modalities.items()
                if isinstance(modality, PretrainedModality)
                and all(
                    p.dtype == torch.float32 and not p.requires_grad
                    for p in model.encoder(name).parameters()
                )
            ),
            batch_size=self.args.per_device_train_batch_size,
            longest_row=max(self.batches.lengths, default=0),
            pack_tokens=self.batches.pack_tokens,
            activation_checkpointing=checkpointing_options(self.args) is not None,
            logits_budget=model.logits_bytes
            if model.capabilities.supports_chunked_logits
            else None,
            logits_of_token=num_bytes_per_token(model.language_model),
        )

    # ---- checkpoints

    def save_result(self, folder: str | Path) -> None:
        """Write the trained model into a folder; collective, the main process writes.

        Raises CheckpointError in all processes if the folder cannot be written.
        """
        self.finish_step_check()
        check_weights_finite(self.multi_token_model, self.state.global_step)
        if self.sharding is not None:
            self.sharding.gather()
        with raise_together(), raise_on_write_error(Path(folder)):
            self._save(str(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            with self.sharding.unsharded() if self.sharding else nullcontext():
                save(self.multi_token_model, output_dir or str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but complete or not there at all. Raises CheckpointError."""
        self.finish_step_check()
        check_weights_finite(self.multi_token_model, self.state.global_step)
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        # All collectives come before the first write: a process that cannot write (a full disk)
        # would leave the others waiting in the next one.
        rows = self.batches.gather_state()
        if self.sharding is not None:
            self.sharding.gather()
            assert self.optimizer is not None
            self._full_optimizer_state = full_optimizer_state(self.optimizer)
        # transformers prunes by number alone, and might keep only incomplete checkpoints
        num_kept, self.args.save_total_limit = self.args.save_total_limit, None
        folder = run / f"checkpoint-{step}"
        try:
            with atomic_checkpoint(folder, self.batching_facts):
                super()._save_checkpoint(model, trial)
                self.batches.save_state(folder, step, rows)
        finally:
            self.args.save_total_limit = num_kept
            self._full_optimizer_state = None
        if is_main_process():
            prune_checkpoints(run, num_kept, best=self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # the numbers of one process decide: rounded otherwise, some processes would save alone
        metrics = broadcast_from_main(lambda: metrics)
        try:
            is_best = super()._determine_best_metric(metrics, trial)
        except KeyError:
            # a stage with `dpo` may have held-out rows without any pair
            raise RecipeError(
                f"train args: this evaluation has no {self.args.metric_for_best_model!r}; set "
                "metric_for_best_model to loss"
            ) from None
        # between two saves too, since only what is saved can be loaded at the end
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def _load_best_model(self) -> None:
        """Do nothing: `load_best` loads it, which knows this project's checkpoints."""

    def load_best(self) -> None:
        """Load the checkpoint of the best evaluation; a collective call.

        Raises MultiTokenError if no evaluation gave a finite number.
        """
        step = broadcast_from_main(lambda: self.state.best_global_step)
        if not step:
            raise MultiTokenError(
                f"load_best_model_at_end: no evaluation gave a finite "
                f"{self.args.metric_for_best_model}, so no checkpoint is the best; lower the "
                "learning rates under `learn`, or leave load_best_model_at_end out"
            )
        load_trained(self.multi_token_model, Path(str(self.args.output_dir), f"checkpoint-{step}"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not any(Path(checkpoint).rglob("*optim*")):
            raise CheckpointError(
                f"{checkpoint} was saved with `save_only_model`, so it lacks the optimizer's state "
                "and cannot be continued; remove the checkpoints beside it to begin the stage again"
            )
        with raise_on_read_error(checkpoint), ExitStack() as stack:
            if self.sharding is not None:
                # One of several processes would load the full state onto its device. A single one
                # maps the file, and `shard_optimizer_state` cuts from that.
                options: Any = serialization.config
                stack.enter_context(options.patch("load.mmap", True))
                stack.callback(setattr, self, "args", self.args)
                self.args: Any = SimpleNamespace(world_size=1)
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        check_same_batching(Path(resume_from_checkpoint), self.batching_facts)
        load_trained(self.multi_token_model, resume_from_checkpoint)
        # loading may attach parts (an adapter, a language model) whose parameters are trainable
        sharded = self.fsdp is not None and self.args.world_size > 1
        freeze_and_unfreeze(self.multi_token_model, self.learn, to_be_sharded=sharded)
