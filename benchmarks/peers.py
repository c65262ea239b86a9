"""The same rows through transformers' LLaVA, with `Trainer` and with TRL's `SFTTrainer`, and ours.

    python benchmarks/peers.py [--quick] [--threads 1] [--out FILE.json]

All have the same weights and train the projector, or the projector and the language model, with a
learning rate of zero (ours: 1e-12, since it refuses zero). None has a feature cache. Ours packs and
computes logits at supervised positions only, as lines of a recipe ask for. Rows are prepared before
the clock starts, so no time is spent on decoding.
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
    AutoTokenizer,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from multi_token.collate import Collator
from multi_token.convert.llava import import_llava
from multi_token.data.packing import PackingPlan
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import Trainable
from multi_token.report.machine import machine_facts
from multi_token.train.batch_plan import PackedBatches
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import training_arguments
from multi_token.types import Sample

STEPS = 4
"""Timed steps of each trainer in a turn; one more before them is a warm-up."""
RATE = 1e-12
"""Learning rate of ours, which refuses zero."""


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
        (place,), (item,) = sample.media_spans, sample.media
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


def of_llava(folder: Path, learn: str) -> Any:
    """transformers' LLaVA, of which the projector learns, or it and the language model."""
    llava: Any = LlavaForConditionalGeneration.from_pretrained(folder / "llava")
    llava.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    if learn == "all":
        llava.model.language_model.requires_grad_(True)
        llava.lm_head.requires_grad_(True)
    return llava


def with_trainer(llava: Any, folder: Path, given: Any, options: dict[str, Any]) -> Trainer:
    """transformers' own trainer on the rows of `llava_rows`."""
    return Trainer(
        model=llava,
        args=TrainingArguments(
            output_dir=str(folder / "theirs"), learning_rate=0.0, disable_tqdm=True, **options
        ),
        train_dataset=given,
        data_collator=llava_batch,  # type: ignore[arg-type]
    )


def with_sft_trainer(
    folder: Path, learn: str, given: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Return TRL's trainer on the same rows, without its own preparation of them."""
    # Imported here: the rest of the table needs neither datasets nor TRL.
    from datasets import Array3D, Dataset, Features, List, Value
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    features = Features(
        input_ids=List(Value("int64")),
        labels=List(Value("int64")),
        pixel_values=Array3D(tuple(given[0]["pixel_values"].shape), "float32"),
    )
    arrays = [{key: value.numpy() for key, value in row.items()} for row in given]
    return SFTTrainer(
        model=of_llava(folder, learn),
        args=SFTConfig(
            output_dir=str(folder / "sft"),
            learning_rate=0.0,
            disable_tqdm=True,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **options,
        ),
        train_dataset=Dataset.from_list(arrays, features=features).with_format("torch"),
        data_collator=llava_batch,  # type: ignore[arg-type]
        processing_class=AutoTokenizer.from_pretrained(folder / "llava"),
    )


def with_ours(
    model: Any, folder: Path, learn: Trainable, samples: Any, lengths: Any, options: dict[str, Any]
) -> MultiTokenTrainer:
    """Ours on the same rows, packed to about as many tokens as a batch of the others has."""
    mean, num_rows = sum(lengths) / len(lengths), options["per_device_train_batch_size"]
    packing = PackingPlan(lengths, max(max(lengths), round(num_rows * mean)))
    return MultiTokenTrainer(
        model,
        learn=learn,
        batches=PackedBatches(packing, lengths),
        args=training_arguments(folder / "trained", options, seed=0, learning_rate=RATE),
        train_dataset=samples,
        data_collator=Collator(model.modalities, 0).pack,
    )


GROUPS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::mkldnn_convolution"),
    "attention": ("aten::_scaled_dot_product",),
    "loss": ("aten::_log_softmax", "aten::nll_loss"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach"),
}
"""Group of operators -> how their names begin."""


def shares_of(trainer: Trainer) -> dict[str, float]:
    """Return the share of a step that each group of operators takes, and what is beside them."""
    times = StepTimes()
    trainer.add_callback(times)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        trainer.train()
    trainer.remove_callback(times)
    found = dict.fromkeys([*GROUPS, "other operators"], 0.0)
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            names = (g for g, starts in GROUPS.items() if event.key.startswith(starts))
            found[next(names, "other operators")] += event.self_cpu_time_total / 1e6
    total = sum(times.seconds)
    found["Python and the libraries"] = total - sum(found.values())
    return {group: round(seconds / total, 3) for group, seconds in found.items()}


def measure(folder: Path, learn: str, rounds: int) -> dict[str, Any]:
    """All three in turns, a few steps each; 4 x 8 rows in memory, no cache."""
    if not (folder / "ours").is_dir():
        import_llava(folder / "llava", folder / "ours")
    ours = MultiTokenForConditionalGeneration.from_pretrained(folder / "ours")
    samples = read(ours, folder, rows(4 * NUM_ROWS, random.Random(1)))
    llava = of_llava(folder, learn)
    given = llava_rows(samples, llava.config.image_token_id)
    with torch.no_grad():
        first = ours(**Collator(ours.modalities, 0)(samples[:NUM_ROWS])).loss
        expected = llava(**llava_batch(given[:NUM_ROWS])).loss
    options: dict[str, Any] = {
        "per_device_train_batch_size": NUM_ROWS,
        "max_steps": 1 + STEPS,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }
    rates = {"projectors": RATE, **({"language_model": RATE} if learn == "all" else {})}
    lengths = [len(sample.input_ids) for sample in samples]
    trainers = {
        "trainer": with_trainer(of_llava(folder, learn), folder, given, options),
        "sft_trainer": with_sft_trainer(folder, learn, given, options),
        "ours": with_ours(ours, folder, Trainable.model_validate(rates), samples, lengths, options),
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            times = StepTimes()
            trainer.add_callback(times)
            trainer.train()
            trainer.remove_callback(times)
            seconds[name] += times.seconds[1:]
    speeds = {
        name: sum(lengths) / len(trainer.get_train_dataloader()) / statistics.median(seconds[name])
        for name, trainer in trainers.items()
    }
    return {
        "learn": learn,
        "loss_of_llava": float(expected),
        "loss_of_ours": float(first),
        "shares": {name: shares_of(trainer) for name, trainer in trainers.items()},
        **{f"{name}_tokens_per_second": round(speed, 1) for name, speed in speeds.items()},
        **{
            f"times_{name}": round(speeds["ours"] / speed, 2)
            for name, speed in speeds.items()
            if name != "ours"
        },
    }


def main() -> None:
    """The table, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 2 if options.quick else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_parts(folder)
        peers = [measure(folder, learn, rounds) for learn in ("projector", "all")]
    table = Table(
        "what is trained",
        "LLaVA + Trainer",
        "+ SFTTrainer",
        "ours",
        "times",
        "times",
        "loss of both",
    )
    for peer in peers:
        table.add_row(
            peer["learn"],
            f"{peer['trainer_tokens_per_second']} tok/s",
            f"{peer['sft_trainer_tokens_per_second']} tok/s",
            f"{peer['ours_tokens_per_second']} tok/s",
            f"{peer['times_trainer']:.2f}",
            f"{peer['times_sft_trainer']:.2f}",
            f"{peer['loss_of_llava']:.5f} {peer['loss_of_ours']:.5f}",
        )
    Console(width=100).print(table)
    groups = list(peers[0]["shares"]["ours"])
    table = Table("what is trained", "by", *groups, title="shares of a step, profiled")
    for peer in peers:
        for name, shares in peer["shares"].items():
            table.add_row(peer["learn"], name, *(f"{shares[group]:.1%}" for group in groups))
    Console(width=140).print(table)
    numbers = {
        "peers": peers,
        "rounds": rounds,
        "threads": options.threads,
        "machine": machine_facts(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
