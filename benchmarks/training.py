"""Time and FLOPs that each lever of training saves, alone and together, at equal loss.

    python benchmarks/training.py [--quick] [--threads 1] [--out FILE.json]

Random weights, built in process: a Llama of 4 layers x 192 with 16,000 ids, a CLIP of 6 layers x
192 on 196 patches. Eight rows of realistic lengths, a quarter of them long, with an image each.
Every variant runs the same rows through forward, backward and an optimizer step (with a learning
rate of zero, so that the loss of every step is the same and is printed). Variants take turns; a
time is the median over the rounds, and what counts is the ratio within one run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from multi_token.collate import Collator
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.formats import to_conversation
from multi_token.language_model.segment_attention import segment_attention_enabled
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec
from multi_token.report.machine import machine_facts
from multi_token.testing import LLAVA_TEMPLATE, tiny_tokenizer
from multi_token.types import Sample

NUM_ROWS = 8
TEXT_TOKENS = (20, 30, 105, 35, 45, 55, 115, 65)
"""Roughly, by row; a quarter is long."""
SUPERVISED = 0.5
"""Supervised share of a row's text; the rest is its question."""
VOCABULARY = 16_000


def language_model_config() -> LlamaConfig:
    """4 layers x 192, grouped keys."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def vision_config() -> CLIPVisionConfig:
    """6 layers x 192 on 14 x 14 patches."""
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=112,
        patch_size=8,
    )


def build_parts(folder: Path) -> None:
    """`language_model/`, `clip/`, `llava/` and images, all with random weights."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(language_model_config()).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    size = {"crop_size": {"height": 112, "width": 112}, "size": {"shortest_edge": 112}}
    pixels = CLIPImageProcessorPil(**size)
    CLIPVisionModel(vision_config()).save_pretrained(folder / "clip")
    pixels.save_pretrained(folder / "clip")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config(),
            text_config=language_model_config(),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    llava.save_pretrained(folder / "llava")
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder / "llava")
    for i in range(NUM_ROWS):
        Image.effect_noise((112, 112), 90).convert("RGB").save(folder / f"{i}.png")


def rows(count: int, numbers: random.Random) -> list[dict[str, Any]]:
    """Rows with one image each, in turns short and long."""
    return [row(i, i % NUM_ROWS, TEXT_TOKENS[i % len(TEXT_TOKENS)], numbers) for i in range(count)]


def questions(numbers: random.Random) -> list[dict[str, Any]]:
    """Two images, five short questions about each."""
    return [row(i, i // 5, 24, numbers) for i in range(10)]


def row(number: int, image: int, length: int, numbers: random.Random) -> dict[str, Any]:
    """Return a row of an image and `length` characters of text; the last part is the answer."""
    text = "".join(numbers.choice("abcdefghij ") for _ in range(length))
    cut = int(len(text) * (1 - SUPERVISED))
    return {
        "id": str(number),
        "images": [f"{image}.png"],
        "messages": [
            {"role": "user", "content": "<image>\n" + text[:cut]},
            {"role": "assistant", "content": text[cut:].strip() or "a"},
        ],
    }


def read(
    model: MultiTokenForConditionalGeneration,
    folder: Path,
    given: Sequence[dict[str, Any]],
    cache: FeatureCache | None = None,
) -> list[Sample]:
    """Return rows as samples, with features in place of pixels where there is a cache."""
    assert model.processor is not None
    processor = replace(model.processor, fetch=Fetch(root=str(folder)), cache=cache)
    conversations = [
        to_conversation(row, list(model.modalities), row_id=row["id"]) for row in given
    ]
    if cache is not None:
        items = [(item, processor.fetch) for c in conversations for item in c.media]
        encoders: Any = model.encoders
        cache.fill(items, model.modalities, encoders)
    return [processor(conversation) for conversation in conversations]


@dataclass(frozen=True)
class Variant:
    """One combination of levers for the same rows."""

    name: str
    learn: str = "projector"
    packed: bool = False
    supervised: bool = False
    cached: bool = False
    tree: bool = False
    lowered: bool = False


@dataclass
class Result:
    """Cost of a variant: median seconds of a step, FLOPs, loss and the projector's gradient."""

    name: str
    seconds: float
    gflops: float
    """FLOPs of matrix products and attention by torch's counter: the same in every run."""
    loss: float
    grad_norm: float
    ratio: float = 1.0
    gflops_ratio: float = 1.0


LEVERS = [
    Variant(name.format(learn), learn, packed, supervised, cached)
    for learn in ("projector", "all")
    for name, packed, supervised, cached in (
        ("{}: padded, all logits", False, False, False),
        ("{}: supervised logits", False, True, False),
        ("{}: packed", True, False, False),
        ("{}: feature cache", False, False, True),
        ("{}: packed + supervised logits", True, True, False),
        ("{}: packed + supervised logits + cache", True, True, True),
    )
]

LOWERED = [
    Variant(name.format(learn), learn, packed, packed, lowered=lowered)
    for learn in ("projector", "all")
    for name, packed, lowered in (
        ("{}: padded, all logits", False, False),
        ("{}: bfloat16", False, True),
        ("{}: packed + supervised logits + bfloat16", True, True),
    )
]
"""Frozen parts in bfloat16, so equal up to rounding; apart, since they are other models."""

SHARED = [
    Variant(f"five questions per image: {name}", "projector", True, True, tree=tree)
    for name, tree in (("packed + supervised logits", False), ("as a tree", True))
]
"""The same rows with and without `share`; their image is 196 tokens."""


def composed(fields: dict[str, Any]) -> MultiTokenForConditionalGeneration:
    """Return a model with the same new projector each time, probed before any step counts."""
    torch.manual_seed(0)
    # The seed before each: all models have the same projector, so their losses can be compared.
    model = MultiTokenForConditionalGeneration.from_spec(ModelSpec.model_validate(fields)).train()
    assert model.capabilities
    return model


class Levers:
    """A model and some rows, as each variant takes them."""

    def __init__(
        self,
        folder: Path,
        given: Sequence[dict[str, Any]],
        projector: dict[str, Any],
        *,
        lowered: bool = False,
    ) -> None:
        image = {
            "type": "image",
            "encoder": str(folder / "clip"),
            "features": "patches",
            "projector": projector,
        }
        spec = {
            "language_model": str(folder / "language_model"),
            "dtype": "float32",
            "modalities": {"image": image},
        }
        model = composed(spec)
        self.models = {("projector", False): model, ("all", False): model}
        if lowered:
            # `projector`: all frozen parts in bfloat16. `all`: the encoder alone, since the
            # language model is trained.
            halves = {**spec, "modalities": {"image": {**image, "dtype": "bfloat16"}}}
            self.models["projector", True] = composed({**halves, "dtype": "bfloat16"})
            self.models["all", True] = composed(halves)
        assert model.processor is not None
        collator = Collator(model.modalities, model.processor.chat.filler_id)
        tree = replace(collator, share=True)
        plain, cached = (read(model, folder, given, cache) for cache in (None, FeatureCache()))
        self.optimizers: dict[tuple[str, bool], torch.optim.Optimizer] = {}
        self.lengths = [len(sample.input_ids) for sample in plain]
        self.num_supervised = sum(int((s.labels[1:] != -100).sum()) for s in plain)
        self.batches = {
            "padded": collator(plain),
            "padded, cached": collator(cached),
            "packed": collator.pack(plain),
            "packed, cached": collator.pack(cached),
            "tree": tree.pack(plain),
        }

    def facts(self) -> str:
        """The rows in words."""
        real, padded = sum(self.lengths), max(self.lengths) * len(self.lengths)
        return (
            f"{len(self.lengths)} rows of {min(self.lengths)} to {max(self.lengths)} tokens: "
            f"{real} tokens, {1 - real / padded:.0%} padding, "
            f"{self.num_supervised / real:.0%} supervised"
        )

    def step(self, variant: Variant) -> tuple[float, float]:
        """Forward, backward and an update by zero -> loss, norm of the projector's gradient."""
        which = (variant.learn, variant.lowered)
        model = self.models[which]
        model.language_model.requires_grad_(variant.learn == "all")
        model.projectors.requires_grad_(True)
        if which not in self.optimizers:
            # Kept over steps: building the optimizer's state is no part of a step.
            trainable = [p for p in model.parameters() if p.requires_grad]
            self.optimizers[which] = torch.optim.AdamW(
                trainable, lr=0.0, weight_decay=0.0, fused=True
            )
        optimizer = self.optimizers[which]
        layout = "tree" if variant.tree else "packed" if variant.packed else "padded"
        batch: Any = dict(self.batches[layout + ", cached" * variant.cached])
        segments: Any = segment_attention_enabled(model.language_model)
        with segments if variant.packed else nullcontext():
            if variant.supervised:
                loss = model(**batch).loss
            else:
                # With labels, the model would compute logits at supervised positions only.
                wanted = batch.pop("shift_labels")
                del batch["labels"]
                logits = model(use_cache=False, **batch).logits.float()
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            loss.backward()
        gradients = [p.grad for p in model.projectors.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), norm


def take_turns(names: Sequence[str], run: Callable[[str], Any], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        # In turns within a round: a slow minute then slows every variant.
        for name in names:
            started = time.perf_counter()
            run(name)
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(levers: Levers, variants: Sequence[Variant], rounds: int) -> list[Result]:
    """Measure all variants in turns; ratios are to the first that trains the same parts."""
    by_name = {variant.name: variant for variant in variants}
    found: dict[str, tuple[float, float]] = {}

    def run(name: str) -> None:
        found[name] = levers.step(by_name[name])

    gflops: dict[str, float] = {}
    for name in by_name:
        # Before the clock starts: counting slows every operation.
        with FlopCounterMode(display=False) as counter:
            run(name)
        gflops[name] = counter.get_total_flops() / 1e9
    seconds = take_turns(list(by_name), run, rounds)
    results = [Result(name, seconds[name], gflops[name], *found[name]) for name in by_name]
    for result in results:
        first = next(r for r in results if by_name[r.name].learn == by_name[result.name].learn)
        result.ratio = first.seconds / result.seconds
        result.gflops_ratio = first.gflops / result.gflops
    return results


def main() -> None:
    """The table, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    rounds = 3 if options.quick else 9
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_parts(folder)
        given, projector = rows(NUM_ROWS, random.Random(0)), {"type": "pixel_shuffle", "factor": 2}
        levers = Levers(folder, given, projector)
        console.print(levers.facts(), highlight=False)
        results = measure(levers, LEVERS, rounds)
        results += measure(Levers(folder, given, projector, lowered=True), LOWERED, rounds)
        shared = Levers(folder, questions(random.Random(1)), {"type": "mlp"})
        console.print("five questions per image: " + shared.facts(), highlight=False)
        results += measure(shared, SHARED, rounds)
    table = Table(
        "what is trained: how",
        "ms a step",
        "times",
        "GFLOP",
        "times",
        "loss",
        "projector's gradient",
    )
    for result in results:
        table.add_row(
            result.name,
            f"{1000 * result.seconds:.0f}",
            f"{result.ratio:.2f}",
            f"{result.gflops:.1f}",
            f"{result.gflops_ratio:.2f}",
            f"{result.loss:.5f}",
            f"{result.grad_norm:.5f}",
        )
    console.print(table)
    numbers = {
        "rows": levers.facts(),
        "shared_rows": shared.facts(),
        "levers": [asdict(result) for result in results],
        "rounds": rounds,
        "threads": options.threads,
        "machine": machine_facts(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
