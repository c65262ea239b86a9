"""A run that was stopped, killed or out of disk resumes exactly (train/resume.py)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from multi_token.errors import CheckpointError, Interrupted, MultiTokenError, RecipeError
from multi_token.recipe.recipe import Recipe
from multi_token.train.resume import last_checkpoint, prune_checkpoints, run_lock
from multi_token.train.run import train
from tests.train.bits import assert_same_bits, run_until

Fields = Callable[..., dict[str, Any]]
STAGE = Path("stages") / "1-adapter"
ARGS = {"use_cpu": True, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": []}


def trained(fields: dict[str, Any], console: Console | None = None) -> Any:
    return train(Recipe.model_validate(fields), console=console or Console(quiet=True))


def fields_of(recipe_fields: Fields, out: Path, *, args: Any = None, **more: Any) -> dict[str, Any]:
    """A run of six steps, three epochs of rows, that learns an adapter with dropout."""
    stage = {"name": "adapter", "learn": {"projectors": 1e-2, "adapter": 1e-2}}
    given = {**ARGS, "max_steps": 6, "save_steps": 1, **(args or {})}
    adapter = {"r": 4, "lora_dropout": 0.2}
    return recipe_fields(out, stages=[stage], args=given, adapter=adapter, **more)


@pytest.fixture(scope="module")
def six_steps(recipe_fields: Fields, tmp_path_factory: Any) -> Path:
    """A run that nothing has stopped."""
    out = tmp_path_factory.mktemp("six") / "steps"
    trained(fields_of(recipe_fields, out))
    return out


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def go_on() -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("way", ["group_by_length", "packing"])
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(
    recipe_fields: Fields, tmp_path: Path, way: str
) -> None:
    torch.set_num_threads(1)
    packed = way == "packing"
    args = {"max_steps": 12} | ({} if packed else {"train_sampling_strategy": "group_by_length"})
    more = {"packing": True} if packed else {}
    trained(fields_of(recipe_fields, tmp_path / "whole", args=args, **more))

    fields = fields_of(recipe_fields, tmp_path / "cut", args=args, **more)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    seed = random.randrange(10**6)
    step = random.Random(seed).randrange(2, 10)
    print(f"killed once step {step} was logged (seed {seed})")  # noqa: T201 - shown on a failure
    assert run_until(recipe, f"adapter {step}/12") == -signal.SIGKILL
    assert not (tmp_path / "cut" / "config.json").exists()
    assert run_until(recipe, None) == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_sigterm_saves_after_the_step_and_the_run_resumes_to_the_same_bits(
    recipe_fields: Fields, tmp_path: Path, at: Any, six_steps: Path
) -> None:
    args = {"save_steps": 100}
    at(3, stop)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        trained(fields_of(recipe_fields, tmp_path / "cut", args=args))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    at(3, go_on)
    trained(fields_of(recipe_fields, tmp_path / "cut", args=args))
    assert_same_bits(six_steps, tmp_path / "cut")


def test_an_incomplete_checkpoint_is_reported_skipped_and_written_again(
    recipe_fields: Fields, tmp_path: Path, at: Any, capsys: Any, six_steps: Path
) -> None:
    out = tmp_path / "cut"
    at(4, stop)
    with pytest.raises(Interrupted):
        trained(fields_of(recipe_fields, out))
    # as a process that is killed within a write leaves it
    torn = out / STAGE / "checkpoint-4" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    (out / STAGE / "checkpoint-4" / "rng_state_1.pth").write_bytes(b"of another run")
    at(4, go_on)
    trained(fields_of(recipe_fields, out), Console(width=1000))
    shown = capsys.readouterr().out
    assert "checkpoint-4 is incomplete (optimizer.pt has " in shown
    assert f"resuming from {out / STAGE / 'checkpoint-3'}" in shown.replace("\n", "")
    assert_same_bits(six_steps, out)


def test_a_damaged_checkpoint_is_named(recipe_fields: Fields, tmp_path: Path, at: Any) -> None:
    out = tmp_path / "cut"
    at(4, stop)
    with pytest.raises(Interrupted):
        trained(fields_of(recipe_fields, out))
    damaged = out / STAGE / "checkpoint-4"
    state = damaged / "optimizer.pt"
    state.write_bytes(bytes(state.stat().st_size))
    at(4, go_on)
    with pytest.raises(CheckpointError, match="checkpoint-4 is damaged .* remove that folder"):
        trained(fields_of(recipe_fields, out))
    shutil.rmtree(damaged)
    trained(fields_of(recipe_fields, out))


def test_weights_of_nan_after_the_last_step_are_not_written(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fields = fields_of(recipe_fields, out, args={"max_steps": 1, "warmup_steps": 0})
    fields["train"]["stages"][0]["learn"] = {"projectors": 1e39}
    with pytest.raises(MultiTokenError, match="after step 1 the weight .* holds nan or inf"):
        trained(fields)
    assert not (out / "config.json").exists()
    assert not (out / STAGE / "checkpoint-1").exists()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "whole.json").unlink(), "writing it was cut off"),
        (lambda folder: (folder / "whole.json").write_text("{"), "whole.json is damaged"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "weights").write_text("w"), "has 1 bytes instead of 7"),
    ],
)
def test_the_reason_why_a_checkpoint_is_incomplete_is_reported(
    tmp_path: Path, harm: Any, reason: str
) -> None:
    for step in (2, 10, 9):
        _checkpoint(tmp_path, step)
    harm(tmp_path / "checkpoint-10")
    said: list[str] = []
    assert last_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-9"
    assert len(said) == 1 and reason in said[0] and "checkpoint-10" in said[0]


def _checkpoint(folder: Path, step: int) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_text("weights")
    (path / "whole.json").write_text(json.dumps({"files": {"weights": 7}}))


def test_the_newest_complete_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 9):
        _checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12").mkdir()
    prune_checkpoints(tmp_path, 2, best=str(tmp_path / "checkpoint-2"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]


def test_a_run_keeps_save_total_limit_checkpoints(recipe_fields: Fields, tmp_path: Path) -> None:
    trained(fields_of(recipe_fields, tmp_path, args={"save_total_limit": 1, "save_steps": 2}))
    assert [path.name for path in (tmp_path / STAGE).glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_full_disk_is_an_error_and_leaves_the_last_complete_checkpoint(
    recipe_fields: Fields, tmp_path: Path, at: Any, six_steps: Path
) -> None:
    out = tmp_path / "cut"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file may be larger than this, as if the disk ended there
    at(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard)))
    try:
        with pytest.raises(CheckpointError) as caught:
            trained(fields_of(recipe_fields, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"{out / STAGE / 'checkpoint-3'} could not be written: ")
    assert "continues from checkpoint-2, which is complete" in str(caught.value)
    assert not (out / STAGE / "checkpoint-3").exists()
    at(3, go_on)
    trained(fields_of(recipe_fields, out))
    assert_same_bits(six_steps, out)


def test_a_changed_recipe_is_refused_with_the_keys_that_differ(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    trained(fields_of(recipe_fields, tmp_path, args={"max_steps": 1}))
    changed = fields_of(recipe_fields, tmp_path, args={"max_steps": 2}, seed=9)
    changed["train"]["stages"][0]["learn"]["adapter"] = 1e-3
    with pytest.raises(RecipeError) as caught:
        trained(changed)
    assert "holds a run of another recipe" in str(caught.value)
    for part in (
        "train.seed: 0 there, 9 here",
        "train.args.max_steps: 1 there, 2 here",
        "train.stages.0.learn.adapter.lr: 0.01 there, 0.001 here",
    ):
        assert part in str(caught.value)
    assert str(caught.value).count("there,") == 3


def test_a_resume_may_split_the_rows_of_a_step_otherwise_but_not_add_rows(
    recipe_fields: Fields, tmp_path: Path, at: Any
) -> None:
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    at(3, stop)
    with pytest.raises(Interrupted):
        trained(fields_of(recipe_fields, tmp_path))
    at(3, go_on)
    with pytest.raises(RecipeError, match="made with 2 rows per step, and now there would be 4"):
        trained(fields_of(recipe_fields, tmp_path, args={"per_device_train_batch_size": 4}))
    trained(fields_of(recipe_fields, tmp_path, args=cut))
    assert (tmp_path / "config.json").is_file()


def test_signal_handlers_are_restored_after_a_run_that_failed(
    recipe_fields: Fields, tmp_path: Path, at: Any
) -> None:
    def fail() -> None:
        raise ValueError("no more")

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    at(2, fail)
    with pytest.raises(ValueError, match="no more"):
        trained(fields_of(recipe_fields, tmp_path / "failed"))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.slow
def test_a_second_start_in_a_folder_is_refused_and_the_first_goes_on(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    fields = fields_of(recipe_fields, tmp_path / "run", args={"max_steps": 100_000})
    fields["train"]["args"]["save_steps"] = 100_000
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "multi_token", "train", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        next(line for line in first.stderr if line.startswith("adapter "))
        before = (tmp_path / "run" / "recipe.yaml").stat().st_mtime_ns
        second = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        assert second.returncode == 1
        (sentence,) = second.stderr.splitlines()
        assert sentence.startswith(
            f"error: train.output_dir {tmp_path / 'run'} is in use by process {first.pid} on "
        )
        assert (tmp_path / "run" / "recipe.yaml").stat().st_mtime_ns == before
        first.send_signal(signal.SIGTERM)
        assert "of stage adapter, saved; the same command continues" in first.stderr.read()
    assert first.returncode == 130


_HOLDER = """
import os, pathlib, signal, sys
from multi_token.train.resume import run_lock
with run_lock(pathlib.Path(sys.argv[1]), print):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    signal.pause()
"""


def test_a_killed_run_leaves_no_lock_even_while_its_data_workers_live(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        with pytest.raises(RecipeError, match=f"in use by process {process.pid} on"):
            run_lock(tmp_path, print).__enter__()
        process.kill()
        process.wait()
        with run_lock(tmp_path, print):
            pass
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    said: list[Any] = []
    with run_lock(tmp_path, said.append):
        pass
    assert said == [
        f"{tmp_path} is not locked: No locks available (its file system); start no second run in it"
    ]
