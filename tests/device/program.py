"""Program that trains, generates and serves on the simulated accelerator, and writes its log.

    python tests/device/program.py MATERIAL OUT.json

A process of its own, since torch takes one such device for as long as it lives. `MATERIAL` is the
folder of tests/golden/material.py. OUT.json: case -> `Found` as a mapping.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.device import simulated  # isort: skip - before multi_token
from rich.console import Console
from transformers import TrainerCallback

from multi_token.generate import drop_last_answer
from multi_token.model import MultiTokenForConditionalGeneration, move_to_device
from multi_token.recipe.recipe import Recipe
from multi_token.serve.engines.base import Prompt, SamplingParams
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.media_embeddings import MediaEmbedder
from multi_token.train.prepare import Run, open_stages, prepare
from multi_token.train.run import closed_form_stage
from multi_token.train.stage import attach_adapters, build_trainer
from multi_token.types import Sample
from tests.golden.answers import NUM_NEW, QUESTIONS, row_of
from tests.serve.engine_parts import Client

QUIET = Console(quiet=True)
ACCUMULATION = 2


@dataclass
class Found:
    """Log of a case, of all its micro-batches."""

    num_batches: int = 1
    num_operators: int = 0
    ours: dict[str, int] = field(default_factory=dict)
    """Host syncs that we cause, with those of autograd: line -> count."""
    libraries: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, int] = field(default_factory=dict)
    mixes: dict[str, int] = field(default_factory=dict)
    error: str = ""


def snapshot(num_batches: int = 1) -> Found:
    log = simulated.LOG
    return Found(
        num_batches,
        log.num_operators,
        log.lines("sync", "ours", "backward"),
        log.lines("sync", "libraries"),
        log.lines("upload"),
        log.lines("mix"),
    )


class CountTwoSteps(TrainerCallback):
    """Logs the third and fourth step: the first ones also make what is made once."""

    found: Found | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            simulated.LOG.reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            self.found = snapshot(2 * ACCUMULATION)


PROJECTORS = {"projectors": 1e-2}
STAGES: dict[str, dict[str, Any]] = {
    "projector": {"learn": PROJECTORS},
    "full": {"learn": {**PROJECTORS, "language_model": 1e-3}},
    "lora": {"learn": {**PROJECTORS, "adapter": 1e-3}},
    "dpo": {"learn": PROJECTORS, "dpo": {}},
    "teacher": {"learn": PROJECTORS, "distillation": {"weight": 0.5}},
}
MODES: dict[str, dict[str, Any]] = {
    # the loss in chunks of a few tokens
    "padded": {"logits_megabytes": 0.004},
    "packed": {"packing": True, "pack_tokens": 128},
    "shared": {"packing": {"share": True}, "pack_tokens": 160},
    "streamed": {},
    "cached": {"feature_cache": True},
}


def recipe(material: Path, out: Path, mode: str, stages: list[str], rows: str) -> Recipe:
    data: dict[str, Any] = {"train": [{"rows": str(material / f"{rows}.jsonl")}]}
    if mode == "streamed":
        data |= {"stream": {"window": 4}, "max_tokens": 120}
    fields = {
        "model": {
            "language_model": str(material / "language_model"),
            "modalities": {
                "image": {
                    "type": "image",
                    "encoder": str(material / "clip"),
                    "projector": {"type": "mlp"},
                },
                "vector": {
                    "type": "vector",
                    "dim": 5,
                    "projector": {"type": "expand", "factor": 2},
                },
            },
        },
        "data": data,
        "train": {
            "output_dir": str(out),
            "stages": [{"name": name, **STAGES[name]} for name in stages],
            "args": {
                "max_steps": 5,
                "gradient_accumulation_steps": ACCUMULATION,
                "per_device_train_batch_size": 2,
                "logging_steps": 100,
                "dataloader_pin_memory": False,
                "dataloader_num_workers": 0,
                "bf16": False,
                "report_to": [],
                "save_strategy": "no",
                "optim": "adamw_torch",
            },
            "calibration_items": 8,
            **MODES[mode],
        },
    }
    return Recipe.model_validate(fields)


def prepared(spec: Recipe) -> Run:
    stages = open_stages(spec)
    assert stages[0].args.device == simulated.DEVICE, stages[0].args.device
    return prepare(spec, stages, QUIET)


def train_stages(run: Run, cases: dict[str, Found], mode: str) -> None:
    for stage in run.stages:
        attach_adapters(run, stage)
        trainer = build_trainer(run, stage)
        counter = CountTwoSteps()
        trainer.add_callback(counter)
        try:
            trainer.train()
            cases[f"{mode}-{stage.spec.name}"] = counter.found or Found(error="no step")
        except Exception:  # noqa: BLE001 - any fault is the result of the case
            cases[f"{mode}-{stage.spec.name}"] = Found(error=traceback.format_exc())


def training(material: Path, work: Path, *, mode: str) -> dict[str, Found]:
    """Cases of one way to batch rows: each kind of stage."""
    cases: dict[str, Found] = {}
    rows = "one_image" if mode == "shared" else "naming"
    run = prepared(recipe(material, work / mode, mode, ["projector", "full", "lora"], rows))
    if mode == "padded":
        simulated.LOG.reset()
        closed_form_stage(run)
        cases["closed form"] = snapshot()
    train_stages(run, cases, mode)
    teacher = recipe(material, work / f"{mode}-t", mode, ["teacher"], "media_texts")
    train_stages(prepared(teacher), cases, mode)
    if mode in ("padded", "cached"):  # packing and streams exclude `dpo`
        pairs = recipe(material, work / f"{mode}-p", mode, ["dpo"], "pairs")
        train_stages(prepared(pairs), cases, mode)
    return cases


async def prompt_of(embedder: MediaEmbedder, sample: Sample) -> Prompt:
    placed = zip(sample.media_spans, sample.media, strict=True)
    items = [await embedder.embed_item(span.modality, item) for span, item in placed]
    embeds, keys = tuple(item.embeds for item in items), tuple(item.key for item in items)
    return Prompt(sample.input_ids, tuple(sample.media_spans), embeds, keys)


def using(material: Path, work: Path) -> dict[str, Found]:
    """Cases of a model that is used: `generate`, and the local engine from item to answer."""
    cases: dict[str, Found] = {}
    spec = recipe(material, work / "used", "padded", ["projector"], "naming")
    model = MultiTokenForConditionalGeneration.from_spec(spec.model)
    move_to_device(model, simulated.DEVICE).eval()
    rows = [row_of(QUESTIONS[name], material) for name in ("a picture", "a vector")]
    assert model.capabilities.name  # probed here, or its trials would be counted
    simulated.LOG.reset()
    model.generate(rows, max_new_tokens=NUM_NEW)
    cases["generate"] = snapshot(NUM_NEW)

    engine, embedder = LocalEngine(model, max_batch=4), MediaEmbedder(model, cache_bytes=10**6)
    samples = [
        model.require_processor()(drop_last_answer(row, model), prompt_only=True) for row in rows
    ]
    try:
        engine.start()
        simulated.LOG.reset()
        prompts = [asyncio.run(prompt_of(embedder, sample)) for sample in samples]
        cases["items of requests"] = snapshot(len(prompts))
        simulated.LOG.reset()
        clients = [Client() for _ in prompts]
        for number, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
            params = SamplingParams(NUM_NEW, ignore_eos=True)
            engine.submit(str(number), prompt, params, client)
        answers = [client.ids for client in clients]
        cases["local engine"] = snapshot(NUM_NEW)
        if [len(ids) for ids in answers] != [NUM_NEW] * len(prompts):
            cases["local engine"].error = f"answers {answers}"
        simulated.LOG.reset()
        drawn = Client()
        params = SamplingParams(NUM_NEW, temperature=1.0, top_k=5, top_p=0.9, ignore_eos=True)
        engine.submit("drawn", prompts[0], params, drawn)
        cases["sampled answer"] = snapshot(len(drawn.ids))
    finally:
        engine.stop()
        embedder.stop()
    return cases


def main(material: Path, out: Path) -> None:
    from_spec = MultiTokenForConditionalGeneration.from_spec

    def from_spec_on_cpu(*args: Any, **options: Any) -> Any:
        # weights are read on the CPU and then moved, as for a real device
        with simulated.unsimulated():
            return from_spec(*args, **options)

    MultiTokenForConditionalGeneration.from_spec = from_spec_on_cpu  # type: ignore[method-assign]
    cases: dict[str, Found] = {}
    with simulated.simulated():
        for mode in sys.argv[3:] or [*MODES, "using"]:
            kind = using if mode == "using" else partial(training, mode=mode)
            cases |= kind(material, out.parent / "runs")
    out.write_text(json.dumps({name: asdict(found) for name, found in cases.items()}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
