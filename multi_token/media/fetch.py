"""Source -> its bytes: a path, a URL, a data URI, or the bytes themselves."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from multi_token.errors import MediaError
from multi_token.media.archive import Archive, member_name, open_archive, split_archive
from multi_token.media.errors import missing_file

if TYPE_CHECKING:
    import httpx

    from multi_token.media.safe_http import UrlPolicy

_Content = TypeVar("_Content", bytes, BinaryIO)
MIB = 1024 * 1024
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MAX_REDIRECTS = 5
_ACCEPTED = "a file path, a file://, http(s):// or data: URL, or bytes"


@dataclass(frozen=True)
class Fetch:
    """Reads any source, within limits; picklable, so that data workers can have it.

    | source                       | meaning                                         |
    |------------------------------|-------------------------------------------------|
    | `str`, `os.PathLike`         | a file; a relative path starts at `root`, which |
    |                              | may be an archive, or a folder in one           |
    | `"file://..."`               | the same, percent-decoded                       |
    | `"http://"`, `"https://"`    | a download, up to 5 redirects                   |
    | `"data:...;base64,..."`      | decoded in place                                |
    | `bytes`                      | returned                                        |

    Every failure raises `MediaError(kind="missing_file")`. A server that reads sources of untrusted
    clients sets `allow_paths=False, url_policy=UrlPolicy()`, which accepts data URIs and bytes
    only.
    """

    root: str | None = None
    """Folder of relative paths; None is the current folder. Or a .zip or uncompressed .tar, whose
    files paths then name; `images.zip/train` is a folder in it."""
    inside_root: bool = False
    """True if a path that leaves `root` is refused, as that of a recipe's source."""
    max_bytes: int = 256 * MIB
    """Largest accepted source, in bytes."""
    timeout_s: float = 30.0
    """Deadline of a complete download in seconds, redirects included."""
    allow_urls: bool = True
    """True if http(s) URLs are read."""
    allow_paths: bool = True
    """True if files of this machine are read."""
    url_policy: UrlPolicy | None = None
    """Hosts that untrusted clients may name (safe_http.py). None allows any, as for the rows of
    one's own data."""

    def read(self, source: Any) -> bytes:
        """Return all bytes of a source.

        Raises:
            MediaError: The source cannot be read, or is over `max_bytes`.
        """
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
        if member := self._member(source):
            return self._from_member(member, Archive.read)
        return self._read_file(source)

    def open(self, source: Any) -> BinaryIO:
        """Return a source as a file to read a part of, such as a header; the caller closes it.

        A local file is only opened; every other source is read completely.

        Raises:
            MediaError: The source cannot be read, or is over `max_bytes`.
        """
        if member := self._member(source):
            return self._from_member(member, Archive.open)
        if self.local_path(source) is None:
            return io.BytesIO(self.read(source))
        return self._open_file(source)[0]

    def local_path(self, source: Any) -> Path | None:
        """Return the absolute path that a source names; None if it names no local file.

        The file need not exist. `allow_paths` does not matter, because nothing is opened. A file in
        an archive has no path.
        """
        if self._member(source):
            return None
        if isinstance(source, str):
            scheme = _scheme(source)
            if scheme == "file":
                # Percent-decoded, and refused if it names another machine.
                source = _file_url_path(source)
            elif scheme is not None:
                return None
        elif not isinstance(source, os.PathLike):
            return None
        text = os.fspath(source)
        if not isinstance(text, str) or not text or "\0" in text:
            return None
        # Absolute, so that cache keys and messages name one file from any folder.
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
        whole = Path(self.root or "").joinpath(path)
        if self.inside_root:
            # by name, before links are followed: folders of media are often links
            start = os.path.abspath(self.root or "")
            if os.path.commonpath([start, os.path.abspath(whole)]) != start:
                raise missing_file(
                    f"{shorten(text)} leaves `root` ({start}); name a folder that holds all media, "
                    "or fix the path in the row"
                )
        return whole.resolve()

    def stamp(self, source: Any) -> list[Any]:
        """Return values for JSON that change with the local file that a source names, or [].

        They are path, size and time of change; for a file in an archive, those of the archive. A
        folder, such as a DICOM series, has those of each file in it.
        """
        if member := self._member(source):
            archive, name = member
            return [*archive.stamp, name]
        path = self.local_path(source)
        if path is None:
            return []
        try:
            found = path.stat()
            stamp: list[Any] = [str(path), found.st_size, found.st_mtime_ns]
            if S_ISDIR(found.st_mode):
                # a file that changes in place leaves the folder as it is
                for file in sorted(file for file in path.iterdir() if file.is_file()):
                    found = file.stat()
                    stamp += [file.name, found.st_size, found.st_mtime_ns]
        except (OSError, ValueError):  # no such file, or a text too long for a name
            return []
        return stamp

    def _member(self, source: Any) -> tuple[Archive, str] | None:
        """Return the archive and the name in it that a source names; None for any other source."""
        if self.root is None or not isinstance(source, (str, os.PathLike)):
            return None
        text = os.fspath(source)
        if not isinstance(text, str) or not text or "\0" in text or _scheme(text) is not None:
            return None
        found = split_archive(self.root)
        if found is None:
            return None
        path, folder = found
        return open_archive(path), member_name(folder, text)

    def _from_member(
        self, member: tuple[Archive, str], access: Callable[[Archive, str], _Content]
    ) -> _Content:
        archive, name = member
        if not self.allow_paths:
            raise missing_file(f"files of this machine are not read here, and {name} is one")
        self._check_size(archive.size(name), f"{name} in {archive.path}")
        try:
            return access(archive, name)
        except OSError as error:
            raise _unreadable_file_error(archive.path, error) from error

    def _read_file(self, source: Any) -> bytes:
        file, path = self._open_file(source)
        try:
            with file:
                # One byte more than the limit is enough to see that a file is over it.
                data = file.read(self.max_bytes + 1)
        except OSError as error:
            raise _unreadable_file_error(path, error) from error
        self._check_size(len(data), str(path))  # a file may grow after it was opened
        return data

    def _open_file(self, source: Any) -> tuple[BinaryIO, Path]:
        path = self.local_path(source)
        if path is None:
            raise missing_file(_unreadable_source_error(source))
        if not self.allow_paths:
            raise missing_file(
                f"files of this machine are not read here, and {shorten(source)} is one; "
                "send the bytes as a data: URL"
            )
        try:
            # Looked at before opening: opening a pipe would wait for its writer.
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
            return f"no file at {path}; fix the path in the row, or put the file there"
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
        # Checked before decoding. Four letters are three bytes, up to two of them padding.
        self._check_size(len(body) * 3 // 4 - 2, "the data: URL")
        # Without base64 the body is percent-encoded text (RFC 2397).
        if not header.lower().endswith(";base64"):
            return self.read(unquote_to_bytes(body))
        try:
            # Line breaks are common in base64 that was made for e-mail.
            data = base64.b64decode("".join(body.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise missing_file(
                f"{shorten(source)} is not base64 ({error}); "
                "encode the bytes with base64.b64encode and check that nothing was cut off"
            ) from error
        self._check_size(len(data), "the data: URL")
        return data

    def _read_url(self, source: str) -> bytes:
        if not self.allow_urls:
            raise missing_file(
                f"URLs are not read here, and {shorten(source)} is one; "
                "download it and give the path or the bytes"
            )
        if self.url_policy is not None:
            return self.url_policy.download(source, max_bytes=self.max_bytes)
        # Imported here, because a run on local files needs no HTTP client.
        import httpx

        deadline = time.monotonic() + self.timeout_s
        # Identity, because a compressed body could unpack to far more than the limit in one piece.
        headers = {"Accept-Encoding": "identity", "User-Agent": "multi_token"}
        try:
            with (
                httpx.Client(
                    timeout=self.timeout_s,
                    follow_redirects=True,
                    max_redirects=_MAX_REDIRECTS,
                    headers=headers,
                ) as client,
                client.stream("GET", source) as response,
            ):
                return self._download(response, source, deadline)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise missing_file(
                f"cannot download {shorten(source)}: {reason}; check the URL and the network, "
                "or download it once and give the path"
            ) from error

    def _download(self, response: httpx.Response, source: str, deadline: float) -> bytes:
        if response.status_code != 200:
            raise missing_file(
                f"{shorten(source)} answered {response.status_code} {response.reason_phrase} "
                "instead of 200; check that the address is right and open to everyone"
            )
        # Refused by its announced length before a byte of the body is read.
        announced = response.headers.get("Content-Length", "")
        if announced.isdecimal():
            self._check_size(int(announced), shorten(source))
        data = bytearray()
        # Chunks as they arrive: httpx would wait for a fixed size, and the deadline would pass.
        for chunk in response.iter_bytes():
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
    """Return a source for a message, without megabytes of base64."""
    text = str(source)
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text):,} letters)"


def source_name(source: Any) -> str:
    """Return the path or URL of a source for a message; "" for a data URI or an object."""
    named = isinstance(source, (str, os.PathLike)) and _scheme(str(source)) != "data"
    return shorten(source) if named else ""


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
            "a file:// URL of this machine has three slashes: file:///folder/name"
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
