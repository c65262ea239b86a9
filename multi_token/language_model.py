"""The language model as it comes: loading, LoRA, loss at supervised positions.

Border: the only home of language-model quirks. The model stays an untouched child; nothing here
subclasses or patches it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multi_token.errors import LanguageModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from multi_token.recipe import AdapterSpec


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a hub name or folder. Raises LanguageModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise LanguageModelError(
            f"no tokenizer could be loaded from {name!r} (a hub name or a folder is expected): "
            f"{_first_line(error)}"
        ) from None


def load_language_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A decoder-only model of transformers, frozen and in eval mode. Raises LanguageModelError."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
    except (OSError, ValueError) as error:
        raise LanguageModelError(
            f"no language model could be loaded from {name!r} (a hub name or a folder of a "
            f"decoder-only model is expected): {_first_line(error)}"
        ) from None
    model = model.requires_grad_(False).eval()
    _refuse_if_ids_are_needed(model, name)
    return model


@torch.no_grad()
def _refuse_if_ids_are_needed(model: PreTrainedModel, name: str) -> None:
    """Some families look ids up in every layer; embeddings alone would silently answer otherwise.

    Found by trying, on four tokens, rather than by a list of names.
    """
    embed = model.get_input_embeddings()
    ids = torch.arange(4, device=embed.weight.device)[None]  # type: ignore[union-attr]
    by_ids = model(input_ids=ids, use_cache=False).logits.float()
    try:
        by_embeds = model(inputs_embeds=embed(ids), use_cache=False).logits.float()
    except (TypeError, ValueError) as error:
        raise LanguageModelError(
            f"{name} ({type(model).__name__}) cannot be driven by embeddings: {_first_line(error)}"
        ) from None
    difference = float((by_ids - by_embeds).abs().max())
    if difference > 1e-2 * float(by_ids.std()):
        raise LanguageModelError(
            f"{name} ({type(model).__name__}) gives other logits for embeddings than for the same "
            f"ids (by up to {difference:.3g}): it needs ids in its layers, so media cannot be "
            "written into its input"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@torch.no_grad()
def embedding_rms(language_model: PreTrainedModel) -> float:
    """Root mean square of the input embeddings, as the embedding module returns them.

    Through the module rather than its weight: some families scale inside it.
    """
    embed = language_model.get_input_embeddings()
    num_ids = int(embed.weight.shape[0])  # type: ignore[union-attr]
    ids = torch.arange(0, num_ids, max(1, num_ids // 4096), device=embed.weight.device)  # type: ignore[union-attr]
    return float(embed(ids).float().square().mean().sqrt())


def attach_adapter(language_model: PreTrainedModel, spec: AdapterSpec) -> Any:
    """LoRA on this model alone (PEFT). Its weights are float32 whatever the base's precision."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=spec.target_modules,
    )
    try:
        return get_peft_model(language_model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise LanguageModelError(f"LoRA cannot be attached: {_first_line(error)}") from None


def adapter_parameters(language_model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The LoRA parameters, or nothing if none is attached."""
    return [p for name, p in language_model.named_parameters() if "lora_" in name]


@torch.no_grad()
def prefix_cache(language_model: Any, input_ids: Tensor, *, num_rows: int) -> Any:
    """The keys and values of a text that `num_rows` rows begin with.

    input_ids int64 [1, num_shared]. Exact as long as the language model is frozen: what stands
    before any media does not depend on anything that learns.
    """
    past = language_model(input_ids=input_ids, use_cache=True, logits_to_keep=1).past_key_values
    if not hasattr(past, "batch_repeat_interleave"):
        raise LanguageModelError(
            f"{type(language_model).__name__} keeps no key-value cache, so a shared start cannot "
            "be computed once; set train.share_prefix to false"
        )
    past.batch_repeat_interleave(num_rows)
    return past


def supervised_loss(
    language_model: Any,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    shift_labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    past_key_values: Any = None,
) -> Any:
    """The model's own output with loss and with logits at supervised positions only.

    inputs_embeds [batch, time, dim], shift_labels int64 [batch, time] -> loss [], logits
    [num_supervised, vocabulary], through the model's own head and loss, so that soft caps and
    logit scales are the model's. `use_cache=False` is explicit because the configuration's own
    value is not ours to change, and a cache turns off the isolation of packed rows.
    """
    keep = shift_labels != -100
    output = language_model(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=shift_labels,
        shift_labels=shift_labels[keep],
        logits_to_keep=keep,
        num_items_in_batch=num_items_in_batch,
        use_cache=False,
        **({} if past_key_values is None else {"past_key_values": past_key_values}),
    )
    if output.logits.shape[0] != int(keep.sum()):
        raise LanguageModelError(
            f"{type(language_model).__name__} ignores a boolean logits_to_keep (got logits "
            f"{tuple(output.logits.shape)} for {int(keep.sum())} supervised positions)"
        )
    return output
