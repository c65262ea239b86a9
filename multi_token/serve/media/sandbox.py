"""Sandbox of a process that decodes untrusted media: resource limits and an audit hook.

The kernel enforces the limits (memory, CPU time, file size, descriptors), so they hold for C code.
The audit hook (PEP 578) sees Python code only: it refuses writes, files outside the readable
folders, sockets and subprocesses.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

# Linux alone: on macOS, system libraries with threads of their own may crash after a fork.
CAN_FORK = sys.platform == "linux"
MAX_FILES = 64
"""Open descriptors a sandboxed process may have."""

_DEVICES = tuple(f"/dev/{name}{os.sep}" for name in ("null", "urandom", "random"))
_FORBIDDEN_EVENTS = (
    "socket.",
    "subprocess.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
)
"""Prefixes of audit events that are refused."""


def enter_sandbox(setup: Mapping[str, Any]) -> None:
    """Limit this process for good: neither the limits nor the audit hook can be taken back."""
    _limit_resources(setup["memory_bytes"], fork=setup["fork"])
    # The trailing separator keeps /data from allowing /database.
    roots = tuple(os.path.realpath(root) + os.sep for root in setup["readable"])

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            path = "." if arguments[0] is None else arguments[0]
            # An int is a descriptor that is open already: os.fdopen and the pipes use them.
            if isinstance(path, int):
                return
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            # realpath: a symbolic link in a readable folder must not lead out of it.
            real = os.path.realpath(os.fsdecode(path)) + os.sep
            if real not in _DEVICES and (writes or not real.startswith(roots)):
                raise PermissionError("a media worker may not open this file")
        elif event.startswith(_FORBIDDEN_EVENTS):
            raise PermissionError("a media worker may not use programs, sockets or file changes")

    sys.addaudithook(audit)


def limit_cpu(timeout_s: float) -> None:
    """Give the next item `timeout_s` of CPU time (Linux, macOS)."""
    import resource

    # A second bound beside the parent's timer: it ends the item even when the parent has died.
    most = int(time.process_time() + timeout_s) + 3
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    # Only the soft limit is set: a lowered hard limit could not be raised for the next item.
    if hard == resource.RLIM_INFINITY or most <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _limit_resources(memory_bytes: int, *, fork: bool) -> None:
    if sys.platform == "win32":
        return
    import resource

    def lower_limit(kind: int, most: int) -> None:
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))

    lower_limit(resource.RLIMIT_CORE, 0)
    lower_limit(resource.RLIMIT_FSIZE, 0)
    lower_limit(resource.RLIMIT_NOFILE, MAX_FILES)
    # macOS accepts RLIMIT_AS and does not enforce it.
    if sys.platform == "linux":
        # The limit counts address space, so what the libraries have mapped already is added.
        with open("/proc/self/statm", encoding="ascii") as file:
            num_pages = int(file.read().split()[0])
        lower_limit(resource.RLIMIT_AS, num_pages * resource.getpagesize() + memory_bytes)
        if fork:
            # When the machine runs out of memory, the kernel ends the decoder, not the server.
            with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("1000")
