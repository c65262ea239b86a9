"""Runs a language model from embeddings: its inputs in training, `generate` in inference.

The functions work for any model; `probe.py` finds which of their modes a model needs.
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
"""Options of `generate` for greedy decoding, for any generation config of the model."""


def base_language_model(language_model: Any) -> Any:
    """Return transformers' module, without PEFT's wrapper if an adapter is attached."""
    inner = getattr(language_model, "get_base_model", None)
    return inner() if callable(inner) else language_model


class ScaledEmbedding(nn.Module):
    """Embedding module that multiplies its output, where the model does so for ids only."""

    def __init__(self, embedding: nn.Module, scale: float) -> None:
        super().__init__()
        # In a tuple, so that `parameters()` does not list the weights a second time.
        self.wrapped = (embedding,)
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """Weights [num_ids, dim], without the scale."""
        return self.wrapped[0].weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] -> [..., dim]"""
        return self.wrapped[0](input_ids) * self.scale


def per_layer_inputs(language_model: Any, input_ids: Tensor) -> dict[str, Any]:
    """Return the embeddings that each layer looks up by id, as arguments of forward; mostly {}.

    input_ids int64 [batch, time].
    """
    # Gemma3n and Gemma4 have such layers. A media span shows them the filler id, as transformers'
    # multimodal classes of these models do.
    model = base_language_model(language_model)
    if not getattr(model.config, "hidden_size_per_layer_input", 0):
        return {}
    look_up = getattr(model.base_model, "get_per_layer_inputs", None)
    return {} if look_up is None else {"per_layer_inputs": look_up(input_ids)}


def max_batched_length(language_model: Any) -> int | None:
    """Return the length above which the longest row of a batch changes the others, or None."""
    # transformers' `dynamic` and `longrope` scale the positions of all rows by the longest one
    # (modeling_rope_utils.py). Read from the configuration: a probe would need a text that long.
    config = base_language_model(language_model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in (rope, *rope.values())  # one for all layers, or one for each type of layers
        if isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=None)


def accepts_position_ids(language_model: Any) -> bool:
    """Return True if forward has an argument `position_ids`."""
    parameters = inspect.signature(base_language_model(language_model).forward).parameters
    return "position_ids" in parameters


def filter_flash_attention_kwargs(language_model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Drop `cu_seq_lens_*` and `max_length_*` for models whose forward has no **kwargs."""
    parameters = inspect.signature(base_language_model(language_model).forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(inputs)
    # by these, transformers' flash attention gets the segments of a packed row
    segments = ("cu_seq_lens_", "max_length_")
    return {name: value for name, value in inputs.items() if not name.startswith(segments)}


def generate_from_embeds(
    language_model: Any,
    *,
    inputs_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    prefill_mode: PrefillMode = "embeds",
    **options: Any,
) -> Any:
    """Run the model's own `generate` after a prompt [batch, time, dim] -> new ids [batch, new].

    Args:
        inputs_embeds: Prompts [batch, time, dim], padded on the left.
        input_ids: int64 [batch, time]; the filler id at media spans.
        attention_mask: int64 [batch, time].
        prefill_mode: "embeds" hands the embeddings to `generate`. "ids" prefills all positions
            but the last into a KV cache and continues by ids, for models whose `generate` takes no
            embeddings or whose layers need ids; the last position must then be text.
        **options: Options of `generate`.

    Returns:
        New ids, or with `return_dict_in_generate` the output of `generate`, its `sequences`
        without the prompt.

    Raises:
        LanguageModelError: For several beams or answers per prompt in the mode "ids".
    """
    if prefill_mode == "embeds":
        return language_model.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options
        )
    if max(options.get(name) or 1 for name in ("num_beams", "num_return_sequences")) > 1:
        raise LanguageModelError(
            f"{type(base_language_model(language_model)).__name__} generates from a KV cache of "
            "the prompt, which several answers cannot share: num_beams and num_return_sequences "
            "must be 1"
        )
    before = slice(None, -1)
    # `generate` needs one id to go on from, so the last position stays out of the cache.
    if input_ids.shape[1] > 1:
        prompt = per_layer_inputs(language_model, input_ids[:, before])
        if accepts_position_ids(language_model):
            # `generate` numbers positions from the mask; the prefill must number them likewise.
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
    """Streamer that gets an empty prompt, as `generate` gives it with embeddings."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.is_prompt = True

    def put(self, ids: Tensor) -> None:
        self.streamer.put(ids[:, :0] if self.is_prompt else ids)
        self.is_prompt = False

    def end(self) -> None:
        self.streamer.end()
