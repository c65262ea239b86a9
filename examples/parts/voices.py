"""Speech of many voices, made by eSpeak NG in this process."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multi_token.errors import MultiTokenError
from parts import INSTALL_EXAMPLES

SAMPLE_RATE = 22_050

# of espeak-ng/speak_lib.h
_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _PITCH = 1, 3
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """A voice of eSpeak NG: an accent and, after a plus, the speaker: `en-us+f3`."""

    name: str
    pitch: int = 50
    """0 to 99."""
    rate: int = 175
    """Words a minute, 80 to 450."""


def speak(text: str, voice: Voice) -> np.ndarray[Any, Any]:
    """int16 [samples] at `SAMPLE_RATE`.

    The synthesizer carries some state from one call to the next: the same calls in the same order,
    from the first of the process on, give the same samples.
    """
    library, chunks = _library()
    chunks.clear()
    if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
        raise MultiTokenError(f"eSpeak NG has no voice {voice.name!r}")
    library.espeak_SetParameter(_RATE, voice.rate, 0)
    library.espeak_SetParameter(_PITCH, voice.pitch, 0)
    raw = text.encode()
    # With the zero at its end, which ctypes adds to the bytes.
    size = ctypes.c_size_t(len(raw) + 1)
    if library.espeak_Synth(raw, size, 0, 0, 0, _UTF8, None, None) != 0 or not chunks:
        raise MultiTokenError(f"eSpeak NG did not speak {text!r}")
    return np.concatenate(chunks)


def record(text: str, voice: Voice, path: Path) -> None:
    """Speak into a .wav file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "not compressed"))
        file.writeframes(speak(text, voice).tobytes())


@functools.cache
def _library() -> tuple[Any, list[np.ndarray[Any, Any]]]:
    """The synthesizer, started, and the list into which it puts its samples."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise MultiTokenError(f"speech is made by the package espeakng_loader: {INSTALL_EXAMPLES}")
    import espeakng_loader

    library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
    # The wheel brings its own voices; a system's eSpeak NG may have others.
    data = espeakng_loader.get_data_path().encode()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
    if rate != SAMPLE_RATE:
        raise MultiTokenError(f"eSpeak NG did not start: it answered {rate}, not {SAMPLE_RATE}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # else breath is another in each process
    chunks: list[np.ndarray[Any, Any]] = []
    heard = _Callback(_listener(chunks))
    library.espeak_SetSynthCallback(heard)
    library.heard = heard  # C holds no reference of its own
    return library, chunks


def _listener(chunks: list[np.ndarray[Any, Any]]) -> Callable[..., int]:
    def hear(samples: Any, num_samples: int, _events: Any) -> int:
        if samples and num_samples > 0:
            chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    return hear
