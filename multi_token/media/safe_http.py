"""Downloads for untrusted clients: from listed public hosts only, never from the local network."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any

import httpcore

from multi_token.errors import MultiTokenError
from multi_token.media.errors import missing_file

if TYPE_CHECKING:
    import ssl

    import httpx

Address = IPv4Address | IPv6Address

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_URL_LENGTH = 8_192
_HOST_ENTRY = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?(:[0-9]{1,5})?")
_HOST = re.compile(r"[a-z0-9_.:-]+")
# Parsers differ about these characters, so a URL with one may name another host to the next parser.
_AMBIGUOUS = re.compile(r"[\x00-\x20\x7f\\]")
_NAT64 = IPv6Network("64:ff9b::/96")


def resolve_host(host: str, port: int) -> list[str]:
    """Return the IPs that the system finds for a host. Raises OSError."""
    # Each IP appears once per protocol and socket type.
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: Address) -> bool:
    """Return True if an IP, and any IPv4 address inside it, is a public host.

    Mapped, 6to4, Teredo and NAT64 addresses reach the IPv4 address inside them.
    """
    if isinstance(address, IPv6Address):
        inner: Iterable[Address | None] = (
            address.ipv4_mapped,
            address.sixtofour,
            *(address.teredo or ()),
            IPv4Address(int(address) & 0xFFFF_FFFF) if address in _NAT64 else None,
        )
        within = [one for one in inner if one is not None]
        if within:
            return all(is_public(one) for one in within)
        # Deprecated, and still routed inside of some networks; `is_global` allows it.
        if address.is_site_local:
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


@dataclass(frozen=True)
class UrlPolicy:
    """Policy of downloads for untrusted clients. By default nothing is downloaded.

    A URL is parsed once, and the connection uses what was parsed: http or https, a listed host and
    port, no user name. The host is resolved once, each IP must be public, and the connection goes
    to one of these IPs under the host's name. A redirect is a new URL, to which all of this
    applies. No proxy, cookie, password or setting of the environment is used.
    """

    allowed_hosts: tuple[str, ...] = ()
    """`example.org`: this host on ports 80 and 443; `*.example.org`: every host below it;
    `example.org:8080`: the host on this port. Without entries nothing is read."""
    timeout_s: float = 10.0
    """Deadline in seconds for name look-up, connections, redirects and all bytes together."""
    max_redirects: int = 3
    """Largest number of redirects in a chain."""
    resolve: Callable[[str, int], Sequence[str]] = resolve_host
    """Host and port -> its IPs; raises OSError."""
    is_allowed_address: Callable[[Address], bool] = is_public
    """Condition on an IP to connect to it."""

    def __post_init__(self) -> None:
        wrong = [entry for entry in self.allowed_hosts if not _HOST_ENTRY.fullmatch(entry.lower())]
        if wrong:
            raise MultiTokenError(
                "expected hosts such as example.org, *.example.org or example.org:8080 in the list "
                f"of allowed hosts, got {wrong[0]!r}; write the name of a host alone"
            )

    def download(self, address: str, *, max_bytes: int) -> bytes:
        """Return the bytes of a URL, at most `max_bytes`.

        Raises:
            MediaError: The URL is refused or cannot be read. The message names no IP, which would
                tell the client about the local network.
        """
        deadline = time.monotonic() + self.timeout_s
        url = self._parse_url(address)
        # Redirects are followed here and not by httpcore, so that each target is checked.
        for _ in range(self.max_redirects + 1):
            try:
                moved, body = _get(url, self._public_ips(url, deadline), deadline, max_bytes)
            except httpcore.TimeoutException:
                raise missing_file(
                    f"{url.host} was not done within {self.timeout_s:g} s; send the bytes instead"
                ) from None
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol):
                raise missing_file(
                    f"{url.host} could not be reached, or closed the connection; check the URL, "
                    "or send the bytes"
                ) from None
            if moved is None:
                return body
            url = self._parse_url(moved, base=url)
        raise missing_file(
            f"{url.host} redirects more than {self.max_redirects} times; send the last URL"
        )

    def _parse_url(self, address: str, *, base: httpx.URL | None = None) -> httpx.URL:
        """Parse a URL, or a redirect from `base`, and check all but its IPs."""
        import httpx

        if not self.allowed_hosts:
            raise missing_file("URLs are not read here; send the bytes as a data: URL")
        if _AMBIGUOUS.search(address) or len(address) > _MAX_URL_LENGTH:
            raise missing_file("the URL has a blank, a backslash or too many characters")
        try:
            url = httpx.URL(address) if base is None else base.join(address)
            host, port = url.raw_host.decode("ascii").lower(), url.port or _PORTS.get(url.scheme)
        except (httpx.InvalidURL, ValueError):
            raise missing_file("the URL cannot be parsed") from None
        if url.scheme not in _PORTS or port is None:
            raise missing_file("the URL does not begin with http:// or https://")
        if url.userinfo or b"@" in url.netloc:
            raise missing_file("the URL has a user name or password; leave it out")
        if not _HOST.fullmatch(host) or not self._is_allowed_host(
            host, port, port == _PORTS[url.scheme]
        ):
            raise missing_file(
                "the URL names a host or port that is not on the list of this server; send the "
                "bytes as a data: URL"
            )
        return url

    def _is_allowed_host(self, host: str, port: int, is_usual: bool) -> bool:
        for entry in self.allowed_hosts:
            # An IPv6 address has colons of its own, but no entry can name one.
            # An entry `*.example.org` covers the hosts below example.org, not the host itself.
            name, _, entry_port = entry.lower().partition(":")
            below = name.startswith("*.") and host.endswith(name[1:]) and host != name[1:]
            at_port = port == int(entry_port) if entry_port else is_usual
            if (host == name or below) and at_port:
                return True
        return False

    def _public_ips(self, url: httpx.URL, deadline: float) -> list[str]:
        """IPs of a host, if a connection to each of them is allowed."""
        port = url.port or _PORTS[url.scheme]
        host = url.raw_host.decode("ascii").lower()
        # The system's resolver takes no deadline, so it runs in a thread that is abandoned.
        found = _with_timeout(_remaining_s(deadline), lambda: self.resolve(host, port))
        try:
            ips = [ip_address(ip) for ip in found or ()]
        # A scoped address names an interface of this machine.
        except ValueError:  # fe80::1%eth0
            ips = []
        # One private IP among public ones is enough to refuse the host.
        if not ips or not all(self.is_allowed_address(ip) for ip in ips):
            raise missing_file("the URL does not name a host on the public internet")
        return [str(ip) for ip in ips]


def _get(
    url: httpx.URL, ips: Sequence[str], deadline: float, max_bytes: int
) -> tuple[str | None, bytes]:
    """Return the target of a redirect, or None and the body of the response."""
    target = httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
    # Identity, because a compressed body could unpack to any size.
    headers = [
        (b"Host", url.netloc),
        (b"Accept", b"*/*"),
        (b"Accept-Encoding", b"identity"),
        (b"User-Agent", b"multi_token"),
    ]
    with (
        httpcore.ConnectionPool(network_backend=_PinnedBackend(ips, deadline)) as pool,
        pool.stream("GET", target, headers=headers) as response,
    ):
        fields = {name.lower(): value for name, value in response.headers}
        if response.status in _REDIRECTS and b"location" in fields:
            return fields[b"location"].decode("latin-1"), b""
        if response.status != 200:
            raise missing_file(f"{url.host} answered {response.status} instead of 200")
        announced = fields.get(b"content-length", b"")
        data = bytearray()
        # An announced length only refuses early; the body is counted all the same.
        _check_size(int(announced) if announced.isdigit() else 0, max_bytes, url.host)
        for chunk in response.iter_stream():
            data += chunk
            _check_size(len(data), max_bytes, url.host)
    return None, bytes(data)


class _PinnedBackend(httpcore.NetworkBackend):
    """Connects to the checked IPs and nothing else, for any host."""

    # httpcore would resolve the host again, and a second look-up may give another IP (DNS
    # rebinding). The host's name stays in the request, so certificates are checked against it.

    def __init__(self, ips: Sequence[str], deadline: float) -> None:
        self.ips = ips
        self.deadline = deadline
        self.sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        failed: Exception = httpcore.ConnectError("no IP")
        for ip in self.ips:
            try:
                stream = self.sockets.connect_tcp(ip, port, timeout=_remaining_s(self.deadline))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
            else:
                return _DeadlineStream(stream, self.deadline)
        raise failed

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        raise httpcore.ConnectError("sockets of this machine are not used")

    def sleep(self, seconds: float) -> None:
        raise httpcore.ConnectTimeout("there is no second attempt")


class _DeadlineStream(httpcore.NetworkStream):
    """A connection with one deadline: each step gets the time that is left."""

    # httpcore's timeouts are per read, so a server that sends a byte now and then would never end.

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self.stream = stream
        self.deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, timeout=_remaining_s(self.deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, timeout=_remaining_s(self.deadline))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        stream = self.stream.start_tls(ssl_context, server_hostname, _remaining_s(self.deadline))
        return _DeadlineStream(stream, self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


def _remaining_s(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return seconds


def _with_timeout(seconds: float, ask: Callable[[], Sequence[str]]) -> Sequence[str] | None:
    """Result of `ask`; None if it fails or takes longer."""
    answers: list[Sequence[str]] = []

    def run() -> None:
        try:
            answers.append(ask())
        except (OSError, UnicodeError):
            return  # no such host; the caller sees no result

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _check_size(num_bytes: int, max_bytes: int, host: str) -> None:
    if num_bytes > max_bytes:
        raise missing_file(
            f"{host} sends more than the limit of {max_bytes:,} bytes; make the file smaller"
        )
