"""loss.py: the loss in chunks is the loss of all logits, and no more logits exist than a chunk."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multi_token.collate import supervised_positions
from multi_token.errors import LanguageModelError
from multi_token.language_model.loss import (
    SupervisedOutput,
    chunk_rows,
    supervised_loss,
    supervised_output,
    token_losses,
)
from multi_token.language_model.probe import probe

VOCABULARY, TIME, CHUNK = 97, 11, 4


def inputs_of(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    labels = torch.randint(0, VOCABULARY, (2, TIME))
    labels[torch.rand(2, TIME) < 0.3] = -100
    return {
        "inputs_embeds": torch.randn(2, TIME, model.config.hidden_size, requires_grad=True),
        "attention_mask": torch.ones(2, TIME, dtype=torch.long),
        "shift_labels": labels,
        "supervised": supervised_positions(labels),
    }


def loss_and_gradients(model: Any, rows: int | None, **options: Any) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter and of the embeddings."""
    inputs = inputs_of(model) | options
    assert len(inputs["supervised"]) > 3 * CHUNK
    model.zero_grad()
    loss = supervised_output(model, chunk_rows=rows, **inputs).loss
    assert loss is not None
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "embeddings": inputs["inputs_embeds"].grad, **found}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        distance = (a[name] - b[name]).abs().max()
        assert distance <= tolerance * b[name].abs().max().clamp(min=1e-3), name


# plain, tied, soft cap, divided, multiplied, mixture with a loss of its router, output is no tensor
@pytest.mark.parametrize(
    "family", ["Llama", "Qwen2", "Gemma2", "Granite", "Cohere", "Mixtral", "Falcon-H1"]
)
def test_loss_and_gradients_in_chunks_are_those_of_all_logits(
    families: ModuleType, family: str
) -> None:
    model = families.tiny_model(family, vocab_size=VOCABULARY)
    if family == "Mixtral":
        model.config.output_router_logits = True
    assert probe(model).supports_chunked_logits
    for num_items in (None, torch.tensor(50)):
        whole, chunked = (
            loss_and_gradients(model, rows, num_items_in_batch=num_items) for rows in (None, CHUNK)
        )
        assert_same(chunked, whole, 1e-4)


def test_the_same_holds_under_autocast_and_with_an_adapter_of_the_head(
    families: ModuleType,
) -> None:
    model = families.tiny_model("Llama", vocab_size=VOCABULARY)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if not parameter.abs().max() > 0:
            nn.init.normal_(parameter, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        whole, chunked = (loss_and_gradients(model, rows) for rows in (None, CHUNK))
    assert any("lm_head.lora_B" in name for name in whole)
    assert_same(chunked, whole, 2e-2)


def test_dropout_of_the_head_is_drawn_once_for_loss_and_gradient(families: ModuleType) -> None:
    model = families.tiny_model("Llama", vocab_size=VOCABULARY)
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], lora_dropout=0.5))
    nn.init.normal_(model.get_output_embeddings().lora_B["default"].weight)
    model.train()
    weight = model.get_output_embeddings().lora_A["default"].weight
    inputs = inputs_of(model)

    def loss(change: float) -> Tensor:
        with torch.no_grad():
            weight[0, 0] += change
        torch.manual_seed(3)
        found = supervised_output(model, chunk_rows=CHUNK, **inputs).loss
        assert found is not None
        return found

    loss(0.0).backward()
    slope = (loss(1e-2).detach() - loss(-2e-2).detach()) / 2e-2
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0, 0], slope, rtol=2e-2, atol=1e-3)


class LargestLogits(TorchDispatchMode):
    """Notes the most rows of any tensor [rows, vocabulary] that an operator returns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # the transposed weights of the head are as wide
        if (
            isinstance(output, Tensor)
            and output.shape[-1:] == (VOCABULARY,)
            and output.shape[-2:] != (self.width, VOCABULARY)
        ):
            self.rows = max(self.rows, output.numel() // VOCABULARY)
        return output


@pytest.mark.parametrize("returns", ["loss", "values"])
def test_no_more_logits_exist_at_a_time_than_a_chunk(families: ModuleType, returns: str) -> None:
    model = families.tiny_model("Gemma2", vocab_size=VOCABULARY)
    inputs = inputs_of(model)
    labels = inputs["shift_labels"], inputs["supervised"]
    if returns == "values":
        inputs["returns"] = token_losses(*labels)
    found = {}
    for rows in (None, CHUNK):
        with LargestLogits(model.config.hidden_size) as largest:
            output = supervised_output(model, chunk_rows=rows, **inputs)
            loss = output.loss if output.per_token is None else output.per_token.sum()
            assert loss is not None
            loss.backward()
        found[rows] = largest.rows
    assert found == {None: len(labels[1]), CHUNK: CHUNK}


def test_an_output_holds_no_logits_that_accelerate_would_copy(families: ModuleType) -> None:
    from accelerate.utils import convert_to_fp32

    model = families.tiny_model("Llama", vocab_size=VOCABULARY).to(torch.bfloat16)
    inputs = inputs_of(model)
    inputs["inputs_embeds"] = inputs["inputs_embeds"].detach().bfloat16()
    for rows in (None, CHUNK):
        with LargestLogits(model.config.hidden_size) as largest:
            output = supervised_output(model, chunk_rows=rows, **inputs)
            largest.rows = 0
            copied = convert_to_fp32(output)
        assert isinstance(copied, SupervisedOutput) and list(copied) == ["loss"]
        assert largest.rows == 0


def test_a_batch_below_the_budget_has_the_models_own_loss(families: ModuleType) -> None:
    model = families.tiny_model("Llama", vocab_size=VOCABULARY)
    num = len(inputs_of(model)["supervised"])
    whole, below = (loss_and_gradients(model, rows) for rows in (None, num))
    assert all(torch.equal(whole[name], below[name]) for name in whole)


class NumSoftmaxes(TorchDispatchMode):
    """Counts the softmaxes over logits, one for each loss of them."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._log_softmax.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keeps", [True, False])
def test_values_and_logits_are_computed_without_an_unused_loss(
    families: ModuleType, keeps: bool
) -> None:
    model = families.tiny_model("Llama", vocab_size=VOCABULARY)
    inputs = inputs_of(model) | {"supports_logits_to_keep": keeps}
    values = token_losses(inputs["shift_labels"], inputs["supervised"])
    found = []
    for returns in ("loss", values, "logits"):
        with NumSoftmaxes() as counted:
            supervised_output(model, chunk_rows=None, returns=returns, **inputs)
        found.append(counted.num)
    assert found == [1, 1, 0]


def test_a_chunk_has_as_many_rows_as_the_budget_holds_and_at_least_one(
    families: ModuleType,
) -> None:
    model = families.tiny_model("Llama", vocab_size=VOCABULARY)
    assert [chunk_rows(model, n * 4 * VOCABULARY + 3) for n in (0, 1, 7)] == [1, 1, 7]


def test_a_model_whose_layers_lie_deeper_computes_all_logits_and_says_so(
    families: ModuleType,
) -> None:
    found = probe(families.tiny_model("OPT", vocab_size=VOCABULARY))
    assert found.supports_logits_to_keep and not found.supports_chunked_logits
    assert any("train.logits_megabytes" in note for note in found.notes())


@pytest.fixture(scope="module")
def llama(families: ModuleType) -> Any:
    return families.tiny_model("Llama", vocab_size=40)


LABELS = torch.tensor([[-100, 7, -100, 3, 9], [-100, -100, 5, -100, -100]])


def loss_of_four(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    embeds = torch.randn(2, 5, model.config.hidden_size)
    mask = torch.ones(2, 5, dtype=torch.long)
    return supervised_loss(
        model,
        inputs_embeds=embeds,
        attention_mask=mask,
        shift_labels=LABELS,
        supervised=supervised_positions(LABELS),
        **options,
    )


@pytest.mark.parametrize("num_items", [None, 10, torch.tensor(10)])
def test_the_loss_of_all_logits_is_that_of_the_selected_ones(llama: Any, num_items: Any) -> None:
    one, other = (
        loss_of_four(llama, supports_logits_to_keep=selects, num_items_in_batch=num_items)
        for selects in (True, False)
    )
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.logits, other.logits)
    assert one.logits.shape == (4, 40)
    if num_items is not None:
        torch.testing.assert_close(
            other.loss * 10, loss_of_four(llama, supports_logits_to_keep=False).loss * 4
        )
    assert one.past_key_values is other.past_key_values is None


@pytest.mark.parametrize("selects", [True, False])
def test_other_inputs_of_the_loss_reach_the_model(llama: Any, selects: bool) -> None:
    positions = torch.tensor([[0, 1, 0, 1, 2]] * 2)
    packed = loss_of_four(llama, supports_logits_to_keep=selects, position_ids=positions)
    alone = loss_of_four(llama, supports_logits_to_keep=selects)
    assert not torch.allclose(packed.logits, alone.logits)


def test_a_model_that_does_not_call_its_head_is_refused(llama: Any) -> None:
    class AllLogits(nn.Module):
        config = llama.config

        def get_output_embeddings(self) -> Any:
            return nn.Linear(1, 1)

        def forward(self, **inputs: Any) -> Any:
            return llama(inputs_embeds=inputs["inputs_embeds"])

    with pytest.raises(LanguageModelError, match=r"\(2, 5, 40\) for 4 supervised positions"):
        loss_of_four(AllLogits())


def test_the_head_of_a_model_is_as_before_after_a_loss_and_after_an_error(llama: Any) -> None:
    loss_of_four(llama)
    with pytest.raises(ValueError, match="input_ids"):
        loss_of_four(llama, input_ids=torch.tensor([[1, 2]]))
    head = llama.get_output_embeddings()
    assert not head._forward_pre_hooks
    assert llama(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)
