"""Every family of language models is answered as by `generate`, or refused at the start.

Border: tiny models of all families; what an engine must do besides is tested beside it.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from multi_token.errors import LanguageModelError
from multi_token.generate import generate_ids
from multi_token.serve.engines.base import SamplingParams
from multi_token.serve.engines.continuous import ContinuousEngine
from multi_token.serve.engines.local.engine import LocalEngine
from tests.serve.engine_parts import VECTORS, Client, composed, prompt_of, sample_of, together

NUM_NEW = 8
CANNOT_BE_ASKED = {"BERT"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of families' own code
@pytest.mark.parametrize("kind", [LocalEngine, ContinuousEngine])
def test_every_family_is_answered_as_by_generate_or_refused(
    families: ModuleType, tmp_path: Path, kind: Any
) -> None:
    served = []
    for family in families.FAMILIES.keys() - CANNOT_BE_ASKED:
        model = composed(tmp_path / family, families, family)
        samples = [
            sample_of(model, "yes or no"),
            sample_of(model, "What is this thing?", VECTORS[0]),
            sample_of(model, "Which?", VECTORS[1], VECTORS[2]),
        ]
        alone = [generate_ids(model, [s], max_new_tokens=NUM_NEW)[0].tolist() for s in samples]
        engine = kind(model)
        try:
            engine.start()
        except LanguageModelError:
            continue
        try:
            clients = [Client() for _ in samples]
            prompts = [prompt_of(model, sample) for sample in samples]
            together(engine, prompts, [SamplingParams(NUM_NEW)] * 3, clients)
            assert [client.ids for client in clients] == alone, family
        finally:
            engine.stop()
        served.append(family)
    num_all = len(families.FAMILIES) - len(CANNOT_BE_ASKED)
    assert len(served) == num_all if kind is LocalEngine else len(served) >= 15, served
