"""The main job from nothing to a report: rows, closed-form start, training, questions, proofs.

Border: the order of the demo's steps and its numbers. Everything it does with models goes through
the library's own doors: a recipe, `train`, `generate`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from multi_token.checkpoint.load import CONFIG, compose, load_trained
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.demo.parts import encoder_folder, language_model_folder
from multi_token.demo.report import Example, draw_sheet, write_report
from multi_token.demo.rows import DemoData, DemoQuestion, build_rows, read_questions
from multi_token.demo.scores import contains_name, is_exact_name, shuffled_pictures
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
    """How much is made, learned and asked."""

    num_names: int = 100
    num_renderings: int = 12
    num_held_out_renderings: int = 2
    num_steps: int = 90
    batch_size: int = 16
    num_yes_no: int = 80
    num_categories: int = 40
    num_two_pictures: int = 100
    num_asked: int = 200
    """Questions of each held-out kind, at most."""


QUICK = DemoSize(
    num_names=10,
    num_renderings=4,
    num_steps=16,
    batch_size=8,
    num_yes_no=10,
    num_categories=10,
    num_two_pictures=10,
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
        "data": {"train": [{"rows": str(data.naming)}, {"rows": str(data.questions)}]},
        "train": {
            "output_dir": str(out),
            "seed": seed,
            "closed_form": {
                "rows": [{"rows": str(data.naming)}],
                "caption_format": " {caption}\n{caption}",
            },
            "feature_cache": True,
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
                "use_cpu": True,
            },
        },
    }
    return parse_recipe(json.dumps(fields), where="the demo's recipe")


def run(out: Path, *, size: DemoSize, seed: int, console: Console) -> dict[str, Any]:
    """Everything, with the report written to `out`; returns the report's numbers."""
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
        num_two_pictures=size.num_two_pictures,
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
    if known and times.is_file():  # it was trained by an earlier run of the same command
        train_seconds = json.loads(times.read_text(encoding="utf-8"))
    times.write_text(json.dumps(train_seconds), encoding="utf-8")

    console.rule("3 questions about what it has not seen")
    asker = BatchGenerator(model, data, out, console)
    naming = read_questions(data.held_out_naming)[: size.num_asked]
    named = asker.ask(naming, "new renderings")
    two = asker.ask(
        read_questions(data.held_out_two_pictures)[: size.num_asked // 2], "two pictures"
    )
    yes_no = asker.ask(read_questions(data.held_out_yes_no)[: size.num_asked // 2], "yes or no")
    unknown = asker.ask(_unknown_media_ids(data)[: size.num_asked // 4], "beside an unseen thing")

    console.rule("4 proofs")
    mixed = _shuffle_pictures(naming, seed)
    shuffled = asker.ask(mixed, "the same with the pictures shuffled")
    identical = text_is_untouched(model)
    start = closed_form_model(plan, out)
    begun = BatchGenerator(start, data, out, console).ask(
        naming[: size.num_asked // 2], "no gradient step"
    )

    history = json.loads((out / "stages/1-projector/done.json").read_text(encoding="utf-8"))
    report: dict[str, Any] = {
        "num_names": len(data.names),
        "held_out_accuracy": _share_right(named),
        "closed_form_accuracy": sum(
            contains_name(example.answer, example.truth) for example in begun
        )
        / len(begun),
        "shuffled_accuracy": _share_right(shuffled),
        "two_picture_accuracy": _share_right(two),
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
            "projector": "closed form (frozen) + MLP, 8 tokens a picture",
            "training": f"{size.num_steps} steps of {size.batch_size} rows",
        },
    }
    losses = [(log["step"], log["loss"]) for log in history["log_history"] if "loss" in log]
    examples = [*named, *two, *yes_no, *unknown]
    write_report(out, report, examples, losses)
    draw_sheet(_sheet_examples(named), out / "sheet.png", folder=out)
    return report


@dataclass
class BatchGenerator:
    """Asks questions of the data's files in batches, with features remembered."""

    model: MultiTokenForConditionalGeneration
    data: DemoData
    out: Path
    console: Console

    def __post_init__(self) -> None:
        assert self.model.processor is not None
        cache = FeatureCache(self.out / "cache" / "held_out")
        self.model.processor = replace(self.model.processor, cache=cache)
        self.cache = cache

    def ask(self, questions: Sequence[DemoQuestion], what: str) -> list[Example]:
        """Greedy answers, right only if they *are* the expected one."""
        folder = str(self.data.folder)
        items = [(Media("image", p), Fetch(root=folder)) for q in questions for p in q.pictures]
        encoders: Any = self.model.encoders
        self.cache.fill(items, self.model.modalities, encoders)
        with Progress(
            console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task(what, total=len(questions))
            answers = self.model.generate(
                [_row(question) for question in questions],
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
                pictures=tuple(
                    str((self.data.folder / p).relative_to(self.out)) for p in question.pictures
                ),
                group=what.capitalize(),
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
        share = _share_right(examples)
        self.console.print(f"{what}: {share:.1%} of {len(examples)} right", highlight=False)
        return examples


def text_is_untouched(model: MultiTokenForConditionalGeneration) -> bool:
    """Whether a text-only prompt gives a freshly loaded language model's logits, to the bit."""
    spec = model.config.model
    bare: Any = load_language_model(spec["language_model"], dtype=spec["dtype"])
    bare.to(model.device)
    ids = model.processor.tokenizer("The capital of France is", return_tensors="pt").input_ids  # type: ignore[union-attr]
    ids = ids.to(model.device)
    with torch.no_grad():
        return torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)


def closed_form_model(plan: Recipe, out: Path) -> MultiTokenForConditionalGeneration:
    """The model as it was after the closed-form start, before any gradient step."""
    model = compose(plan.model)
    load_trained(model, out / "stages" / "0-closed-form")
    return model.eval()


def _row(question: DemoQuestion) -> dict[str, Any]:
    return {
        "id": question.id,
        "images": list(question.pictures),
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question.text},
        ],
    }


def _shuffle_pictures(questions: Sequence[DemoQuestion], seed: int) -> list[DemoQuestion]:
    """Each question with the picture of another name; the right answer stays its own."""
    order = shuffled_pictures([question.names[0] for question in questions], seed)
    return [
        replace(question, pictures=questions[j].pictures, names=questions[j].names)
        for question, j in zip(questions, order, strict=True)
    ]


def _unknown_media_ids(data: DemoData) -> list[DemoQuestion]:
    return [q for q in read_questions(data.held_out_things) if q.kind == "known_beside_unknown"]


def _share_right(examples: Sequence[Example]) -> float:
    return round(sum(example.right for example in examples) / max(len(examples), 1), 4)


def _sheet_examples(examples: Sequence[Example]) -> list[Example]:
    """Fifteen spread over all, wrong ones among them in their true proportion."""
    step = max(1, len(examples) // 15)
    return list(examples[::step][:15])
