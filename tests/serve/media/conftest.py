"""A pool of media workers, and a plug-in whose items are commands to the process that decodes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multi_token import registry
from multi_token.modalities.image import ImageModality
from multi_token.modalities.timeseries import TimeseriesModality
from multi_token.modalities.vector import VectorModality
from multi_token.serve.media.limits import MediaLimits
from multi_token.serve.media.pool import MediaPool
from tests.serve.untrusted import MIB, SECRET, TIMEOUT_S


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The plug-in, registered in this process alone, as in a notebook."""
    folder = tmp_path_factory.mktemp("plug_in")
    shutil.copy(Path(__file__).parent / "sample_modality.py", folder / "a_sample_modality.py")
    sys.path.insert(0, str(folder))
    import a_sample_modality  # type: ignore[reportMissingImports]

    cls = a_sample_modality.TrialModality
    registry.register_modality("trial", cls)
    yield cls
    sys.path.remove(str(folder))
    del sys.modules["a_sample_modality"]
    registry._registered["modality"].pop("trial")


@pytest.fixture(scope="module")
def modalities(trial: Any, parts: Path) -> dict[str, Any]:
    return {
        "trial": trial(),
        "image": ImageModality(encoder=str(parts / "clip")),
        "vector": VectorModality(dim=3),
        "series": TimeseriesModality(channels=2),
    }


@pytest.fixture(scope="module")
def pool(modalities: dict[str, Any]) -> Iterator[MediaPool]:
    limits = MediaLimits(max_bytes=4 * MIB, max_numbers=1000, max_prepared_bytes=MIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTI_TOKEN_API_KEY", SECRET)
        patch.setenv("HF_TOKEN", SECRET)
        made = MediaPool(
            modalities, num_workers=1, timeout_s=TIMEOUT_S, memory_bytes=256 * MIB, limits=limits
        )
        made.start()
    yield made
    made.stop()
