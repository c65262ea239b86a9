"""Child side of a media worker: `python -m multi_token.serve.media.worker`.

Frames (`protocol.py`) come in on standard input and go out on standard output. On Linux the process
loads the modalities once and decodes in a fork of itself:

    server  <-frames->  worker (libraries loaded)  <-frames->  fork (sandboxed, decodes)

An item that harms the fork (memory, time, crash) costs a new fork, which takes milliseconds.
Elsewhere the worker itself enters the sandbox and decodes.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch

from multi_token import registry
from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.errors import undecodable
from multi_token.media.fetch import MIB, Fetch
from multi_token.modalities.base import Modality
from multi_token.modalities.facts import facts_to_json
from multi_token.serve.media.protocol import (
    decode_frame,
    deserialize_source,
    encode_frame,
    read_frame,
    tensor_blobs,
)
from multi_token.serve.media.sandbox import MAX_FILES, enter_sandbox, limit_cpu

_ITEMS_PER_FORK = 1_000
"""Items after which a fork is replaced, so that leaks of decoders do not add up."""
_INBOX, _OUTBOX = MAX_FILES - 2, MAX_FILES - 1
"""Pipe descriptors of a fork, far from 0 to 2, which libraries print to."""
_SLACK_BYTES = MIB
"""Bytes a reply may have beyond its tensors: header, safetensors metadata."""
_CONTINUES = b"+"


def main() -> int:
    """Load the modalities, report `ready`, then decode item after item until the input ends."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # A library that prints would write into a frame: its output goes to /dev/null.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    first = read_frame(inbox.read, most=_SLACK_BYTES)
    if first is None:
        return 0
    setup = decode_frame(first)[0]
    try:
        modalities = build_modalities(setup)
        fork = ForkedWorker(modalities, setup) if setup["fork"] else None
        # Containers may forbid setrlimit: the fork dies then, and should at startup, not later.
        if fork and decode_frame(fork.decode(encode_frame({})))[0].get("fault") == "died":
            raise OSError("this system does not let a fork limit its own resources")
    # Any error at all, even SystemExit of a plug-in: the parent logs the frame and refuses to
    # start. stderr goes to /dev/null, so a traceback would be lost.
    except BaseException as error:  # noqa: BLE001
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


def build_modalities(setup: Mapping[str, Any]) -> dict[str, Modality]:
    """Build the modalities and load their processors and decoders before the first item."""
    sys.path[:] = setup["path"]
    torch.set_num_threads(1)
    # Pillow's AVIF decoder starts a thread for each core, and each thread takes address space.
    with suppress(ImportError):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    for kind, name, where in setup["classes"]:
        # A class that the server's process registered by a call has no entry point to find here.
        if name not in registry.registered_names(kind):
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
        enter_sandbox(setup)
    return modalities


def warm_up(modality: Modality) -> None:
    """Decode the modality's examples, which loads its processor and the decoders."""
    for source in modality.example_sources():
        modality.prepare(modality.load(source, Fetch(allow_paths=False)))


class ForkedWorker:
    """A sandboxed fork of this process that decodes; replaced after an item that harmed it."""

    def __init__(self, modalities: Mapping[str, Modality], setup: Mapping[str, Any]) -> None:
        self.modalities = modalities
        self.setup = setup
        self.max_bytes = setup["max_prepared_bytes"] + _SLACK_BYTES
        # Frozen objects are left alone by the garbage collector, so forks share their pages.
        gc.collect()
        gc.freeze()
        self._fork()

    def decode(self, request: bytes | bytearray) -> bytes | bytearray:
        """Return the fork's reply frame, or a frame that names how the fork failed."""
        deadline = time.monotonic() + self.setup["timeout_s"]
        # The fork may have been killed while idle, for instance by the kernel's OOM killer.
        if os.waitpid(self.child, os.WNOHANG) != (0, 0):
            self._close()
            self._fork()
        reply, continues = None, False
        try:
            # memoryview: os.write may write a part, and slices of bytes would copy the rest.
            left = memoryview(request)
            while left:
                left = left[os.write(self.writer, left) :]
            reply = read_frame(lambda size: self._read(deadline, size), most=self.max_bytes)
            # The fork sends one more byte if it goes on; a complete reply alone does not say so.
            if reply is not None:
                continues = self._read(time.monotonic() + 1.0, 1) == _CONTINUES
        except TimeoutError:
            reply = reply or encode_frame({"fault": "time"})
        except (OSError, EOFError, ValueError):
            pass  # the fork died and left half a frame or none
        if not continues:
            self.kill()
            self._fork()
        return reply or encode_frame({"fault": "died"})

    def _read(self, deadline: float, size: int) -> bytes:
        seconds = max(0.0, deadline - time.monotonic())
        if not select.select([self.reader], [], [], seconds)[0]:
            raise TimeoutError
        return os.read(self.reader, size)

    def _fork(self) -> None:
        inbox, self.writer = os.pipe()
        self.reader, outbox = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                os.dup2(inbox, _INBOX)
                os.dup2(outbox, _OUTBOX)
                # Everything else is closed, above all the worker's own pipes to the server.
                os.closerange(3, _INBOX)
                enter_sandbox(self.setup)
                self._child_loop()
            finally:
                # _exit: the worker's exit handlers and buffers must not run twice.
                os._exit(0)
        os.close(inbox)
        os.close(outbox)

    def _child_loop(self) -> None:
        """Inside the fork: decode item after item until one goes wrong."""
        inbox, outbox = os.fdopen(_INBOX, "rb"), os.fdopen(_OUTBOX, "wb")
        for num_left in reversed(range(_ITEMS_PER_FORK)):
            request = read_frame(inbox.read, most=self.setup["max_request_bytes"])
            if request is None:
                return
            limit_cpu(self.setup["timeout_s"])
            reply, is_well = decode_item(self.modalities, request, self.setup)
            # Two items at once would not fit the memory limit: this one goes before the next.
            del request
            continues = is_well and num_left > 0
            outbox.write(reply)
            outbox.write(_CONTINUES if continues else b"")
            outbox.flush()
            if not continues:
                return

    def kill(self) -> None:
        """End the fork, reap it and close its pipes."""
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        self._close()

    def _close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


def decode_item(
    modalities: Mapping[str, Modality], request: bytes | bytearray, setup: Mapping[str, Any]
) -> tuple[bytes, bool]:
    """Decode one item -> its reply frame, and whether this process may take another item.

    A refused item is a normal reply. Every error becomes a frame, so nothing is raised.
    """
    try:
        header, blobs = decode_frame(request)
        modality = modalities[header["modality"]]
        fetch = Fetch(max_bytes=setup["max_bytes"], allow_paths=False, allow_urls=False)
        raw = modality.load(deserialize_source(header["source"], blobs), fetch)
        size = modality.size_of(raw)
        prepared = modality.prepare(raw)
        num_bytes = sum(t.numel() * t.element_size() for t in prepared.inputs.values())
        if num_bytes > setup["max_prepared_bytes"]:
            raise undecodable(
                f"the item becomes {num_bytes:,} bytes of encoder input, and the limit is "
                f"{setup['max_prepared_bytes']:,}; send a smaller one"
            )
        described, tensors = tensor_blobs(prepared.inputs)
        fields = {
            "num_features": int(prepared.num_features),
            "size": size,
            "facts": facts_to_json(prepared.facts) if modality.facts is not None else [],
            "tensors": described,
        }
        return encode_frame(fields, tensors), True
    except MediaError as error:
        return encode_frame({"fault": "media", "message": str(error)}), True
    except MultiTokenError as error:
        return encode_frame({"fault": "setup", "message": str(error)}), True
    except MemoryError:
        return encode_frame({"fault": "memory"}), False
    # A decoder may raise anything: a Rust panic is a BaseException. The parent logs the frame, and
    # this process takes no further item.
    except BaseException as error:  # noqa: BLE001
        # torch raises RuntimeError, not MemoryError, when its allocator fails.
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return encode_frame({"fault": "memory"}), False
        return encode_frame({"fault": "error", "message": type(error).__name__}), False


if __name__ == "__main__":
    sys.exit(main())
