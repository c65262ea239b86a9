"""Things on coloured grounds and spoken questions about them, in files made on first use."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from multi_token.demo.images import render
from multi_token.demo.things import Thing
from parts.voices import Voice, record

Kind = Literal["name", "kind", "colour"]

QUESTIONS: dict[Kind, tuple[str, ...]] = {
    "name": ("What is this called?", "Tell me its name."),
    "kind": ("What kind of thing is it?", "Which group does it belong to?"),
    "colour": ("Which colour is behind it?", "Say the background colour."),
}
COLOURS = {
    "red": (225, 60, 60),
    "green": (70, 170, 80),
    "blue": (60, 100, 225),
    "yellow": (245, 220, 70),
    "pink": (250, 160, 200),
    "white": (250, 250, 250),
}
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland")


class Gallery:
    """Folder of images and spoken questions; all paths are relative to it."""

    def __init__(self, folder: Path, numbers: random.Random) -> None:
        self.folder = folder
        self.numbers = numbers

    def speech(self, kind: Kind, voice: Voice) -> str:
        """Return the path of a spoken question."""
        text = self.numbers.choice(QUESTIONS[kind])
        name = f"speech/{voice.name}-{voice.rate}-{kind}-{QUESTIONS[kind].index(text)}.wav"
        path = self.folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            record(text, voice, path)
        return name

    def image(self, thing: Thing, colour: str, index: int) -> str:
        """Return the path of a thing on a coloured ground; the same arguments give the same."""
        name = f"images/{thing.name}-{colour}-{index}.png"
        path = self.folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            # The folder's old name stays in the seed, or the images would be others than those of
            # the published results.
            own = random.Random(f"pictures/{thing.name}-{colour}-{index}.png")
            shade = tuple(max(0, min(255, c + own.randint(-12, 12))) for c in COLOURS[colour])
            image = render(
                thing.character,
                rotation=own.uniform(-25, 25),
                scale=own.uniform(0.5, 0.8),
                position=(own.random(), own.random()),
                background=(shade[0], shade[1], shade[2]),
            )
            image.save(path)
        return name
