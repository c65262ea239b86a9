"""Where a device's memory is not enough: that it was not, in words, and which lines to change.

Border: what a stage needs is plan.py's; here is what to do about it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from multi_token.errors import MultiTokenError
from multi_token.modalities.base import PretrainedModality

if TYPE_CHECKING:
    from multi_token.train.trainer import MultiTokenTrainer


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python found no memory, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def memory_capacity(device: torch.device) -> int:
    """Bytes of memory of a device; for a CPU of the machine, or of the container if it has less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # control groups, version 2
    said = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(said)) if said.isdigit() else machine


def memory_suggestions(trainer: MultiTokenTrainer, part: float | None) -> list[str]:
    """Lines of the recipe to change, a sentence each. `part`: of its largest batch, how much would
    fit, 0 (not even a small one) to 1; None if what a batch takes is not known.
    """
    ways: list[str] = []
    model = trainer._multi_token_model()
    language_model = model.language_model
    frozen = not any(
        p.requires_grad for n, p in language_model.named_parameters() if "lora_" not in n
    )
    dtypes = {p.dtype for p in language_model.parameters() if not p.requires_grad}
    if frozen and torch.float32 in dtypes:
        ways.append("model.dtype: bfloat16 (halves the frozen language model)")
    for name, modality in model.modalities.items():
        learns = any(p.requires_grad for p in model.encoder(name).parameters())
        if isinstance(modality, PretrainedModality) and modality.dtype == "float32" and not learns:
            ways.append(f"model.modalities.{name}.dtype: bfloat16 (halves its frozen encoder)")
    if frozen and torch.uint8 not in dtypes and torch.int8 not in dtypes:
        ways.append("model.quantization: 4bit (a quarter of bfloat16, or less)")
    size = trainer.args.per_device_train_batch_size
    if part and trainer.packing is not None:
        tokens = max(int(trainer.packing.max_tokens * part), max(trainer.lengths))
        if tokens < trainer.packing.max_tokens:
            ways.append(f"train.pack_tokens: {tokens} (it is {trainer.packing.max_tokens})")
    elif part and (fits := max(1, int(size * part))) < size:
        ways.append(
            f"train.args.per_device_train_batch_size: {fits} (it is {size}; raise "
            "gradient_accumulation_steps by as much)"
        )
    if part is not None and not trainer.args.activation_checkpointing:
        ways.append("train.args.activation_checkpointing: true (a third slower, far less to keep)")
    if not frozen:
        ways.append(
            "an `adapter` instead of `language_model` under `learn` (no gradients and optimizer "
            "states of all weights)"
        )
    return ways


def bullet_list(ways: list[str]) -> str:
    """Below each other, behind a colon."""
    return "".join(f"\n    {way}" for way in ways)


@contextmanager
def explain_oom(trainer: MultiTokenTrainer, stage: str) -> Iterator[None]:
    """Within, memory that is not there is a MultiTokenError, which says what to change."""
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:200]
    device = trainer.args.device
    raise MultiTokenError(
        f"memory was not enough in step {trainer.state.global_step + 1} of stage {stage}, on "
        f"{device} with {memory_capacity(device) / 2**30:,.1f} GiB ({cause}). With only "
        "per_device_train_batch_size and gradient_accumulation_steps changed the same command goes "
        "on from the last whole checkpoint; with other lines, choose another train.output_dir:"
        f"{bullet_list(memory_suggestions(trainer, 0.5))}"
    )
