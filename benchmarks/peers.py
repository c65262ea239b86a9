"""The same rows through transformers' LLaVA with `Trainer` and through ours, on the same weights.

    python benchmarks/peers.py [--quick] [--threads 1] [--out FILE.json]

Both learn the projector, or it and the language model, with a learning rate of zero or nearly so
(1e-12, as ours takes no zero); neither has a cache of features. Ours packs and computes logits
where something is learned, which are lines of a recipe. Rows are read before: neither decodes.

Border: the peer is used as its documents say, with its own loss and a collator that pads. Model and
rows are those of training.py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import NUM_ROWS, build_parts, read, rows
from transformers import (
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from multi_token.checkpoint import load
from multi_token.collate import Collator
from multi_token.convert.llava import import_llava
from multi_token.demo.report import machine
from multi_token.train.arguments import training_arguments
from multi_token.train.packing import Packing
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train_spec import Learn
from multi_token.types import Sample


class StepTimes(TrainerCallback):
    """Seconds from the beginning of a step to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def llava_rows(samples: Sequence[Sample], image_token: int) -> list[dict[str, Tensor]]:
    """The same ids, labels and pixels as LLaVA takes them."""
    made = []
    for sample in samples:
        (place,), (item,) = sample.places, sample.media
        ids = sample.input_ids.clone()
        ids[place.start : place.start + place.length] = image_token
        made.append(
            {
                "input_ids": ids,
                "labels": sample.labels,
                "pixel_values": item.inputs["pixel_values"],
            }
        )
    return made


def llava_batch(given: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right, as transformers' collators do."""
    pad = nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in given]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=0),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad([row["labels"] for row in given], batch_first=True, padding_value=-100),
        "pixel_values": torch.stack([row["pixel_values"] for row in given]),
    }


def measure_peer(folder: Path, learn: str, steps: int) -> dict[str, Any]:
    """transformers' LLaVA with `Trainer`, and ours with `MultiTokenTrainer`, on the same weights.

    No cache. Both learn the projector, or it and the language model; 4 x 8 rows in memory.
    """
    if not (folder / "ours").is_dir():
        import_llava(folder / "llava", folder / "ours")
    ours = load(folder / "ours")
    llava: Any = LlavaForConditionalGeneration.from_pretrained(folder / "llava")
    samples = read(ours, folder, rows(4 * NUM_ROWS, random.Random(1)))
    theirs = llava_rows(samples, llava.config.image_token_id)
    with torch.no_grad():
        first = ours(**Collator(ours.modalities, 0)(samples[:NUM_ROWS])).loss
        expected = llava(**llava_batch(theirs[:NUM_ROWS])).loss
    num_tokens = sum(len(sample.input_ids) for sample in samples)

    llava.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    if learn == "all":
        llava.model.language_model.requires_grad_(True)
        llava.lm_head.requires_grad_(True)
    shared: dict[str, Any] = {
        "per_device_train_batch_size": NUM_ROWS,
        "max_steps": steps,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }
    times = {"transformers": StepTimes(), "multi_token": StepTimes()}
    Trainer(
        model=llava,
        args=TrainingArguments(
            output_dir=str(folder / "theirs"), learning_rate=0.0, disable_tqdm=True, **shared
        ),
        train_dataset=theirs,  # type: ignore[arg-type]
        data_collator=llava_batch,  # type: ignore[arg-type]
        callbacks=[times["transformers"]],
    ).train()

    rates = {"projectors": 1e-12, **({"language_model": 1e-12} if learn == "all" else {})}
    lengths = [len(sample.input_ids) for sample in samples]
    mean = sum(lengths) / len(lengths)
    collator = Collator(ours.modalities, 0)
    trainer = MultiTokenTrainer(
        ours,
        learn=Learn.model_validate(rates),
        lengths=lengths,
        packing=Packing(lengths, max(max(lengths), round(NUM_ROWS * mean))),
        args=training_arguments(folder / "trained", shared, seed=0, learning_rate=1e-12),
        train_dataset=samples,
        data_collator=collator.pack,
        callbacks=[times["multi_token"]],
    )
    trainer.train()
    seconds = {name: statistics.median(found.seconds[1:]) for name, found in times.items()}
    theirs_rate = num_tokens / (len(samples) / NUM_ROWS) / seconds["transformers"]
    ours_rate = num_tokens / len(trainer.get_train_dataloader()) / seconds["multi_token"]
    return {
        "learn": learn,
        "loss_of_llava": float(expected),
        "loss_of_ours": float(first),
        "llava_tokens_per_second": round(theirs_rate, 1),
        "our_tokens_per_second": round(ours_rate, 1),
        "ratio": round(ours_rate / theirs_rate, 2),
    }


def main() -> None:
    """The table, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = 5 if options.quick else 13
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_parts(folder)
        peers = [measure_peer(folder, learn, steps) for learn in ("projector", "all")]
    table = Table("what learns", "LLaVA + Trainer", "ours", "times", "loss of both")
    for peer in peers:
        table.add_row(
            peer["learn"],
            f"{peer['llava_tokens_per_second']} tok/s",
            f"{peer['our_tokens_per_second']} tok/s",
            f"{peer['ratio']:.2f}",
            f"{peer['loss_of_llava']:.5f} {peer['loss_of_ours']:.5f}",
        )
    Console(width=100).print(table)
    numbers = {
        "peers": peers,
        "steps": steps,
        "threads": options.threads,
        "machine": machine(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
