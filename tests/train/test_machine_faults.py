"""Faults of the machine in mid-run: one sentence, exit code 1, the last checkpoint is kept."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from multi_token import cli
from multi_token.errors import CheckpointError, MultiTokenError, RowError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.train import dpo_reference as reference_module
from multi_token.train import run as run_module
from multi_token.train import trainer as trainer_module
from multi_token.train.metrics import ROW_IDS
from multi_token.train.plan.oom import is_out_of_memory
from multi_token.train.resume import last_checkpoint
from multi_token.train.trainer import MultiTokenTrainer

Fields = Callable[..., dict[str, Any]]
NUM_STEPS = 6
LOST = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"


def lose_device() -> None:
    raise torch.AcceleratorError(LOST)


def lose_old_device() -> None:
    raise RuntimeError(LOST)


def kill_workers() -> None:
    """Do what the system does where memory is full."""
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)


@pytest.fixture
def in_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Calls a function in the forward pass of the fourth step and of those after it."""
    steps: list[int] = [0]
    faults: list[Callable[[], None]] = []
    step = MultiTokenTrainer.training_step

    def counted(self: MultiTokenTrainer, *args: Any, **options: Any) -> Any:
        steps[0] += 1
        return step(self, *args, **options)

    def look(module: nn.Module, _: Any) -> None:
        if isinstance(module, MultiTokenForConditionalGeneration) and steps[0] >= 4:
            faults[0]()

    monkeypatch.setattr(MultiTokenTrainer, "training_step", counted)
    handle = register_module_forward_pre_hook(look)
    yield faults.append
    handle.remove()


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["multi-token", *words])
    return cli._run_command(Console(stderr=True, width=1000))


def test_a_full_disk_is_one_sentence_in_every_command(
    recipe_fields: Fields,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_fields(tmp_path / "run")))
    rows, clean = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]
    rows.write_text(json.dumps({"messages": turns}))
    words = ("data", "check", rows, "--recipe", recipe, "--clean", clean)
    # the largest file that this process may write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        assert command(monkeypatch, *map(str, words)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().err
    assert "could not be written: File too large; free some space" in printed
    assert not clean.exists()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lose_device, "error: the device failed (CUDA error: an illegal memory access"),
        (lose_old_device, "error: the device failed (CUDA error: an illegal memory access"),
        (kill_workers, "error: a data worker was killed (DataLoader worker (pid"),
    ],
)
def test_a_fault_in_mid_run_is_one_sentence_and_the_same_command_continues(
    recipe_fields: Fields,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_training: Any,
    fault: Callable[[], None],
    sentence: str,
) -> None:
    num_workers = 2 if fault is kill_workers else 0
    fields = recipe_fields(tmp_path / "run", closed_form=None)
    fields["train"]["args"] |= {
        "max_steps": NUM_STEPS,
        "save_steps": 2,
        "dataloader_num_workers": num_workers,
        "report_to": [],
    }
    fields["train"]["stages"][0].pop("args")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    in_training(fault)
    assert command(monkeypatch, "train", str(recipe)) == 1
    printed = capsys.readouterr().err
    assert sentence in printed and "last complete checkpoint" in printed
    assert "Traceback" not in printed
    # batches that workers had read before they were killed are still trained on
    kept = last_checkpoint(tmp_path / "run" / "stages" / "1-projector")
    assert kept is not None and kept.name in ("checkpoint-2", "checkpoint-4")


def test_memory_that_cuda_itself_lacks_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"))
    assert not is_out_of_memory(torch.AcceleratorError(LOST))
    assert not is_out_of_memory(MultiTokenError("CUDA error: out of memory"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that this process, one of two, tells the other, which has no fault."""
    found: list[Any] = []

    def gather(values: list[Any], own: Any) -> None:
        found.append(own)
        values[:] = [own, None if own is None or isinstance(own, Exception) else own]

    for name, answer in (
        ("is_initialized", lambda: True),
        ("get_world_size", lambda: 2),
        ("get_rank", lambda: 0),
        ("barrier", lambda: None),
        ("all_gather_object", gather),
        ("broadcast_object_list", lambda _: None),
    ):
        monkeypatch.setattr(torch.distributed, name, answer)
    return found


def test_a_bad_row_of_a_reference_is_told_to_other_processes_before_it_is_raised(
    told: list[Any],
) -> None:
    bad = RowError("image: 6.jpg is truncated", kind="undecodable", row_id="row 6")
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(per_device_train_batch_size=1, dataloader_num_workers=0),
        model=torch.nn.Linear(1, 1),
        data_collator=lambda _: {ROW_IDS: [bad]},
    )
    pairs: Any = [0, 1]
    with pytest.raises(RowError, match="row 6: image: 6.jpg is truncated"):
        reference_module._compute_reference(trainer, pairs, Console(quiet=True))
    assert [type(each) for each in told] == [RowError]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def save_reference(folder: Path, patch: pytest.MonkeyPatch) -> None:
    computed = lambda *_: (torch.zeros(1, 2), torch.zeros(1, 2))  # noqa: E731
    patch.setattr(reference_module, "_compute_reference", computed)
    patch.setattr(reference_module, "save_file", full_disk)
    pairs: Any = SimpleNamespace(samples=SimpleNamespace(datasets=[]))
    trainer: Any = None
    reference_module._load_or_compute(trainer, pairs, folder / "reference", Console(quiet=True))


def save_run(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_module, "is_done", lambda _: True)
    patch.setattr(run_module, "save", full_disk)
    train = SimpleNamespace(output_dir=str(folder))
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=train), stream=None, stages=[], model=None
    )
    run_module.run_stages(run)


def save_closed_form(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_module, "find_items", lambda *_: {})
    patch.setattr(run_module, "save", full_disk)
    train = SimpleNamespace(output_dir=str(folder), closed_form=None)
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=train),
        model=SimpleNamespace(modalities=[]),
        initialized=[],
        console=Console(quiet=True),
    )
    run_module.closed_form_stage(run)


def save_stage(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "check_weights_finite", lambda *_: None)
    trainer: Any = SimpleNamespace(
        finish_step_check=lambda: None,
        multi_token_model=None,
        state=SimpleNamespace(global_step=1),
        sharding=None,
        _save=full_disk,
    )
    trainer_module.MultiTokenTrainer.save_result(trainer, folder / "result")


@pytest.mark.parametrize("save", [save_reference, save_run, save_closed_form, save_stage])
def test_a_full_disk_of_the_main_process_is_told_to_other_processes_before_it_is_raised(
    told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any
) -> None:
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        save(tmp_path, monkeypatch)
    assert [type(each) for each in told] == [CheckpointError]
