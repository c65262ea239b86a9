"""The model: encoders and projectors beside an untouched language model.

Border: tensors only below `Batch`; no paths, strings or templates except in the doors
`from_pretrained`, `save_pretrained` and `generate`, which lead to load.py and generate.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from multi_token.collate import FEATURES_KEY, NEWLINES_KEY
from multi_token.encoders import TrainedEncoderState, is_randomly_initialized, set_train_mode
from multi_token.language_model.capabilities import Capabilities
from multi_token.language_model.forward import (
    ScaledEmbedding,
    filter_flash_attention_kwargs,
    per_layer_inputs,
    supervised_loss,
)
from multi_token.language_model.probe import probe
from multi_token.language_model.segment_attention import segments_to_mask
from multi_token.modalities.base import Encoder, Modality
from multi_token.projectors.base import Projector
from multi_token.splice import MediaEmbeds, splice
from multi_token.types import Features, MediaBatch

if TYPE_CHECKING:
    from multi_token.processor import MultiTokenProcessor


class MultiTokenConfig(PreTrainedConfig):
    """What a checkpoint says about itself (see checkpoint/load.py for the fields)."""

    model_type = "multi_token"
    identity: dict[str, Any] | None = None
    base_identity: dict[str, Any] | None = None
    base_model: str | None = None


class MultiTokenForConditionalGeneration(PreTrainedModel):
    """encode -> project -> splice -> the language model, which it does not subclass."""

    config_class = MultiTokenConfig
    base_model_prefix = "multi_token"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # without it gradient accumulation would multiply the loss
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: MultiTokenConfig,
        language_model: Any,
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        projectors: Mapping[str, nn.Module],
        processor: MultiTokenProcessor | None = None,
    ) -> None:
        super().__init__(config)
        self.language_model = language_model
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False)
        self.projectors = nn.ModuleDict(projectors)
        self.trained_encoders = {
            name: TrainedEncoderState(tensors="all")
            for name, encoder in encoders.items()
            if is_randomly_initialized(encoder)
        }
        self.trained_language_model = False
        self.modalities = dict(modalities)
        self.processor = processor
        self._capabilities: Capabilities | None = None
        self.train(False)

    def train(self, mode: bool = True) -> MultiTokenForConditionalGeneration:
        """As torch's, but what is frozen of an encoder stays in eval.

        The trainer calls this before each step.
        """
        super().train(mode)
        self.encoders.eval()
        for name in self.encoders:
            set_train_mode(self.encoder(name), mode)
        return self

    @property
    def capabilities(self) -> Capabilities:
        """What the language model can do, tried when first asked for and then remembered.

        Raises LanguageModelError if it cannot be driven by embeddings at all.
        """
        if self._capabilities is None:
            self._capabilities = probe(self.language_model)
        return self._capabilities

    @capabilities.setter
    def capabilities(self, found: Capabilities) -> None:
        """For a language model that runs elsewhere, which cannot be tried here."""
        self._capabilities = found

    def get_input_embeddings(self) -> nn.Module:
        """ids -> what the language model makes of them before its first layer."""
        embedding = self.language_model.get_input_embeddings()
        scale = self.capabilities.embedding_scale
        return embedding if scale == 1.0 else ScaledEmbedding(embedding, scale)

    def encode(self, name: str, inputs: Mapping[str, Tensor]) -> Features:
        """All items of one modality through its encoder, or their cached features.

        Without gradients, unless something of the encoder learns.
        """
        if FEATURES_KEY in inputs:
            return Features(inputs[FEATURES_KEY], inputs["mask"], inputs.get(NEWLINES_KEY))
        encoder = self.encoder(name)
        learns = any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return encoder(**inputs)

    def embed(self, input_ids: Tensor, media: Mapping[str, MediaBatch] | None = None) -> Tensor:
        """input_ids [batch, time] -> inputs_embeds [batch, time, dim], media written in."""
        embeds = self.get_input_embeddings()(input_ids)
        media = media or {}
        pieces = [
            MediaEmbeds(name, self._media_embeds(name, m), m["positions"])
            for name, m in media.items()
        ]
        if self.training:
            embeds = embeds + self._touch_absent(media).to(embeds.dtype)
        return splice(embeds, pieces)

    def _media_embeds(self, name: str, media: MediaBatch) -> Tensor:
        """All tokens of a modality's items [copies * num_tokens, dim], computed once."""
        tokens = self.projectors[name](self.encode(name, media["inputs"]))
        copies = media.get("copies", 1)
        return tokens if copies == 1 else tokens.repeat(copies, 1)

    def _touch_absent(self, media: Mapping[str, MediaBatch]) -> Tensor:
        """A zero that depends on all that learns of the modalities that this batch does not use.

        Without it a rank whose rows lack a modality would hang the others in the gradient's
        all-reduce.
        """
        zero = torch.zeros((), device=self.device)
        for name, projector in self.projectors.items():
            if name not in media:
                for parameter in (*projector.parameters(), *self.encoders[name].parameters()):
                    if parameter.requires_grad:
                        zero = zero + 0.0 * parameter.sum()
        return zero

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        media: Mapping[str, MediaBatch] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        segments: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """With labels: loss, and logits [num_supervised, vocabulary]; without: the child's output.

        input_ids, attention_mask, labels, shift_labels: int64 [batch, time]. `shift_labels` is
        made of `labels` if absent. `num_items_in_batch`: supervised positions over all devices and
        accumulation steps, by which the summed loss is divided. `segments`: as in `PackedBatch`.
        All other arguments go to the language model, such as a `PackedBatch`'s positions and
        borders.
        """
        kwargs = filter_flash_attention_kwargs(self.language_model, kwargs)
        if segments is not None:
            attention_mask = segments_to_mask(self.language_model, segments)
        embeds = self.embed(input_ids, media)
        if labels is None and shift_labels is None:
            return self.language_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                **per_layer_inputs(self.language_model, input_ids),
                **kwargs,
            )
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        assert shift_labels is not None
        return supervised_loss(
            self.language_model,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
            supports_logits_to_keep=self.capabilities.supports_logits_to_keep,
            **per_layer_inputs(self.language_model, input_ids),
            **kwargs,
        )

    def generate(self, conversations: Sequence[Any], **options: Any) -> list[str]:  # type: ignore[override]
        """Answers to a batch of conversations or rows; see `multi_token.generate.generate`."""
        from multi_token.generate import generate

        return generate(self, conversations, **options)

    def encoder(self, name: str) -> Encoder:
        """The encoder of a modality, typed."""
        module = self.encoders[name]
        assert isinstance(module, Encoder)
        return module

    def projector(self, name: str) -> Projector:
        """The projector of a modality, typed."""
        module = self.projectors[name]
        assert isinstance(module, Projector)
        return module

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:  # type: ignore[override]
        """What was trained, and references to the rest; see checkpoint/load.py."""
        from multi_token.checkpoint.load import save

        save(self, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: Any,
        *,
        revision: str | None = None,
        language_model: str | None = None,
        device: str | None = None,
    ) -> MultiTokenForConditionalGeneration:
        """A run's folder or hub name -> the model with its reader; see checkpoint/load.py."""
        from multi_token.checkpoint.load import load

        return load(folder, revision=revision, language_model=language_model, device=device)
