"""Claims about safe_http.py: an address of a stranger leads to listed public hosts, or nowhere.

The canary is a real server on this machine that counts who comes; an address that gets as far as it
has broken a wall. Where a claim is about a wall behind another, the one before is opened.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import FrozenInstanceError
from ipaddress import ip_address
from typing import Any

import httpcore
import pytest

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.media.safe_http import UrlPolicy, _DeadlineStream, is_public

CONTENT = b"the bytes of a picture"
HOST = "pictures.example"
PUBLIC, INWARDS = "93.184.216.34", "127.0.0.1"
MIB = 1024 * 1024


def names(**known: Sequence[str]) -> Callable[[str, int], Sequence[str]]:
    """A resolver: IPs by the first label of a host; numbers stand for themselves, as to a system.

    Several answers of IPs after one another are given one by one.
    """
    asked: dict[str, int] = {}

    def resolve(host: str, port: int) -> Sequence[str]:
        label = host.partition(".")[0]
        if label not in known:
            return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port)]
        answers = known[label]
        asked[label] = asked.get(label, -1) + 1
        return answers[min(asked[label], len(answers) - 1)].split()

    return resolve


def open_policy(canary: Any, *hosts: str, **fields: Any) -> UrlPolicy:
    """One for which this machine counts as public, as does nothing else of what is not."""
    fields = {
        "allowed_hosts": (f"{HOST}:{canary.port}", *hosts),
        "resolve": names(pictures=[INWARDS]),
        "is_allowed_address": lambda ip: ip == ip_address(INWARDS) or is_public(ip),
        **fields,
    }
    return UrlPolicy(**fields)


class EveryHost(UrlPolicy):
    """What no list can say: with it, the walls behind the list stand alone."""

    def _is_allowed_host(self, host: str, port: int, is_usual: bool) -> bool:
        return True


def refusal(policy: UrlPolicy, address: str, max_bytes: int = MIB) -> str:
    """The sentence, which tells no IP, no path and nothing of the machine."""
    with pytest.raises(MediaError) as caught:
        Fetch(allow_paths=False, max_bytes=max_bytes, url_policy=policy).read(address)
    assert caught.value.kind == "missing_file"
    message = str(caught.value)
    for told in (INWARDS, PUBLIC, "Errno", "0x"):
        assert told not in message
    return message


def spellings(port: int) -> list[str]:
    """This machine and its neighbours, as they have been written to get past filters."""
    hosts = [
        "127.0.0.1", "127.1", "127.0.1", "127.255.255.254", "0.0.0.0", "0", "localhost",
        "localhost.", "LOCALHOST", "2130706433", "017700000001", "0177.0.0.1", "0x7f000001",
        "0x7f.1", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
        "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]", "[fc00::1]",
        "169.254.169.254", "[fd00:ec2::254]", "10.0.0.1", "172.16.0.1", "192.168.0.1",
        "100.64.0.1", "198.18.0.1", "224.0.0.1", "255.255.255.255",
        "%31%32%37.0.0.1", "①②⑦.⓪.⓪.①", "127。0。0。1", "127.0.0.1%00.pictures.example",
        "pictures.example\\@127.0.0.1", "pictures.example@127.0.0.1", "user@127.0.0.1",
        "user:word@pictures.example", "127.0.0.1#@pictures.example", "127.0.0.1?@pictures.example",
        "pictures.example#@127.0.0.1", "pictures.example\t@127.0.0.1", "127.0.0.1 pictures.example",
        "\\127.0.0.1", "/127.0.0.1", "[::1%25lo]", "pictures.example.127.0.0.1.nip.example",
    ]  # fmt: skip
    return [f"http://{host}:{port}/file" for host in hosts]


def test_nothing_is_read_unless_hosts_are_listed(canary: Any) -> None:
    policy = open_policy(canary, allowed_hosts=())
    assert "not read here" in refusal(policy, f"http://{HOST}:{canary.port}/file")
    assert UrlPolicy().allowed_hosts == ()
    with pytest.raises(FrozenInstanceError):  # what was checked stays as it was
        policy.allowed_hosts = (HOST,)  # type: ignore[misc]
    assert canary.hits == []


def test_a_listed_host_is_read(canary: Any) -> None:
    fetch = Fetch(allow_paths=False, url_policy=open_policy(canary))
    assert fetch.read(f"http://{HOST}:{canary.port}/file") == CONTENT
    assert fetch.read(f"HTTP://PICTURES.EXAMPLE:{canary.port}/file") == CONTENT
    assert [path for path, _ in canary.hits] == ["/file", "/file"]


def test_no_spelling_of_an_inner_address_is_a_listed_host(canary: Any) -> None:
    policy = open_policy(canary, is_allowed_address=lambda ip: True)
    for address in spellings(canary.port):
        refusal(policy, address)
    assert canary.hits == []


@pytest.mark.parametrize("place", range(len(spellings(1))))
def test_an_inner_address_is_not_dialled_even_if_it_is_listed(place: int, canary: Any) -> None:
    policy = EveryHost(allowed_hosts=("any",), timeout_s=2.0)
    address = spellings(canary.port)[place]
    refusal(policy, address)
    assert canary.hits == []


def test_the_canary_would_sing_if_the_walls_were_down(canary: Any) -> None:
    policy = EveryHost(allowed_hosts=("any",), is_allowed_address=lambda ip: True)
    for host in ("127.0.0.1", "2130706433", "0x7f.1", "127.1"):
        fetch = Fetch(allow_paths=False, url_policy=policy)
        assert fetch.read(f"http://{host}:{canary.port}/file") == CONTENT
    assert len(canary.hits) == 4


@pytest.mark.parametrize(
    "ip",
    [
        "93.184.216.34",
        "1.1.1.1",
        "2606:4700:4700::1111",
        "::ffff:93.184.216.34",
        "64:ff9b::101:101",
    ],
)
def test_hosts_of_the_open_internet_are_public(ip: str) -> None:
    assert is_public(ip_address(ip))


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1", "10.1.2.3", "169.254.169.254", "0.0.0.0", "224.0.0.1", "240.0.0.1", "::1",
        "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1",
        "2002:a00:1::", "2001:0:a00:1::1", "100.64.0.1", "192.0.2.1",
    ],
)  # fmt: skip
def test_what_leads_inwards_is_not_public(ip: str) -> None:
    assert not is_public(ip_address(ip))


def test_a_name_that_is_public_once_and_inner_then_is_asked_once(canary: Any) -> None:
    asked: list[str] = []
    answers = names(pictures=[PUBLIC, INWARDS])

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers(host, port)

    policy = open_policy(canary, resolve=resolve, timeout_s=0.5, is_allowed_address=is_public)
    refusal(policy, f"http://{HOST}:{canary.port}/file")  # nobody answers at the public one here
    assert asked == [HOST]
    assert canary.hits == []


def test_a_name_with_one_inner_ip_among_public_ones_is_refused(canary: Any) -> None:
    for ips in (f"{PUBLIC} {INWARDS}", f"{INWARDS} {PUBLIC}", f"{PUBLIC} ::1", "", "fe80::1%lo"):
        policy = open_policy(canary, resolve=names(pictures=[ips]), is_allowed_address=is_public)
        message = refusal(policy, f"http://{HOST}:{canary.port}/file")
        assert "not the name of a host on the public internet" in message
    assert canary.hits == []


def test_the_pinned_ip_is_dialled_under_the_hosts_name(canary: Any) -> None:
    open_policy(canary).download(f"http://{HOST}:{canary.port}/file?a=b", max_bytes=MIB)
    ((path, headers),) = canary.hits
    assert path == "/file?a=b"
    assert headers["host"] == f"{HOST}:{canary.port}"
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers and "authorization" not in headers


def test_tls_is_spoken_under_the_hosts_name() -> None:
    with socket.create_server((INWARDS, 0)) as server:
        hello: list[bytes] = []

        def take() -> None:
            connection, _ = server.accept()
            with connection:
                hello.append(connection.recv(4096))

        thread = threading.Thread(target=take)
        thread.start()
        policy = UrlPolicy(
            allowed_hosts=(f"{HOST}:{server.getsockname()[1]}",),
            resolve=names(pictures=[INWARDS]),
            is_allowed_address=lambda ip: True,
        )
        refusal(policy, f"https://{HOST}:{server.getsockname()[1]}/file")
        thread.join()
    assert hello[0][0] == 0x16  # a handshake
    assert HOST.encode() in hello[0]  # the server name


def test_proxies_and_passwords_of_the_environment_are_not_used(
    canary: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {HOST} login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    address = f"http://{HOST}:{canary.port}/file"
    assert open_policy(canary).download(address, max_bytes=MIB) == CONTENT
    assert "authorization" not in canary.hits[0][1]


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/file",
        "http://[::1]:{port}/file",
        "//127.0.0.1:{port}/file",
        "http://2130706433:{port}/file",
        "https://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "/%5C127.0.0.1:{port}/file",
        "gopher://pictures.example:{port}/file",
        "http://user@pictures.example:{port}/file",
        "http://pictures.example:1/file",
        "",
    ],
)
def test_a_redirect_is_checked_as_an_address_is(target: str, canary: Any) -> None:
    target = target.format(port=canary.port)
    refusal(open_policy(canary), f"http://{HOST}:{canary.port}/to/{target}")
    # the empty one leads to itself
    assert {path for path, _ in canary.hits} == {f"/to/{target}"}


def test_a_redirect_to_a_listed_host_that_is_inner_is_refused(canary: Any) -> None:
    policy = open_policy(
        canary,
        f"inner.example:{canary.port}",
        resolve=names(pictures=[INWARDS], inner=["10.0.0.7"]),
    )
    address = f"http://{HOST}:{canary.port}/to/http://inner.example:{canary.port}/file"
    assert "not the name of a host on the public internet" in refusal(policy, address)


def test_a_listed_redirect_is_followed_without_its_cookies(canary: Any) -> None:
    address = f"http://{HOST}:{canary.port}"
    policy = open_policy(canary)
    assert policy.download(f"{address}/to/{address}/file", max_bytes=MIB) == CONTENT
    assert policy.download(f"{address}/relative", max_bytes=MIB) == CONTENT
    assert all("cookie" not in headers for _, headers in canary.hits)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_status_of_a_redirect_is_followed(status: int, canary: Any) -> None:
    address = f"http://{HOST}:{canary.port}/moved/{status}"
    assert open_policy(canary).download(address, max_bytes=MIB) == CONTENT


def test_three_redirects_are_followed_and_four_are_not(canary: Any) -> None:
    address = f"http://{HOST}:{canary.port}/chain"
    policy = open_policy(canary)
    assert policy.download(f"{address}/2", max_bytes=MIB) == CONTENT
    canary.hits.clear()
    assert "redirects more than 3 times" in refusal(policy, f"{address}/3")
    assert len(canary.hits) == 4


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("path", ["drops", "headers"])
def test_one_deadline_holds_for_an_answer_in_drops(path: str, canary: Any) -> None:
    policy = open_policy(canary, timeout_s=0.3)
    with within(5):
        assert "within 0.3 s" in refusal(policy, f"http://{HOST}:{canary.port}/{path}")


def test_the_deadline_holds_for_a_name_server_that_does_not_answer(canary: Any) -> None:
    asked = threading.Event()
    daemons: list[bool] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        daemons.append(threading.current_thread().daemon)
        asked.wait(20)
        return [INWARDS]

    with within(10):
        refusal(
            open_policy(canary, resolve=resolve, timeout_s=0.2), f"http://{HOST}:{canary.port}/"
        )
    asked.set()
    assert canary.hits == []
    assert daemons == [True]  # a process that ends does not wait for it


def test_the_deadline_holds_for_a_host_that_takes_no_connection() -> None:
    with socket.create_server((INWARDS, 0), backlog=0) as server, ExitStack() as waiting:
        address = server.getsockname()
        for _ in range(4):  # more than may wait there: nobody else is answered
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        policy = UrlPolicy(
            allowed_hosts=(f"{HOST}:{address[1]}",),
            timeout_s=0.3,
            resolve=names(pictures=[INWARDS]),
            is_allowed_address=lambda ip: True,
        )
        with within(5):
            assert "within 0.3 s" in refusal(policy, f"http://{HOST}:{address[1]}/file")


def test_an_endless_answer_stops_at_the_limit_of_bytes(canary: Any) -> None:
    with within(20):
        assert "more than 100,000 bytes" in refusal(
            open_policy(canary), f"http://{HOST}:{canary.port}/endless", max_bytes=100_000
        )


def test_an_announced_length_is_believed_only_where_it_is_too_much(canary: Any) -> None:
    address, policy = f"http://{HOST}:{canary.port}/lies", open_policy(canary)
    assert "more than 50,000 bytes" in refusal(policy, f"{address}/99999999", max_bytes=50_000)
    # before any of it is read: less comes, and that is not what is said
    assert "more than 200,000 bytes" in refusal(policy, f"{address}/200001", max_bytes=200_000)
    assert len(policy.download(f"{address}/500", max_bytes=50_000)) == 500
    assert len(policy.download(f"{address}/500", max_bytes=500)) == 500
    assert "broke off" in refusal(policy, f"{address}/900000")  # less comes than was announced


def test_what_comes_compressed_is_not_unpacked(canary: Any) -> None:
    data = open_policy(canary).download(f"http://{HOST}:{canary.port}/bomb", max_bytes=MIB)
    assert len(data) < MIB and data.startswith(b"\x1f\x8b")


def test_what_is_not_200_is_refused_by_its_number(canary: Any) -> None:
    assert "answered 404" in refusal(open_policy(canary), f"http://{HOST}:{canary.port}/nothing")


def test_a_host_that_nobody_answers_for_is_refused(canary: Any) -> None:
    policy = open_policy(canary, f"{HOST}:9")
    assert "could not be reached" in refusal(policy, f"http://{HOST}:9/file")


def test_rows_of_ones_own_are_read_as_before(canary: Any) -> None:
    assert Fetch().read(f"http://127.0.0.1:{canary.port}/file") == CONTENT


def test_sending_gets_the_time_that_is_left_until_the_deadline() -> None:
    timeouts: list[float | None] = []

    class Recording(httpcore.NetworkStream):
        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            timeouts.append(timeout)

    stream = _DeadlineStream(Recording(), time.monotonic() + 5)
    stream.write(b"GET / HTTP/1.1", timeout=60)
    assert timeouts[0] is not None and 4 < timeouts[0] <= 5
    with pytest.raises(httpcore.ReadTimeout):
        _DeadlineStream(Recording(), time.monotonic() - 1).write(b"GET / HTTP/1.1")
