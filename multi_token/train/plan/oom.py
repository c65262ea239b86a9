"""Out of memory: how to recognize it, and the lines of the recipe that need less.

Works on `OomFacts`, numbers that the trainer fills in, so that this module imports no trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from multi_token.errors import MultiTokenError


@dataclass(frozen=True)
class OomFacts:
    """State of a stage that decides which changes to the recipe save memory."""

    device: torch.device
    step: int
    """The step in which memory ran out, from 1."""
    frozen_language_model: bool
    """True if no weight of the language model but an adapter's is trainable."""
    frozen_dtypes: frozenset[torch.dtype]
    """Precision of the frozen weights of the language model."""
    float32_encoders: tuple[str, ...]
    """Names of modalities with a frozen encoder that the recipe keeps in float32."""
    batch_size: int
    """Rows per device."""
    longest_row: int
    """Tokens of the longest row."""
    pack_tokens: int | None
    """Budget of a pack, None if rows are padded."""
    activation_checkpointing: bool
    logits_budget: int | None = None
    """Most bytes of logits at a time; None if the language model's logits have no bound."""
    logits_of_token: int = 0
    """Bytes of one position's logits."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors by which torch or Python report missing memory, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator, and CUDA outside of torch's allocator, raise errors that only their
    # text tells from others
    texts = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def memory_capacity(device: torch.device) -> int:
    """Bytes of memory of a device; for a CPU of the machine, or of the container if it has less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # control groups, version 2
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def memory_suggestions(facts: OomFacts, fraction: float | None) -> list[str]:
    """Lines of the recipe to change, a sentence each, the cheapest change first.

    `fraction`: part of the largest batch that would fit, 0 (not even one row) to 1; None if the
    activations of a batch are not known.
    """
    found: list[str] = []
    if facts.frozen_language_model and torch.float32 in facts.frozen_dtypes:
        found.append("model.dtype: bfloat16 (halves the frozen language model)")
    for name in facts.float32_encoders:
        found.append(f"model.modalities.{name}.dtype: bfloat16 (halves its frozen encoder)")
    if facts.frozen_language_model and not facts.frozen_dtypes & {torch.uint8, torch.int8}:
        found.append("model.quantization: 4bit (a quarter of bfloat16, or less)")
    if fraction and facts.pack_tokens is not None:
        # no pack may be smaller than the longest row, which is never cut
        tokens = max(int(facts.pack_tokens * fraction), facts.longest_row)
        if tokens < facts.pack_tokens:
            found.append(f"train.pack_tokens: {tokens} (it is {facts.pack_tokens})")
    elif fraction and (fits := max(1, int(facts.batch_size * fraction))) < facts.batch_size:
        found.append(
            f"train.args.per_device_train_batch_size: {fits} (it is {facts.batch_size}; raise "
            "gradient_accumulation_steps by as much)"
        )
    num_tokens = facts.pack_tokens or facts.batch_size * facts.longest_row
    if facts.logits_budget and num_tokens * facts.logits_of_token > facts.logits_budget / 4:
        budget = facts.logits_budget / 2**20
        found.append(
            f"train.logits_megabytes: {budget / 4:.4g} (it is {budget:.4g}, and a loss holds up to "
            "four times as much)"
        )
    if fraction is not None and not facts.activation_checkpointing:
        found.append("train.args.activation_checkpointing: true (a third slower, far less to keep)")
    if not facts.frozen_language_model:
        found.append(
            "an `adapter` instead of `language_model` under `learn` (no gradients and optimizer "
            "states of all weights)"
        )
    return found


def bullet_list(lines: Sequence[str]) -> str:
    """One indented line for each, to follow a colon."""
    return "".join(f"\n    {line}" for line in lines)


@contextmanager
def explain_oom(facts: Callable[[], OomFacts], stage: str) -> Iterator[None]:
    """Turn an out-of-memory error into a MultiTokenError that lists what to change in the recipe.

    `facts` is called only after the error.
    """
    try:
        yield
        return
    except Exception as error:
        # MemoryError, torch's own and RuntimeError; all others are raised again
        if not is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:200]
    # Raised outside of `except`: the traceback of the first error keeps the step's tensors alive.
    known = facts()
    # The activations are not known here, so half of the batch is suggested.
    raise MultiTokenError(
        f"memory was not enough in step {known.step} of stage {stage}, on {known.device} with "
        f"{memory_capacity(known.device) / 2**30:,.1f} GiB ({cause}). With only "
        "per_device_train_batch_size and gradient_accumulation_steps changed, the same command "
        "continues from the last complete checkpoint; with other changes, choose another "
        f"train.output_dir:{bullet_list(memory_suggestions(known, 0.5))}"
    )
