"""TRL's GRPO with media of every modality: the one trainer of TRL that knows images alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from trl import GRPOTrainer  # type: ignore[reportPrivateImportUsage]

from multi_token.collate import Collator
from multi_token.hf.inputs import TOKEN_TYPES, to_flat
from multi_token.hf.processor import ChatProcessor
from multi_token.types import Sample


class MediaGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose prompts hold media of any modality of the run.

    TRL 1.16 passes its model a fixed list of arguments, all of images. This class keeps the media
    of each prompt beside its ids, and adds them to every call of the model. The column `prompt`
    holds messages as for `ChatProcessor.apply_chat_template`.
    """

    processing_class: ChatProcessor

    def __init__(self, model: Any, *, args: Any, **options: Any) -> None:
        """Take the arguments of `GRPOTrainer`; `model` and `processing_class` are a run's."""
        # TRL forbids the model to write an image's placeholder, which would be the pad token here
        model.config.image_token_id = None
        args.generation_kwargs = {"suppress_tokens": None, **(args.generation_kwargs or {})}
        self._prompts: list[Sample] = []
        super().__init__(model, args=args, **options)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        self._prompts = self.processing_class.prompts(prompts)
        flat = _flat(self.processing_class, self._prompts)
        real = flat.pop("attention_mask").bool()
        ids, types = flat.pop("input_ids"), flat.pop(TOKEN_TYPES)
        rows = range(len(prompts))
        # TRL pads what is a list of lists, and passes tensors on
        types_of_rows = [types[row][real[row]].tolist() for row in rows]
        return (
            [ids[row][real[row]].tolist() for row in rows],
            None,
            {TOKEN_TYPES: types_of_rows, **flat},
        )

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # a list is shuffled and split as the tensors beside it
        return {**super()._generate_and_score_completions(inputs), "prompts": self._prompts}

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self._prompts = inputs["prompts"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> Any:
        return super()._get_per_token_logps_and_entropies(
            _WithMedia(model, self.processing_class, self._prompts, logits_to_keep),
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size,
            compute_entropy,
            compute_aux_loss,
        )


class _WithMedia:
    """A model that is called with chunks of rows in order, and gets the media of these rows."""

    def __init__(
        self, model: Any, processor: ChatProcessor, prompts: list[Sample], num_completed: int
    ) -> None:
        self.model = model
        self.processor = processor
        self.prompts = prompts
        self.num_completed = num_completed

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Any:
        chunk, self.prompts = self.prompts[: len(input_ids)], self.prompts[len(input_ids) :]
        flat = _flat(self.processor, chunk)
        own = flat.pop(TOKEN_TYPES)
        del flat["input_ids"], flat["attention_mask"]
        # prompts end where the completions begin, however wide their padding is
        end = input_ids.shape[1] - self.num_completed
        types = torch.zeros_like(input_ids)
        types[:, end - own.shape[1] : end] = own
        media = send_to_device(flat, input_ids.device)
        return self.model(input_ids=input_ids, **{TOKEN_TYPES: types}, **media, **inputs)


def _flat(processor: ChatProcessor, samples: list[Sample]) -> dict[str, Tensor]:
    run = processor.run
    collator = Collator(run.modalities, run.chat.filler_id, padding_side="left")
    return to_flat(collator(samples), run.modalities)
