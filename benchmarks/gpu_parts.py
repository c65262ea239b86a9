"""Parts of benchmarks/gpu.py that compute: parity, training, QLoRA, serving.

Each part is a function of a device, a size and a folder for its files, and yields its figures as
it gets them.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from gpu_models import (
    TOY,
    Rows,
    Size,
    composed,
    language_model,
    llava_around,
    modality_fields,
    rows_of,
    write_parts,
)
from peers import RATE, llava_batch, with_ours, with_trainer
from rich.console import Console
from torch import Tensor
from training import row
from transformers import TrainerCallback

from multi_token.collate import Collator
from multi_token.generate import drop_last_answer, generate_ids
from multi_token.language_model.lora import attach_adapter
from multi_token.language_model.segment_attention import segment_attention_enabled
from multi_token.model import move_to_device
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec, Trainable
from multi_token.serve.engines.base import EngineEvent, Prompt, SamplingParams, TokenEvent
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.media_embeddings import MediaEmbedder
from multi_token.testing import tiny_tokenizer
from multi_token.train.run import train
from multi_token.types import Sample

Figures = Iterator[dict[str, Any]]
"""A part yields its rows of the page, so that those before a fault are kept."""


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: torch.device) -> float | None:
    """Return the most memory since the last call; None on the CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


# ---- parity


def parity(device: torch.device, size: Size, folder: Path) -> Figures:
    """Loss, gradients and answers of the same weights and batch on the CPU and on the device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cpu = torch.device("cpu")
    write_parts(folder, TOY, 4)
    for learn, part in (("projector", "projectors"), ("LoRA", "lora_"), ("full", "language_model")):
        here = composed(folder, language_model(TOY, cpu, torch.float32), cpu, "float32")
        if learn == "LoRA":
            here.language_model = attach_adapter(here.language_model, AdapterSpec())
        for name, parameter in here.named_parameters():
            parameter.requires_grad_("projectors" in name or part in name)
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)  # B starts at zero, and hides A
        there = move_to_device(copy.deepcopy(here), device)
        rows = rows_of(here, folder, 4, 10, 40)
        samples = [rows[i] for i in range(4)]
        collator = Collator(here.modalities, 0)
        for packed, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
            batch: Any = collator.pack(samples) if packed else collator(samples)
            loss, gradient = step(here, batch, dtype, packed)
            other, other_gradient = step(there, batch, dtype, packed)
            apart = float((gradient - other_gradient).norm() / gradient.norm())
            bound = 1e-3 if dtype == torch.float32 else 5e-2
            yield {
                "trained": learn,
                "batch": "packed" if packed else "padded",
                "precision": str(dtype).removeprefix("torch."),
                "loss on the CPU": round(loss, 5),
                "on the device": round(other, 5),
                "gradients apart": float(f"{apart:.1e}"),
                "bound": bound,
                "equal": apart < bound and abs(loss - other) < bound * abs(loss),
            }
    spread_out = language_model(TOY, cpu, torch.float32, initializer_range=0.2)
    here = composed(folder, spread_out, cpu, "float32")
    there = move_to_device(copy.deepcopy(here), device)
    rows = rows_of(here, folder, 4, 10, 40)
    asked = [drop_last_answer(c, here) for c in rows.given]
    answers = [
        model.generate(asked, max_new_tokens=16, root=str(folder)) for model in (here, there)
    ]
    num_equal = sum(a == b for a, b in zip(*answers, strict=True))
    yield {"answers": len(asked), "equal answers": num_equal, "equal": num_equal == len(asked)}


def step(model: Any, batch: Any, dtype: torch.dtype, packed: bool) -> tuple[float, Tensor]:
    """Return the loss and all gradients as one vector, on the CPU."""
    model.zero_grad(set_to_none=True)
    device = model.device
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    assert model.capabilities  # probed before, and not in a forward
    segments: Any = segment_attention_enabled(model.language_model) if packed else nullcontext()
    with segments, autocast:
        loss = model(**send_to_device(dict(batch), device)).loss
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat([g.detach().float().cpu().flatten() for g in gradients])


# ---- training


class Timed(TrainerCallback):
    """Seconds of the steps after the warm-up, with the device waited for at both ends."""

    WARM_UP = 2

    def __init__(self, trainer: Any, device: torch.device) -> None:
        self.device = device
        self.seconds = self.began = self.waits = 0.0
        read = trainer.get_batch_samples

        def get_batch_samples(batches: Iterator[Any], *args: Any, **options: Any) -> Any:
            return read(self.timed(batches), *args, **options)

        trainer.get_batch_samples = get_batch_samples
        trainer.add_callback(self)

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waits += time.perf_counter() - began
            yield batch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.WARM_UP:
            wait_for(self.device)
            self.waits, self.began = 0.0, time.perf_counter()
        elif state.global_step == args.max_steps:
            wait_for(self.device)
            self.seconds = time.perf_counter() - self.began


def training(device: torch.device, size: Size, folder: Path) -> Figures:
    """Ours and LLaVA with transformers' `Trainer` in turns, on one language model of both."""
    num_rows = size.batch * (size.steps + Timed.WARM_UP)
    write_parts(folder, size, num_rows)
    ours = composed(folder, language_model(size, device), device)
    llava = llava_around(folder, size, ours, device)
    for learn, spread in size.texts.items():
        rates = {"projectors": RATE}
        if "LoRA" in learn:
            # in place: LLaVA's language model is this one, and has the adapter too
            ours.language_model = attach_adapter(ours.language_model, AdapterSpec())
            rates["adapter"] = RATE
        yield from in_turns(device, size, folder, ours, llava, learn, rates, spread)


def in_turns(
    device: torch.device,
    size: Size,
    folder: Path,
    ours: Any,
    llava: Any,
    learn: str,
    rates: dict[str, float],
    spread: tuple[int, int],
) -> Figures:
    options: dict[str, Any] = {
        "per_device_train_batch_size": size.batch,
        "max_steps": Timed.WARM_UP + size.steps,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": True,
        "dataloader_num_workers": size.num_workers,
        "use_cpu": device.type == "cpu",
    }
    rows = rows_of(ours, folder, size.batch * options["max_steps"], *spread)
    theirs = replace(rows, llava_token=llava.config.image_token_id)
    lengths = [len(rows[i].input_ids) for i in range(len(rows))]
    trainers: dict[str, Any] = {
        "ours": with_ours(ours, folder, Trainable.model_validate(rates), rows, lengths, options)
    }
    llava.requires_grad_(False)
    for name, parameter in llava.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name or "lora_" in name)
    trainers["LLaVA + Trainer"] = with_trainer(llava, folder, theirs, options)
    losses = first_losses(ours, llava, rows, theirs, size.batch)
    clocks = {name: Timed(trainer, device) for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    peaks: dict[str, list[Any]] = {name: [] for name in trainers}
    waits = dict.fromkeys(trainers, 0.0)
    for _ in range(size.rounds):
        for name, trainer in trainers.items():
            gc.collect()
            peak_gib(device)
            trainer.train()
            trainer.model.zero_grad(set_to_none=True)
            peaks[name].append(peak_gib(device))
            seconds[name].append(clocks[name].seconds)
            waits[name] += clocks[name].waits
    metrics = trainers["ours"].step_metrics
    flops_per_token = metrics.total("flops") / metrics.total("tokens")
    for name, trainer in trainers.items():
        num_tokens = sum(lengths) / len(trainer.get_train_dataloader()) * size.steps
        speed = num_tokens / statistics.median(seconds[name])
        yield {
            "trained": learn,
            "by": name,
            "tokens/s": round(speed),
            "TFLOP/s": float(f"{speed * flops_per_token / 1e12:.3g}"),
            "peak GiB": max(peaks[name]) if device.type == "cuda" else None,
            "waits for data": round(waits[name] / sum(seconds[name]), 3),
            "tokens a row": round(sum(lengths) / len(lengths)),
            "loss of 8 rows": round(losses[name], 4),
        }


@torch.no_grad()
def first_losses(ours: Any, llava: Any, rows: Rows, theirs: Rows, batch: int) -> dict[str, float]:
    """Return the losses of both for the same rows, which have to agree."""
    collator = Collator(ours.modalities, 0)
    inputs: Any = collator([rows[i] for i in range(batch)])
    others = llava_batch([theirs[i] for i in range(batch)])
    with torch.autocast(ours.device.type, torch.bfloat16):
        return {
            "ours": float(ours(**send_to_device(dict(inputs), ours.device)).loss),
            "LLaVA + Trainer": float(llava(**send_to_device(others, ours.device)).loss),
        }


# ---- the run of a recipe, in bfloat16 and in 4 bits


def qlora(device: torch.device, size: Size, folder: Path) -> Figures:
    """Run a recipe with LoRA as a user does, on weights in bfloat16 and in 4 bits."""
    num_rows = 4 * size.batch
    write_parts(folder, size, num_rows)
    shallow = language_model(size, device, num_hidden_layers=size.shallow)
    shallow.save_pretrained(folder / "language_model")
    del shallow
    tiny_tokenizer().save_pretrained(folder / "language_model")
    numbers, spread = random.Random(0), size.texts["projector and LoRA"]
    rows = [row(i, i, numbers.randint(*spread), numbers) for i in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    for bits in (None, "4bit"):
        gc.collect()
        peak_gib(device)
        yield recipe_run(device, size, folder, bits)


def recipe_run(device: torch.device, size: Size, folder: Path, bits: str | None) -> dict[str, Any]:
    out = folder / f"run-{bits}"
    recipe = Recipe.model_validate(
        {
            "model": {
                "language_model": str(folder / "language_model"),
                "dtype": "bfloat16",
                "quantization": bits,
                "modalities": {"image": modality_fields(folder, None)},
            },
            "data": {"train": [{"rows": str(folder / "rows.jsonl")}]},
            "train": {
                "output_dir": str(out),
                "stages": [{"name": "lora", "learn": {"projectors": 1e-4, "adapter": 1e-4}}],
                "closed_form": None,
                "packing": True,
                "args": {
                    "max_steps": 12,
                    "per_device_train_batch_size": size.batch,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": [],
                    **({"use_cpu": True} if device.type == "cpu" else {}),
                },
            },
        }
    )
    console = Console(record=True, width=300, file=io.StringIO())
    model = train(recipe, console=console)
    said = console.export_text()
    done = json.loads((out / "stages" / "1-lora" / "done.json").read_text("utf-8"))
    logs = [one for one in done["log_history"] if "tokens_per_second" in one][3:]
    defaults = re.search(r"on this device by default: (.*)", said)
    attention = re.search(r"packs: (.*)", said)
    figures = {
        "weights": "bfloat16" if bits is None else bits,
        "layers": size.shallow,
        "tokens/s": round(statistics.median(one["tokens_per_second"] for one in logs)),
        "TFLOP/s": statistics.median(one["tflops_per_device"] for one in logs),
        "peak GiB": peak_gib(device),
        "waits for data": statistics.median(one["data_wait_fraction"] for one in logs),
        "first loss": round(done["log_history"][0]["loss"], 3),
        "last loss": round(logs[-1]["loss"], 3),
        "defaults": defaults[1].strip() if defaults else "",
        "packs": attention[1].strip() if attention else "",
    }
    del model
    return figures


# ---- serving


@dataclass
class Asked:
    """A request to the engine: ids and times of its new tokens, in seconds from its start."""

    began: float = field(default_factory=time.perf_counter)
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    last: EngineEvent | None = None

    def __call__(self, event: EngineEvent) -> None:
        self.last = event
        if isinstance(event, TokenEvent):
            self.ids.append(event.id)
            self.times.append(time.perf_counter() - self.began)
        else:
            self.ended.set()


def serving(device: torch.device, size: Size, folder: Path) -> Figures:
    """Clients of the local engine, one after the other and all at once; and bare `generate`."""
    write_parts(folder, size, size.num_clients)
    model = composed(folder, language_model(size, device), device)
    rows = rows_of(model, folder, size.num_clients, *size.texts["projector"])
    samples = [rows.processor(drop_last_answer(c, model), prompt_only=True) for c in rows.given]
    embedder = MediaEmbedder(model, cache_bytes=0)
    # without a prefix cache: prompts are asked again
    engine = LocalEngine(model, max_batch=size.num_clients, prefix_cache_tokens=0)
    began = time.perf_counter()
    engine.start()
    started = time.perf_counter() - began
    params = SamplingParams(size.new_tokens, ignore_eos=True)
    try:
        prompts = [prompt_of(embedder, sample, i) for i, sample in enumerate(samples)]
        names = iter(map(str, itertools.count()))

        def ask(some: Sequence[Prompt]) -> list[Asked]:
            asked = [Asked() for _ in some]
            for prompt, one in zip(some, asked, strict=True):
                engine.submit(next(names), prompt, params, one)
            for one in asked:
                if not one.ended.wait(60) or len(one.ids) != size.new_tokens:
                    raise SystemExit(f"the engine did not answer: {one.last}")
            return asked

        ask(prompts)  # warm-up
        alone = [ask([prompt])[0] for prompt in prompts]
        together = ask(prompts)
    finally:
        engine.stop()
        embedder.stop()
    began = time.perf_counter()
    bare = [
        generate_ids(model, [sample], max_new_tokens=size.new_tokens)[0].tolist()
        for sample in samples
    ]
    seconds = time.perf_counter() - began
    num_equal = sum(a.ids == b.ids for a, b in zip(alone, together, strict=True))
    # an end-of-turn token ends an answer of `generate`
    as_bare = sum(a.ids[: len(b)] == b for a, b in zip(alone, bare, strict=True))
    total = size.num_clients * size.new_tokens
    yield {
        "prompts": len(prompts),
        "prompt tokens": round(statistics.mean(len(s.input_ids) for s in samples)),
        "new tokens": size.new_tokens,
        "batching": engine._mode,
        "start s": round(started, 1),
        "`generate` tokens/s": round(sum(map(len, bare)) / seconds, 1),
        "one client tokens/s": round(total / sum(one.times[-1] for one in alone), 1),
        "all clients tokens/s": round(total / max(one.times[-1] for one in together), 1),
        "first token s": round(statistics.median(one.times[0] for one in alone), 3),
        "equal alone and together": num_equal,
        "equal to `generate`": as_bare,
        "peak GiB": peak_gib(device),
    }


def prompt_of(embedder: MediaEmbedder, sample: Sample, number: int) -> Prompt:
    (span,), (item,) = sample.media_spans, sample.media
    embeds = embedder.embed(span.modality, item, str(number)).result()
    return Prompt(sample.input_ids, (span,), (embeds,), (str(number),))


PARTS: dict[str, Callable[[torch.device, Size, Path], Figures]] = {
    "parity": parity,
    "training": training,
    "qlora": qlora,
    "serving": serving,
}
