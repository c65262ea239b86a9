"""Claims about media/fetch.py: what it reads, and the sentence for everything it does not."""

from __future__ import annotations

import base64
import os
import pickle
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch

CONTENT = b"the bytes of an image"


class Site(BaseHTTPRequestHandler):
    """A small web site on this machine."""

    def do_GET(self) -> None:
        if self.path == "/file":
            self._answer(200, CONTENT)
        elif self.path == "/moved":
            self._answer(302, b"", Location="/file")
        elif self.path == "/to-a-file":
            self._answer(302, b"", Location="file:///etc/hostname")
        elif self.path == "/circle":
            self._answer(302, b"", Location="/circle")
        elif self.path == "/endless":
            self.send_response(200)  # no Content-Length: the limit must hold while reading
            self.end_headers()
            self._drip(b"x" * 4096, pause_s=0.0)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            self._drip(b"x", pause_s=0.02)
        else:
            self._answer(404, b"nothing here")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self, piece: bytes, *, pause_s: float) -> None:
        gone = threading.Event()
        for _ in range(5000):
            try:
                self.wfile.write(piece)
            except OSError:  # the client has had enough, which is the claim
                return
            gone.wait(pause_s)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(fetch: Fetch, source: Any) -> str:
    with pytest.raises(MediaError) as caught:
        fetch.read(source)
    assert caught.value.kind == "missing_file"
    return str(caught.value)


def test_a_path_is_read_as_text_and_as_a_path_object(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(CONTENT)
    assert Fetch().read(str(file)) == CONTENT
    assert Fetch().read(file) == CONTENT


def test_a_relative_path_starts_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.bin").write_bytes(CONTENT)
    assert Fetch(root=str(tmp_path)).read("images/a.bin") == CONTENT


def test_without_a_root_a_relative_path_starts_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    assert Fetch().read("a.bin") == CONTENT


def test_a_file_address_is_percent_decoded(tmp_path: Path) -> None:
    file = tmp_path / "a b.bin"
    file.write_bytes(CONTENT)
    assert "%20" in file.as_uri()
    assert Fetch().read(file.as_uri()) == CONTENT


def test_a_file_address_of_another_machine_is_refused() -> None:
    assert "'elsewhere'" in refusal(Fetch(), "file://elsewhere/a.bin")


def test_bytes_are_returned_as_they_are() -> None:
    assert Fetch().read(CONTENT) == CONTENT
    assert Fetch().read(bytearray(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64," + base64.b64encode(CONTENT).decode(),
        "DATA:;BASE64," + base64.b64encode(CONTENT).decode(),
        "data:image/png;base64,\n" + base64.encodebytes(CONTENT).decode(),
        "data:text/plain,the%20bytes%20of%20an%20image",
    ],
)
def test_a_data_uri_is_decoded(uri: str) -> None:
    assert Fetch().read(uri) == CONTENT


def test_a_data_uri_that_was_cut_off_is_refused_in_a_short_sentence() -> None:
    uri = "data:image/png;base64," + base64.b64encode(CONTENT * 1000).decode()[:-1]
    message = refusal(Fetch(), uri)
    assert "not base64" in message
    assert len(message) < 500


def test_a_data_uri_without_a_comma_is_refused() -> None:
    assert "no comma" in refusal(Fetch(), "data:image/png;base64")


def test_a_missing_file_is_named_by_its_whole_path_and_the_root(tmp_path: Path) -> None:
    message = refusal(Fetch(root=str(tmp_path)), "images/a.png")
    assert f"no file at {tmp_path / 'images' / 'a.png'}" in message
    assert "the row says images/a.png" in message
    assert f"relative paths start at {tmp_path}" in message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "found a folder" in refusal(Fetch(), tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refusal(Fetch(), tmp_path / "pipe")


def test_base64_without_its_data_header_is_refused_in_a_short_sentence() -> None:
    assert len(refusal(Fetch(), "iVBORw0KGgo" * 1000)) < 500


@pytest.mark.parametrize("source", ["", "a\0b.png", 7, None, ["a.png"], {"url": "a.png"}])
def test_what_is_no_source_is_refused(source: Any) -> None:
    assert "expected a file path" in refusal(Fetch(), source)


def test_another_scheme_is_named() -> None:
    assert "starts with s3://" in refusal(Fetch(), "s3://bucket/a.png")


def test_a_file_over_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" * 11)
    (tmp_path / "b.bin").write_bytes(b"x" * 10)
    fetch = Fetch(root=str(tmp_path), max_bytes=10)
    assert "the limit is 10" in refusal(fetch, "a.bin")
    assert fetch.read("b.bin") == b"x" * 10


def test_bytes_and_data_uris_over_the_limit_are_refused() -> None:
    fetch = Fetch(max_bytes=10)
    assert "the limit is 10" in refusal(fetch, b"x" * 11)
    uri = "data:;base64," + base64.b64encode(b"x" * 11).decode()
    assert "the limit is 10" in refusal(fetch, uri)
    assert "the limit is 10" in refusal(fetch, "data:," + "x" * 11)
    assert fetch.read("data:;base64," + base64.b64encode(b"x" * 10).decode()) == b"x" * 10


def test_paths_can_be_forbidden(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    fetch = Fetch(root=str(tmp_path), allow_paths=False)
    for source in ("a.bin", (tmp_path / "a.bin").as_uri(), tmp_path / "a.bin"):
        assert "not read here" in refusal(fetch, source)
    assert fetch.read(CONTENT) == CONTENT


def test_a_web_address_is_downloaded(site: str) -> None:
    assert Fetch().read(f"{site}/file") == CONTENT


def test_a_redirect_is_followed(site: str) -> None:
    assert Fetch().read(f"{site}/moved") == CONTENT


def test_a_redirect_never_leads_to_a_file_of_this_machine(site: str) -> None:
    assert "cannot download" in refusal(Fetch(), f"{site}/to-a-file")


def test_redirects_in_a_circle_end(site: str) -> None:
    assert "redirect" in refusal(Fetch(), f"{site}/circle")


def test_an_answer_that_is_not_200_is_named(site: str) -> None:
    assert "answered 404 Not Found" in refusal(Fetch(), f"{site}/nothing")


def test_a_download_over_its_announced_limit_is_refused(site: str) -> None:
    assert "the limit is 10" in refusal(Fetch(max_bytes=10), f"{site}/file")


def test_a_download_without_an_announced_size_stops_at_the_limit(site: str) -> None:
    assert "the limit is 100,000" in refusal(Fetch(max_bytes=100_000), f"{site}/endless")


def test_a_download_that_drips_ends_at_the_deadline(site: str) -> None:
    start = time.monotonic()
    assert "was not done" in refusal(Fetch(timeout_s=0.3), f"{site}/slow")
    assert time.monotonic() - start < 10


def test_a_url_without_a_server_is_refused_with_a_sentence() -> None:
    assert "cannot download http://127.0.0.1:9/" in refusal(
        Fetch(timeout_s=5), "http://127.0.0.1:9/a"
    )


@pytest.mark.parametrize("source", ["http://", "http://[", "https://a b/", "http://\udcff/"])
def test_an_address_that_is_none_is_refused_with_a_sentence(source: str) -> None:
    assert "cannot download" in refusal(Fetch(timeout_s=5), source)


def test_web_addresses_can_be_forbidden(site: str) -> None:
    assert "not read here" in refusal(Fetch(allow_urls=False), f"{site}/file")


def test_a_local_path_is_known_without_opening_it(tmp_path: Path) -> None:
    fetch = Fetch(root=str(tmp_path))
    assert fetch.local_path("b/../a.png") == tmp_path / "a.png"
    assert fetch.local_path((tmp_path / "a.png").as_uri()) == tmp_path / "a.png"
    for elsewhere in ("http://a/b.png", "data:,a", b"a", 7, ""):
        assert fetch.local_path(elsewhere) is None


def test_it_travels_into_data_workers() -> None:
    fetch = Fetch(root="images", max_bytes=7)
    assert pickle.loads(pickle.dumps(fetch)) == fetch  # noqa: S301 - our own


def test_a_file_may_be_read_in_part(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abcdef")
    fetch = Fetch(root=str(tmp_path), max_bytes=6)
    for source in ("a.bin", b"abcdef", "data:;base64,YWJjZGVm"):
        with fetch.open(source) as file:
            assert file.read(2) == b"ab" and file.seek(0) == 0
    for source in ("gone.bin", str(tmp_path), "ftp://a/b", 3):
        with pytest.raises(MediaError):
            fetch.open(source)
    with pytest.raises(MediaError, match="the limit is 5"):
        Fetch(root=str(tmp_path), max_bytes=5).open("a.bin")
    with pytest.raises(MediaError, match="files of this machine are not read here"):
        Fetch(root=str(tmp_path), allow_paths=False).open("a.bin")
