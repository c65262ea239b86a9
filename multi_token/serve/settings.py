"""What a server may be told when it starts: where it listens, whom it answers, and its limits.

Border: fields and their checks; nothing is opened or loaded.
"""

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

from multi_token.serve.media.totals import RequestMediaLimits

MIB = 1024 * 1024
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_NAME = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_ENGINE_URL = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?/?")
_ENGINE_KEY = re.compile(r"[\x21-\x7e]{1,512}")


class ServeSettings(BaseModel):
    """Frozen; every field has a default, and the defaults are safe for strangers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "multi_token"
    """What the model is called in `/v1/models` and in requests."""
    host: str = "127.0.0.1"
    """The address that is listened on; any but this machine's own needs a key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    run_folder: Path | None = None
    """The run's folder, whose report and rows the chat page shows; None shows neither."""
    show_examples: bool = True
    """Whether the chat page shows some rows of the training to whoever has a key."""
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    """Whoever sends one of them as `Authorization: Bearer KEY` is answered; none: everybody is."""
    allowed_url_hosts: tuple[str, ...] = ()
    """Hosts that media may be fetched from; none: media come in the request alone."""

    engine_urls: tuple[str, ...] = ()
    """Addresses of vLLM servers, without `/v1`, that generate for the prompts; none: the local
    engine of this process does."""
    engine_key: str | None = Field(default=None, repr=False)
    """The vLLM servers' `--api-key`."""
    engine_startup_timeout_s: float = Field(default=0.0, ge=0)
    """Time that the start waits for the first vLLM server."""
    max_batch: PositiveInt = 8
    """Answers that are written at once."""
    max_queue: NonNegativeInt | None = None
    """Answers that may wait beside them; None: four times `max_batch`."""
    prefix_cache_tokens: NonNegativeInt | None = None
    """Local engine: tokens of finished requests in the prefix cache; None: 2048, 0: disabled."""
    num_workers: PositiveInt = 2
    """Processes that decode media."""
    media_timeout_s: PositiveFloat = 20.0
    """The longest that one item may take to be decoded."""
    media_cache_bytes: NonNegativeInt = 256 * MIB
    """Media embeddings that are kept for items that come again."""

    default_max_tokens: PositiveInt = 512
    """The longest answer where a request names no `max_tokens`."""
    max_tokens: PositiveInt = 32_768
    """The longest answer that a request may ask for."""
    max_media: PositiveInt = 64
    """Items in one request."""
    max_messages: PositiveInt = 1000
    """Messages in one request."""
    media_totals: RequestMediaLimits = RequestMediaLimits()
    """Of all items in one request together."""

    max_body_bytes: PositiveInt = 32 * MIB
    """A longer body is refused as soon as so much of it has been received."""
    max_json_values: PositiveInt = 1_000_000
    """A body with more brackets and commas is refused before it is parsed."""
    header_timeout_s: PositiveFloat = 10.0
    """The longest that a request's first line and headers may take to arrive."""
    body_timeout_s: PositiveFloat = 60.0
    """The longest that a body may take to arrive."""
    send_timeout_s: PositiveFloat = 30.0
    """The longest that a client may take to read a piece of its answer."""
    deadline_s: PositiveFloat = 300.0
    """The longest that a request may take; `X-Request-Timeout` lowers it."""
    shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """The longest that answers go on after SIGTERM."""

    @model_validator(mode="after")
    def _safe(self) -> ServeSettings:
        if not self.is_local and not self.api_keys:
            raise ValueError(
                f"host {self.host} can be reached from other machines, which needs a key: give "
                "--api-key, or listen on 127.0.0.1"
            )
        if self.prefix_cache_tokens is not None and self.engine_urls:
            raise ValueError(
                "prefix_cache_tokens is a setting of the local engine, and with --engine-url vLLM "
                "servers keep their own prefix cache: leave out --prefix-cache-tokens"
            )
        check_engine_settings(self.engine_urls, self.engine_key)
        for key in self.api_keys:
            if not _KEY.fullmatch(key):
                raise ValueError(
                    "a key has 8 to 512 printable ASCII characters and no blanks (sk-... is a form "
                    "that all clients take)"
                )
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} should have 1 to 128 letters, digits and . : / @ + - _ only"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def max_waiting(self) -> int:
        """Answers that may wait beside those that are written."""
        return 4 * self.max_batch if self.max_queue is None else self.max_queue


def check_engine_settings(urls: tuple[str, ...], key: str | None) -> None:
    """Raise ValueError for invalid addresses or an invalid key of vLLM servers."""
    for url in urls:
        if not _ENGINE_URL.fullmatch(url):
            shown = re.sub(r"//[^/]*@", "//...@", url[:200])  # a password is not repeated
            raise ValueError(
                f"engine_urls: {shown!r} should be http://HOST:PORT or https://HOST:PORT of an "
                "engine, without a path, user or password (its key: MULTI_TOKEN_ENGINE_KEY)"
            )
    addresses = [url.rstrip("/") for url in urls]
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"engine_urls: {addresses} names an engine twice; name each once")
    if key is not None and not _ENGINE_KEY.fullmatch(key):
        raise ValueError("engine_key should have printable ASCII characters and no blanks only")
