"""The demo: rows, closed-form start, training, questions, controls and the report.

Everything goes through the library's public methods: a recipe, `train`, `generate`.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from multi_token.checkpoint.load import load_trained
from multi_token.checkpoint.save import CONFIG
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.demo.parts import encoder_folder, language_model_folder
from multi_token.demo.report import Example, draw_sheet, write_report
from multi_token.demo.rows import DemoData, DemoQuestion, build_rows, to_row
from multi_token.language_model.loading import load_language_model
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.report.machine import machine_facts
from multi_token.train.run import train
from multi_token.types import Media

SYSTEM = "You name things."
"""The system message of every row: short, since each token costs time on a CPU."""
_MAX_NEW_TOKENS = 8
_BATCH_SIZE = 50


@dataclass(frozen=True)
class DemoSize:
    """Numbers of rows, steps and questions."""

    num_names: int = 100
    num_renderings: int = 12
    num_held_out_renderings: int = 2
    num_steps: int = 90
    batch_size: int = 16
    num_yes_no: int = 80
    num_categories: int = 40
    num_two_images: int = 100
    num_asked: int = 200
    """Questions of each held-out kind, at most."""


QUICK = DemoSize(
    num_names=10,
    num_renderings=4,
    num_steps=16,
    batch_size=8,
    num_yes_no=10,
    num_categories=10,
    num_two_images=10,
    num_asked=10,
)


def recipe(data: DemoData, out: Path, size: DemoSize, *, seed: int) -> Recipe:
    """The demo's recipe: the same keys as any user's."""
    fields: dict[str, Any] = {
        "model": {
            "language_model": str(language_model_folder()),
            "modalities": {
                "image": {
                    "type": "image",
                    "encoder": str(encoder_folder()),
                    "features": "pooled",
                    "projector": {"type": "expand", "factor": 8},
                }
            },
        },
        "data": {"train": [{"rows": str(data.file(s))} for s in ("naming", "questions")]},
        "train": {
            "output_dir": str(out),
            "seed": seed,
            # Naming rows alone: their answers are captions of one image.
            "closed_form": {
                "rows": [{"rows": str(data.file("naming"))}],
                "caption_format": " {caption}\n{caption}",
            },
            "feature_cache": True,
            # The system message and the template's header (13 of about 33 tokens of a row) are
            # computed once per pack.
            "packing": {"share": True},
            "stages": [
                {
                    "name": "projector",
                    "learn": {"projectors": 1e-3, "projector_biases": 3e-3},
                    "args": {"max_steps": size.num_steps},
                }
            ],
            "args": {
                "per_device_train_batch_size": size.batch_size,
                "logging_steps": 2,
                # The README's numbers are of a CPU; a GPU rounds differently.
                "use_cpu": True,
            },
        },
    }
    return parse_recipe(json.dumps(fields), where="the demo's recipe")


def run(out: Path, *, size: DemoSize, seed: int, console: Console) -> dict[str, Any]:
    """Run the demo, write the report to `out` and return its numbers."""
    began = time.perf_counter()
    console.rule("1 rows")
    data = build_rows(
        out / "data",
        num_names=size.num_names,
        num_renderings=size.num_renderings,
        num_held_out_renderings=size.num_held_out_renderings,
        num_held_out_things=min(20, size.num_names),
        num_yes_no=size.num_yes_no,
        num_categories=size.num_categories,
        num_two_images=size.num_two_images,
        num_held_out_questions=size.num_asked // 2,
        seed=seed,
        system=SYSTEM,
    )
    console.print(
        f"{len(data.names)} things in {size.num_renderings} renderings each to learn from; held "
        f"out: {size.num_held_out_renderings} renderings of each, and {len(data.held_out_names)} "
        "things altogether",
        highlight=False,
    )
    plan = recipe(data, out, size, seed=seed)
    console.rule("2 training")
    known = (out / CONFIG).is_file()
    started = time.perf_counter()
    model = train(plan, console=console)
    train_seconds = time.perf_counter() - started
    times = out / "train_seconds.json"
    if known and times.is_file():
        # An earlier run of the same command trained it: `train` only loaded it now.
        train_seconds = json.loads(times.read_text(encoding="utf-8"))
    times.write_text(json.dumps(train_seconds), encoding="utf-8")

    console.rule("3 questions about what it has not seen")
    asker = BatchGenerator(model, data, out, console)
    naming = data.questions("held_out_naming")[: size.num_asked]
    named = asker.ask(naming, "new renderings")
    half = size.num_asked // 2
    two = asker.ask(data.questions("held_out_two_images")[:half], "two images")
    yes_no = asker.ask(data.questions("held_out_yes_no")[:half], "yes or no")
    beside = [q for q in data.questions("held_out_things") if q.kind == "known_beside_unknown"]
    unknown = asker.ask(beside[: size.num_asked // 4], "beside an unseen thing")

    console.rule("4 controls")
    # Each question gets the image of another name; its answer stays.
    order = shuffled_images([question.names[0] for question in naming], seed)
    mixed = [replace(q, images=naming[j].images) for q, j in zip(naming, order, strict=True)]
    shuffled = asker.ask(mixed, "the same with the images shuffled")
    identical = text_is_untouched(model)
    # The model before any gradient step.
    start = MultiTokenForConditionalGeneration.from_spec(plan.model)
    load_trained(start, out / "stages" / "0-closed-form")
    begun = BatchGenerator(start.eval(), data, out, console).ask(naming[:half], "no gradient step")

    history = json.loads((out / "stages/1-projector/done.json").read_text(encoding="utf-8"))
    report: dict[str, Any] = {
        "num_names": len(data.names),
        "held_out_accuracy": _share_right(named),
        "closed_form_accuracy": sum(contains_name(e.answer, e.truth) for e in begun) / len(begun),
        "shuffled_accuracy": _share_right(shuffled),
        "two_image_accuracy": _share_right(two),
        "yes_no_accuracy": _share_right(yes_no),
        "known_beside_unseen_accuracy": _share_right(unknown),
        "text_logits_identical": identical,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - began, 1),
        "data_wait_share": history.get("data_wait"),
        "num_steps": size.num_steps,
        "seed": seed,
        "machine": machine_facts(),
        "recipe": {
            "language model": "SmolLM2-135M-Instruct, frozen",
            "encoder": "EfficientNet-Lite0 (ImageNet), pooled, frozen",
            "projector": "closed form (frozen) + MLP, 8 tokens an image",
            "training": f"{size.num_steps} steps of {size.batch_size} rows",
        },
    }
    losses = [(log["step"], log["loss"]) for log in history["log_history"] if "loss" in log]
    examples = [*named, *two, *yes_no, *unknown]
    write_report(out, report, examples, losses)
    # Fifteen, evenly spaced: wrong ones come in their true proportion.
    spaced = named[:: max(1, len(named) // 15)][:15]
    draw_sheet(spaced, out / "sheet.png", folder=out)
    return report


@dataclass
class BatchGenerator:
    """Asks questions of the data's files in batches, with features remembered."""

    model: MultiTokenForConditionalGeneration
    data: DemoData
    out: Path
    console: Console

    def __post_init__(self) -> None:
        # A folder of its own: held-out images never enter the features of the training run.
        self.cache = FeatureCache(self.out / "cache" / "held_out")
        self.model.processor = replace(self.model.require_processor(), cache=self.cache)

    def ask(self, questions: Sequence[DemoQuestion], what: str) -> list[Example]:
        """Greedy answers, right only if they *are* the expected one."""
        folder = str(self.data.folder)
        items = [(Media("image", p), Fetch(root=folder)) for q in questions for p in q.images]
        encoders: Any = self.model.encoders
        self.cache.fill(items, self.model.modalities, encoders)
        with Progress(
            console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task(what, total=len(questions))
            answers = self.model.generate(
                [to_row(question, SYSTEM) for question in questions],
                root=folder,
                max_new_tokens=_MAX_NEW_TOKENS,
                batch_size=_BATCH_SIZE,
                on_batch=lambda num: progress.update(task, completed=num),
            )
        examples = [
            Example(
                question=question.text,
                answer=answer,
                truth=question.answer,
                right=is_exact_name(answer, question.answer),
                images=tuple(
                    str((self.data.folder / p).relative_to(self.out)) for p in question.images
                ),
                group=what.capitalize(),
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
        share = _share_right(examples)
        self.console.print(f"{what}: {share:.1%} of {len(examples)} right", highlight=False)
        return examples


def text_is_untouched(model: MultiTokenForConditionalGeneration) -> bool:
    """Return True if a text-only prompt gives the untrained language model's logits, to the bit."""
    spec = model.config.model
    # Loaded again from its folder: the run's own copy could not show a change.
    bare: Any = load_language_model(spec["language_model"], dtype=spec["dtype"])
    bare.to(model.device)
    ids = model.processor.tokenizer("The capital of France is", return_tensors="pt").input_ids  # type: ignore[union-attr]
    ids = ids.to(model.device)
    with torch.no_grad():
        return torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)


def _share_right(examples: Sequence[Example]) -> float:
    return round(sum(example.right for example in examples) / max(len(examples), 1), 4)


def is_exact_name(answer: str, name: str) -> bool:
    """Return True if the answer is the name, up to case, outer blanks and a final dot."""
    return answer.strip().removesuffix(".").rstrip().casefold() == name.casefold()


def contains_name(answer: str, name: str) -> bool:
    """Return True if the answer contains the name as words: "cat", but not in "caterpillar"."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", answer, re.IGNORECASE) is not None


def shuffled_images(names: Sequence[str], seed: int) -> list[int]:
    """Return for each question the index of another question's image, of another name.

    `names`: name of the thing in each question's image. Every image is used exactly once, so that
    a model which ignores images keeps its score, and one which uses them falls to chance.
    """
    most = max(Counter(names).values(), default=0)
    if 2 * most > len(names):
        raise ValueError(f"{most} of {len(names)} images show the same: they cannot be shuffled")
    random_numbers = random.Random(seed)
    images = list(range(len(names)))
    random_numbers.shuffle(images)
    for i, name in enumerate(names):
        # No name has more than half, so some j can be exchanged with i and stay valid itself.
        while names[images[i]] == name:
            j = random_numbers.randrange(len(names))
            if names[j] != name and names[images[j]] != name:
                images[i], images[j] = images[j], images[i]
    return images
