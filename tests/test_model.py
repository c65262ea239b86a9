"""model.py: an untouched language model, one loss, gradients for trainable parameters only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multi_token.collate import Collator
from multi_token.generate import collate_prompts, drop_last_answer
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Text


def image(colour: str) -> Media:
    return Media("image", Image.new("RGB", (40, 40), colour))


def question(*parts: Any, answer: str = "a red square") -> Conversation:
    turn = tuple(p if isinstance(p, Media) else Text(p) for p in parts)
    return Conversation((Message("user", turn), Message("assistant", (Text(answer),))), id="row")


MIXED = [
    question("What is this?", image("red")),
    question(image("blue"), " or ", image("green"), "?", answer="two"),
    question("No media at all, only a much longer question about nothing", answer="yes"),
    question(Media("vector", [0.1, 2.0, -1.0, 0.5, 3.0]), image("white"), answer="eight nine"),
]


def batch_of(model: Any, conversations: list[Conversation], side: Any = "right") -> Any:
    samples = [model.processor(c) for c in conversations]
    return Collator(model.modalities, model.processor.chat.filler_id, padding_side=side)(samples)


def test_without_media_the_logits_are_the_bare_language_models(model: Any) -> None:
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        bare = model.language_model(input_ids=ids).logits
    assert torch.equal(ours, bare)


def test_the_loss_is_the_full_logits_loss_and_so_are_its_gradients(model: Any) -> None:
    batch = batch_of(model, MIXED)
    weight = model.projectors["image"].network.branches[0][0].weight
    weight.requires_grad_(True)
    ours = model(**batch).loss
    (our_gradient,) = torch.autograd.grad(ours, weight)

    embeds = model.embed(batch["input_ids"], batch["media"])
    logits = model.language_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"]
    ).logits
    theirs = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    (their_gradient,) = torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-7)


def test_logits_are_computed_at_supervised_positions_only(model: Any) -> None:
    batch = batch_of(model, MIXED)
    with torch.no_grad():
        logits = model(**batch).logits
    num_supervised = int((batch["labels"] != IGNORE_INDEX).sum())
    assert logits.shape[0] == num_supervised < batch["labels"].numel()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_mixed_lengths_equals_one_by_one(model: Any, side: str) -> None:
    batch = batch_of(model, MIXED, side)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(
            input_ids=batch["input_ids"],
            media=batch["media"],
            attention_mask=mask,
            position_ids=positions,
        ).logits
        for row, conversation in enumerate(MIXED):
            alone = batch_of(model, [conversation])
            single = model(input_ids=alone["input_ids"], media=alone["media"]).logits[0]
            torch.testing.assert_close(
                together[row][mask[row].bool()], single, rtol=1e-4, atol=1e-5
            )


def test_the_summed_loss_is_divided_by_the_items_of_the_whole_step(model: Any) -> None:
    with torch.no_grad():
        whole = batch_of(model, MIXED)
        num_items = int((whole["shift_labels"] != IGNORE_INDEX).sum())
        parts = [
            model(**batch_of(model, [c]), num_items_in_batch=torch.tensor(num_items)).loss
            for c in MIXED
        ]
        torch.testing.assert_close(sum(parts), model(**whole).loss)


def test_the_gradient_reaches_the_projector_and_nothing_else(model: Any) -> None:
    from multi_token.recipe.train import Trainable
    from multi_token.train.parameter_groups import freeze_and_unfreeze

    freeze_and_unfreeze(model, Trainable.model_validate({"projectors": 1e-3}))
    model.zero_grad()
    model(**batch_of(model, MIXED)).loss.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {n for n, _ in model.named_parameters() if n.startswith("projectors.")}
    model.zero_grad()


def test_a_projector_whose_modality_is_absent_still_takes_part_in_the_backward_pass(
    model: Any,
) -> None:
    from multi_token.recipe.train import Trainable
    from multi_token.train.parameter_groups import freeze_and_unfreeze

    freeze_and_unfreeze(model, Trainable.model_validate({"projectors": 1e-3}))
    model.train().zero_grad()
    model(**batch_of(model, MIXED[:1])).loss.backward()
    gradients = [p.grad for p in model.projectors["vector"].parameters()]
    assert gradients and all(g is not None and not g.any() for g in gradients)
    model.eval().zero_grad()


def test_frozen_encoders_stay_in_eval_mode_when_the_model_trains(model: Any) -> None:
    model.train()
    assert model.language_model.training and model.projectors.training
    assert not any(module.training for module in model.encoders.modules())
    model.eval()


def test_all_items_of_a_modality_go_through_its_encoder_in_one_call_of_bounded_size(
    model: Any,
) -> None:
    calls: list[str] = []
    sizes: list[int] = []
    encoder = model.encoder("image")
    tower, size = encoder.tower, encoder.micro_batch
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.encoders.items()
    ]
    hooks.append(
        tower.register_forward_pre_hook(
            lambda _module, _args, inputs: sizes.append(len(inputs["pixel_values"])),
            with_kwargs=True,
        )
    )
    batch = batch_of(model, MIXED)
    with torch.no_grad():
        whole = model(**batch).loss
        assert sorted(calls) == ["image", "vector"] and sizes == [4]
        encoder.micro_batch = 3
        torch.testing.assert_close(model(**batch).loss, whole)
    assert sorted(calls) == ["image", "image", "vector", "vector"] and sizes == [4, 3, 1]
    encoder.micro_batch = size
    for hook in hooks:
        hook.remove()


def test_a_trainable_encoder_gets_the_gradients_of_rows_one_by_one(model: Any) -> None:
    from multi_token.recipe.train import Trainable
    from multi_token.train.parameter_groups import freeze_and_unfreeze

    freeze_and_unfreeze(model, Trainable.model_validate({"encoders": {"image": 1e-5}}))
    weights = list(model.encoders["image"].parameters())
    whole = batch_of(model, MIXED)
    num_items = torch.tensor(int((whole["shift_labels"] != IGNORE_INDEX).sum()))
    loss = model.train()(**whole).loss
    together = torch.autograd.grad(loss, weights)
    parts = [model(**batch_of(model, [c]), num_items_in_batch=num_items).loss for c in MIXED]
    torch.testing.assert_close(sum(parts), loss)
    one_by_one = torch.autograd.grad(sum(parts), weights)
    assert any(gradient.any() for gradient in together)
    torch.testing.assert_close(one_by_one, together, rtol=1e-3, atol=1e-6)
    model.trained_encoders.clear()
    model.requires_grad_(False).eval()


def test_a_trainable_encoder_whose_modality_is_absent_takes_part_in_the_backward_pass(
    model: Any,
) -> None:
    from multi_token.recipe.train import Trainable
    from multi_token.train.parameter_groups import freeze_and_unfreeze

    freeze_and_unfreeze(
        model, Trainable.model_validate({"encoders": {"image": {"lr": 1, "last_layers": 1}}})
    )
    model.train()(**batch_of(model, [MIXED[2]])).loss.backward()
    gradients = {n: p.grad for n, p in model.encoders.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and not g.any() for g in gradients.values())
    assert all("layers.2." in name for name in gradients)
    model.trained_encoders.clear()
    model.requires_grad_(False).eval().zero_grad()


def test_greedy_generation_equals_the_argmax_of_repeated_full_forwards(model: Any) -> None:
    num_new = 6
    processor = replace(model.processor, max_tokens=None)
    answers = model.generate(MIXED, max_new_tokens=num_new, batch_size=4)
    for conversation, answer in zip(MIXED, answers, strict=True):
        batch = collate_prompts(processor, [drop_last_answer(conversation, model)])
        embeds = model.embed(batch["input_ids"], batch["media"])
        ids: list[int] = []
        for _ in range(num_new):
            with torch.no_grad():
                step = model.language_model(inputs_embeds=embeds).logits[0, -1].argmax()
            ids.append(int(step))
            if ids[-1] in processor.chat.end_of_turn_ids:
                break
            embeds = torch.cat([embeds, model.get_input_embeddings()(step.view(1, 1))], dim=1)
        assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_generation_keeps_the_order_and_does_not_depend_on_the_batch_size(model: Any) -> None:
    together = model.generate(MIXED, max_new_tokens=5, batch_size=4)
    assert together == model.generate(MIXED, max_new_tokens=5, batch_size=1)
    assert together == model.generate(MIXED[::-1], max_new_tokens=5, batch_size=3)[::-1]


def test_rows_of_every_shape_can_be_asked(model: Any, data: Path) -> None:
    rows = [
        {"images": ["red.png"], "messages": [{"role": "user", "content": "What is <image>?"}]},
        {"image": "red.png", "conversations": [{"from": "human", "value": "What is <image>?"}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is "},
                        {"type": "image", "image": "red.png"},
                        {"type": "text", "text": "?"},
                    ],
                }
            ]
        },
    ]
    answers = model.generate(rows, root=str(data), max_new_tokens=4)
    assert len(answers) == 3 and len(set(answers)) == 1
