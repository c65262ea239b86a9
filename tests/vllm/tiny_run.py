"""A tiny run with three modalities and an adapter, its media, and the tokens of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from multi_token.types import Conversation, Media, Message, Part, Text

CONTEXT = 2048
"""Limit of prompt and new tokens together."""
VECTORS = [[1.0, -1.0, 0.5, 2.0, 0.0], [-2.0, 0.3, 1.5, -0.7, 1.0]]


def tiny_run(folder: Path, *, seed: int = 0) -> Path:
    """A run with the modalities `image`, `sound` and `vector`, saved; another one for each seed.

    A head has dim 32, the smallest that vLLM's attention for CPUs takes. Media embeddings are as
    large as those of text, so answers depend on the media.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from multi_token.checkpoint.save import save
    from multi_token.language_model.lora import adapter_parameters, attach_adapter
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.model import ModelSpec
    from multi_token.recipe.train import AdapterSpec
    from multi_token.testing import tiny_image_encoder, tiny_tokenizer
    from multi_token.testing.encoders import tiny_clap

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=CONTEXT,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                initializer_range=0.2,
            )
        )
        language_model.save_pretrained(folder / "language_model")
        tokenizer.save_pretrained(folder / "language_model")
        fields = {
            "language_model": str(folder / "language_model"),
            "modalities": {
                "image": {
                    "type": "image",
                    "encoder": tiny_image_encoder(folder / "clip"),
                    "features": "pooled",
                    "projector": {"type": "expand", "factor": 3},
                },
                "sound": {
                    "type": "sound",
                    "encoder": tiny_clap(folder / "clap"),
                    "projector": {"type": "expand", "factor": 4},
                },
                "vector": {
                    "type": "vector",
                    "dim": 5,
                    "projector": {"type": "expand", "factor": 2},
                },
            },
        }
        model: Any = MultiTokenForConditionalGeneration.from_spec(ModelSpec.model_validate(fields))
        model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
        for parameter in model.projectors.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        for parameter in adapter_parameters(model):
            torch.nn.init.normal_(parameter, std=0.1)
        save(model.eval(), folder / "run")
    return folder / "run"


def media(folder: Path) -> dict[str, list[str | list[float]]]:
    """Two items of each modality: files, and lists of numbers."""
    from multi_token.testing.files import write_tone

    images = []
    for number, colour in enumerate([(220, 30, 30), (30, 60, 220)]):
        Image.radial_gradient("L").convert("RGB").resize((40, 40)).save(folder / "base.png")
        image = Image.blend(
            Image.open(folder / "base.png"), Image.new("RGB", (40, 40), colour), alpha=0.6
        )
        image.save(folder / f"{number}.png")
        images.append(str(folder / f"{number}.png"))
    sounds = [
        str(write_tone(folder / f"{hertz}.wav", 0.8, 48_000, hertz=hertz)) for hertz in (300, 1200)
    ]
    return {"image": images, "sound": sounds, "vector": list(VECTORS)}


def question(*parts: tuple[str, Any] | str) -> Conversation:
    """One turn of the user: texts, and pairs of a modality and its item, in this order."""
    return Conversation((Message("user", tuple(map(_part, parts))),), id="question")


def _part(part: tuple[str, Any] | str) -> Part:
    return Text(part) if isinstance(part, str) else Media(*part)


@torch.no_grad()
def embedded(model: Any, conversation: Conversation) -> torch.Tensor:
    """Prompt embeddings, float [time, hidden]."""
    from multi_token.generate import collate_prompts

    batch = collate_prompts(model.require_processor(), [conversation])
    return model.embed(batch["input_ids"], batch["media"])[0]


def greedy(model: Any, conversations: Sequence[Conversation], num_new: int) -> list[list[int]]:
    """Ids that `generate` gives for each conversation alone, with the end of turn."""
    from multi_token.generate import generate_ids

    processor = model.require_processor()
    return [
        generate_ids(model, [processor(one, prompt_only=True)], max_new_tokens=num_new)[0].tolist()
        for one in conversations
    ]
