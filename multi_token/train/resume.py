"""Resuming a run: its folder belongs to one recipe, and only complete checkpoints count.

    RUN/recipe.yaml                       the recipe that the folder belongs to
    RUN/.lock                             locked by the process that trains in the folder
    RUN/stages/<stage>/checkpoint-<step>  complete if `whole.json` is in it and all files have the
                                          sizes that it lists

A checkpoint is written in this order: all files, fsync of each, then `whole.json` by rename. A
process that is killed, or a full disk, therefore leaves a folder without `whole.json`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import distributed

from multi_token.checkpoint.atomic import atomic_file, lock_file
from multi_token.checkpoint.save import CONFIG
from multi_token.distributed import all_gather, barrier, is_main_process
from multi_token.errors import CheckpointError, RecipeError
from multi_token.recipe.recipe import Recipe, differences, load_recipe
from multi_token.train.plan.oom import is_out_of_memory

RECIPE = "recipe.yaml"
COMPLETE = "whole.json"
LOCK = ".lock"
_PREFIX = "checkpoint-"
# errors of Python, torch and safetensors when a disk is full or gone
_FAULTS = (OSError, RuntimeError, SafetensorError)

# Arguments of transformers that may change on a resume, since the result does not: device, workers,
# logging. The number of rows per step is compared with the checkpoint (`check_same_batching`).
_MAY_CHANGE = frozenset(
    {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "use_cpu",
        "ddp_backend",
        "ddp_timeout",
        "ddp_bucket_cap_mb",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "logging_steps",
        "logging_first_step",
        "report_to",
        "run_name",
        "save_steps",
        "save_total_limit",
    }
)


@contextmanager
def run_lock(out: Path, print_fn: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of a run's folder: of two processes that train in it, the second is refused.

    The operating system drops the lock when its process ends in any way, so none is ever stale. On
    a file system without locks, `print_fn` gets a sentence that says so.

    Raises RecipeError if another process holds the lock, with its machine, process and start.
    """
    with raise_on_write_error(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("a+", encoding="utf-8")
    with file:
        try:
            reason = lock_file(file)
        except BlockingIOError:
            file.seek(0)
            raise RecipeError(
                f"train.output_dir {out} is in use by {file.read().strip() or 'another process'}; "
                "wait until that run has ended, or choose another folder"
            ) from None
        if reason is not None:
            print_fn(f"{out} is not locked: {reason}; start no second run in it")
        now = datetime.datetime.now(datetime.timezone.utc)
        with raise_on_write_error(out):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {now:%F %H:%M} UTC")
            file.flush()
        yield


def claim_run_folder(out: Path, recipe: Recipe) -> None:
    """Write the recipe into its folder.

    Raises RecipeError if the folder holds stages or results of another recipe. Settings of device,
    processes and logging may differ (docs/scale-out.md).
    """
    path = out / RECIPE
    if path.is_file() and any((out / name).exists() for name in ("stages", CONFIG)):
        theirs = load_recipe(path).model_dump(mode="json")
        found = differences(theirs, recipe.model_dump(mode="json"))
        changed = [
            f"{at}: {_short(a)} there, {_short(b)} here" for at, a, b in found if _matters(at)
        ]
        if changed:
            raise RecipeError(
                f"{out} holds a run of another recipe ({path}), which differs in "
                f"{'; '.join(changed)}; continue with that one, choose another `train.output_dir`, "
                "or remove that folder to start again"
            )
    with raise_on_write_error(out):
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            recipe.save(partial)


def _matters(at: str) -> bool:
    """Ignore settings that cannot change the result: FSDP, source of lengths, device, logging."""
    section, _, key = at.rpartition(".")
    if section.endswith("args") and key in _MAY_CHANGE:
        return False
    return at != "data.lengths" and at.split(".")[:2] != ["train", "fsdp"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def raise_on_write_error(folder: Path) -> Iterator[None]:
    """Turn errors of writing (a full disk) into a CheckpointError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {_error_reason(error)}; free some space or choose "
            "another `train.output_dir`, and start the same command again: it continues from what "
            "is there"
        ) from error


@contextmanager
def raise_on_read_error(checkpoint: str | None) -> Iterator[None]:
    """Turn errors of reading an optimizer's state into a CheckpointError.

    `last_checkpoint` has compared the sizes of files, not their bytes.
    """
    try:
        yield
    except Exception as error:  # torch raises many types for a damaged file; all are reported
        if is_out_of_memory(error) or isinstance(error, distributed.DistError):
            raise
        raise CheckpointError(
            f"{checkpoint} is damaged ({(str(error).splitlines() or [''])[0][:200]}); remove that "
            "folder, and the same command continues from the checkpoint before it, or begins the "
            "stage again if there is none"
        ) from error


@contextmanager
def atomic_checkpoint(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Write a checkpoint within, in all processes together: it is then complete, or removed.

    `facts`: numbers that a resumed run must share. Raises CheckpointError in all processes if any
    of them could not write, with the name of the last complete checkpoint.
    """
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while writing
    barrier()
    fault = None
    try:
        yield
    except _FAULTS as error:
        fault = error
    _check_no_fault(folder, fault)
    try:
        if is_main_process():
            _write_manifest(folder, facts)
    except OSError as error:
        fault = error
    _check_no_fault(folder, fault)


def _check_no_fault(folder: Path, fault: Exception | None) -> None:
    # gathered before anyone raises: the others would wait in the next collective for a process that
    # has left
    reasons = [
        r for r in all_gather(None if fault is None else _error_reason(fault)) if r is not None
    ]
    if not reasons:
        return
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    barrier()
    last = last_checkpoint(folder.parent)
    raise CheckpointError(
        f"{folder} could not be written: {reasons[0]}; free space on that disk and start the same "
        + (
            f"command again: it continues from {last.name}, which is complete"
            if last is not None
            else "command again; there is no checkpoint yet, so this stage begins again"
        )
    ) from fault


def _error_reason(error: Exception) -> str:
    """First line of the message; torch adds positions in its own source after it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if "inline_container" in str(error):  # torch's zip writer reports positions, not the reason
        return "a file could not be written to its end, as on a full disk"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # fsync before the manifest exists: after a power cut it must not describe files that are empty
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    with atomic_file(folder / COMPLETE, sync=True) as partial:
        partial.write_text(json.dumps({**facts, "files": sizes}, indent=1), encoding="utf-8")


def last_checkpoint(folder: Path, print_fn: Callable[[str], object] | None = None) -> Path | None:
    """Newest complete checkpoint of a stage; newer incomplete ones are reported to `print_fn`."""
    for path in reversed(_checkpoints(folder)):
        fault = _incomplete_reason(path)
        if fault is None:
            return path
        if print_fn is not None:
            print_fn(f"{path} is incomplete ({fault}), so it is skipped")
    return None


def prune_checkpoints(folder: Path, num: int | None, *, best: str | None = None) -> None:
    """Keep the newest `num` complete checkpoints (None: all) and the `best` one, remove others."""
    complete = [path for path in _checkpoints(folder) if _incomplete_reason(path) is None]
    kept = {path.name for path in (complete[-num:] if num else complete)}
    if best is not None:
        kept.add(Path(best).name)
    for path in _checkpoints(folder):
        if path.name not in kept:
            # the manifest first: a removal that is cut off must not leave a complete-looking folder
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def check_same_batching(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Raise RecipeError if the steps after this checkpoint would skip or repeat rows."""
    before = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    for key, value in facts.items():
        if before.get(key) != value:
            raise RecipeError(
                f"{checkpoint} was made with {before.get(key)} {key.replace('_', ' ')}, and now "
                f"there would be {value}, so rows would be skipped or repeated; keep the number "
                "(rows per step = processes x per_device_train_batch_size x "
                "gradient_accumulation_steps; packs per step = processes x "
                "gradient_accumulation_steps)"
            )


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _incomplete_reason(path: Path) -> str | None:
    try:
        sizes = json.loads((path / COMPLETE).read_text(encoding="utf-8"))["files"]
    except OSError:
        return f"writing it was cut off: no {COMPLETE}"
    except (ValueError, KeyError, TypeError):
        return f"{COMPLETE} is damaged"
    # sizes, not hashes: hashing gigabytes would delay every start by minutes
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None
