"""The table of things and its images: all drawn, all different, the same every time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageChops

from multi_token.demo.images import render, rendering
from multi_token.demo.things import CATEGORY_PHRASES, THINGS, Thing, is_outside, things
from multi_token.errors import MultiTokenError

NAMED = {thing.name: thing for thing in THINGS}
WHITE = (255, 255, 255)


def drawn_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.difference(image, Image.new("RGB", image.size, WHITE)).getbbox()


def test_names_are_single_lower_case_words_and_nothing_is_listed_twice() -> None:
    assert all(thing.name.isalpha() and thing.name.islower() for thing in THINGS)
    assert len(NAMED) == len(THINGS) == len({thing.character for thing in THINGS})


def test_there_are_enough_things_of_each_kind() -> None:
    counts = Counter(thing.category for thing in THINGS)
    assert len(THINGS) >= 160 and counts["animal"] >= 40 and counts["fruit"] >= 12
    # The first hundred are trained, the next twenty held out: both must allow every question
    assert all(any(t.category == c for t in THINGS[:100]) for c in CATEGORY_PHRASES)
    assert len({t.category for t in THINGS[100:120]} & set(CATEGORY_PHRASES)) >= 5


def test_every_thing_draws_an_image_of_its_own() -> None:
    images = {thing.name: render(thing.character, size=64) for thing in THINGS}
    assert [name for name, image in images.items() if drawn_box(image) is None] == []
    missing = render("\U0010fffd", size=64).tobytes()  # what the font draws for unknown ones
    seen = Counter(image.tobytes() for image in images.values())
    assert missing not in seen and max(seen.values()) == 1


def test_images_have_colour() -> None:
    red, green, blue = np.asarray(render(NAMED["strawberry"].character)).reshape(-1, 3).T
    assert np.mean((red > 180) & (green < 120) & (blue < 120)) > 0.1


@pytest.mark.parametrize("position", [(0.0, 0.0), (1.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("rotation", [-25.0, 0.0, 25.0])
def test_a_drawing_is_wholly_inside_and_as_large_as_asked(
    position: tuple[float, float], rotation: float
) -> None:
    # A ladder is long and thin: the shape that would be cut first
    image = render(NAMED["ladder"].character, scale=0.6, rotation=rotation, position=position)
    box = drawn_box(image)
    assert image.size == (224, 224) and image.mode == "RGB" and box is not None
    left, top, right, bottom = box
    assert max(right - left, bottom - top) == pytest.approx(0.6 * 224, abs=2)
    if position == (0.0, 0.0):
        assert left <= 1 and top <= 1
    if position == (1.0, 1.0):
        assert right >= 223 and bottom >= 223


def test_a_rendering_depends_on_thing_number_and_seed_alone() -> None:
    dog, cat = NAMED["dog"], NAMED["cat"]
    image = rendering(dog, 3, seed=0).tobytes()
    assert image == rendering(dog, 3, seed=0).tobytes()
    assert image != rendering(dog, 4, seed=0).tobytes()
    assert image != rendering(dog, 3, seed=1).tobytes()
    assert image != rendering(cat, 3, seed=0).tobytes()


def test_an_unknown_character_is_refused_when_it_draws_nothing() -> None:
    with pytest.raises(MultiTokenError, match="draws nothing"):
        render(" ")


def test_too_many_names_are_refused() -> None:
    with pytest.raises(MultiTokenError, match=f"2 to {len(THINGS)} names, got 1000"):
        things(1000)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("dog", "a dog"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("corn", "corn"),
    ],
)
def test_a_name_is_asked_for_as_english_does(name: str, phrase: str) -> None:
    assert NAMED[name].phrase == phrase


def test_a_doubtful_image_is_never_the_wrong_one() -> None:
    tomato = Thing("tomato", "🍅", "vegetable")
    assert not is_outside(tomato, "fruit")
    assert is_outside(tomato, "animal")
