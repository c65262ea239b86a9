"""ServeSettings: address, API keys, engines and limits of a server, checked at construction."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from multi_token.media.fetch import MIB
from multi_token.serve.media.limits import RequestMediaLimits
from multi_token.serve.media.memory import DEFAULT_CAPACITY, parse_bytes

_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_NAME = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_ENGINE_URL = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?/?")
_ENGINE_KEY = re.compile(r"[\x21-\x7e]{1,512}")


class ServeSettings(BaseModel):
    """Settings of a server. Every default is safe for untrusted clients."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "multi_token"
    """Model name in `/v1/models` and in requests."""
    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs an API key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0: a free port."""
    run_folder: Path | None = None
    """Run folder whose report and example rows the chat page may show; None: neither."""
    show_examples: bool = False
    """Show rows of the run's data on the chat page: examples, and the report with its samples."""
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    """Clients must send one of these as `Authorization: Bearer KEY`; empty: no key needed."""
    allowed_url_hosts: tuple[str, ...] = ()
    """Hosts that media may be fetched from; empty: media come in the request only."""

    engine_urls: tuple[str, ...] = ()
    """Addresses of vLLM servers, without `/v1`; empty: the local engine generates."""
    engine_key: str | None = Field(default=None, repr=False)
    """The vLLM servers' `--api-key`."""
    engine_startup_timeout_s: float = Field(default=0.0, ge=0)
    """Time to wait for the first vLLM server at the start."""
    engine_step_timeout_s: PositiveFloat = 120.0
    """Time after which a prefill or decode step, or a part of a media encoder, is stalled."""
    max_batch: PositiveInt = 8
    """Concurrent generations; each choice of `n` counts."""
    max_queue: NonNegativeInt | None = None
    """Generations that may wait; None: 4 x `max_batch`."""
    prefix_cache_tokens: NonNegativeInt | None = None
    """Local engine: tokens of finished requests in the prefix cache; None: 2048, 0: disabled."""
    num_workers: PositiveInt = 2
    """Processes that decode media."""
    media_timeout_s: PositiveFloat = 20.0
    """Time limit for decoding one media item."""
    media_memory_bytes: PositiveInt = DEFAULT_CAPACITY
    """Memory of request bodies and media, until the media are embedded; requests wait for it."""
    memory_wait_s: PositiveFloat = 20.0
    """Time that a body, and then its parsing, may wait for memory; then a 429 refuses it."""
    media_cache_bytes: NonNegativeInt = 256 * MIB
    """Size of the cache of media embeddings, for items that are sent again."""

    default_max_tokens: PositiveInt = 512
    """`max_tokens` of requests that give none."""
    max_tokens: PositiveInt = 32_768
    """Largest `max_tokens` of a request."""
    max_media: PositiveInt = 64
    """Media items per request."""
    max_messages: PositiveInt = 1000
    """Messages per request."""
    media_totals: RequestMediaLimits = RequestMediaLimits()
    """Limits of all media items of one request together."""

    max_body_bytes: PositiveInt = 32 * MIB
    """Largest request body; the server stops reading there."""
    max_json_values: PositiveInt = 1_000_000
    """Most brackets and commas in a body, counted before it is parsed."""
    header_timeout_s: PositiveFloat = 10.0
    """Time limit for receiving a request's headers."""
    body_timeout_s: PositiveFloat = 60.0
    """Time limit for receiving a body."""
    send_timeout_s: PositiveFloat = 30.0
    """Time limit for sending one chunk of a response."""
    deadline_s: PositiveFloat = 300.0
    """Time limit of a request; the header `X-Request-Timeout` can lower it."""
    shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """Time that running requests may take to finish after SIGTERM."""

    @model_validator(mode="after")
    def _safe(self) -> ServeSettings:
        if not self.is_local and not self.api_keys:
            raise ValueError(
                f"host {self.host} is reachable from other machines, so an API key is needed: give "
                "--api-key or --api-key-file, or listen on 127.0.0.1"
            )
        if self.prefix_cache_tokens is not None and self.engine_urls:
            raise ValueError(
                "prefix_cache_tokens is a setting of the local engine, and with --engine-url vLLM "
                "servers keep their own prefix cache: leave out --prefix-cache-tokens"
            )
        self._check_engine_settings()
        # So that each stage of a request fits its share of the memory.
        least = 8 * parse_bytes(self.max_body_bytes, self.max_json_values)
        if self.media_memory_bytes < least:
            raise ValueError(
                f"media_memory_bytes is {self.media_memory_bytes:,}, and bodies of up to "
                f"{self.max_body_bytes:,} bytes need {least:,} at least; raise --media-memory-mb "
                f"to {-(-least // MIB)}"
            )
        for key in self.api_keys:
            if not _KEY.fullmatch(key):
                raise ValueError(
                    "an API key must have 8 to 512 printable ASCII characters and no spaces (all "
                    "clients accept the form sk-...)"
                )
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} must have 1 to 128 characters: letters, digits and . : / @ + "
                "- _ only"
            )
        return self

    @property
    def is_local(self) -> bool:
        """True if the host is a loopback address."""
        return is_loopback(self.host.strip("[]"))

    @property
    def max_waiting(self) -> int:
        """Generations that may wait."""
        return 4 * self.max_batch if self.max_queue is None else self.max_queue

    def _check_engine_settings(self) -> None:
        for url in self.engine_urls:
            if not _ENGINE_URL.fullmatch(url):
                shown = re.sub(r"//[^/]*@", "//...@", url[:200])  # hides a password
                raise ValueError(
                    f"engine_urls: {shown!r} should be http://HOST:PORT or https://HOST:PORT of an "
                    "engine, without a path, user or password (its key: MULTI_TOKEN_ENGINE_KEY)"
                )
        addresses = [url.rstrip("/") for url in self.engine_urls]
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"engine_urls: {addresses} names an engine twice; name each once")
        if self.engine_key is not None and not _ENGINE_KEY.fullmatch(self.engine_key):
            raise ValueError(
                "engine_key must be 1 to 512 printable ASCII characters, without spaces"
            )


def is_loopback(host: str) -> bool:
    """Return True for `localhost` and for loopback IP addresses."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
