"""A source in, its bytes out: a path, a URL, a data URI, or the bytes themselves."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from multi_token.errors import MediaError
from multi_token.media.errors import missing_file

if TYPE_CHECKING:
    import httpx

    from multi_token.media.safe_http import UrlPolicy

MIB = 1024 * 1024
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MAX_REDIRECTS = 5
_ACCEPTED = "a file path, file://, http(s):// or data: address, or bytes"


@dataclass(frozen=True)
class Fetch:
    """Reads any source, within limits; picklable, so that data workers take it along.

    | source                       | what happens                                    |
    |------------------------------|-------------------------------------------------|
    | `str`, `os.PathLike`         | a file; a relative path starts at `root`        |
    | `"file://..."`               | the same, percent-decoded                       |
    | `"http://"`, `"https://"`    | downloaded in pieces, up to 5 redirects         |
    | `"data:...;base64,..."`      | decoded in place                                |
    | `bytes`                      | returned                                        |

    Whatever goes wrong raises `MediaError(kind="missing_file")`. A server that reads for strangers
    wants `allow_paths=False, url_policy=UrlPolicy()`: data URIs and bytes are then all it accepts.
    """

    root: str | None = None
    """Folder of relative paths; None is the current folder."""
    max_bytes: int = 256 * MIB
    """The largest source accepted."""
    timeout_s: float = 30.0
    """One deadline for a whole download, redirects included."""
    allow_urls: bool = True
    """True if http(s) URLs are read."""
    allow_paths: bool = True
    """True if files of this machine are read."""
    url_policy: UrlPolicy | None = None
    """For strangers: which addresses are read, and how (address.py). None: any, as for rows of
    one's own."""

    def read(self, source: Any) -> bytes:
        """All bytes of `source`."""
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
            self._check_size(len(data), "the bytes in the row")
            return data
        if isinstance(source, str):
            scheme = _scheme(source)
            if scheme == "data":
                return self._read_data_uri(source)
            if scheme in ("http", "https"):
                return self._read_url(source)
        return self._read_file(source)

    def open(self, source: Any) -> BinaryIO:
        """`source` as a file, of which a part may be read: a header, say. Close it.

        A local file is only opened; whatever else is read whole.
        """
        if self.local_path(source) is None:
            return io.BytesIO(self.read(source))
        return self._open_file(source)[0]

    def local_path(self, source: Any) -> Path | None:
        """The absolute path that `source` names, or None if it does not name a local file.

        The file need not exist. Not subject to `allow_paths`: nothing is opened.
        """
        if isinstance(source, str):
            scheme = _scheme(source)
            if scheme == "file":
                source = _file_url_path(source)
            elif scheme is not None:
                return None
        elif not isinstance(source, os.PathLike):
            return None
        text = os.fspath(source)
        if not isinstance(text, str) or not text or "\0" in text:
            return None
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
        return Path(self.root or "").joinpath(path).resolve()

    def _read_file(self, source: Any) -> bytes:
        file, path = self._open_file(source)
        try:
            with file:
                data = file.read(self.max_bytes + 1)
        except OSError as error:
            raise _unreadable_file_error(path, error) from error
        self._check_size(len(data), str(path))  # a file may grow while it is read
        return data

    def _open_file(self, source: Any) -> tuple[BinaryIO, Path]:
        path = self.local_path(source)
        if path is None:
            raise missing_file(_unreadable_source_error(source))
        if not self.allow_paths:
            raise missing_file(
                f"files of this machine are not read here, and {shorten(source)} is one; "
                "send the bytes as a data: address"
            )
        try:
            if not path.exists():
                raise missing_file(self._not_found(source, path))
            if path.is_dir():
                raise missing_file(
                    f"expected a file at {path}, but found a folder; name a file in it"
                )
            if not path.is_file():
                raise missing_file(
                    f"expected a regular file at {path}, but it is a device, pipe or socket"
                )
            file = path.open("rb")
        except OSError as error:
            raise _unreadable_file_error(path, error) from error
        try:
            self._check_size(os.fstat(file.fileno()).st_size, str(path))
        except MediaError:
            file.close()
            raise
        return file, path

    def _not_found(self, source: Any, path: Path) -> str:
        given = os.fspath(source)
        if Path(given).is_absolute() or _scheme(given):
            return f"no file at {path}; mend the path in the row, or put the file there"
        start = Path(self.root or "").resolve()
        return (
            f"no file at {path} (the row says {shorten(given)}, and relative paths start at "
            f"{start}); put the file there, or write its absolute path in the row"
        )

    def _read_data_uri(self, source: str) -> bytes:
        header, comma, body = source.partition(",")
        if not comma:
            raise missing_file(
                f"expected data:<type>;base64,<letters>, but {shorten(source)} has no comma"
            )
        self._check_size(len(body) * 3 // 4 - 2, "the data: address")
        if not header.lower().endswith(";base64"):
            return self.read(unquote_to_bytes(body))
        try:
            data = base64.b64decode("".join(body.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise missing_file(
                f"{shorten(source)} is not base64 ({error}); "
                "encode the bytes with base64.b64encode and check that nothing was cut off"
            ) from error
        self._check_size(len(data), "the data: address")
        return data

    def _read_url(self, source: str) -> bytes:
        if not self.allow_urls:
            raise missing_file(
                f"web addresses are not read here, and {shorten(source)} is one; "
                "download it and give the path or the bytes"
            )
        if self.url_policy is not None:
            return self.url_policy.download(source, max_bytes=self.max_bytes)
        import httpx

        deadline = time.monotonic() + self.timeout_s
        # identity: a compressed answer could unpack to far more than the limit in one piece
        headers = {"Accept-Encoding": "identity", "User-Agent": "multi_token"}
        try:
            with (
                httpx.Client(
                    timeout=self.timeout_s,
                    follow_redirects=True,
                    max_redirects=_MAX_REDIRECTS,
                    headers=headers,
                ) as client,
                client.stream("GET", source) as answer,
            ):
                return self._download(answer, source, deadline)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise missing_file(
                f"cannot download {shorten(source)}: {reason}; check the address and the network, "
                "or download it once and give the path"
            ) from error

    def _download(self, answer: httpx.Response, source: str, deadline: float) -> bytes:
        if answer.status_code != 200:
            raise missing_file(
                f"{shorten(source)} answered {answer.status_code} {answer.reason_phrase} "
                "instead of 200; check that the address is right and open to everyone"
            )
        announced = answer.headers.get("Content-Length", "")
        if announced.isdecimal():
            self._check_size(int(announced), shorten(source))
        data = bytearray()
        # pieces as they arrive: a fixed size would be waited for, and the deadline with it
        for chunk in answer.iter_bytes():
            data += chunk
            self._check_size(len(data), shorten(source))
            if time.monotonic() > deadline:
                raise missing_file(
                    f"{shorten(source)} sent {len(data):,} bytes in {self.timeout_s:g} s and was "
                    "not done; raise timeout_s, or download it once and give the path"
                )
        return bytes(data)

    def _check_size(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.max_bytes:
            raise missing_file(
                f"{what} has {num_bytes:,} bytes or more, and the limit is {self.max_bytes:,}; "
                "make it smaller, or raise max_bytes"
            )


def shorten(source: Any, limit: int = 120) -> str:
    """A source as a message shows it: never megabytes of base64 in a terminal."""
    text = source if isinstance(source, str) else str(source)
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text):,} letters)"


def _scheme(source: str) -> str | None:
    if source[:5].lower() == "data:":
        return "data"
    match = _SCHEME.match(source)
    return match.group(1).lower() if match else None


def _file_url_path(source: str) -> str:
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise missing_file(
            f"{shorten(source)} names the machine {parts.netloc!r}; "
            "a file:// address of this machine has three slashes: file:///folder/name"
        )
    return url2pathname(parts.path)


def _unreadable_file_error(path: Path, error: OSError) -> MediaError:
    return missing_file(
        f"cannot read {shorten(path)}: {error.strerror or error}; check the name and the "
        "permissions"
    )


def _unreadable_source_error(source: Any) -> str:
    if isinstance(source, str) and (scheme := _scheme(source)):
        return f"{shorten(source)} starts with {scheme}://, but the source must be {_ACCEPTED}"
    if isinstance(source, str):
        reason = "a NUL character in it" if source else "nothing in it"
        return f"expected {_ACCEPTED}, but the source is a text with {reason}"
    return f"expected {_ACCEPTED}, but the source is of type {type(source).__name__}"
