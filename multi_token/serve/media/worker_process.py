"""Parent side of one media worker: starts the process, exchanges frames, ends it when it hangs.

Every failure of the process (timeout, memory, crash, refusal) becomes a ServeError of its item. The
next item starts a new process.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.fetch import MIB
from multi_token.modalities.base import Modality
from multi_token.modalities.facts import Run, facts_from_json
from multi_token.serve.errors import ServeError
from multi_token.serve.media import worker as media_worker
from multi_token.serve.media.protocol import (
    Buffer,
    decode_frame,
    drop_frame,
    encode_frame,
    read_frame,
    tensors_of,
)
from multi_token.types import Prepared

_START_S = 300.0
"""Time limit for loading libraries and processors."""
_GRACE_S = 5.0
"""Added to an item's time limit if the worker enforces that limit on its fork itself."""
_MAX_HEADER = MIB
_KEPT_ENVIRONMENT = (
    "PATH",
    "HOME",
    "USERPROFILE",
    "SYSTEMROOT",
    "TMPDIR",
    "TEMP",
    "TMP",
    "VIRTUAL_ENV",
    "TZ",
)
_KEPT_ENVIRONMENT_PREFIXES = (
    "LANG",
    "LC_",
    "LD_",
    "DYLD_",
    "XDG_",
    "PYTHON",
    "HF_HOME",
    "HF_HUB_CACHE",
    "TRANSFORMERS_",
    "TORCH_",
)
"""Environment variables that a worker inherits: they locate libraries and caches. Variables with
keys and tokens are left out."""

_PATH_IN_MESSAGE = re.compile(r"\S*[/\\]\S+")
"""Words of a decoder's message that may be a path or an address."""
_PACKAGE_PARENT = Path(media_worker.__file__).resolve().parents[3]

_log = logging.getLogger(__name__)


class Unwanted(Exception):
    """No request waits for the item any more."""


class DecodedItem(NamedTuple):
    """Encoder input of one item, and the item's measured sizes by name."""

    prepared: Prepared
    sizes: dict[str, float]


class WorkerProcess:
    """One worker process; started again after it has ended. Used by one thread at a time."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self.is_ready = False
        """True if the process has loaded its modalities."""
        self._is_stopped = False

    def launch(self) -> None:
        """Start the process without waiting until it has loaded."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if key in _KEPT_ENVIRONMENT or key.startswith(_KEPT_ENVIRONMENT_PREFIXES)
        }
        # One thread per worker: workers decode in parallel as it is. Offline: the server has
        # fetched the processors already, and a decoder must not need the network.
        environment |= {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MALLOC_ARENA_MAX": "2",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", media_worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=_PACKAGE_PARENT,
            # Ctrl-C would reach the whole process group; the server drains running requests first.
            start_new_session=True,
        )
        # stop() of another thread may have run just before Popen, and would miss this process.
        if self._is_stopped:
            self.stop_process()

    def wait_ready(self) -> None:
        """Send the setup and wait for `ready`. Raises MultiTokenError if loading fails."""
        answer = self._exchange([encode_frame(self._setup)], _START_S)
        if answer is None or "ready" not in answer[0]:
            self.stop_process()
            reason = "it exited" if answer is None else answer[0].get("failed", "")
            raise MultiTokenError(f"the process that decodes media did not start: {reason}")
        self.is_ready = True

    def try_start(self) -> bool:
        """Start the process and wait until it is ready. Returns False and logs why it is not."""
        try:
            self.launch()
            self.wait_ready()
        except (MultiTokenError, OSError) as error:
            if not self._is_stopped:
                _log.error("%s", error)
        return self.is_ready

    def prepare(
        self, modality: str, frame: Sequence[Buffer], reserve: Callable[[int], object]
    ) -> DecodedItem:
        """Decode one item in the process.

        `reserve` is called with the bytes of the result before they are read; it may wait, and
        raises Unwanted if the result is to be dropped. Raises ServeError and Unwanted.
        """
        if self._is_stopped:
            raise stopped_error()
        if not self.is_ready or (self._process is not None and self._process.poll() is not None):
            self.stop_process()  # closes the pipes of a process that ended since the last item
            if not self.try_start():
                raise ServeError("the media decoder does not start; try again later", status=503)
        seconds = self._setup["timeout_s"] + (_GRACE_S if self._setup["fork"] else 0.0)
        answer = self._exchange(frame, seconds, reserve)
        if answer is None:
            self.stop_process()
            if self._is_stopped:
                raise stopped_error()
            raise self._error_of(modality, {"fault": "time" if self._timed_out else "died"})
        header, blobs = answer
        if "fault" in header:
            raise self._error_of(modality, header)
        return _parse_result(header, blobs)

    def _exchange(
        self,
        frame: Sequence[Buffer],
        seconds: float,
        reserve: Callable[[int], object] | None = None,
    ) -> tuple[dict[str, Any], list[memoryview]] | None:
        """Write a frame and read the reply; None if the process ended or was killed for time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        self._timed_out = False

        def end() -> None:
            self._timed_out = True
            _kill(process)

        def start_timer() -> threading.Timer:
            # A thread kills the process: a blocking read of a pipe has no timeout on Windows.
            timer = threading.Timer(seconds, end)
            timer.daemon = True
            timer.start()
            return timer

        def before_reply(length: int) -> None:
            nonlocal timer
            if reserve is None:
                return
            # The item is decoded, so its time does not run while it waits for memory.
            timer.cancel()
            try:
                reserve(length)
            except Unwanted:
                timer = start_timer()
                drop_frame(read, length)
                raise
            timer = start_timer()

        read, timer = process.stdout.read, start_timer()
        try:
            for part in frame:
                process.stdin.write(part)
            process.stdin.flush()
            most = self._setup["max_prepared_bytes"] + _MAX_HEADER
            reply = read_frame(read, most=most, before_body=before_reply)
            return None if reply is None else decode_frame(reply)
        # LookupError, TypeError: a decoder that was taken over may send any bytes as its frame.
        except (OSError, EOFError, ValueError, LookupError, TypeError):
            return None
        finally:
            timer.cancel()

    def _error_of(self, modality: str, header: Mapping[str, Any]) -> ServeError:
        kind, message = header.get("fault"), str(header.get("message", ""))
        if kind == "media":
            return media_error(modality, message)
        if kind == "time":
            return ServeError(
                f"the item for {modality} took longer than {self._setup['timeout_s']:g} s to "
                "decode; send a smaller one",
                status=422,
                code="media_too_slow",
            )
        if kind == "memory":
            return ServeError(
                f"the item for {modality} needs more memory than one item may use; send a smaller "
                "one",
                status=422,
                code="media_too_large",
            )
        if kind == "setup":
            _log.error("%s cannot prepare items: %s", modality, message)
            return ServeError(
                f"this server cannot prepare input for the modality {modality}; the server's log "
                "has the reason",
                status=500,
            )
        _log.warning("decoding an item for %s failed: %s", modality, message or kind)
        return ServeError(
            f"the item for {modality} cannot be decoded; it is damaged, or of a type that "
            "this modality does not support",
            status=400 if kind == "error" else 422,
            code="invalid_media",
        )

    def stop(self) -> None:
        """End the process and never start it again."""
        self._is_stopped = True
        self.stop_process()

    def stop_process(self) -> None:
        """Kill the process, reap it and close its pipes; `prepare` may start it again."""
        process, self.is_ready = self._process, False
        if process is None:
            return
        _kill(process)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None and not stream.closed:
                with suppress(OSError):  # flushing what was not written fails: the reader is gone
                    stream.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its fork: both are in the process group of the new session."""
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _parse_result(header: Mapping[str, Any], blobs: Sequence[memoryview]) -> DecodedItem:
    """Check the reply of a decoder, which untrusted bytes may have taken over."""
    try:
        measured = ("pixels", "frames", "seconds", "characters")
        sizes = {name: float(header["size"].get(name, 0)) for name in measured}
        # NaN is above no limit, and a negative size would raise the limit of other items
        if not all(0 <= size < math.inf for size in sizes.values()):
            raise ValueError(f"sizes {sizes}")
        sizes["prepared_bytes"] = sum(map(len, blobs))
        tensors = tensors_of(header["tensors"], blobs)
        num_features = int(header["num_features"])
        facts = facts_from_json(header["facts"], num_features)
        prepared = Prepared(tensors, num_features, facts)
        return DecodedItem(prepared, sizes)
    # Any of these shows a reply that the worker's own code did not write.
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ServeError("the item cannot be decoded", status=422, code="invalid_media") from error


def media_error(modality: str, message: str) -> ServeError:
    """400 for an item that is refused; words that may be a path or an address are cut out."""
    message = _PATH_IN_MESSAGE.sub("(...)", message)
    return ServeError(f"{modality}: {message}", status=400, code="invalid_media")


def runs_of_item(name: str, modality: Modality, prepared: Prepared) -> list[Run]:
    """Return the runs of a decoded item. Raises ServeError if it lacks a fact to write."""
    try:
        return modality.runs(prepared)
    except MediaError as error:
        raise media_error(name, str(error)) from error


def stopped_error() -> ServeError:
    """503 for items that a stopping pool does not decode."""
    return ServeError("this server is shutting down", status=503, code="stopped", retry_after=1.0)
