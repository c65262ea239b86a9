"""One stage of a run: its trainer, the checkpoint it resumes from, its result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, set_seed

from multi_token.collate import Collator
from multi_token.data.packing import packing_plan
from multi_token.data.shared_prefix import SharedPrefixGroup, shared_prefix_groups
from multi_token.data.sources import TrainingSource, num_readers
from multi_token.data.streaming import NUM_TRIED_ITEMS, StreamDataset
from multi_token.distributed import (
    all_gather,
    broadcast_from_main,
    is_main_process,
    num_processes,
    raise_together,
)
from multi_token.encoders import attach_lora, find_unused_parameters, gradients_enabled
from multi_token.errors import Interrupted
from multi_token.language_model.lora import attach_adapter
from multi_token.language_model.probe import check_trainable
from multi_token.recipe.train import Stage
from multi_token.train.batch_plan import BatchPlan, PackedBatches, PaddedBatches, StreamedBatches
from multi_token.train.closed_form import encode_items
from multi_token.train.distillation import DistillationLoss
from multi_token.train.dpo import DpoLoss, PreferenceDataset
from multi_token.train.dpo_reference import (
    held_out_preference_dataset,
    load_or_compute_reference,
    preference_dataset,
)
from multi_token.train.fsdp import is_sharded
from multi_token.train.objective import CrossEntropy, Objective
from multi_token.train.parameter_groups import parameter_groups, trainable_encoders
from multi_token.train.plan.estimate import plan_stage, print_plan
from multi_token.train.plan.oom import explain_oom
from multi_token.train.prepare import Run, StageRun, mark_done
from multi_token.train.progress import (
    ProgressBarCallback,
    StopOnInterrupt,
    describe_data_wait,
    describe_groups,
    describe_loggers,
)
from multi_token.train.resume import last_checkpoint, raise_on_write_error
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import mixed_precision


def attach_adapters(run: Run, stage: StageRun) -> None:
    """Attach the adapters that a stage trains, unless an earlier one has."""
    model, seed = run.model, run.recipe.train.seed
    learn = stage.spec.learn
    if learn.adapter is not None and not hasattr(model.language_model, "peft_config"):
        set_seed(seed)  # of its own, so that a resumed run draws the same adapter
        model.language_model = attach_adapter(model.language_model, run.recipe.train.adapter)
    for name, trainable in learn.encoders.items():
        if trainable.lora is not None and model.encoder(name).pretrained:
            set_seed(seed)
            attach_lora(name, model.encoder(name), trainable.lora)


def build_trainer(run: Run, stage: StageRun) -> MultiTokenTrainer:
    """Return the trainer of a stage, ready to start; prints what the stage trains.

    Raises RecipeError or LanguageModelError for a stage that cannot be trained.
    """
    model, spec, learn = run.model, run.recipe.train, stage.spec.learn
    assert model.processor is not None
    sources, dataset = run.rows_of(stage.spec)
    held_out: Any = run.evaluation.dataset if stage.args.eval_strategy != "no" else None
    if stage.spec.dpo is not None:
        sources, dataset = preference_dataset(sources, stage.spec, model)
        if held_out is not None:
            rows = run.evaluation.held_out
            # without any pair the held-out rows stay as they are, for cross entropy
            held_out = held_out_preference_dataset(rows, model, run.console) or held_out
    objective, batches = _objective(stage.spec), _batch_plan(run, stage, sources, dataset)
    share = spec.packing is not None and spec.packing.share
    collator = Collator(model.modalities, model.processor.chat.filler_id, share=share)
    _freeze_unused(run, stage, sources)
    model.logits_bytes = int(spec.logits_megabytes * 2**20)
    trainer = MultiTokenTrainer(
        model,
        learn=learn,
        batches=batches,
        objective=objective,
        fsdp=spec.fsdp,
        compile_layers=spec.compile_layers,
        args=stage.args,
        train_dataset=dataset,
        eval_dataset=held_out,
        peak_tflops=spec.peak_tflops,
        data_collator=objective.collator(collator, packed=batches.pack_tokens is not None),
    )
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_all = sum(p.numel() for p in model.parameters())
    run.console.print(
        f"stage {stage.spec.name}: {num_trainable:,} of {num_all:,} parameters are trainable",
        *_trainable_groups(run, stage),
        describe_loggers(stage.args),
        sep="\n",
        highlight=False,
    )
    return trainer


def _objective(stage: Stage) -> Objective:
    if stage.distillation is not None:
        return DistillationLoss(stage.distillation)
    return CrossEntropy() if stage.dpo is None else DpoLoss(stage.dpo)


def _batch_plan(
    run: Run, stage: StageRun, sources: list[TrainingSource], dataset: Any
) -> BatchPlan:
    spec = run.recipe.train
    lengths = [length for source in sources for length in source.lengths]
    num_items: list[int] = []
    if spec.pack_items is not None:
        num_items = [num for source in sources for num in source.num_items]
    share = spec.packing is not None and spec.packing.share
    # rows of a stream are not known before; those of a pack share what they happen to share
    find_groups = share and not isinstance(dataset, StreamDataset)
    packing = packing_plan(
        spec,
        lengths,
        num_items,
        num_rows=stage.args.per_device_train_batch_size,
        groups=_shared_prefixes(run, sources) if find_groups else (),
    )
    if isinstance(dataset, StreamDataset):
        print_fn = partial(run.console.print, highlight=False, markup=False)
        return StreamedBatches(dataset, lengths, packing=packing, print_fn=print_fn)
    if packing is not None:
        return PackedBatches(packing, lengths)
    pairs = isinstance(dataset, PreferenceDataset)
    return PaddedBatches(dataset.num_tokens if pairs else lengths)


def _shared_prefixes(run: Run, sources: list[TrainingSource]) -> Sequence[SharedPrefixGroup]:
    """Return the rows that begin with the same media, found once for stages of the same rows."""
    key = tuple(id(source.rows) for source in sources)
    if key not in run.shared_prefixes:
        run.shared_prefixes[key] = shared_prefix_groups(
            sources,
            Path(run.recipe.train.output_dir),
            num_workers=num_readers(
                run.recipe, sum(len(s.lengths) for s in sources) // num_processes()
            ),
            console=run.console,
        )
    return run.shared_prefixes[key]


def _freeze_unused(run: Run, stage: StageRun, sources: list[TrainingSource]) -> None:
    """Find the parameters of trained encoders that their features do not depend on."""
    model = run.model
    for name, spec in trainable_encoders(model, stage.spec.learn).items():
        encoder, unused = model.encoder(name), None
        items = (pair for source in sources for pair in source.items(name))
        tried = list(itertools.islice(items, NUM_TRIED_ITEMS))
        if tried:
            with mixed_precision(stage.args), gradients_enabled(encoder):
                features = encode_items(model, name, tried, batch_size=1)
                unused = find_unused_parameters(name, encoder, spec, features)
        # agreed, since ranks of a stream may begin with other items
        found = [one for one in all_gather(unused) if one is not None]
        encoder.unused_parameters = frozenset[str]().union(*found).intersection(*found)
        sizes = dict(encoder.named_parameters())
        num = sum(sizes[key].numel() for key in encoder.unused_parameters)
        if num:
            run.console.print(
                f"{name}: the features do not depend on {num:,} parameters of the encoder, which "
                "stay frozen",
                highlight=False,
            )


def _trainable_groups(run: Run, stage: StageRun) -> list[str]:
    decay = stage.args.weight_decay
    return describe_groups(parameter_groups(run.model, stage.spec.learn, weight_decay=decay))


def fit(run: Run, stage: StageRun) -> None:
    """Train a stage from its last complete checkpoint on, and write its result.

    Raises Interrupted after Ctrl-C or SIGTERM, once the checkpoint is written.
    """
    console, name, folder = run.console, stage.spec.name, stage.folder
    trainer = build_trainer(run, stage)
    print_plan(plan_stage(trainer, name, try_steps=False), trainer, console)
    run.evaluation.attach(trainer, name, _trainable_groups(run, stage))
    if not is_sharded(run.recipe.train):  # else tried when the model was composed
        with mixed_precision(stage.args):
            check_trainable(run.model.language_model)
    # transformers adds it where tqdm is off; it would print every log a second time
    trainer.remove_callback(PrinterCallback)
    stop = StopOnInterrupt(console)
    trainer.add_callback(ProgressBarCallback(trainer, console, name))
    trainer.add_callback(stop)
    if stage.spec.dpo is not None:
        # before a checkpoint is loaded: the reference is the model as it is when the stage begins
        load_or_compute_reference(trainer, folder, console)
    resume = broadcast_from_main(lambda: last_checkpoint(folder, console.print))
    if resume is not None:
        console.print(f"resuming from {resume}")
    try:
        with explain_oom(trainer.oom_facts, name):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        stop.restore()
        run.evaluation.save_report()
    if stop.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage "
            f"{name}, saved; the same command continues from there"
        )
    line = describe_data_wait(trainer, run.recipe.train)
    console.print(line, highlight=False, soft_wrap=True)
    if stage.args.load_best_model_at_end:
        trainer.load_best()
        metric, best = stage.args.metric_for_best_model, trainer.state.best_metric
        console.print(
            f"  the checkpoint of step {trainer.state.best_global_step} is the best by {metric} "
            f"({best:.4g}), and is the stage's result",
            highlight=False,
        )
    trainer.save_result(folder / "result")
    # the mark comes last: a stage counts as done only with its result on the disk
    with raise_together(), raise_on_write_error(folder):
        if is_main_process():
            wait = trainer.step_metrics.data_wait
            mark_done(folder, {"log_history": trainer.state.log_history, "data_wait": wait})
