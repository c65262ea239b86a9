"""The columns of the table in docs/language-models.md: one trial each, through our own classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multi_token.collate import Collator
from multi_token.errors import LanguageModelError
from multi_token.generate import generate_ids
from multi_token.language_model.forward import per_layer_inputs
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.language_model.probe import check_trainable
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.train import AdapterSpec, Trainable
from multi_token.train.parameter_groups import freeze_and_unfreeze
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Sample, Text
from tests.train.fitting import calibrate

YES = "yes"


@dataclass
class Subject:
    """A family's model as a trial gets it; `refused` collects our sentences by column."""

    folder: Path
    model: Any
    refused: dict[str, str] = field(default_factory=dict)


def composed(folder: Path, **spec: Any) -> Any:
    """Our model around the language model of a folder, with one modality; seeded."""
    vector = {"type": "vector", "dim": 5, "projector": {"type": "expand", "factor": 2}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultiTokenForConditionalGeneration.from_spec(
            ModelSpec.model_validate(
                {"language_model": str(folder), "modalities": {"vector": vector}, **spec}
            )
        )
        # its own start is small beside these embeddings, and media must be seen to matter
        for parameter in model.projectors.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def row(text: str, *vectors: list[float], answer: str = "a red square") -> Conversation:
    """A question about vectors, and its answer."""
    parts = (*(Media("vector", v) for v in vectors), Text(text))
    return Conversation((Message("user", parts), Message("assistant", (Text(answer),))), id=text)


FIRST, SECOND = [0.1, 2.0, -1.0, 0.5, 3.0], [1.0, -2.0, 0.0, 1.5, -0.5]
ROWS = [
    row("What is this?", FIRST),
    row("Which of these is a fruit, the first or the second?", FIRST, SECOND, answer="two"),
    row("No vector at all, only a much longer question about nothing", answer="yes"),
]


def prompts(model: Any) -> list[Sample]:
    return [model.processor(Conversation(r.messages[:-1], id=r.id), prompt_only=True) for r in ROWS]


def batch_of(model: Any, rows: list[Conversation]) -> Any:
    collate = Collator(model.modalities, model.processor.chat.filler_id)
    return collate([model.processor(r) for r in rows])


def full_logits(model: Any, embeds: Tensor, ids: Tensor, **inputs: Any) -> Tensor:
    """The child's logits at all positions, without a cache."""
    child = model.language_model
    return child(
        inputs_embeds=embeds, use_cache=False, **per_layer_inputs(child, ids), **inputs
    ).logits


def same(a: Tensor, b: Tensor, *, within: float = 1e-4) -> bool:
    """Equal up to rounding, in units of the spread."""
    return float((a - b).abs().max()) <= within * float(b.float().std())


@torch.no_grad()
def text_only(subject: Subject) -> str:
    """Text alone has the logits of transformers' own model, to the bit."""
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(subject.folder).eval()
    ids = torch.arange(20, 32).view(2, 6)
    ours, theirs = subject.model(input_ids=ids).logits, bare(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    return YES


@torch.no_grad()
def embeddings(subject: Subject) -> str:
    """Text as embeddings gives the logits of its ids; media change the logits after them."""
    model = subject.model
    batch = batch_of(model, ROWS[:1])
    ids = batch["input_ids"]
    by_ids = model.language_model(input_ids=ids, use_cache=False).logits
    assert same(full_logits(model, model.embed(ids), ids), by_ids)
    with_media = full_logits(model, model.embed(ids, batch["media"]), ids)
    media = batch["media"]["vector"]["positions"]
    first, after = int(media.min()), int(media.max()) + 1
    assert same(with_media[:, :first], by_ids[:, :first])
    assert not same(with_media[:, after], by_ids[:, after], within=1e-2)
    return YES


def batch_equals_single(subject: Subject) -> str:
    """Rows of several lengths, answered together, are answered as each alone."""
    model, options = subject.model, {"max_new_tokens": 4, "min_new_tokens": 4}
    samples = prompts(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        together = generate_ids(model, samples, **options)
    alone = [generate_ids(model, [sample], **options)[0] for sample in samples]
    for ours, single in zip(together, alone, strict=True):
        assert torch.equal(ours, single), (ours, single)
    assert len({tuple(ids.tolist()) for ids in alone}) > 1, "all answers are the same"
    by_length = any("each length is a batch of its own" in str(w.message) for w in warned)
    longest = max(len(sample.input_ids) for sample in samples) + 4
    assert by_length != model.capabilities.can_batch_lengths(longest)
    return f"{YES}, by length" if by_length else YES


def loss_and_gradients(subject: Subject) -> str:
    """Loss of a padded batch equals that of full logits, and of its rows one by one."""
    model = subject.model
    weight = model.projectors["vector"].network.branches[0][0].weight.requires_grad_(True)
    batch = batch_of(model, ROWS)
    num_items = int((batch["shift_labels"] != IGNORE_INDEX).sum())
    ours = model(**batch, num_items_in_batch=num_items)
    assert ours.logits.shape[0] == num_items
    gradients = [torch.autograd.grad(ours.loss, weight)[0]]

    def full(batch: Any) -> Tensor:
        logits = full_logits(
            model,
            model.embed(batch["input_ids"], batch["media"]),
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )
        labels = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels, reduction="sum"
        )

    for theirs in (full(batch), sum(full(batch_of(model, [r])) for r in ROWS)):
        loss: Any = theirs / num_items
        torch.testing.assert_close(ours.loss, loss, rtol=1e-4, atol=1e-5)
        gradients.append(torch.autograd.grad(loss, weight)[0])
        assert same(gradients[0], gradients[-1], within=1e-2)
    return YES if model.capabilities.supports_logits_to_keep else f"{YES}, all logits"


@torch.no_grad()
def greedy(subject: Subject) -> str:
    """Generated tokens are the argmax of repeated forwards over the complete text."""
    model = subject.model
    for sample in prompts(model)[1:]:
        (answer,) = generate_ids(model, [sample], max_new_tokens=4, min_new_tokens=4)
        batch = Collator(model.modalities, 0)([sample])
        ids, embeds = batch["input_ids"], model.embed(batch["input_ids"], batch["media"])
        stops = torch.tensor(sorted(stop_ids_of(model)))
        for token in answer:
            logits = full_logits(model, embeds, ids)[0, -1].index_fill(0, stops, -torch.inf)
            assert int(logits.argmax()) == int(token)
            ids = torch.cat([ids, token.view(1, 1)], 1)
            embeds = torch.cat([embeds, model.get_input_embeddings()(token.view(1, 1))], 1)
    return YES if model.capabilities.prefill_mode == "embeds" else f"{YES}, by ids"


def stop_ids_of(model: Any) -> list[int]:
    from multi_token.generate import eos_token_ids

    return eos_token_ids(model)


@torch.no_grad()
def packed(subject: Subject) -> str:
    """Two rows in one, with restarting positions, give the logits of each alone."""
    model = subject.model
    batch = batch_of(model, [row("What is this?", FIRST), row("What is this?", SECOND)])
    num_rows, time = batch["input_ids"].shape
    assert batch["attention_mask"].all(), "rows of one length: flattened, they are the packed row"
    alone = model(input_ids=batch["input_ids"], media=batch["media"], use_cache=False).logits
    isolated = False
    if "position_ids" in forward_arguments(model):
        together = model(
            input_ids=batch["input_ids"].view(1, -1),
            media=batch["media"],
            position_ids=torch.arange(time).repeat(1, num_rows),
            use_cache=False,
        ).logits
        isolated = same(together.view_as(alone), alone)
    assert isolated == model.capabilities.supports_packing
    model.capabilities.require("supports_packing")
    return YES


def forward_arguments(model: Any) -> list[str]:
    import inspect

    return list(inspect.signature(model.language_model.forward).parameters)


@torch.no_grad()
def size_of_tokens(subject: Subject) -> str:
    """At the start media tokens have the root mean square of what ids are embedded as."""
    model = subject.model
    items = [(item, model.processor) for r in ROWS for item in r.media]
    assert calibrate(model, "vector", items) == len(items)
    ids = torch.arange(model.get_input_embeddings().weight.shape[0])[None]
    batch = batch_of(model, [row("?", FIRST), row("?", SECOND), row("?", FIRST)])
    tokens = model.embed(batch["input_ids"], batch["media"]).flatten(0, 1)
    tokens = tokens[batch["media"]["vector"]["positions"]]
    expected = model.embed(ids).float().square().mean().sqrt()
    torch.testing.assert_close(tokens.square().mean().sqrt(), expected, rtol=1e-3, atol=0)
    return YES


def adapter(subject: Subject) -> str:
    """LoRA is on the language model alone; it and the projector are trained, nothing else."""
    model = subject.model
    cell = attached(subject, "LoRA", model)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names and all(name.startswith("language_model.") for name in names)
    freeze_and_unfreeze(model, Trainable.model_validate({"projectors": 1e-2, "adapter": 1e-2}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check_trainable(model.language_model)
    losses = trained(model, num_steps=3)
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n or n.startswith("projectors.") for n in changed)
    assert any("lora_B" in n for n in changed)
    return cell


def attached(subject: Subject, heading: str, model: Any) -> str:
    """LoRA on all linear layers, or where that is refused on those that the refusal names."""
    try:
        model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
        return YES
    except LanguageModelError as error:
        assert not adapter_parameters(model.language_model), "half an adapter was left"
        subject.refused[heading] = str(error)
        targets = str(error).rpartition(": ")[2].split(", ")
        spec = AdapterSpec(r=2, target_modules=targets)
        model.language_model = attach_adapter(model.language_model, spec)
        return f"{YES}, by name"


def trained(model: Any, *, num_steps: int) -> list[float]:
    """Losses of a few steps on the rows, then eval mode again."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    batch = batch_of(model, ROWS)
    losses = []
    model.train()
    for _ in range(num_steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def saved(subject: Subject) -> str:
    """A trained model comes back with the same logits, to the bit."""
    model = subject.model
    assert adapter_parameters(model.language_model), "it is saved with its adapter"
    out = subject.folder / "run"
    model.save_pretrained(out)
    again = MultiTokenForConditionalGeneration.from_pretrained(out)
    batch = batch_of(model, ROWS)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "media")}
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    return YES


def four_bits(subject: Subject) -> str:
    """An nf4 model loads, trains LoRA and projector, and generates."""
    model = composed(subject.folder, quantization="4bit")
    stored = [p for p in model.language_model.parameters() if p.dtype == torch.uint8]
    assert stored, "no weight is stored in 4 bits"
    before = [p.clone() for p in stored]
    assert model.capabilities, "asked for before an adapter is attached, as training does"
    cell = attached(subject, "4-bit", model)
    check_trainable(model.language_model)
    freeze_and_unfreeze(model, Trainable.model_validate({"projectors": 1e-2, "adapter": 1e-2}))
    losses = trained(model, num_steps=4)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(stored, before, strict=True))
    assert len(generate_ids(model, prompts(model)[:1], max_new_tokens=2)[0])
    return cell


# Heading of the column -> its trial, in the order in which they run on one model.
COLUMNS: dict[str, Callable[[Subject], str]] = {
    "text": text_only,
    "embeddings": embeddings,
    "batch": batch_equals_single,
    "loss": loss_and_gradients,
    "greedy": greedy,
    "packed": packed,
    "size": size_of_tokens,
    "LoRA": adapter,
    "save": saved,
}
SLOW_COLUMNS: dict[str, Callable[[Subject], str]] = {"4-bit": four_bits}


def run(subject: Subject, columns: dict[str, Callable[[Subject], str]]) -> dict[str, str]:
    """The cells of a family. A refusal by our own error is a cell; anything else fails.

    A model that cannot be driven at all is refused once, under no heading.
    """
    try:
        assert subject.model.capabilities
    except LanguageModelError as error:
        subject.refused[""] = str(error)
        return dict.fromkeys(columns, "refused")
    cells = {}
    for heading, trial in columns.items():
        try:
            cells[heading] = trial(subject)
        except LanguageModelError as error:
            cells[heading] = "refused"
            subject.refused[heading] = str(error)
    return cells
