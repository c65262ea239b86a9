"""Kernels, host syncs, 4-bit layers, memory and the local engine, as only a GPU can show them.

benchmarks/gpu.py runs these tests, where there is a GPU.
"""

from __future__ import annotations

import copy
import itertools
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.utils.import_utils import enable_tf32

import multi_token
from multi_token.collate import Collator
from multi_token.generate import generate_ids, single_question
from multi_token.language_model import segment_attention as attention
from multi_token.language_model.loading import load_language_model
from multi_token.model import MultiTokenForConditionalGeneration, move_to_device
from multi_token.recipe.model import ModelSpec, Quantization
from multi_token.recipe.recipe import Recipe
from multi_token.serve.engines.base import Prompt, SamplingParams
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.media_embeddings import MediaEmbedder
from multi_token.testing import tiny_language_model, tiny_tokenizer
from multi_token.testing.language_models import tiny_llama_config
from multi_token.train.plan.estimate import plan_stage
from multi_token.train.prepare import open_stages, prepare
from multi_token.train.stage import attach_adapters, build_trainer
from multi_token.types import Media
from tests.serve.engine_parts import VECTORS, Client, composed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # of libraries on a device that no test here has seen
    pytest.mark.filterwarnings("default"),
]
Fields = Callable[..., dict[str, Any]]
DEVICE = "cuda"
ARGS = {"per_device_train_batch_size": 4, "logging_steps": 100, "save_strategy": "no"}
LEARN = {
    "projector": {"projectors": 1e-3},
    "lora": {"projectors": 1e-3, "adapter": 1e-3},
    "full": {"projectors": 1e-3, "language_model": 1e-4},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model whose heads are wide enough for every kernel."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), tiny_tokenizer()
    config = tiny_llama_config(tokenizer, hidden_size=256)
    config.initializer_range = 0.05  # wide layers of larger weights would magnify each rounding
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer_of(fields: dict[str, Any]) -> Any:
    """Return the trainer of the only stage of a recipe, ready to start."""
    recipe = Recipe.model_validate(fields)
    run = prepare(recipe, open_stages(recipe), Console(quiet=True))
    (stage,) = run.stages
    attach_adapters(run, stage)
    return build_trainer(run, stage)


def stage_of(learn: str, **args: Any) -> dict[str, Any]:
    stage = {"name": "s", "learn": LEARN[learn]}
    return {"stages": [stage], "args": {**ARGS, "report_to": [], **args}, "closed_form": None}


# ---- host syncs

PACKAGE, TORCH = (str(Path(m.__file__ or "").parent) for m in (multi_token, torch))


class Syncs(TrainerCallback):
    """Counts the lines that wait for the GPU in the third and fourth step."""

    def __init__(self) -> None:
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:  # the first ones also make what is made once
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            torch.cuda.set_sync_debug_mode("default")

    def note(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if not f.filename.startswith(TORCH)]
        frames = [f for f in frames if not f.filename.endswith("warnings.py")]
        # autograd's threads have no frame of Python
        line = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "autograd"
        (self.ours if line.startswith(PACKAGE) else self.others)[line] += 1


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("packing", [None, {}], ids=["padded", "packed"])
def test_a_step_waits_for_the_gpu_as_often_as_on_the_simulated_accelerator(
    recipe_fields: Fields, wide: str, tmp_path: Path, packing: Any, learn: str
) -> None:
    """Once a step, for the losses of the step before; transformers looks at masks of padding."""
    fields = recipe_fields(tmp_path, packing=packing, **stage_of(learn, max_steps=6))
    fields["model"]["language_model"] = wide
    trainer, syncs = trainer_of(fields), Syncs()
    trainer.add_callback(syncs)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = syncs.note
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all("distributed.py" in line for line in syncs.ours), syncs.ours
    assert syncs.ours.total() <= 2, syncs.ours
    if packing is not None:
        assert not syncs.others, syncs.others


# ---- kernels


def test_packs_have_the_loss_and_gradients_of_padded_rows_by_one_kernel_a_layer(
    recipe_fields: Fields, data: Path, wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = recipe_fields(tmp_path)["model"] | {"language_model": wide}
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(ModelSpec.model_validate(fields))
    move_to_device(model, DEVICE).train()
    assert model.capabilities.supports_segment_attention
    calls: list[Any] = []
    kernel = attention.varlen_attention

    def watched(query: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(query.shape)
        return kernel(query, *args, **options)

    monkeypatch.setattr(attention, "varlen_attention", watched)
    names = ("red", "blue", "green")
    questions = [
        single_question("What is this? " * (i + 1), [Media("image", str(data / f"{name}.png"))])
        for i, name in enumerate(names)
    ]
    samples = [model.require_processor()(question, prompt_only=True) for question in questions]
    for sample in samples:
        sample.labels[-3:] = sample.input_ids[-3:]
    collator = Collator(model.modalities, 0)

    def trained(batch: Any) -> tuple[float, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**send_to_device(dict(batch), DEVICE)).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.projectors.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(gradients)

    loss, gradient = trained(collator(samples))
    assert not calls
    with attention.segment_attention_enabled(model.language_model):
        packed_loss, packed_gradient = trained(collator.pack(samples))
    assert len(calls) == model.language_model.config.num_hidden_layers
    assert packed_loss == pytest.approx(loss, rel=1e-2)
    assert float((packed_gradient - gradient).norm() / gradient.norm()) < 5e-2


# ---- 4 bits


def test_gradients_through_4_bit_layers_are_near_those_of_the_weights(wide: str) -> None:
    pytest.importorskip("bitsandbytes")
    ids, found = torch.arange(10, 60, device=DEVICE)[None], []
    for quantization in (None, Quantization(kind="4bit", compute_dtype="bfloat16")):
        made: Any = load_language_model(wide, dtype="bfloat16", quantization=quantization)
        made = made.to(DEVICE).train()
        embeds = made.get_input_embeddings()(ids).detach().requires_grad_()
        made(inputs_embeds=embeds, labels=ids).loss.backward()
        assert embeds.grad is not None
        found.append(embeds.grad.float().flatten())
    assert 0.9 < torch.nn.functional.cosine_similarity(*found, dim=0) < 1.0


# ---- memory


@pytest.mark.parametrize("learn", ["lora", "full"])
def test_planned_memory_is_within_a_fifth_of_the_most_that_a_gpu_holds(
    recipe_fields: Fields, tmp_path: Path, learn: str
) -> None:
    # libraries keep some 30 MB of workspace, which this model makes a small share
    big = tiny_language_model(tmp_path / "big", hidden_size=2048)
    fields = recipe_fields(tmp_path / "run", **stage_of(learn, max_steps=6))
    fields["model"]["language_model"] = big
    trainer = trainer_of(fields)
    plan = plan_stage(trainer, "s", try_steps=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert plan.memory.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)


# ---- serving


def test_the_local_engine_answers_as_generate_does(families: ModuleType, tmp_path: Path) -> None:
    enable_tf32(False)  # trainers turn it on for their process
    model = composed(tmp_path, families, "Llama")
    before = copy.deepcopy(model)
    move_to_device(model, DEVICE)
    processor = model.require_processor()
    questions = [
        single_question("Say what this is. " * (i + 1), [Media("vector", vector)])
        for i, vector in enumerate(VECTORS)
    ]
    samples = [processor(question, prompt_only=True) for question in questions]
    engine, embedder = LocalEngine(model, max_batch=4), MediaEmbedder(model, cache_bytes=0)
    clients = [Client() for _ in samples]
    try:
        engine.start()
        for number, (sample, client) in enumerate(zip(samples, clients, strict=True)):
            (span,), (item,) = sample.media_spans, sample.media
            embeds = embedder.embed("vector", item, str(number)).result()
            prompt = Prompt(sample.input_ids, (span,), (embeds,), (str(number),))
            engine.submit(str(number), prompt, SamplingParams(12, ignore_eos=True), client)
        answers = [client.ids for client in clients]
    finally:
        engine.stop()
        embedder.stop()
    for one, (sample, ids) in itertools.product(
        (model, before), zip(samples, answers, strict=True)
    ):
        (bare,) = generate_ids(one, [sample], max_new_tokens=12)
        # `generate` ends with its turn, and the engine goes on
        assert ids[: len(bare)] == bare.tolist()
