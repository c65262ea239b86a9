"""Loss and logits of a language model at supervised positions, in bounded memory.

    supervised_loss      all logits at once, returned with the model's own loss
    supervised_output    no more logits at a time than a budget, in backward too

Logits are `supervised tokens x vocabulary`: 8,000 x 152,000 are 5 GB in float32, and the loss holds
three to four tensors of that size. In chunks, the hidden states alone are kept. Each chunk's logits
are computed for the loss, dropped, and computed again for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from multi_token.errors import LanguageModelError
from multi_token.language_model.forward import base_language_model
from multi_token.types import IGNORE_INDEX

TokenFunction = Callable[[Tensor, slice], Tensor]
"""(logits [rows, vocabulary], their slice of the supervised positions) -> values [rows, ...]."""


class SupervisedLogits:
    """Logits at the supervised positions of a batch, of which no more than a chunk is needed.

    Args:
        rows: Gives the logits [rows, vocabulary] of a slice of the supervised positions.
        num_rows: Number of supervised positions.
        chunk_rows: Rows of a chunk; `num_rows` or more where all logits exist already.
    """

    def __init__(self, rows: Callable[[slice], Tensor], num_rows: int, chunk_rows: int) -> None:
        self.rows = rows
        self._num_rows = num_rows
        self._chunk_rows = chunk_rows

    def apply(self, function: TokenFunction) -> Tensor:
        """Apply a function to all logits, chunk by chunk -> values [num_rows, ...].

        With several chunks it runs again in the backward pass.
        """
        if self._num_rows <= self._chunk_rows:
            every = slice(0, self._num_rows)
            return function(self.rows(every), every)

        def values_of(chunk: slice) -> Tensor:
            return function(self.rows(chunk), chunk)

        found = []
        for start in range(0, self._num_rows, self._chunk_rows):
            chunk = slice(start, min(start + self._chunk_rows, self._num_rows))
            if torch.is_grad_enabled():
                found.append(checkpoint(values_of, chunk, use_reentrant=False))
            else:
                found.append(values_of(chunk))
        return torch.cat(found)


@dataclass
class SupervisedOutput(ModelOutput):
    """Output of a forward that returns no tensor of logits, but one of these three.

    accelerate would copy logits in half precision to float32.
    """

    loss: Tensor | None = None
    """[]; the mean or summed cross entropy."""
    per_token: Tensor | None = None
    """Values [num_supervised, ...] of a `TokenFunction`."""
    logits: SupervisedLogits | None = None


def supervised_loss(
    language_model: Any,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    shift_labels: Tensor,
    supervised: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    supports_logits_to_keep: bool = True,
    with_loss: bool = True,
    **inputs: Any,
) -> Any:
    """Return the model's output with the loss, and with logits at supervised positions only.

    inputs_embeds [batch, time, dim], shift_labels int64 [batch, time], their flat supervised
    positions int64 [num_supervised] -> loss [], logits [num_supervised, vocabulary]. Head and loss
    are the model's own, so that soft caps and logit scales apply. Without `supports_logits_to_keep`
    all logits are computed, then selected. Without `with_loss` there is no loss, which would take
    time and three tensors of the logits' size.
    """
    # By positions and not by a mask: the number of true elements of a mask is on the device, and
    # the host would wait for it in the forward and in the backward pass.
    labels = shift_labels.flatten().index_select(0, supervised)
    inputs |= {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        # Explicit, for any configuration: with a cache, transformers does not look for
        # restarting positions, and packed rows would attend to each other.
        "use_cache": False,
    }
    if not supports_logits_to_keep:
        output = language_model(**inputs)
        output.logits = output.logits.flatten(0, 1).index_select(0, supervised)
        if not with_loss:
            return output
        total = nn.functional.cross_entropy(output.logits.float(), labels, reduction="sum")
        output.loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return output
    if with_loss:
        # Already shifted labels skip the model's own shift, which a selection of positions would
        # break; `labels` only switch the loss on.
        inputs |= {"labels": shift_labels, "shift_labels": labels}
        inputs["num_items_in_batch"] = num_items_in_batch
    with _logits_only_at(language_model, supervised):
        output = language_model(**inputs)
    if output.logits.shape[:-1] != labels.shape:
        raise LanguageModelError(
            f"{type(base_language_model(language_model)).__name__} computes logits without calling "
            f"its output embeddings (got logits {tuple(output.logits.shape)} for {len(labels)} "
            "supervised positions)"
        )
    return output


def supervised_output(
    language_model: Any,
    *,
    shift_labels: Tensor,
    supervised: Tensor,
    chunk_rows: int | None,
    returns: Literal["loss", "logits"] | TokenFunction = "loss",
    num_items_in_batch: Tensor | int | None = None,
    **inputs: Any,
) -> SupervisedOutput:
    """Return the loss, the values of a function, or the logits, in chunks of bounded memory.

    Args:
        language_model: The language model.
        shift_labels: int64 [batch, time], as for `supervised_loss`.
        supervised: int64 [num_supervised], as for `supervised_loss`.
        chunk_rows: Most supervised positions of a chunk. None, or a batch with no more: the
            logits come from one call, and the loss is the model's own.
        returns: Field of the output that is computed, or the function of `per_token`.
        num_items_in_batch: Divisor of the summed loss; default: `num_supervised`.
        **inputs: Other arguments of `supervised_loss`.
    """
    num = len(supervised)
    if chunk_rows is None or num <= chunk_rows:
        output = supervised_loss(
            language_model,
            shift_labels=shift_labels,
            supervised=supervised,
            num_items_in_batch=num_items_in_batch,
            with_loss=returns == "loss",
            **inputs,
        )
        if returns == "loss":
            return SupervisedOutput(loss=output.loss)
        every = output.logits
        return _of_logits(SupervisedLogits(lambda rows: every[rows], num, num), returns)
    divisor = num if num_items_in_batch is None else num_items_in_batch
    body, first = _body(language_model), supervised[:1]
    outputs: list[Any] = []
    hook = body.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        # The head gets one position here, and no label: the loss is what the model adds to cross
        # entropy, such as that of a mixture's router.
        rest = supervised_loss(
            language_model,
            shift_labels=torch.full_like(shift_labels, IGNORE_INDEX),
            supervised=first,
            num_items_in_batch=divisor,
            with_loss=returns == "loss",
            **inputs,
        ).loss
    finally:
        hook.remove()
    output_type = type(outputs[0])
    hidden = outputs.pop().last_hidden_state.flatten(0, 1).index_select(0, supervised)

    def logits_of(rows: slice) -> Tensor:
        chunk = hidden[rows][None]
        with _body_returning(body, output_type(last_hidden_state=chunk)):
            # without the hooks of the module: FSDP's gather weights, once in a forward
            inner = base_language_model(language_model)
            return inner.forward(inputs_embeds=chunk, use_cache=False).logits[0]

    logits = SupervisedLogits(logits_of, num, chunk_rows)
    if returns != "loss":
        return _of_logits(logits, returns)
    total = logits.apply(token_losses(shift_labels, supervised)).sum() / divisor
    return SupervisedOutput(loss=rest + total)


def _of_logits(
    logits: SupervisedLogits, returns: Literal["logits"] | TokenFunction
) -> SupervisedOutput:
    if returns == "logits":
        return SupervisedOutput(logits=logits)
    # within the model's forward: DDP looks there for the parameters that a loss depends on
    return SupervisedOutput(per_token=logits.apply(returns))


def token_losses(shift_labels: Tensor, supervised: Tensor) -> TokenFunction:
    """Return the function for the cross entropy of each token, in float32.

    shift_labels int64 [batch, time], their flat supervised positions int64 [num_supervised].
    """
    labels = shift_labels.flatten().index_select(0, supervised)
    return lambda logits, rows: nn.functional.cross_entropy(
        logits.float(), labels[rows], reduction="none"
    )


def chunk_rows(language_model: Any, num_bytes: int) -> int:
    """Return the number of positions whose logits in float32 take `num_bytes`, at least one."""
    return max(1, num_bytes // num_bytes_per_token(language_model))


def num_bytes_per_token(language_model: Any) -> int:
    """Return the bytes of one position's logits in float32."""
    return 4 * base_language_model(language_model).config.get_text_config().vocab_size


@contextmanager
def _logits_only_at(language_model: Any, positions: Tensor) -> Iterator[None]:
    """Within, the head gets the hidden states at flat positions [num] only -> logits [num, ids]."""
    # In place of `logits_to_keep`, which selects positions of rows of different lengths by a mask
    # alone, and a mask makes the host wait for the device.
    head = base_language_model(language_model).get_output_embeddings()
    if head is None:
        raise LanguageModelError(
            f"{type(base_language_model(language_model)).__name__} has no output embeddings"
        )

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = args
        return (hidden.flatten(0, -2).index_select(0, positions.to(hidden.device)), *others)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _body(language_model: Any) -> nn.Module:
    """Return the module that computes the hidden states from which the model takes its logits."""
    inner = base_language_model(language_model)
    body = inner.base_model
    if body is inner:
        raise LanguageModelError(f"{type(inner).__name__} does not name its layers' module")
    return body


@contextmanager
def _body_returning(body: nn.Module, output: Any) -> Iterator[None]:
    """Within, the body returns `output`, so that the model computes its own logits of it."""
    # In place of a call of the head: scales and soft caps stand in the model's forward, before the
    # head and after it.
    own = vars(body).get("forward")  # of accelerate, where a model lies on several devices
    vars(body)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del vars(body)["forward"]
        if own is not None:
            vars(body)["forward"] = own
