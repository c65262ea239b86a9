"""Time and peak memory of a step with a large vocabulary: all logits at once, and in chunks.

    python benchmarks/logits.py [--tokens 1024] [--rounds 3]

Random weights in the shape of Qwen2.5-0.5B with two layers: 896 x 151,936, tied. Forward and
backward to the input embeddings through the frozen model, interleaved.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from multi_token.language_model.loss import chunk_rows, supervised_output
from multi_token.train.plan.estimate import format_bytes, peak_memory

BUDGETS = {"all at once": None, "256 MiB": 256 << 20, "64 MiB": 64 << 20}


def step(model: Any, num_tokens: int, budget: int | None) -> float:
    """One forward and backward in which every token is supervised -> its loss."""
    torch.manual_seed(0)
    labels = torch.randint(0, model.config.vocab_size, (1, num_tokens))
    embeds = torch.randn(1, num_tokens, model.config.hidden_size, requires_grad=True)
    loss = supervised_output(
        model,
        chunk_rows=None if budget is None else chunk_rows(model, budget),
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(labels),
        shift_labels=labels,
        supervised=torch.arange(num_tokens),
    ).loss
    assert loss is not None
    loss.backward()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).train()
    times: dict[str, list[float]] = {name: [] for name in BUDGETS}
    losses = {}
    for _ in range(options.rounds):
        for name, budget in BUDGETS.items():
            start = time.perf_counter()
            losses[name] = step(model, options.tokens, budget)
            times[name].append(time.perf_counter() - start)
    print("| logits | peak of new memory | step | loss |\n|---|---|---|---|")
    for name, budget in BUDGETS.items():
        with peak_memory() as peak:
            step(model, options.tokens, budget)
        print(
            f"| {name} | {format_bytes(peak[0])} | {median(times[name]):.2f} s "
            f"| {losses[name]:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
