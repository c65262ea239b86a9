"""Times at which the frames of a video are taken: evenly spaced, and the same every time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from PIL import Image

from multi_token.errors import MediaError
from multi_token.media.errors import undecodable

TIME_SLACK_S = Fraction(1)
"""Seconds by which an `end` may lie after the last frame: annotations round up."""

Frame = TypeVar("Frame")


class Frames(list[Image.Image]):
    """Frames that were taken of a video.

    Attributes:
        times: Second at which each is shown, counted from the first frame of the video; None for
            frames without times.
    """

    def __init__(self, frames: Iterable[Image.Image], times: Iterable[float | None]) -> None:
        super().__init__(frames)
        self.times = list(times)


@dataclass(frozen=True)
class FrameSampling:
    """Frames to take of a video: `num_frames` of it, or `fps` of each second; and the limits."""

    num_frames: int | None = None
    fps: float | None = None
    start: float | None = None
    """First second of the part to read."""
    end: float | None = None
    """Last second of the part to read; None is the end of the video."""
    max_seconds: float = math.inf
    max_frames: int = 1 << 20

    def times(self, duration: Fraction, label: str) -> list[Fraction]:
        """Return the times, in seconds, of the frames to take of a video of this duration.

        Raises MediaError for a part that does not exist, or is over `max_seconds`.
        """
        return self.spread(*self._bounds(duration, label))

    def spread(self, start: Fraction, end: Fraction) -> list[Fraction]:
        """Return the middles of `num_frames` equal parts, or of every 1 / `fps` seconds.

        A part with more than `max_frames` of the latter is cut into `max_frames` equal parts.
        """
        num_frames, step = self.num_frames or 1, (end - start) / (self.num_frames or 1)
        if self.fps is not None:
            # Fractions, because float times miss a frame at the border of two.
            step = 1 / Fraction(str(self.fps))
            num_frames = max(math.floor((end - start) / step), 1)
            # Spread over the part, and not cut off, so that the end of a long video is seen too.
            if num_frames > self.max_frames or end - start < step:
                num_frames = min(num_frames, self.max_frames)
                step = (end - start) / num_frames
        return [start + step * (2 * i + 1) / 2 for i in range(num_frames)]

    def _bounds(self, duration: Fraction, label: str) -> tuple[Fraction, Fraction]:
        # By the decimal digits: 2.4 means 12/5, and not the nearest binary number.
        first = Fraction(str(self.start or 0))
        last = duration if self.end is None else Fraction(str(self.end))
        if first < 0 or (self.end is not None and first >= last):
            raise undecodable(
                f"{label} is to be read from {float(first):g} s to {float(last):g} s; `start` must "
                "be 0 or more, and `end` after it"
            )
        length = f"{label} is {float(duration):.2f} s long, and the row"
        if first > 0 and first >= duration:
            raise undecodable(f"{length} starts at {float(first):g} s; fix `start`")
        if last > duration + TIME_SLACK_S:
            raise undecodable(f"{length} ends at {float(last):g} s; fix `end`")
        last = min(last, duration)
        if last - first > self.max_seconds:
            raise self.too_long_error(label, f"{float(last - first):.1f} s")
        return first, last

    def too_long_error(self, label: str, seconds: str) -> MediaError:
        """Return the error of a video with more to read than `max_seconds`."""
        return undecodable(
            f"{label} has {seconds} to read, and the limit is {self.max_seconds:g} s; give `start` "
            "and `end` in the row, or raise max_seconds"
        )


def pick_frames(
    frames: Sequence[Frame], sampling: FrameSampling, *, rate: float | None = None
) -> list[Frame]:
    """Return the frames to take of a list with `rate` frames per second.

    Raises MediaError for an empty list, and for one without a rate if seconds are asked for.
    """
    label = "the list of frames"
    if not len(frames):
        raise undecodable(f"{label} is empty; give at least one frame")
    if rate is not None:
        times = sampling.times(len(frames) / Fraction(str(rate)), label)
    elif (sampling.fps, sampling.start, sampling.end) != (None, None, None):
        raise undecodable(
            f"{label} has no times, which `fps`, `start` and `end` need; give it as "
            '{"array": frames, "fps": its frames a second}'
        )
    else:
        # Without a rate, one frame counts as one second.
        times = sampling.spread(Fraction(0), Fraction(len(frames)))
    last = len(frames) - 1
    return [frames[min(math.floor(time * Fraction(str(rate or 1))), last)] for time in times]
