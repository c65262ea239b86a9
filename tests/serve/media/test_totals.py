"""Claims about `RequestMediaBudget` and `Modality.size_of`: limits of all items of a request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from multi_token.modalities.joint import JointModality
from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import SIZE_UNITS, RequestMediaBudget, RequestMediaLimits
from multi_token.testing.files import noise_frames, tone, write_video
from tests.serve.asking import QUESTION, VECTOR, asked, content_of, fault_of
from tests.serve.running_server import RunningServer, data_url, png, running
from tests.serve.untrusted import UNTRUSTED

LIMITS = RequestMediaLimits(
    max_bytes=20_000,
    max_pixels=2_000,
    max_frames=10,
    max_seconds=2.5,
    max_characters=100,
    max_prepared_bytes=1_000_000,
    max_tokens=40,
)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("bytes", 15_000, "30,000 bytes together"),
        ("pixels", 1_500, "3,000 pixels"),
        ("frames", 6, "12 frames"),
        ("seconds", 1.34, "2.7 seconds of audio"),
        ("characters", 60, "120 characters"),
        ("prepared_bytes", 600_000, "1,200,000 bytes of encoder input"),
        ("tokens", 21, "42 tokens"),
    ],
)
def test_the_error_of_a_sum_over_its_limit_names_the_limit_and_a_remedy(
    name: str, size: float, words: str
) -> None:
    budget = RequestMediaBudget(LIMITS, 3)
    budget.add(**{name: size})
    with pytest.raises(ServeError) as refused:
        budget.add(**{name: size})
    message = str(refused.value)
    assert refused.value.status == 413 and refused.value.code == "media_too_large_together"
    assert words in message and "the 3 media items" in message and "send fewer" in message
    assert f"the limit is {getattr(LIMITS, f'max_{name}'):,}" in message
    assert len(message) < 300, "longer ones are cut off"


def test_every_size_has_a_limit_and_every_limit_a_size() -> None:
    assert {f"max_{name}" for name in SIZE_UNITS} == set(RequestMediaLimits.model_fields)


def test_an_item_that_comes_alone_has_its_own_limits_only() -> None:
    RequestMediaBudget(LIMITS, 1).add(pixels=10**9, seconds=600.0, tokens=10**6)


@pytest.mark.slow
def test_sizes_are_measured_on_decoded_items(
    all_modalities: dict[str, Any], tmp_path: Path
) -> None:
    def size(name: str, source: Any) -> dict[str, float]:
        return all_modalities[name].size_of(all_modalities[name].load(source, UNTRUSTED))

    sound = {"array": tone(1.5, 8_000), "sampling_rate": 8_000}
    video = Path(write_video(tmp_path / "a.mp4", noise_frames(20))).read_bytes()
    frames = all_modalities["video"].load(video, UNTRUSTED)
    pixels = sum(frame.width * frame.height for frame in frames)
    for name in ("image", "joint"):
        assert size(name, png(size=24)) == {"pixels": 576}
    for name in ("speech", "sound"):
        assert size(name, sound) == {"seconds": pytest.approx(1.5, abs=0.01)}
    short = {"array": tone(0.5, 8_000), "sampling_rate": 8_000}
    joint = JointModality(encoder=all_modalities["sound"].encoder)
    measured = joint.size_of(joint.load({"audio": short}, UNTRUSTED))
    assert measured == {"seconds": pytest.approx(0.5, abs=0.01)}
    assert size("video", video) == {"pixels": pixels, "frames": len(frames)}
    assert size("document", {"text": "a few words"}) == {"characters": 11}
    assert size("joint", {"text": "a lamp"}) == {"characters": 6}
    assert size("vector", [1.0, 2.0, 3.0, 4.0]) == {}
    assert size("timeseries", [[1.0, 2.0]] * 8) == {}


# --- a server


@pytest.fixture(scope="module")
def small(served_model: Any) -> Iterator[RunningServer]:
    with running(served_model, media_totals=LIMITS) as server:
        yield server


def ask(server: RunningServer, *parts: Any) -> httpx.Response:
    body = {"messages": asked(*parts, QUESTION), "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def images(number: int, size: int = 24) -> list[Any]:
    """Images of different colours, so that no cached one is among them."""
    addresses = [data_url(png((i % 256, i * 7 % 256, 9), size)) for i in range(number)]
    return [{"type": "image_url", "image_url": address} for address in addresses]


def num_decoded(server: RunningServer) -> int:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(r'media_decode_seconds_count\{modality="image"\} (\d+)', text)
    return int(found[1]) if found else 0


@pytest.mark.slow
def test_images_over_the_limit_together_are_refused_and_the_next_are_not(
    small: RunningServer,
) -> None:
    content_of(ask(small, *images(3)))  # 1,728 pixels
    answer = ask(small, *images(4))
    assert answer.status_code == 413
    error = fault_of(answer)
    assert error["code"] == "media_too_large_together" and error["param"] == "messages"
    assert "2,304 pixels" in error["message"] and "2,000" in error["message"]
    content_of(ask(small, *images(3)))


@pytest.mark.slow
def test_one_large_image_has_its_own_limits_only(small: RunningServer) -> None:
    content_of(ask(small, *images(1, size=64)))  # 4,096 pixels


@pytest.mark.slow
def test_tokens_of_all_items_have_a_limit(small: RunningServer) -> None:
    content_of(ask(small, *[VECTOR] * 20))  # two tokens each
    answer = ask(small, *[VECTOR] * 21)
    assert answer.status_code == 413 and "42 tokens" in fault_of(answer)["message"]


@pytest.mark.slow
def test_bytes_are_counted_before_anything_is_decoded(small: RunningServer) -> None:
    before = num_decoded(small)
    # not an image, and never decoded
    bulk = {"type": "image_url", "image_url": data_url(b"x" * 12_000)}
    answer = ask(small, bulk, bulk)
    assert answer.status_code == 413 and "bytes" in fault_of(answer)["message"]
    assert num_decoded(small) == before


@pytest.mark.slow
def test_items_after_the_sum_is_exceeded_are_not_decoded(small: RunningServer) -> None:
    before = num_decoded(small)
    assert ask(small, *images(30)).status_code == 413
    assert num_decoded(small) - before < 10
    assert small.wait_until(lambda: small.service.prompts.media_pool.num_waiting == 0)
    assert small.wait_until(lambda: small.service.admission.num_admitted == 0)
