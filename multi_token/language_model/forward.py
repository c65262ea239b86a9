"""Drives a language model by embeddings: inputs of its layers, loss, going on.

Border: one function for each thing that is asked of it, for any family; which way a model needs is
found by language_model/probe.py and handed in.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from multi_token.errors import LanguageModelError

PrefillMode = Literal["embeds", "ids"]
"""How `generate` starts from a prompt: see `generate_from_embeds`."""
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1} | (
    dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
)
"""Options of `generate` for greedy decoding, whatever the model's own generation config says."""
FLASH_ATTENTION_KWARGS = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
"""What transformers' flash attention is told of a packed row."""


def base_language_model(language_model: Any) -> Any:
    """transformers' own module, below PEFT's if an adapter is attached."""
    inner = getattr(language_model, "get_base_model", None)
    return inner() if callable(inner) else language_model


class ScaledEmbedding(nn.Module):
    """A view of an embedding whose output the model multiplies before its first layer."""

    def __init__(self, embedding: nn.Module, scale: float) -> None:
        super().__init__()
        self.wrapped = (embedding,)  # in a tuple, so that its weights are not listed a second time
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The weights [num_ids, dim], not scaled."""
        return self.wrapped[0].weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] -> [..., dim]"""
        return self.wrapped[0](input_ids) * self.scale


def per_layer_inputs(language_model: Any, input_ids: Tensor) -> dict[str, Any]:
    """What some families look up by id for every layer, as arguments of forward; {} for others.

    input_ids int64 [batch, time]. A media span holds the filler id, which is what the multimodal
    classes of those families put there as well (Gemma3n, Gemma4 in transformers).
    """
    model = base_language_model(language_model)
    if not getattr(model.config, "hidden_size_per_layer_input", 0):
        return {}
    look_up = getattr(model.base_model, "get_per_layer_inputs", None)
    return {} if look_up is None else {"per_layer_inputs": look_up(input_ids)}


def max_batched_length(language_model: Any) -> int | None:
    """The length beyond which a row's positions are scaled by the longest row of its batch, if any.

    So do transformers' `dynamic` and `longrope` scalings (modeling_rope_utils.py). Read from the
    configuration: trying it would take a text of that length.
    """
    config = base_language_model(language_model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in (rope, *rope.values())  # one for all layers, or one for each type of layers
        if isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=None)


def accepts_position_ids(language_model: Any) -> bool:
    """Whether forward has an argument `position_ids` of its own."""
    return (
        "position_ids" in inspect.signature(base_language_model(language_model).forward).parameters
    )


def filter_flash_attention_kwargs(language_model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of forward's arguments those that this model takes: where segments begin (`cu_seq_lens_q`
    and so on) is told only to one that passes on what it does not know.
    """
    parameters = inspect.signature(base_language_model(language_model).forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name not in FLASH_ATTENTION_KWARGS}


def supervised_loss(
    language_model: Any,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    shift_labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    supports_logits_to_keep: bool = True,
    **inputs: Any,
) -> Any:
    """The model's own output with loss and with logits at supervised positions only.

    inputs_embeds [batch, time, dim], shift_labels int64 [batch, time] -> loss [], logits
    [num_supervised, vocabulary], through the model's own head and loss, so that soft caps and
    logit scales are the model's. A model that does not select logits by itself computes all of
    them; the loss is then taken of those that are supervised. `use_cache=False` is explicit
    because the configuration's own value is not ours to change, and a cache turns off the
    isolation of packed rows.
    """
    keep = shift_labels != -100
    inputs |= {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "use_cache": False,
    }
    if not supports_logits_to_keep:
        output = language_model(**inputs)
        output.logits = output.logits[keep]
        total = nn.functional.cross_entropy(
            output.logits.float(), shift_labels[keep], reduction="sum"
        )
        output.loss = total / (keep.sum() if num_items_in_batch is None else num_items_in_batch)
        return output
    output = language_model(
        labels=shift_labels,
        shift_labels=shift_labels[keep],
        logits_to_keep=keep,
        num_items_in_batch=num_items_in_batch,
        **inputs,
    )
    if output.logits.shape[0] != int(keep.sum()):
        raise LanguageModelError(
            f"{type(base_language_model(language_model)).__name__} ignores a boolean "
            f"logits_to_keep "
            f"(got logits {tuple(output.logits.shape)} for {int(keep.sum())} supervised positions)"
        )
    return output


def generate_from_embeds(
    language_model: Any,
    *,
    inputs_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    prefill_mode: PrefillMode = "embeds",
    **options: Any,
) -> Any:
    """The child's own `generate` behind a prompt [batch, time, dim] -> new ids [batch, new].

    `prefill_mode` "embeds": it is given the prompt's embeddings. "ids": the prompt but its last
    position is run first, and `generate` goes on from that cache by ids, for models that take no
    embeddings there or need ids in their layers; the last position must then be text, and
    input_ids int64 [batch, time] says which. With `return_dict_in_generate` its whole output.
    """
    if prefill_mode == "embeds":
        return language_model.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options
        )
    if max(options.get(name) or 1 for name in ("num_beams", "num_return_sequences")) > 1:
        raise LanguageModelError(
            f"{type(base_language_model(language_model)).__name__} goes on from a cache "
            f"of the prompt, "
            "which cannot be shared by several answers: num_beams and num_return_sequences must "
            "be 1"
        )
    before = slice(None, -1)
    if input_ids.shape[1] > 1:
        prompt = per_layer_inputs(language_model, input_ids[:, before])
        if accepts_position_ids(language_model):
            prompt["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, before]
        options["past_key_values"] = language_model(
            inputs_embeds=inputs_embeds[:, before],
            attention_mask=attention_mask[:, before],
            use_cache=True,
            logits_to_keep=1,
            **prompt,
        ).past_key_values
    if options.get("streamer") is not None:
        options["streamer"] = _SkipPromptStreamer(options["streamer"])
    output = language_model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
    if isinstance(output, Tensor):
        return output[:, input_ids.shape[1] :]
    output.sequences = output.sequences[:, input_ids.shape[1] :]
    return output


class _SkipPromptStreamer:
    """Hands a streamer an empty prompt, as `generate` does where it is given embeddings."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.is_prompt = True

    def put(self, ids: Tensor) -> None:
        self.streamer.put(ids[:, :0] if self.is_prompt else ids)
        self.is_prompt = False

    def end(self) -> None:
        self.streamer.end()
