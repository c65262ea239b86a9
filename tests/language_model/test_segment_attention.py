"""segment_attention.py: packed rows have the logits that they have alone, under any mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from multi_token.collate import Collator, shared_prefix
from multi_token.errors import LanguageModelError
from multi_token.language_model import segment_attention as attention
from multi_token.language_model.capabilities import UNLIMITED_REACH
from multi_token.language_model.probe import probe
from multi_token.language_model.segment_attention import (
    SEGMENT_ATTENTION,
    segment_attention_enabled,
)
from multi_token.recipe.train import AdapterSpec, Trainable
from multi_token.train.parameter_groups import freeze_and_unfreeze
from multi_token.types import (
    IGNORE_INDEX,
    BatchCounts,
    Conversation,
    Media,
    Message,
    PackedBatch,
    Text,
)

LENGTHS = (12, 1, 25)


def question(*parts: Any, answer: str) -> Conversation:
    turn = tuple(p if isinstance(p, Media) else Text(p) for p in parts)
    return Conversation((Message("user", turn), Message("assistant", (Text(answer),))), id=answer)


def image(colour: str) -> Media:
    return Media("image", Image.new("RGB", (40, 40), colour))


MIXED = [
    question("What is this?", image("red"), answer="a red square"),
    question(image("blue"), " or ", image("green"), "?", answer="two"),
    question("No media at all, only a much longer question about nothing", answer="yes"),
    question(Media("vector", [0.1, 2.0, -1.0, 0.5, 3.0]), image("white"), answer="eight nine"),
]


@pytest.fixture
def trainable(recipe_fields: Callable[..., Any], tmp_path: Path) -> Iterator[Any]:
    """Yield a model with trainable projectors and LoRA, for images and vectors."""
    from multi_token.language_model.lora import adapter_parameters, attach_adapter
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe

    fields = recipe_fields(tmp_path)
    projector = {"type": "expand", "factor": 2}
    fields["model"]["modalities"]["vector"] = {"type": "vector", "dim": 5, "projector": projector}
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    with torch.no_grad():  # LoRA starts at zero, where half of its gradients are
        for parameter in adapter_parameters(model.language_model):
            parameter.normal_(std=0.05)
    freeze_and_unfreeze(model, Trainable.model_validate({"projectors": 1e-3, "adapter": 1e-3}))
    yield model.train()


def collator_of(model: Any) -> Collator:
    return Collator(model.modalities, model.processor.chat.filler_id)


def packed(model: Any, conversations: list[Conversation]) -> PackedBatch:
    return collator_of(model).pack([model.processor(c) for c in conversations])


def loss_and_gradients(model: Any, batches: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over batches that make one step."""
    num_items = sum(int((b["shift_labels"] != IGNORE_INDEX).sum()) for b in batches)
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(num_items)).loss
        loss.backward()
        total += loss.detach()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return total, gradients


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance between two gradients of one parameter, as a part of their length."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[key] - theirs[key]).norm() / theirs[key].norm().clamp(min=1e-6)) for key in ours
    )


def test_packed_equals_padded_equals_one_by_one_in_loss_and_gradients(trainable: Any) -> None:
    model = trainable
    collate = collator_of(model)
    samples = [model.processor(c) for c in MIXED]
    alone = loss_and_gradients(model, [collate([s]) for s in samples])
    ways = {
        "padded": [collate(samples)],
        "packed": [collate.pack(samples)],
        "two packs accumulated": [collate.pack(samples[:1]), collate.pack(samples[1:])],
    }
    found = {name: loss_and_gradients(model, batches) for name, batches in ways.items()}
    with segment_attention_enabled(model.language_model) as by_segment:
        assert by_segment
        found["by segment"] = loss_and_gradients(model, ways["packed"])
        found["padded, by segment"] = loss_and_gradients(model, ways["padded"])
    parts = {name.split(".")[0] for name, gradient in alone[1].items() if gradient.any()}
    assert parts == {"projectors", "language_model"}
    for name, (loss, gradients) in found.items():
        torch.testing.assert_close(loss, alone[0], rtol=1e-5, atol=1e-6, msg=name)
        assert apart(gradients, alone[1]) < 1e-5, name


def test_activation_checkpointing_recomputes_layers_by_segment(trainable: Any) -> None:
    model, batch = trainable, packed(trainable, MIXED)
    plain = loss_and_gradients(model, [batch])
    base = model.language_model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    with segment_attention_enabled(model.language_model):
        again = loss_and_gradients(model, [batch])
    assert apart(again[1], plain[1]) < 1e-5


@pytest.mark.parametrize("by_segment", [False, True], ids=["mask", "by segment"])
def test_the_content_of_a_segment_changes_nothing_in_the_others(
    trainable: Any, by_segment: bool
) -> None:
    model = trainable.eval()
    others = [
        MIXED[0],
        question("Which of all these is it?", image("white"), answer="seven"),
        *MIXED[2:],
    ]

    def logits(conversations: list[Conversation]) -> list[Tensor]:
        batch: dict[str, Any] = dict(packed(model, conversations))
        borders = batch["cu_seq_lens_q"].tolist()
        for key in ("labels", "shift_labels"):
            del batch[key]
        found = model(**batch, use_cache=False).logits[0]
        return [found[a:b] for a, b in pairwise(borders)]

    with torch.no_grad():
        if by_segment:
            with segment_attention_enabled(model.language_model):
                before, after = logits(MIXED), logits(others)
        else:
            before, after = logits(MIXED), logits(others)
    assert before[1].shape != after[1].shape
    for i in (0, 2, 3):
        torch.testing.assert_close(before[i], after[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen3", "Gemma3", "Phi-3", "GPT-2", "Granite", "SmolLM3"]
)
def test_segment_attention_gives_each_family_the_logits_of_single_rows(
    families: Any, family: str
) -> None:
    """Rows are longer than the sliding windows, so that these matter."""
    model = families.tiny_model(family)
    assert probe(model).supports_segment_attention
    ids = torch.randint(10, 390, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.no_grad():
        rows = [model(input_ids=row, use_cache=False).logits for row in ids.split(LENGTHS, 1)]
        with segment_attention_enabled(model):
            found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat(rows, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("window", "by_segment"), [(None, True), (25, True), (24, False)])
def test_a_full_mask_is_made_only_where_a_window_cuts_a_segment(
    families: Any, window: int | None, by_segment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []

    def watched(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        shapes.append((query.shape[2], args[0].shape[2]))
        return sdpa_attention_forward(module, query, *args, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    model = families.tiny_model("Mistral", sliding_window=window)
    ids = torch.arange(10, 10 + sum(LENGTHS))[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with segment_attention_enabled(model), torch.no_grad():
        model(input_ids=ids, position_ids=positions, use_cache=False)
    one_layer = [(n, n) for n in (LENGTHS if by_segment else (sum(LENGTHS),))]
    assert shapes == 2 * one_layer


@pytest.mark.parametrize("family", ["Gemma2", "Mamba2", "LFM2"])
def test_models_without_segment_attention_are_found(families: Any, family: str) -> None:
    model = families.tiny_model(family)
    before = model.config._attn_implementation
    found = probe(model)
    assert not found.supports_segment_attention
    assert model.config._attn_implementation == before
    if family != "Gemma2":  # whose soft caps need `eager`, with a mask over all
        with pytest.raises(LanguageModelError, match="cannot take packed rows"):
            found.require("supports_packing")


def test_answers_are_the_same_during_and_after_segment_attention(model: Any) -> None:
    questions = [Conversation(c.messages[:1], id=c.id) for c in MIXED]
    before = model.generate(questions, max_new_tokens=6, batch_size=2)
    with segment_attention_enabled(model.language_model):
        assert model.language_model.config._attn_implementation == SEGMENT_ATTENTION
        assert model.generate(questions, max_new_tokens=6, batch_size=2) == before
        assert model.generate(questions, max_new_tokens=6, batch_size=1) == before
    assert model.language_model.config._attn_implementation == "sdpa"
    assert model.generate(questions, max_new_tokens=6, batch_size=2) == before


def test_a_model_on_another_attention_is_left_unchanged(families: Any) -> None:
    model = families.tiny_model("Llama")
    model.set_attn_implementation("eager")
    with segment_attention_enabled(model) as by_segment:
        assert not by_segment and model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


SHARED = [
    question("Look at ", image("red"), " and say: ", "is it red?", answer="yes"),
    question("Look at ", image("red"), " and say: ", "which colour is it?", answer="a red square"),
    question("Look at ", image("red"), " and say: ", "is it blue?", answer="no"),
    question("Look at ", image("blue"), " and say: ", "is it blue?", answer="yes"),
    question("What is this?", image("red"), answer="a red square"),
    question(
        *("Here: ", Media("vector", [0.1, 2.0, -1.0, 0.5, 3.0]), image("white"), "?"),
        answer="one",
    ),
    question(
        *("Here: ", Media("vector", [0.1, 2.0, -1.0, 0.5, 3.0]), image("green"), "?"),
        answer="two",
    ),
]


@pytest.mark.parametrize("system", [None, "You are a helpful assistant of few words."])
def test_rows_that_share_prefixes_are_a_tree_with_the_loss_and_gradients_of_rows_one_by_one(
    trainable: Any, system: str | None
) -> None:
    """All rows share a system message; some share an image after it as well."""
    model = trainable
    first = () if system is None else (Message("system", (Text(system),)),)
    samples = [model.processor(replace(c, messages=(*first, *c.messages))) for c in SHARED]
    alone = loss_and_gradients(model, [collator_of(model)([s]) for s in samples])
    tree = replace(collator_of(model), share=True).pack(samples)
    (all_, none), (three, one) = shared_prefix(samples), shared_prefix(samples[:3])
    two = shared_prefix(samples[5:])[0]
    assert none == 0 and one == 1
    assert two == samples[5].media_spans[1].start == 2 + samples[5].media_spans[0].start
    num_saved = sum(len(s.input_ids) for s in samples) - tree["input_ids"].shape[1]
    if system is None:  # what all share is too short
        assert all_ < 8 and num_saved == 2 * three + two > 30
    else:
        assert all_ >= 20 and num_saved == 6 * all_ + 2 * (three - all_) + (two - all_)
    assert len(tree["media"]["image"]["positions"]) == 5 * 3, "of seven images"
    with segment_attention_enabled(model.language_model):
        loss, gradients = loss_and_gradients(model, [tree])
    torch.testing.assert_close(loss, alone[0], rtol=1e-5, atol=1e-6)
    assert apart(gradients, alone[1]) < 1e-5


def test_a_shared_prefix_ends_before_the_first_supervised_token(model: Any) -> None:
    seen = Message("user", (image("red"), Text("?")))
    said = Message("assistant", (Text("a red square"),))
    asked = [Message("user", (Text(t),)) for t in ("one", "an image")]
    rows = [Conversation((seen, said, again, said), id="row") for again in asked]
    samples = [model.processor(row) for row in rows]
    first_supervised = int((samples[0].labels != IGNORE_INDEX).nonzero()[0])
    assert shared_prefix(samples) == (first_supervised - 1, 1)
    texts = [model.processor(Conversation((again, said), id="row")) for again in asked]
    assert shared_prefix(texts)[1] == 0


@pytest.mark.parametrize(
    ("family", "branches"),
    [
        *((family, True) for family in ("Llama", "Qwen3", "GPT-2", "Granite")),
        *((family, False) for family in ("Mistral", "Gemma3", "Gemma2", "LFM2")),
    ],
)
def test_models_that_can_share_a_prefix_are_found(
    families: Any, family: str, branches: bool
) -> None:
    """A window of any length prevents sharing, even one longer than the probe's text."""
    window = {"sliding_window": 10_000} if family in ("Mistral", "Gemma3") else {}
    found = probe(families.tiny_model(family, **window))
    assert found.supports_shared_prefix == branches
    if not branches:
        with pytest.raises(LanguageModelError, match="without `share`"):
            found.require("supports_shared_prefix")


def test_a_tree_without_segment_attention_is_refused(model: Any) -> None:
    tree = replace(collator_of(model), share=True).pack([model.processor(c) for c in SHARED])
    with pytest.raises(LanguageModelError, match="run it inside of `segment_attention_enabled`"):
        model(**tree)


@pytest.mark.parametrize(
    ("family", "options", "reach"),
    [
        ("Llama", {}, UNLIMITED_REACH),
        ("Mistral", {"sliding_window": 25}, 25),
        ("Gemma3", {"sliding_window": 9}, 9),
        ("Gemma2", {}, 0),  # soft caps need `eager`
        ("LFM2", {}, 0),  # convolutions reach into the next segment
    ],
)
def test_the_reach_of_a_model_is_its_shortest_window(
    families: Any, family: str, options: dict[str, int], reach: int
) -> None:
    assert probe(families.tiny_model(family, **options)).segment_reach == reach


@pytest.mark.parametrize(("window", "has_table"), [(None, True), (25, True), (24, False)])
def test_a_pack_has_its_segments_from_the_collator_unless_a_window_cuts_one(
    families: Any, window: int | None, has_table: bool
) -> None:
    """Segments are not looked for in the positions, for which the host waits for the device."""
    model = families.tiny_model("Mistral", sliding_window=window)
    found = probe(model)
    bounds = [0, *accumulate(LENGTHS)]
    segments = tuple((*pair, 0, 0) for pair in pairwise(bounds))
    counts = BatchCounts(LENGTHS, 0, segments, (0, 0, 0))
    ids = torch.arange(10, 10 + sum(LENGTHS))[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    assert attention.segments_to_mask(model, counts, lambda: found.segment_reach) is None
    with segment_attention_enabled(model), torch.no_grad():
        table = attention.segments_to_mask(model, counts, lambda: found.segment_reach)
        assert (table is not None) == has_table
        asked = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        given = model(
            input_ids=ids, position_ids=positions, attention_mask=table, use_cache=False
        ).logits
    assert torch.equal(asked, given)


def stand_in_kernel(calls: list[Any]) -> Any:
    """`torch.nn.attention.varlen.varlen_attn` by its contract: it needs a GPU."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
        assert isinstance(max_q, int) and max_q == max_k == int(cu_seq_q.diff().max())
        assert enable_gqa == (query.shape[1] != key.shape[1]) and query.stride(-1) == 1
        calls.append(query.shape)
        lengths = cu_seq_q.diff().tolist()
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1) for x in part),
                    is_causal=True,
                    scale=scale,
                    enable_gqa=enable_gqa,
                ).transpose(0, 1)
                for part in parts
            ]
        )

    return varlen_attn


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_packs_are_one_kernel_a_layer_where_torch_has_it(
    families: Any, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    """With keys of two heads for four of queries, and in Qwen3 a norm that leaves float32."""
    calls: list[Any] = []
    model = families.tiny_model("Qwen3").to(torch.float32 if autocast else torch.bfloat16)
    borders = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    inputs = {
        "input_ids": torch.arange(10, 10 + sum(LENGTHS))[None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
        "use_cache": False,
    }
    with (
        segment_attention_enabled(model),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        by_segment = model(**inputs).logits
        with monkeypatch.context() as patch:
            patch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in_kernel(calls))
            patch.setattr(attention, "has_varlen_kernel", lambda *_: True)
            attention._varlen_parameters.cache_clear()
            in_one = model(**inputs).logits
        attention._varlen_parameters.cache_clear()
    assert len(calls) == model.config.num_hidden_layers
    assert float((in_one - by_segment).norm() / by_segment.norm()) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_of_a_gpu_has_the_attention_and_gradients_of_single_segments() -> None:
    torch.manual_seed(0)
    lengths = [300, 1, 77]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    table = torch.tensor([[[(*pair, 0, 0) for pair in pairwise([0, *accumulate(lengths)])]]])
    found = []
    for options in ({}, {"cu_seq_lens_q": borders, "max_length_q": max(lengths)}):
        torch.manual_seed(1)
        query = torch.randn(1, 4, sum(lengths), 64, device="cuda", dtype=torch.bfloat16)
        key, value = (query[:, :2].clone().flip(i + 2).requires_grad_() for i in range(2))
        query.requires_grad_()
        module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
        output, _ = attention.segment_attention(module, query, key, value, table, **options)
        output.float().square().sum().backward()
        found.append([output, query.grad, key.grad, value.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("family", "implementation", "said"),
    [
        ("Llama", "sdpa", "packs: a call for each segment and layer"),
        ("Llama", "eager", "memory and time grow with the square of train.pack_tokens"),
        ("Gemma2", None, "a dense mask in each layer, since Gemma2ForCausalLM"),
        ("Mistral", "sdpa", "with a row of more than 25 tokens, the reach of its layers, a dense"),
    ],
)
def test_how_packs_are_attended_to_is_said(
    families: Any, family: str, implementation: str | None, said: str
) -> None:
    model = families.tiny_model(family, **({"sliding_window": 25} if family == "Mistral" else {}))
    if implementation is not None:
        model.set_attn_implementation(implementation)
    line = attention.describe_pack_attention(
        model, probe(model), torch.device("cpu"), torch.bfloat16
    )
    assert said in line
