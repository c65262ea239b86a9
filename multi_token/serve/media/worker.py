"""A process that decodes what strangers send: `python -m multi_token.serve.media.worker`.

Border: bytes in, inputs of encoders out, over its standard input and output (wire.py). It opens no
file or address that a request names. media_process.py starts it, and ends it.

Where the system can (Linux), a fork of the warm process decodes, and a new one takes its place in
milliseconds as soon as an item has harmed it.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO

from multi_token.serve.media.protocol import (
    decode_frame,
    deserialize_source,
    encode_frame,
    read_frame,
)

CAN_FORK = sys.platform == "linux"
"""Elsewhere a fork of a process with many libraries in it is not safe."""
_ITEMS_PER_FORK = 1_000
"""After which a fork is replaced, whatever may have gathered in it."""
_PIPE_CHUNK_BYTES = 1024 * 1024
_MAX_FILES = 64
_INBOX, _OUTBOX = _MAX_FILES - 2, _MAX_FILES - 1
"""Descriptors of a fork, away from those that libraries print to."""
_SLACK_BYTES = 1024 * 1024
"""By which an answer may be longer than what it holds."""


def main() -> int:
    """Set up, say `ready`, then answer item after item until the input ends."""
    inbox, outbox = _claim_pipes()
    first = read_frame(inbox.read, most=_SLACK_BYTES)
    if first is None:
        return 0
    setup = decode_frame(first)[0]
    try:
        modalities = build_modalities(setup)
        fork = ForkedWorker(modalities, setup) if setup["fork"] else None
        if fork and decode_frame(fork.decode(_NO_REPLY))[0].get("fault") == "died":
            raise OSError("this system does not let a fork limit itself")
    except BaseException as error:  # noqa: BLE001 - whatever it is, the server has to say it
        outbox.write(encode_frame({"failed": f"{type(error).__name__}: {error}"[:2000]}))
        outbox.flush()
        return 1
    outbox.write(encode_frame({"ready": True}))
    outbox.flush()
    while (request := read_frame(inbox.read, most=setup["max_request_bytes"])) is not None:
        outbox.write(fork.decode(request) if fork else decode_item(modalities, request, setup)[0])
        outbox.flush()
    if fork:
        fork.kill()
    return 0


def build_modalities(setup: Mapping[str, Any]) -> dict[str, Any]:
    """Build the modalities and load what they decode with, so that the first item is not slow."""
    import torch

    from multi_token import registry
    from multi_token.modalities.base import Modality

    sys.path[:] = setup["path"]
    torch.set_num_threads(1)
    with suppress(ImportError):  # it would take a thread for each core, and memory for each thread
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    for kind, name, where in setup["classes"]:
        if name not in registry.registered_names(kind):  # registered in the server's process alone
            module, _, attribute = where.partition(":")
            add = registry.register_modality if kind == "modality" else registry.register_projector
            add(name, getattr(import_module(module), attribute))
    modalities = {
        name: registry.build("modality", fields, Modality)
        for name, fields in setup["modalities"].items()
    }
    for modality in modalities.values():
        warm_up(modality)
    if not setup["fork"]:
        _sandbox(setup)
    return modalities


def warm_up(modality: Any) -> None:
    """Decode the modality's examples, which loads its processor and the decoders."""
    from multi_token.media.fetch import Fetch

    for source in modality.example_sources():
        modality.prepare(modality.load(source, Fetch(allow_paths=False)))


class ForkedWorker:
    """A copy of this process that decodes, and is replaced after an item that went badly."""

    def __init__(self, modalities: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
        self.modalities = modalities
        self.setup = setup
        self.max_bytes = setup["max_prepared_bytes"] + _SLACK_BYTES
        gc.collect()
        gc.freeze()  # what is loaded stays, and what nobody visits is not copied
        self._fork()

    def decode(self, request: bytes) -> bytes:
        """The frame that the copy answers with, or one that says how it ended."""
        deadline = time.monotonic() + self.setup["timeout_s"]
        if os.waitpid(self.child, os.WNOHANG) != (0, 0):  # ended while there was nothing to do
            self._close()
            self._fork()
        whole, goes_on = None, False
        try:
            _write_all(self.writer, request)
            whole = read_frame(
                lambda size: _read_before(deadline, self.reader, size), most=self.max_bytes
            )
            # a last byte says that it goes on; of one that has ended there is none
            goes_on = whole is not None and self._continues()
        except TimeoutError:
            whole = encode_frame({"fault": "time"})
        except (OSError, EOFError, ValueError):
            pass  # what has died says no more
        if not goes_on:
            self.kill()
            self._fork()
        return whole or encode_frame({"fault": "died"})

    def _continues(self) -> bool:
        try:
            return _read_before(time.monotonic() + 1.0, self.reader, 1) == _CONTINUES
        except TimeoutError:
            return False

    def _fork(self) -> None:
        inbox, self.writer = os.pipe()
        self.reader, outbox = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                os.dup2(inbox, _INBOX)
                os.dup2(outbox, _OUTBOX)
                os.closerange(3, _INBOX)  # the way to the server is not its own
                _sandbox(self.setup)
                self._child_loop()
            finally:
                os._exit(0)
        os.close(inbox)
        os.close(outbox)

    def _child_loop(self) -> None:
        """In the copy: item after item, until one goes badly."""
        inbox = os.fdopen(_INBOX, "rb")
        for num_left in reversed(range(_ITEMS_PER_FORK)):
            request = read_frame(inbox.read, most=self.setup["max_request_bytes"])
            if request is None:
                return
            _limit_cpu(self.setup["timeout_s"])
            answer, is_well = decode_item(self.modalities, request, self.setup)
            del request
            _write_all(_OUTBOX, answer)
            if not is_well or not num_left:
                return
            _write_all(_OUTBOX, _CONTINUES)

    def kill(self) -> None:
        """Nothing is left of the copy."""
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        self._close()

    def _close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


_CONTINUES = b"+"
_NO_REPLY = encode_frame({"nothing": True})


def decode_item(
    modalities: Mapping[str, Any], request: bytes, setup: Mapping[str, Any]
) -> tuple[bytes, bool]:
    """Decode one item here -> the frame of its answer, and whether all went as it should.

    A refusal is as it should be. Faults become frames, whatever they are.
    """
    from safetensors.torch import save

    from multi_token.errors import MediaError, MultiTokenError
    from multi_token.media.fetch import Fetch

    try:
        header, blobs = decode_frame(request)
        modality = modalities[header["modality"]]
        fetch = Fetch(max_bytes=setup["max_bytes"], allow_paths=False, allow_urls=False)
        raw = modality.load(deserialize_source(header["source"], blobs), fetch)
        size = modality.size_of(raw)
        prepared = modality.prepare(raw)
        num_bytes = sum(t.numel() * t.element_size() for t in prepared.inputs.values())
        if num_bytes > setup["max_prepared_bytes"]:
            raise MediaError(
                f"the item would become {num_bytes:,} bytes for its encoder, and the limit is "
                f"{setup['max_prepared_bytes']:,}; send a smaller one",
                kind="undecodable",
            )
        # copies: safetensors refuses tensors that share memory
        tensors = {key: t.detach().contiguous().clone() for key, t in prepared.inputs.items()}
        told = {"num_features": int(prepared.num_features), "size": size}
        return encode_frame(told, [save(tensors)]), True
    except MediaError as error:
        return encode_frame({"fault": "media", "message": str(error)}), True
    except MultiTokenError as error:
        return encode_frame({"fault": "setup", "message": str(error)}), True
    except MemoryError:
        return encode_frame({"fault": "memory"}), False
    except BaseException as error:  # noqa: BLE001 - a decoder may raise anything, a panic of Rust's
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's
            return encode_frame({"fault": "memory"}), False
        return encode_frame({"fault": "error", "message": type(error).__name__}), False


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Input and output for frames; what a library prints goes nowhere."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return inbox, outbox


def _read_before(deadline: float, descriptor: int, size: int) -> bytes:
    """At most so many bytes of a pipe. Raises TimeoutError."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
    return os.read(descriptor, min(size, _PIPE_CHUNK_BYTES))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:_PIPE_CHUNK_BYTES]) :]


def _sandbox(setup: Mapping[str, Any]) -> None:
    """Give this process its memory, its time, and no way to files, programs or networks.

    Python's audit events (PEP 578) do not see what a library does in C: there, the limits hold.
    """
    _limit_resources(setup["memory_bytes"], fork=setup["fork"])
    roots = tuple(os.path.realpath(root) + os.sep for root in setup["readable"])

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            path = "." if arguments[0] is None else arguments[0]
            if isinstance(path, int):
                return  # a descriptor that is open already
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            real = os.path.realpath(os.fsdecode(path)) + os.sep
            if real not in _DEVICES and (writes or not real.startswith(roots)):
                raise PermissionError("no file is opened here")
        elif event.startswith(_CLOSED):
            raise PermissionError("no program, network or file is reached from here")

    sys.addaudithook(audit)


_DEVICES = tuple(f"/dev/{name}{os.sep}" for name in ("null", "urandom", "random"))
_CLOSED = (
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


def _limit_cpu(timeout_s: float) -> None:
    """So that an item ends even where nobody is left who would end it."""
    import resource

    most = int(time.process_time() + timeout_s) + 3
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
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
    lower_limit(resource.RLIMIT_NOFILE, _MAX_FILES)
    if sys.platform == "linux":  # other systems have no limit of address space that holds
        with open("/proc/self/statm", encoding="ascii") as file:
            num_pages = int(file.read().split()[0])
        lower_limit(resource.RLIMIT_AS, num_pages * resource.getpagesize() + memory_bytes)
        if fork:
            # where the machine runs out of memory, this one goes first
            with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("1000")


if __name__ == "__main__":
    sys.exit(main())
