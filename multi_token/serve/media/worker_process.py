"""One process that decodes media: started, spoken to, ended where it takes too long.

Border: frames and faults. What the process does inside is media_worker.py's; which item it gets,
media_pool.py's.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from multi_token.errors import MultiTokenError
from multi_token.serve.errors import ServeError
from multi_token.serve.media import worker as media_worker
from multi_token.serve.media.protocol import decode_frame, encode_frame, read_frame
from multi_token.serve.media.totals import MediaSize
from multi_token.types import Prepared

_START_S = 300.0
"""The longest that libraries and processors may take to load."""
_GRACE_S = 5.0
"""After which a process is ended that should have ended an item itself."""
_MAX_HEADER = 1024 * 1024
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
"""Of the environment: what finds libraries and caches. A key or token is not for a decoder."""

_PATH_IN_MESSAGE = re.compile(r"\S*[/\\]\S+")
"""What may be a path, an address or bytes, in a sentence of a decoder."""
_PACKAGE_PARENT = str(Path(media_worker.__file__).resolve().parents[2])

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeRequest:
    """What a worker is asked: the item's modality and its frame."""

    modality: str
    data: bytes


@dataclass(frozen=True)
class DecodeResult:
    """What a worker made of an item, and what that was."""

    prepared: Prepared
    size: MediaSize


class WorkerProcess:
    """One process, started again when it has ended."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self.is_ready = False
        """Whether it has loaded what it needs."""
        self._is_stopped = False

    def launch(self) -> None:
        """Start the process; it loads by itself."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if key in _KEPT_ENVIRONMENT or key.startswith(_KEPT_ENVIRONMENT_PREFIXES)
        }
        # one thread each; whatever the hub has, the server has fetched already
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
            start_new_session=True,  # Ctrl-C is the server's, which first answers what it has
        )
        if self._is_stopped:  # in another thread, while this one was at it
            self.stop_process()

    def wait_ready(self) -> None:
        """Hand the process its modalities. Raises MultiTokenError if it does not come up."""
        answer = self._exchange(encode_frame(self._setup), _START_S)
        if answer is None or "ready" not in answer[0]:
            self.stop_process()
            reason = "it ended by itself" if answer is None else answer[0].get("failed", "")
            raise MultiTokenError(f"the process that decodes media does not start: {reason}")
        self.is_ready = True

    def try_start(self) -> bool:
        """Start the process and wait for it; whether it is there, and why not in the log."""
        try:
            self.launch()
            self.wait_ready()
        except (MultiTokenError, OSError) as error:
            if not self._is_stopped:
                _log.error("%s", error)
        return self.is_ready

    def prepare(self, item: DecodeRequest) -> DecodeResult:
        """What the process makes of an item. Raises ServeError."""
        if self._is_stopped:
            raise stopped_error()
        if not self.is_ready or (self._process is not None and self._process.poll() is not None):
            self.stop_process()  # it has ended since the last item, if it was there at all
            if not self.try_start():
                raise ServeError("media cannot be decoded at the moment", status=503)
        seconds = self._setup["timeout_s"] + (_GRACE_S if self._setup["fork"] else 0.0)
        answer = self._exchange(item.data, seconds)
        if answer is None:
            self.stop_process()
            if self._is_stopped:
                raise stopped_error()
            raise self._error_of(item, {"fault": "time" if self._timed_out else "died"})
        header, blobs = answer
        if "fault" in header:
            raise self._error_of(item, header)
        return _parse_result(header, blobs)

    def _exchange(self, data: bytes, seconds: float) -> tuple[dict[str, Any], list[bytes]] | None:
        """Write a frame and read one; None if the process ends, or has to be ended, before."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        self._timed_out = False

        def end() -> None:
            self._timed_out = True
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(data)
            process.stdin.flush()
            most = self._setup["max_prepared_bytes"] + _MAX_HEADER
            whole = read_frame(process.stdout.read, most=most)
            return None if whole is None else decode_frame(whole)
        except (OSError, EOFError, ValueError, LookupError, TypeError):
            return None  # it died on the way, or said what no worker of ours says
        finally:
            timer.cancel()

    def _error_of(self, item: DecodeRequest, header: Mapping[str, Any]) -> ServeError:
        kind, message = header.get("fault"), str(header.get("message", ""))
        if kind == "media":
            return media_error(item.modality, message)
        if kind == "time":
            return ServeError(
                f"the item for {item.modality} took longer than {self._setup['timeout_s']:g} s to "
                "decode; send a smaller one",
                status=422,
                code="media_too_slow",
            )
        if kind == "memory":
            return ServeError(
                f"the item for {item.modality} needs more memory than one item may take; send a "
                "smaller one",
                status=422,
                code="media_too_large",
            )
        if kind == "setup":
            _log.error("%s cannot prepare items: %s", item.modality, message)
            return ServeError(
                f"the sense {item.modality} of this server is not set up rightly", status=500
            )
        _log.warning("an item for %s ended its decoder: %s", item.modality, message or kind)
        return ServeError(
            f"the item for {item.modality} cannot be decoded; it is damaged, or of a kind that "
            "this sense does not read",
            status=400 if kind == "error" else 422,
            code="invalid_media",
        )

    def stop(self) -> None:
        """End the process, and start none again."""
        self._is_stopped = True
        self.stop_process()

    def stop_process(self) -> None:
        process, self.is_ready = self._process, False
        if process is None:
            return
        _kill(process)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None and not stream.closed:
                with suppress(OSError):  # what was not written has nobody to read it
                    stream.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its forks."""
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _parse_result(header: Mapping[str, Any], blobs: list[bytes]) -> DecodeResult:
    from safetensors.torch import load

    try:
        told = header["size"]
        size = MediaSize(
            pixels=int(told.get("pixels", 0)),
            frames=int(told.get("frames", 0)),
            seconds=float(told.get("seconds", 0)),
            characters=int(told.get("characters", 0)),
            prepared_bytes=len(blobs[0]),
        )
        return DecodeResult(
            Prepared(load(blobs[0]), num_features=int(header["num_features"])), size
        )
    except (AttributeError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ServeError("the item cannot be decoded", status=422, code="invalid_media") from error


def media_error(modality: str, message: str) -> ServeError:
    message = _PATH_IN_MESSAGE.sub("(...)", message)
    return ServeError(f"{modality}: {message}", status=400, code="invalid_media")


def stopped_error() -> ServeError:
    return ServeError("this server is being stopped", status=503, code="stopped", retry_after=1.0)
