"""Collectives over torch.distributed: rank, barrier, broadcast, gather, and agreement of processes.

With one process every function is a no-op or returns its own value, so callers need no branches.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from multi_token.errors import MultiTokenError, RecipeError

T = TypeVar("T")


def num_processes() -> int:
    """World size; 1 before the process group exists."""
    return distributed.get_world_size() if _is_initialized() else 1


def rank() -> int:
    """Number of this process among all, from 0."""
    return distributed.get_rank() if _is_initialized() else 0


def is_main_process() -> bool:
    """True in the one process that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Block until all processes have arrived."""
    if num_processes() > 1:
        distributed.barrier()


def exit_without_teardown(code: int, error: Exception | None = None) -> None:
    """End this process if it is one of several, before the interpreter is torn down.

    With one process, do nothing. Functions registered with `atexit` run first, since trackers end
    their run in one. `error` is printed as the interpreter would print it.
    """
    if num_processes() == 1:
        return
    if error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
    if not code:
        # after a fault NCCL would wait here for processes that are gone
        distributed.destroy_process_group()
    # Threads of gloo may still run: `destroy_process_group` only drops references, and DDP, a mesh,
    # a traceback or a default argument of torch.distributed.nn may hold others. A thread that needs
    # the GIL while the interpreter ends is unwound through C++, which aborts: exit code -6, not
    # `code`.
    if not code:
        threading._shutdown()  # type: ignore[attr-defined] - waits for threads, as a normal exit
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """Value of `decide()` in the main process, for all processes.

    Other processes might see a shared folder later or differently, so only one may look. A
    MultiTokenError of `decide()` is raised in all processes.
    """
    found: list[Any] = [None, None]
    if is_main_process():
        try:
            found[0] = decide()
        except MultiTokenError as error:
            # sent before it is raised: the others would wait for a process that has left
            found[1] = error
    if num_processes() > 1:
        distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def all_gather(value: T) -> list[T]:
    """Value of every process, by rank."""
    if num_processes() == 1:
        return [value]
    found: list[Any] = [None] * num_processes()
    distributed.all_gather_object(found, value)
    return found


@contextmanager
def raise_together() -> Iterator[None]:
    """Raise a MultiTokenError of this block in all processes; collective, at the end of the block.

    One that raised alone would leave the others waiting in the next collective. The block itself
    holds no collective, or the others would wait in that one.
    """
    own: MultiTokenError | None = None
    try:
        yield
    except MultiTokenError as error:
        own = error
    for error in all_gather(own):
        if error is not None:
            raise error


def all_reduce_sum(total: Tensor) -> None:
    """Add the tensors of all processes, in place."""
    if num_processes() > 1:
        distributed.all_reduce(total)


class DelayedAny:
    """Agreement of processes on a flag without a host sync: started now, read a step later.

    By then the device has computed it, so the host does not wait and the device is never idle.
    """

    def __init__(self, flag: bool | Tensor, device: torch.device) -> None:
        """Start the reduction; collective."""
        if not isinstance(flag, Tensor):
            # filled on the device: a copy from the CPU would wait for it
            flag = torch.full((), flag, device=device)
        self._flag, self._copied = flag.int(), None
        if num_processes() > 1:
            distributed.all_reduce(self._flag, op=distributed.ReduceOp.MAX)
        if device.type == "cuda":
            pinned = torch.empty((), dtype=torch.int, pin_memory=True)
            self._flag = pinned.copy_(self._flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        """True if the flag was true in any process."""
        if self._copied is not None:
            # this step alone is waited for, and not those that were queued after it
            self._copied.synchronize()
        return bool(self._flag)


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn a lost connection to another process into a MultiTokenError with the remedy."""
    try:
        yield
    except RuntimeError as error:
        # gloo and NCCL notice in the next collective: at once if the peer has ended, after
        # `ddp_timeout` if it hangs. gloo raises plain RuntimeError, so its text must be matched.
        text = str(error)
        broken = isinstance(error, distributed.DistError) or "gloo" in text or "by peer" in text
        if num_processes() == 1 or not broken:
            raise
        raise MultiTokenError(
            f"process {rank()} lost another process of this run, which ended or cannot be reached "
            "any more; its own output says why. Start the same command again: it continues from "
            f"the last complete checkpoint. ({(text.splitlines() or [type(error).__name__])[0]})"
        ) from error


def check_same_values(name: str, values: Sequence[Any], remedy: str) -> None:
    """Raise RecipeError in all processes if their `values` differ; compares SHA-256 digests."""
    digests = all_gather(digest_values(values))
    others = [str(i) for i, other in enumerate(digests) if other != digests[0]]
    if others:
        raise RecipeError(
            f"the {name} of process {', '.join(others)} differs from that of process 0; {remedy}"
        )


def digest_values(values: Sequence[Any]) -> str:
    """Digest of values as JSON, bytes by their hash, other objects by their type: 64 characters."""
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(value, sort_keys=True, default=_digestible, ensure_ascii=False)
        # JSON of a row may hold half of a UTF-16 pair, which UTF-8 refuses without surrogatepass
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _digestible(value: Any) -> str:
    """Bytes by their hash, other objects (an opened image) by their type."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return hashlib.sha256(value).hexdigest()
    return type(value).__name__


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
