"""Which moments of a video are looked at: evenly spaced, the same ones every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from multi_token.errors import MediaError
from multi_token.media.errors import undecodable

TIME_SLACK_S = Fraction(1)
"""Seconds by which an `end` may lie behind the last frame: annotations round up."""

Frame = TypeVar("Frame")


def sample_times(
    start: Fraction, end: Fraction, *, num_frames: int | None, fps: float | None, max_frames: int
) -> list[Fraction]:
    """The middles of `num_frames` equal parts of a section, or of every 1 / `fps` seconds of it.

    A section with more than `max_frames` of the latter is cut into `max_frames` equal parts.
    """
    step = (end - start) / (num_frames or 1)
    if fps is not None:
        num_frames = max(math.floor((end - start) * Fraction(str(fps))), 1)
        step = 1 / Fraction(str(fps))
        if num_frames > max_frames or end - start < step:
            num_frames = min(num_frames, max_frames)
            step = (end - start) / num_frames
    assert num_frames is not None
    return [start + step * (2 * i + 1) / 2 for i in range(num_frames)]


def pick_frames(
    frames: Sequence[Frame],
    *,
    rate: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float,
    max_frames: int,
) -> list[Frame]:
    """The same choice from frames that are there already, `rate` of them a second.

    Raises `MediaError(kind="undecodable")`; without a rate for whatever counts in seconds.
    """
    label = "the list of frames"
    if not len(frames):
        raise undecodable(f"{label} is empty; give at least one frame")
    if rate is None:
        if fps is not None or start is not None or end is not None:
            raise undecodable(
                f"{label} has no times, which `fps`, `start` and `end` need; give it as "
                '{"array": frames, "fps": its frames a second}'
            )
        part = Fraction(0), Fraction(len(frames))
    else:
        duration = len(frames) / Fraction(str(rate))
        part = clip_bounds(duration, start, end, max_seconds=max_seconds, label=label)
    times = sample_times(*part, num_frames=num_frames, fps=fps, max_frames=max_frames)
    return [
        frames[min(math.floor(time * Fraction(str(rate or 1))), len(frames) - 1)] for time in times
    ]


def clip_bounds(
    duration: Fraction, start: float | None, end: float | None, *, max_seconds: float, label: str
) -> tuple[Fraction, Fraction]:
    """Return start and end, in seconds.

    Raises `MediaError(kind="undecodable")` for a part that is not there, or over `max_seconds`.
    """
    # by its decimal digits: 2.4 means 12/5, not the binary number next to it
    first, last = Fraction(str(start or 0)), duration if end is None else Fraction(str(end))
    if first < 0 or (end is not None and first >= last):
        raise undecodable(
            f"{label} is asked for from {float(first):g} s to {float(last):g} s; `start` must be 0 "
            "or more, and `end` behind it"
        )
    if first > 0 and first >= duration:
        raise undecodable(
            f"{label} is {float(duration):.2f} s long, and the row starts at {float(first):g} s; "
            "mend `start`"
        )
    if last > duration + TIME_SLACK_S:
        raise undecodable(
            f"{label} is {float(duration):.2f} s long, and the row ends at {float(last):g} s; "
            "mend `end`"
        )
    last = min(last, duration)
    if last - first > max_seconds:
        raise too_long_error(label, f"{float(last - first):.1f} s", max_seconds)
    return first, last


def too_long_error(label: str, seconds: str, max_seconds: float) -> MediaError:
    """More to read than the limit."""
    return undecodable(
        f"{label} has {seconds} to read, and the limit is {max_seconds:g} s; give `start` and "
        "`end` in the row, or raise max_seconds"
    )
