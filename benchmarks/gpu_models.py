"""Models, rows and sizes of benchmarks/gpu.py.

Weights are random and are made on the device: a 7B is never on disk.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import llava_rows
from PIL import Image
from training import row
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from multi_token import model as composing
from multi_token.data.formats import to_conversation
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration, move_to_device
from multi_token.recipe.model import ModelSpec
from multi_token.testing import tiny_tokenizer
from multi_token.types import Conversation, Sample


@dataclass(frozen=True)
class Size:
    """Sizes of models and runs."""

    language_model: dict[str, Any]
    vision: dict[str, Any]
    batch: int
    """Rows of a step."""
    steps: int
    """Timed steps of a trainer in a turn."""
    rounds: int
    """Turns."""
    texts: dict[str, tuple[int, int]]
    """Stage -> characters, about tokens, of its shortest and longest row."""
    shallow: int
    """Layers of the model that is written to disk, for the run of a recipe."""
    new_tokens: int
    num_clients: int
    num_workers: int


FULL = Size(
    language_model={
        "vocab_size": 32_064,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    batch=8,
    steps=5,
    rounds=2,
    # captions of LLaVA's first stage have some 30 tokens; conversations of its second, 100 to 500
    texts={"projector": (20, 60), "projector and LoRA": (100, 500)},
    shallow=4,
    new_tokens=64,
    num_clients=8,
    num_workers=8,
)
"""Mistral 7B and CLIP-L/336: 576 image tokens a row."""

TOY = Size(
    language_model={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
    batch=2,
    steps=2,
    rounds=1,
    texts={"projector": (10, 20), "projector and LoRA": (10, 60)},
    shallow=2,
    new_tokens=8,
    num_clients=8,
    num_workers=1,
)
"""The same shapes, small enough for a CPU."""


def write_parts(folder: Path, size: Size, num_rows: int) -> None:
    """Write the vision tower, the tokenizer and images: what is read from disk."""
    torch.manual_seed(0)
    edge = size.vision["image_size"]
    tower: Any = CLIPVisionModel(CLIPVisionConfig(**size.vision))
    tower.to(torch.bfloat16).save_pretrained(folder / "clip")
    crop = {"crop_size": {"height": edge, "width": edge}, "size": {"shortest_edge": edge}}
    CLIPImageProcessorPil(**crop).save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    for i in range(num_rows):
        Image.effect_noise((edge, edge), 90).convert("RGB").save(folder / f"{i}.png")


def language_model(
    size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Any:
    """Return a Mistral with random weights, made on its device."""
    tokenizer = tiny_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id")}
    config = MistralConfig(
        **{**size.language_model, **changes},
        **ids,
        eos_token_id=tokenizer.eos_token_id,
        sliding_window=None,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made.requires_grad_(False).eval()


def modality_fields(folder: Path, dtype: str | None = "bfloat16") -> dict[str, Any]:
    """LLaVA's features and projector."""
    return {
        "type": "image",
        "encoder": str(folder / "clip"),
        "features": "patches",
        "layer": -2,
        "dtype": dtype,
        "projector": {"type": "mlp", "standardize": False},
    }


def composed(
    folder: Path, given: Any, device: torch.device, dtype: str | None = "bfloat16"
) -> MultiTokenForConditionalGeneration:
    """Return the model of a recipe around a language model that is in memory already."""
    fields = {
        "language_model": str(folder / "tokenizer"),
        "modalities": {"image": modality_fields(folder, dtype)},
    }
    load, composing.load_language_model = composing.load_language_model, lambda *_, **__: given
    try:
        torch.manual_seed(0)
        model = MultiTokenForConditionalGeneration.from_spec(ModelSpec.model_validate(fields))
    finally:
        composing.load_language_model = load
    return move_to_device(model, device)


def llava_around(folder: Path, size: Size, ours: Any, device: torch.device) -> Any:
    """Return transformers' LLaVA with the weights of ours: one language model for both."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=MistralConfig(**{**size.language_model, "num_hidden_layers": 1}),
        image_token_index=size.language_model["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device(device):
        llava: Any = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    child = ours.language_model
    llava.model.language_model, llava.lm_head = child.model, child.lm_head
    tower = CLIPVisionModel.from_pretrained(folder / "clip", dtype=torch.bfloat16)
    llava.model.vision_tower = tower.to(device)  # type: ignore[arg-type]
    found = ours.projectors["image"].state_dict()
    layers = {"linear_1": "network.0", "linear_2": "network.2"}
    # float32, as ours: an update at a usual rate is lost in bfloat16
    llava.model.multi_modal_projector.float().load_state_dict(
        {
            f"{theirs}.{kind}": found[f"{own}.{kind}"]
            for theirs, own in layers.items()
            for kind in ("weight", "bias")
        }
    )
    return llava.eval()


def conversations(num: int, shortest: int, longest: int) -> list[Conversation]:
    """Return rows of an image and a text, of lengths evenly spread."""
    numbers = random.Random(0)
    made = [row(i, i, numbers.randint(shortest, longest), numbers) for i in range(num)]
    return [to_conversation(one, ["image"], row_id=one["id"]) for one in made]


@dataclass(frozen=True)
class Rows:
    """Rows that are decoded and prepared when they are asked for, in data workers."""

    processor: Any
    given: Sequence[Conversation]
    llava_token: int | None = None
    """Id of LLaVA's image token, for rows as LLaVA takes them."""

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Any:
        sample: Sample = self.processor(self.given[index])
        return sample if self.llava_token is None else llava_rows([sample], self.llava_token)[0]


def rows_of(model: MultiTokenForConditionalGeneration, folder: Path, *spread: int) -> Rows:
    """`spread`: number of rows, characters of the shortest and of the longest."""
    processor = replace(model.require_processor(), fetch=Fetch(root=str(folder)))
    return Rows(processor, conversations(*spread))
