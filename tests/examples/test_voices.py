"""examples/parts/voices.py: audible speech, different by voice, equal in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parts.voices import SAMPLE_RATE, Voice, speak

from multi_token.errors import MultiTokenError

pytest.importorskip("espeakng_loader")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_voice_speaks_for_about_as_long_as_a_person_would() -> None:
    samples = speak("turn on the kitchen light", Voice("en-us"))
    assert samples.dtype == np.int16 and samples.ndim == 1
    assert 0.8 < len(samples) / SAMPLE_RATE < 2.0
    assert np.abs(samples.astype(int)).max() > 5_000


def test_a_faster_voice_takes_less_time_and_a_higher_one_has_a_higher_pitch() -> None:
    slow, fast = (len(speak("open the door", Voice("en-us", rate=r))) for r in (120, 240))
    assert fast < 0.7 * slow

    def pitch(height: int) -> float:
        """The shortest time after which a vowel repeats itself, as a frequency."""
        samples = speak("ah", Voice("en-us", pitch=height)).astype(float)
        middle = samples[len(samples) // 4 : len(samples) // 2]
        similar = np.correlate(middle, middle, "full")[len(middle) - 1 :]
        shortest, longest = SAMPLE_RATE // 400, SAMPLE_RATE // 60
        return SAMPLE_RATE / (shortest + int(similar[shortest:longest].argmax()))

    assert pitch(90) > 1.2 * pitch(10)


def test_the_same_calls_give_the_same_speech_in_another_process() -> None:
    code = (
        "import hashlib\n"
        "from parts.voices import Voice, speak\n"
        "names = ('en-us+f2', 'en-gb-scotland+whisper', 'en-us+m3')\n"
        "said = b''.join(speak('open the door', Voice(name)).tobytes() for name in names)\n"
        "print(hashlib.sha256(said).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=EXAMPLES
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == hashlib.sha256().digest_size * 2


def test_a_voice_that_is_not_there_is_named() -> None:
    with pytest.raises(MultiTokenError, match="has no voice 'xx-nowhere'"):
        speak("hello", Voice("xx-nowhere"))
