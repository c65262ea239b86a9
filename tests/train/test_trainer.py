"""Training arguments are checked, and rows come in the right order (train/training_args.py)."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from multi_token.errors import RecipeError
from multi_token.train.batch_plan import LengthGroupedSampler, PaddedBatches, SetEpochCallback
from multi_token.train.training_args import check_metric, training_arguments


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_step": 3}, "did you mean 'max_steps'"),
        ({"learning_rate": 1e-3}, "learning rates are under `learn`"),
        ({"remove_unused_columns": True}, "are fixed"),
        ({"save_strategy": "sometimes"}, "train args"),
        (
            {"per_device_train_batch_size": "abc"},
            "expected a whole number from 1 on for 'per_device_train_batch_size', got 'abc'",
        ),
        ({"gradient_accumulation_steps": 0}, "from 1 on for 'gradient_accumulation_steps', got 0"),
        ({"max_steps": 2.5}, "expected a whole number for 'max_steps', got 2.5"),
        ({"weight_decay": "much"}, "expected a number for 'weight_decay', got 'much'"),
        ({"save_total_limit": True}, "expected a number for 'save_total_limit', got True"),
        ({"bf16": "yes"}, "expected true or false for 'bf16', got 'yes'"),
        ({"label_smoothing_factor": 0.1}, "logits are computed at supervised positions alone"),
        ({"optim": "galore_adamw"}, "galore_adamw takes all parameters as one"),
        ({"optim": "lomo"}, "lomo takes all parameters as one"),
        ({"optim": "adamw_torch_xla"}, "train args: .*torch_xla"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "train args: .*min_lr"),
        ({"lr_scheduler_kwargs": {"min_rate": 1e-6}}, "train args: .*min_rate"),
        ({"fp16": True}, "`fp16` needs a GPU; set `bf16: true`"),
        ({"train_sampling_strategy": "batch_rebalance"}, "set it to group_by_length"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches' has to be false"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches' has to be true"),
        ({"accelerator_config": "file.json"}, "expected a mapping for 'accelerator_config'"),
        ({"dataloader_persistent_workers": True}, "is for data workers"),
        ({"push_to_hub": True}, "run `multi-token push RUN`"),
        ({"fsdp": "full_shard"}, "'fsdp' is not set here; set `train.fsdp: true`"),
        ({"torch_compile": True}, "set `train.compile_layers: true`"),
        ({"use_liger_kernel": True}, "set `train.liger: true`"),
        (
            {"deepspeed": "nowhere.json"},
            r"deepspeed 'nowhere\.json' could not be read: No such file",
        ),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "has a section 'optimizer', which would"),
        ({"deepspeed": {"scheduler": {}}}, "has a section 'scheduler', which would"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "stage 3, which shards weights .* 1 or",
        ),
    ],
)
def test_training_arguments_are_checked(fields: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        training_arguments(tmp_path, {"use_cpu": True, **fields}, seed=0, learning_rate=1e-3)


def test_the_seed_of_the_order_of_rows_may_be_zero(tmp_path: Path) -> None:
    lengths = [10, 50] * 40
    orders = {}
    for seed, chosen in ((5, {"data_seed": 0}), (0, {}), (5, {})):
        fields = {"use_cpu": True, "train_sampling_strategy": "group_by_length", **chosen}
        args = training_arguments(tmp_path, fields, seed=seed, learning_rate=1e-3)
        sampler = PaddedBatches(lengths).sampler(args)
        assert sampler is not None
        orders[seed, bool(chosen)] = list(sampler)
    assert orders[5, True] == orders[0, False] != orders[5, False]


def test_a_process_trains_on_one_device_however_many_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as torch answers on a machine with eight
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    args = training_arguments(tmp_path, {}, seed=0, learning_rate=1e-3)
    # with more, the trainer would wrap the model in nn.DataParallel
    assert args.n_gpu == 1
    assert args.train_batch_size == args.per_device_train_batch_size


@pytest.mark.parametrize(
    ("fields", "metrics", "sentence"),
    [
        ({"metric_for_best_model": "exact_answers"}, ["loss"], "computes 'exact_answers'; .* loss"),
        ({"metric_for_best_model": "eval_loss"}, ["loss"], None),
        ({"metric_for_best_model": "rewards/margins"}, ["loss", "rewards/margins"], None),
        ({}, ["loss"], None),
    ],
)
def test_a_metric_that_no_evaluation_computes_is_refused(
    fields: Any, metrics: list[str], sentence: str | None, tmp_path: Path
) -> None:
    args = training_arguments(tmp_path, {"use_cpu": True, **fields}, seed=0, learning_rate=1e-3)
    with nullcontext() if sentence is None else pytest.raises(RecipeError, match=sentence):
        check_metric(args, metrics)


def test_rows_of_one_length_come_together_each_once_and_in_another_order_each_epoch() -> None:
    lengths = [10, 50] * 40 + [10]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(81))
    batches = [[lengths[i] for i in first[k : k + 8]] for k in range(0, 80, 8)]
    assert sum(len(set(batch)) == 1 for batch in batches) >= 5  # by chance: none
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)


def test_a_deepspeed_file_is_read_before_a_run_begins(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    for text, sentence in (("{", "is not JSON"), ("[2]", "should hold a mapping, got list")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=sentence):
            training_arguments(tmp_path, {"deepspeed": str(file)}, seed=0, learning_rate=1e-3)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_named(tmp_path: Path) -> None:
    fields = {"use_cpu": True, "deepspeed": {"zero_optimization": {"stage": 2}}}
    with pytest.raises(RecipeError, match="needs the package deepspeed, which is not installed"):
        training_arguments(tmp_path, fields, seed=0, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("ACCELERATE_USE_FSDP", "makes accelerate use FSDP.* set `train.fsdp: true`"),
        ("ACCELERATE_USE_DEEPSPEED", "makes accelerate use DeepSpeed.* `train.args.deepspeed`"),
    ],
)
def test_settings_of_accelerate_outside_the_recipe_are_refused(
    variable: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RecipeError, match=sentence):
        training_arguments(tmp_path, {"use_cpu": True}, seed=0, learning_rate=1e-3)


def test_a_resume_within_an_epoch_sets_it_in_the_sampler_below_four_layers() -> None:
    """As accelerate nests them for one of several processes that skips the batches it has seen."""
    sampler = LengthGroupedSampler([10, 50] * 8, batch_size=4, seed=1)
    share = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), 2, 0)
    loader = DataLoader(range(16), batch_sampler=SkipBatchSampler(share, 1))  # type: ignore[arg-type]
    state, args = TrainerState(epoch=2.25), TrainingArguments("unused", use_cpu=True)
    SetEpochCallback().on_epoch_begin(args, state, TrainerControl(), train_dataloader=loader)
    expected = LengthGroupedSampler([10, 50] * 8, batch_size=4, seed=1)
    expected.set_epoch(2)
    wanted = list(expected)
    assert [batch.tolist() for batch in loader] == [wanted[i : i + 2] for i in (4, 8, 12)]
