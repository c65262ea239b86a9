"""The local engine gives the tokens of `generate`, for every family of language models."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from multi_token.generate import generate_ids
from multi_token.serve.engines.base import SamplingParams
from multi_token.serve.engines.local.engine import LocalEngine
from tests.serve.engine_parts import VECTORS, Client, composed, prompt_of, sample_of, together

NUM_NEW = 8
CANNOT_GENERATE = {"BERT"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of families' own code
def test_every_family_gives_the_tokens_of_generate(families: ModuleType, tmp_path: Path) -> None:
    for family in families.FAMILIES.keys() - CANNOT_GENERATE:
        model = composed(tmp_path / family, families, family)
        samples = [
            sample_of(model, "yes or no"),
            sample_of(model, "What is this thing?", VECTORS[0]),
            sample_of(model, "Which?", VECTORS[1], VECTORS[2]),
        ]
        alone = [generate_ids(model, [s], max_new_tokens=NUM_NEW)[0].tolist() for s in samples]
        engine = LocalEngine(model)
        engine.start()
        try:
            clients = [Client() for _ in samples]
            prompts = [prompt_of(model, sample) for sample in samples]
            together(engine, prompts, [SamplingParams(NUM_NEW)] * 3, clients)
            assert [client.ids for client in clients] == alone, family
        finally:
            engine.stop()
