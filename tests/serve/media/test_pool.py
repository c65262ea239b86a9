"""serve/media/pool.py: worker processes decode items under limits, and a bad item fails alone.

The modality `trial` is a plug-in whose items are commands to the process that decodes them.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multi_token import registry
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.modalities.vector import VectorModality
from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import MediaLimits
from multi_token.serve.media.pool import MediaPool
from multi_token.testing.files import recordings, write_pdf
from multi_token.types import Media, Prepared
from tests.serve.untrusted import MIB, SECRET, children, is_gone, text_of

pytestmark = pytest.mark.slow


def ask(pool: MediaPool, source: Any, modality: str = "trial") -> Prepared:
    return asyncio.run(pool.prepare(Media(modality, source)))


def refusal(pool: MediaPool, source: Any, modality: str = "trial") -> ServeError:
    """The error; its message contains nothing about the machine."""
    with pytest.raises(ServeError) as caught:
        ask(pool, source, modality)
    message = str(caught.value)
    assert re.fullmatch(r"[\x20-\x7e]{1,300}", message)
    assert "0x" not in message and not re.search(r"(^|\s)\S*/\S", message), message
    assert SECRET not in message
    return caught.value


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_a_sandboxed_worker_reads_every_format_of_recordings(
    pool: MediaPool, modalities: dict[str, Any]
) -> None:
    series = modalities["series"]
    for suffix, data in recordings().items():
        here = series.prepare(series.load(data, Fetch()))
        assert torch.equal(ask(pool, data, "series").inputs["patches"], here.inputs["patches"])
        if suffix != "csv":  # half of a table is a table
            assert refusal(pool, data[: len(data) // 2], "series").status == 400


def test_a_sandboxed_worker_shows_pages_of_a_pdf(
    pool: MediaPool, modalities: dict[str, Any], tmp_path: Path
) -> None:
    data = write_pdf(tmp_path / "a.pdf", ["One page.", "Another one."]).read_bytes()
    source = {"bytes": data, "page": 2}
    image = modalities["image"]
    here = image.prepare(image.load(source, Fetch()))
    assert torch.equal(
        ask(pool, source, "image").inputs["pixel_values"], here.inputs["pixel_values"]
    )
    assert "name the one to show" in str(refusal(pool, data, "image"))


def test_a_worker_prepares_an_item_like_this_process(
    pool: MediaPool, modalities: dict[str, Any]
) -> None:
    for name, source in (("image", png()), ("vector", [1, 2.5, -3]), ("trial", b"hello")):
        modality = modalities[name]
        here = modality.prepare(modality.load(source, Fetch()))
        there = ask(pool, source, name)
        assert there.num_features == here.num_features
        assert there.inputs.keys() == here.inputs.keys()
        assert all(torch.equal(there.inputs[key], here.inputs[key]) for key in here.inputs)


def test_concurrent_items_get_their_own_results(pool: MediaPool) -> None:
    async def all_of_them() -> list[Prepared]:
        items = [Media("vector", [i, i, i]) for i in range(40)]
        return await asyncio.gather(*map(pool.prepare, items))

    firsts = [prepared.inputs["values"][0, 0].item() for prepared in asyncio.run(all_of_them())]
    assert firsts == list(range(40))


@pytest.mark.parametrize("order", ["abort", "exit", "segfault"])
def test_an_item_that_ends_its_decoder_fails_alone(pool: MediaPool, order: str) -> None:
    async def both() -> list[Any]:
        sources = [b"hello", order.encode(), b"hello", b"hello"]
        waiting = (pool.prepare(Media("trial", source)) for source in sources)
        return await asyncio.gather(*waiting, return_exceptions=True)

    first, ended, *others = asyncio.run(both())
    assert isinstance(ended, ServeError)
    assert (ended.status, ended.code) == (422, "invalid_media")
    assert [text_of(prepared) for prepared in (first, *others)] == ["hello"] * 3


def test_an_item_over_the_time_limit_is_stopped(pool: MediaPool) -> None:
    error = refusal(pool, b"spin")
    assert (error.status, error.code) == (422, "media_too_slow")
    assert "longer than 2 s" in str(error)
    assert text_of(ask(pool, b"hello")) == "hello"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
@pytest.mark.parametrize("order", ["fill", "fill_torch"])
def test_an_item_over_the_memory_limit_is_refused(pool: MediaPool, order: str) -> None:
    error = refusal(pool, f"{order} {400 * MIB}".encode())
    assert (error.status, error.code) == (422, "media_too_large")
    assert ask(pool, f"{order} {50 * MIB}".encode()).num_features > 0


@pytest.mark.parametrize("order", ["raise secret", "interrupt", "recurse"])
def test_an_exception_of_a_decoder_becomes_a_400_without_its_text(
    pool: MediaPool, order: str
) -> None:
    error = refusal(pool, order.encode())
    assert error.status == 400
    assert "Error" not in str(error)
    assert text_of(ask(pool, b"hello")) == "hello"


def test_a_refusal_is_a_400_without_paths_and_control_characters(pool: MediaPool) -> None:
    error = refusal(pool, b"refuse secret")
    assert (error.status, error.code) == (400, "invalid_media")


def test_output_of_a_library_is_not_part_of_a_reply(pool: MediaPool) -> None:
    assert text_of(ask(pool, b"print 200000")) == "print"


def test_encoder_input_over_the_limit_is_refused(pool: MediaPool) -> None:
    assert "the limit is 1,048,576" in str(refusal(pool, b"letters 1048577"))
    assert ask(pool, b"letters 1000000").num_features == 1_000_000


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(SECRET)
    return file


def test_a_decoder_opens_no_file_even_if_it_tries(pool: MediaPool, secret_file: Path) -> None:
    link = secret_file.parent / "link"
    link.symlink_to(secret_file)
    inside = Path(sys.prefix) / "lib" / ".." / ".." / ".." / ".." / ".." / "etc" / "passwd"
    beside = Path(sys.modules["a_sample_modality"].__file__ or "").parent / "beside.txt"
    beside.write_text(SECRET)
    others = ("/etc/passwd", "/proc/self/environ", "/dev/zero", "README.md", "pyproject.toml")
    for path in (secret_file, link, inside, beside, *others):
        refusal(pool, f"read {path}".encode())
    refusal(pool, f"list {secret_file.parent}".encode())


def test_a_decoder_changes_no_file(pool: MediaPool, tmp_path: Path, secret_file: Path) -> None:
    refusal(pool, f"write {tmp_path / 'new'}".encode())
    refusal(pool, f"write {Path(torch.__file__).parent / 'new'}".encode())
    refusal(pool, f"remove {secret_file}".encode())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_decoder_reaches_no_network_and_no_program(pool: MediaPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        refusal(pool, f"connect {server.getsockname()[1]}".encode())
        with pytest.raises(TimeoutError):
            server.accept()
    refusal(pool, b"run id")


def test_fetch_in_a_decoder_reads_neither_files_nor_addresses(
    pool: MediaPool, secret_file: Path
) -> None:
    for source in (secret_file, secret_file.as_uri(), "http://127.0.0.1/", "https://example.org/"):
        assert refusal(pool, f"fetch {source}".encode()).status == 400
    assert text_of(ask(pool, b"fetch data:,hello")) == "hello"


def test_a_decoder_inherits_no_keys_and_tokens(pool: MediaPool) -> None:
    environment = text_of(ask(pool, b"environment"))
    assert "PATH=" in environment
    assert SECRET not in environment


def test_a_path_never_gets_to_a_decoder(pool: MediaPool, secret_file: Path) -> None:
    relative = os.path.relpath(secret_file)
    for path in (str(secret_file), secret_file, secret_file.as_uri(), relative, "config.json", ""):
        shapes: list[Any] = [
            path,
            {"path": path},
            {"bytes": path},
            {"array": [path]},
            [path],
            [[path]],
        ]
        for source in shapes:
            for name in ("trial", "image", "vector"):
                error = refusal(pool, source, name)
                assert error.status == 400
                assert "the server never reads its own files" in str(error)


def test_texts_that_are_not_sources_pass(pool: MediaPool) -> None:
    assert text_of(ask(pool, "do hello")) == "hello"  # this modality takes a string as a text
    source = {"lead": "II", "unit": "mV", "bytes": b"\x00\xff", "also": [None, True, {"a": [1.5]}]}
    assert text_of(ask(pool, source)) == repr(source)


def test_data_urls_are_decoded_before_the_worker(pool: MediaPool) -> None:
    assert text_of(ask(pool, "data:;base64,aGVsbG8=")) == "hello"
    source = {"path": "data:,a", "list": ["data:,b", {"bytes": "data:,c"}]}
    assert text_of(ask(pool, source)) == repr({"path": b"a", "list": [b"b", {"bytes": b"c"}]})


def test_a_decoder_is_replaced_after_1000_items_without_an_error(pool: MediaPool) -> None:
    async def counts() -> list[int]:
        items = [Media("trial", b"count")] * 1_001
        return [
            int(text_of(prepared)) for prepared in await asyncio.gather(*map(pool.prepare, items))
        ]

    ask(pool, b"count")
    numbers = asyncio.run(counts())
    assert numbers.count(1) == 1  # a new fork starts to count at 1
    assert max(numbers) <= 1_000


def test_too_large_and_invalid_sources_are_refused_before_a_worker(pool: MediaPool) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for source, words in (
        (b"x" * (4 * MIB + 1), "4,194,305 bytes"),
        ([b"x" * (3 * MIB)] * 2, "6,291,456 bytes"),
        ("data:," + "x" * (4 * MIB + 1), "the limit is 4,194,304"),
        ([0.5] * 1001, "more than 1,000 numbers"),
        ([[0.5] * 200] * 6, "more than 1,000 numbers"),
        (deep, "levels deep"),
        ({1: 2}, "strings as keys"),
        (object(), "got object"),
        (Image.new("RGB", (4, 4)), "got Image"),
        ("http://127.0.0.1/a.png", "URLs are not read here"),
    ):
        error = refusal(pool, source)
        assert error.status == 400
        assert words in str(error)


def test_an_unknown_modality_is_a_400(pool: MediaPool) -> None:
    assert "no modality named 'smell'" in str(refusal(pool, b"", "smell"))


def test_numbers_of_any_kind_are_refused_or_finite(pool: MediaPool) -> None:
    for source in ([float("nan")] * 3, [float("inf")] * 3, [10**400] * 3, [1e308] * 3, [], [None]):
        assert refusal(pool, source, "vector").status == 400


def test_a_stopped_pool_raises_503(modalities: dict[str, Any]) -> None:
    pool = MediaPool(modalities)
    assert refusal(pool, b"hello").status == 503


def test_a_pool_lowers_the_limits_of_its_modalities(pool: MediaPool) -> None:
    assert pool.modalities["image"].max_pixels == MediaLimits().max_pixels  # type: ignore[reportAttributeAccessIssue]


def test_without_forks_a_process_that_ended_is_started_again(trial: Any) -> None:
    modalities = {"trial": trial(), "vector": VectorModality(dim=3)}
    pool = MediaPool(modalities, num_workers=2, timeout_s=2.0, fork=False)
    pool.start()
    try:
        for order, code in (("abort", "invalid_media"), ("spin", "media_too_slow")):
            assert refusal(pool, order.encode()).code == code
            assert text_of(ask(pool, b"hello")) == "hello"
        refusal(pool, b"read /etc/passwd")

        async def many() -> list[Prepared]:
            items = [Media("vector", [i, i, i]) for i in range(40)]
            return await asyncio.gather(*map(pool.prepare, items))

        assert [int(p.inputs["values"][0, 0]) for p in asyncio.run(many())] == list(range(40))
    finally:
        pool.stop()


def test_stopping_fails_waiting_items_and_leaves_no_process(trial: Any) -> None:
    pool = MediaPool({"trial": trial()}, num_workers=1)
    pool.start()

    async def stop_in_between() -> list[Any]:
        sources = [b"spin", b"hello", b"hello"]
        waiting = [asyncio.ensure_future(pool.prepare(Media("trial", s))) for s in sources]
        while pool.num_waiting < 2:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(pool.stop)
        return await asyncio.gather(*waiting, return_exceptions=True)

    process = pool._workers[0]._process
    assert process is not None
    pids = [process.pid, *children(process.pid)]
    errors = asyncio.run(stop_in_between())
    assert [error.status for error in errors] == [503] * 3
    assert all(is_gone(pid) for pid in pids)


def test_a_modality_that_a_worker_cannot_build_is_named_at_the_start(trial: Any) -> None:
    class Local(trial):  # defined in a function, so no other process can import it
        type: Any = "local"

    registry.register_modality("local", Local)
    try:
        with pytest.raises(MultiTokenError, match="did not start: AttributeError"):
            MediaPool({"local": Local()}, num_workers=1).start()
    finally:
        registry._registered["modality"].pop("local")
