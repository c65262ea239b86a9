"""The model hub: the limit of a wait for its answers, and the options of all downloads of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from multi_token.errors import MultiTokenError

_AGAIN_S = 300.0
"""Time after which a hub that did not answer is asked again, as a run of days may need it."""
_OF_THE_HUB = {
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "TransportError",
    "TimeoutError",
    "ConnectionError",
}
"""Names of the errors, or of their base classes, that a hub which does not answer leads to."""


class HubSilence:
    """Time that this process has waited for the hub since its last answer, in all its threads."""

    def __init__(self, limit_s: float = 60.0) -> None:
        self.limit_s = limit_s
        self.waited_s = 0.0
        self._counted_until = 0.0
        self._lock = threading.Lock()

    def left_s(self) -> float:
        """Return the seconds that the next request may wait; 0 once the limit is reached."""
        with self._lock:
            if time.monotonic() - self._counted_until > _AGAIN_S:
                self.waited_s = 0.0
            return max(0.0, self.limit_s - self.waited_s)

    def end(self) -> None:
        """Note an answer."""
        with self._lock:
            self.waited_s = 0.0

    def add(self, began: float) -> None:
        """Note a request that was sent at a `time.monotonic` and has timed out now."""
        with self._lock:
            # Eight threads that wait at the same time wait once.
            now = time.monotonic()
            self.waited_s += now - max(began, self._counted_until)
            self._counted_until = now


SILENCE = HubSilence()


@contextmanager
def limited_hub_waits(name: str, error: type[MultiTokenError] = MultiTokenError) -> Iterator[None]:
    """Load something from the hub by any library, and wait for 60 s of silence at most.

    huggingface_hub, transformers and datasets wait for minutes, since each request is sent again
    up to five times, and each file has its requests. After the limit they work as without a
    network: files come from the cache.

    Args:
        name: Name on the hub, for the message.
        error: Class of the error.

    Raises:
        error: The hub did not answer, and the cache has not all files. Faults of another kind
            are raised as they are.
    """
    _limit_sessions()
    try:
        yield
    except MultiTokenError:
        raise
    except Exception as fault:
        if SILENCE.left_s() or not is_of_the_hub(fault):
            raise
        from huggingface_hub import constants

        raise error(
            f"{constants.ENDPOINT} has not answered for {SILENCE.waited_s:.0f} s, and {name} is "
            "not complete in this machine's cache; check the network, set HF_ENDPOINT to a hub "
            "that answers, or name a local folder. With HF_HUB_OFFLINE=1 nothing is asked of a hub"
        ) from fault


def is_of_the_hub(fault: BaseException) -> bool:
    """True if a fault, or one that led to it, is that a hub does not answer or a file is missing.

    Others (no memory, a full disk, an unknown model) stay what they are, however silent the hub.
    """
    waiting, seen = [fault], set[int]()
    while waiting:
        each = waiting.pop()
        seen.add(id(each))
        # by name: the HTTP library of huggingface_hub is httpx or httpx2, by its version
        if any(kind.__name__ in _OF_THE_HUB for kind in type(each).__mro__):
            return True
        before = (each.__cause__, each.__context__)
        waiting += [e for e in before if e is not None and id(e) not in seen]
    return False


def _limit_sessions() -> None:
    """Limit the waits of the client that huggingface_hub, transformers and datasets share."""
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils import _http

    # The factory and not the client: a new one is made after a fork and after connection errors.
    # huggingface_hub has no public name for the factory in use, which may be a user's.
    given = _http._GLOBAL_CLIENT_FACTORY
    if getattr(given, "limits_waits", False):
        return

    def factory() -> Any:
        client: Any = given()
        client.send = _limited(client.send)
        return client

    factory.limits_waits = True  # type: ignore[attr-defined]
    set_client_factory(factory)
    get_session()


def _limited(send: Callable[..., Any]) -> Callable[..., Any]:
    from huggingface_hub.errors import OfflineModeIsEnabled

    def limited(request: Any, **options: Any) -> Any:
        left_s = SILENCE.left_s()
        if not left_s:
            # Of all errors, this one alone is never tried again, and lets the cache answer.
            raise OfflineModeIsEnabled(f"{request.url.host} does not answer")
        # Here, since huggingface_hub passes `timeout=None` with most requests.
        given = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {
            kind: min(given.get(kind) or left_s, left_s) for kind in kinds
        }
        began = time.monotonic()
        try:
            response = send(request, **options)
        except Exception as error:
            # By name: the HTTP library of huggingface_hub is httpx or httpx2, by its version.
            if any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__):
                SILENCE.add(began)
            raise
        SILENCE.end()
        return response

    return limited


@dataclass(frozen=True)
class HubOptions:
    """Arguments of `from_pretrained` for all that a run names: language model, encoders.

    Plug-ins load encoders, so these are no arguments of each load: they hold within a block of
    `hub_options`, and `hub_arguments` returns them to whatever loads there.
    """

    token: str | bool | None = None
    """Token of a private or gated repository; default: the one of `hf auth login`."""
    cache_dir: str | None = None
    """Folder of downloads; default: that of huggingface_hub."""
    local_files_only: bool = False
    """Download nothing; what is missing is an error."""


DEFAULT_HUB = HubOptions()
"""Options of `hf auth login` and the environment variables of huggingface_hub."""
_CURRENT: ContextVar[HubOptions] = ContextVar("hub_options", default=DEFAULT_HUB)


@contextmanager
def hub_options(options: HubOptions) -> Iterator[None]:
    """Within, `hub_arguments` returns these options; defaults change nothing."""
    if options == DEFAULT_HUB:
        yield
        return
    token = _CURRENT.set(options)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def hub_arguments(*, of_weights: bool = False) -> dict[str, Any]:
    """Return the options that differ from their defaults, as arguments of `from_pretrained`.

    `of_weights`: for a model, whose Auto class looks for an adapter with options of its own.
    """
    found = {
        name: value
        for name, value in asdict(_CURRENT.get()).items()
        if value != getattr(DEFAULT_HUB, name)
    }
    return {**found, "adapter_kwargs": dict(found)} if found and of_weights else found
