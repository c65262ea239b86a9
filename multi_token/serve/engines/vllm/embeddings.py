"""A prompt as the embeddings that vLLM wants: text looked up, media written in, all of it scaled.

Border: tensors only. Which of the forms an engine takes is found by asking it: vllm_golden.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from multi_token.serve.engines.base import Prompt
from multi_token.splice import MediaEmbeds, splice

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

EmbedsForm = Literal["inputs", "weights"]
"""`inputs`: what transformers takes as `inputs_embeds`. `weights`: rows of the embedding matrix."""
_NUM_ROWS = 64


@dataclass(frozen=True)
class PromptEmbedder:
    """Makes embeddings of prompts, in the language model's own precision.

    Some families multiply embeddings behind the look-up, inside their embedding module or right
    behind it (by the root of the width, say). vLLM does that in its own look-up for some, so that
    what it is sent must be multiplied already, and behind it for others, so that it must not. For
    the second kind all is divided again, media as well: these are made for transformers' inputs.
    """

    model: MultiTokenForConditionalGeneration
    scale: float
    """Inputs of the language model are so many times the rows of its embedding matrix."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: MultiTokenForConditionalGeneration) -> PromptEmbedder:
        """Measures the scale on some rows; 1 where what is looked up is no multiple of them."""
        embedding: Any = model.get_input_embeddings()
        weight = embedding.weight
        ids = torch.arange(0, len(weight), max(1, len(weight) // _NUM_ROWS), device=weight.device)
        rows, inputs = weight[ids].float(), embedding(ids).float()
        scale = float((rows * inputs).sum() / rows.square().sum().clamp_min(1e-12))
        close = torch.allclose(rows * scale, inputs, rtol=2e-2, atol=1e-6)
        return cls(model, scale if close else 1.0)

    @property
    def forms(self) -> tuple[EmbedsForm, ...]:
        """Those that differ, the likelier one first."""
        return ("inputs",) if abs(self.scale - 1.0) < 1e-4 else ("inputs", "weights")

    @torch.no_grad()
    def __call__(self, prompt: Prompt, form: EmbedsForm) -> Tensor:
        """[time, hidden] on the CPU."""
        embedding: Any = self.model.get_input_embeddings()
        weight: Tensor = embedding.weight
        ids = prompt.input_ids.to(weight.device)
        if form == "inputs":
            text, divisor = embedding(ids), 1.0
        else:
            text, divisor = weight[ids], self.scale
        pieces = [
            MediaEmbeds(
                place.modality,
                tokens.to(weight.device, weight.dtype)
                if divisor == 1.0
                else (tokens.float() / divisor).to(weight.device, weight.dtype),
                torch.arange(place.start, place.start + place.length, device=weight.device),
            )
            for place, tokens in zip(prompt.media_spans, prompt.media_embeds, strict=True)
        ]
        return splice(text.to(weight.dtype)[None], pieces)[0].cpu()
