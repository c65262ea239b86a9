"""Claims about the list of hosts in media/safe_http.py: what an entry lets in, and what is none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.safe_http import UrlPolicy


def test_the_list_means_hosts_below_and_ports_as_it_says() -> None:
    policy = UrlPolicy(allowed_hosts=("a.example", "*.b.example", "c.example:8080"))
    listed = [
        ("a.example", 443, True), ("x.b.example", 80, True), ("y.x.b.example", 80, True),
        ("c.example", 8080, False),
    ]  # fmt: skip
    others = [
        ("x.a.example", 443, True), ("a.example", 8080, False), ("b.example", 80, True),
        ("xb.example", 80, True), ("c.example", 80, True), ("a.example.", 80, True),
        ("a.exampl", 80, True), ("", 80, True),
    ]  # fmt: skip
    assert all(policy._is_allowed_host(*entry) for entry in listed)
    assert not any(policy._is_allowed_host(*entry) for entry in others)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_the_usual_port_may_be_named_in_the_list_and_left_out_of_the_address(
    scheme: str, port: int
) -> None:
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return []

    for entry in ("A.example", f"a.example:{port}"):
        policy = UrlPolicy(allowed_hosts=(entry,), resolve=resolve)
        for address in (f"{scheme}://a.example/x", f"{scheme}://A.example:{port}/x"):
            with pytest.raises(MediaError, match="on the public internet"):
                policy.download(address, max_bytes=1)
    assert asked == [("a.example", port)] * 4
    other = {"http": 443, "https": 80}[scheme]
    policy = UrlPolicy(allowed_hosts=("a.example", f"a.example:{port}"), resolve=resolve)
    with pytest.raises(MediaError, match="not on the list"):
        policy.download(f"{scheme}://a.example:{other}/x", max_bytes=1)
    assert len(asked) == 4


@pytest.mark.parametrize(
    "entry", ["*", "", "http://a.example", "a.example/x", "a@b.example", "*.", "[::1]"]
)
def test_an_entry_that_is_no_host_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(MultiTokenError, match="the name of a host alone"):
        UrlPolicy(allowed_hosts=(entry,))
