"""Random state of Python, NumPy and torch, kept over code that must not change a run's order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Put back all random states after the block, that of this process's GPU included."""
    # `fork_rng` covers torch on all devices, not the generators of Python and NumPy, which data
    # augmentation and seeds of workers may use
    of_python, of_numpy = random.getstate(), np.random.get_state()
    # of one device: access to the others would create a context on each
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
