"""Games of gymnasium's LunarLander, many at once, and a video of one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from multi_token.errors import MultiTokenError
from parts import INSTALL_EXAMPLES

ACTIONS = ("wait", "left", "main", "right")
"""The environment's four actions, in its order: no engine, or one of three."""
HOLD = 3
"""Frames for which an action is held: the heuristic pilot flies as well, with a third of the
decisions."""
_FRAMES_PER_SECOND = 50


@dataclass
class Flight:
    """One game, from its seed until it ends."""

    seed: int
    state: np.ndarray = field(init=False)
    """float32 [8]: position, speed, angle, turning, and contact of each leg."""
    actions: list[int] = field(default_factory=list)
    total: float = 0.0
    """The return: the sum of all rewards. 200 counts as solved."""
    landed: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        self.env = _environment()
        self.state, _ = self.env.reset(seed=self.seed)

    def act(self, action: int, on_frame: Callable[[], None] | None = None) -> None:
        """Hold an action for `HOLD` frames, or until the game ends."""
        self.actions.append(action)
        for _ in range(HOLD):
            self.state, reward, ended, out_of_time, _ = self.env.step(action)
            self.total += float(reward)
            self.landed = bool(ended and reward == 100)  # the reward for coming to rest
            self.done = bool(ended or out_of_time)
            if on_frame is not None:
                on_frame()
            if self.done:
                self.env.close()
                return

    def frame(self) -> Image.Image:
        """Return the screen, 600 x 400."""
        return Image.fromarray(self.env.render())


Pilot = Callable[[Sequence[Flight]], Sequence[int]]
"""Flights in progress -> the action of each."""


def fly(pilot: Pilot, seeds: Sequence[int]) -> list[Flight]:
    """Fly all games step by step together, so that a pilot decides for many at once."""
    flights = [Flight(seed) for seed in seeds]
    while running := [flight for flight in flights if not flight.done]:
        for flight, action in zip(running, pilot(running), strict=True):
            flight.act(action)
    return flights


def heuristic_pilot(flights: Sequence[Flight]) -> list[int]:
    """Return the actions of the environment's own pilot: a few lines of geometry."""
    from gymnasium.envs.box2d.lunar_lander import heuristic

    return [int(heuristic(flight.env, flight.state)) for flight in flights]


def write_video(flight: Flight, path: Path) -> None:
    """Fly a finished flight's actions again and write an .mp4 (H.264) of the screen.

    The same seed and the same actions give the same game.
    """
    import av

    again = Flight(flight.seed)
    font = ImageFont.load_default(26)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=_FRAMES_PER_SECOND)
        stream.width, stream.height = again.frame().size
        stream.pix_fmt = "yuv420p"

        def add_frame() -> None:
            image = again.frame()
            ImageDraw.Draw(image).text((16, 12), ACTIONS[again.actions[-1]], "white", font)
            # Frame by frame: a flight in memory would take hundreds of megabytes.
            container.mux(stream.encode(av.VideoFrame.from_image(image)))

        for action in flight.actions:
            again.act(action, on_frame=add_frame)
        container.mux(stream.encode(None))


def _environment() -> Any:
    for package in ("gymnasium", "Box2D", "pygame"):
        if importlib.util.find_spec(package) is None:
            raise MultiTokenError(f"the games need the package {package}: {INSTALL_EXAMPLES}")
    # Not at the top: the environment's packages are an extra of the examples.
    import gymnasium

    # Frames are drawn without a display.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    return gymnasium.make("LunarLander-v3", render_mode="rgb_array")
