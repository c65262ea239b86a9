"""vLLM engines with stand-ins as servers, and a golden request made in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from multi_token.language_model.forward import per_layer_inputs
from multi_token.serve.engines.fallback import smoke_prompt
from multi_token.serve.engines.vllm.engine import VllmEngine
from multi_token.serve.engines.vllm.golden import GoldenRequest
from tests.serve.vllm_stand_in import StandIn

HEALTH_INTERVAL_S = 0.05


@torch.no_grad()
def golden_of(model: Any, num_new: int = 6) -> GoldenRequest:
    """The golden request that an export of the model contains."""
    ids = smoke_prompt(model).input_ids[None]
    num_prompt, logprobs = ids.shape[1], []
    for _ in range(num_new):
        embeds = model.get_input_embeddings()(ids)
        more = per_layer_inputs(model.language_model, ids)
        logits = model.language_model(inputs_embeds=embeds, **more).logits[0, -1]
        logprob, likeliest = logits.log_softmax(-1).max(-1)
        logprobs.append(float(logprob))
        ids = torch.cat([ids, likeliest.view(1, 1)], 1)
    return GoldenRequest(
        tuple(ids[0, :num_prompt].tolist()),
        tuple(ids[0, num_prompt:].tolist()),
        tuple(logprobs),
        model.capabilities.embedding_scale,
    )


@contextmanager
def started(model: Any, *stand_ins: StandIn, **options: Any) -> Iterator[VllmEngine]:
    """A running engine with stand-ins that end with the engine."""
    fields = {"health_interval_s": HEALTH_INTERVAL_S, **options}
    engine = VllmEngine(model, golden_of(model), [s.url for s in stand_ins], **fields)
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()
        for stand_in in stand_ins:
            stand_in.die()


class VllmWithStandIn(VllmEngine):
    """An engine with a stand-in of its own: the same model, and the same end."""

    def __init__(self, model: Any, *, max_batch: int = 8, max_tokens: int | None = None) -> None:
        """`max_batch`: number of requests that the stand-in runs at once."""
        self.stand_in = StandIn(model.language_model, max_num_seqs=max_batch)
        super().__init__(
            model,
            golden_of(model),
            [self.stand_in.url],
            max_tokens=max_tokens,
            health_interval_s=HEALTH_INTERVAL_S,
        )

    def stop(self) -> None:
        super().stop()
        self.stand_in.die()
