"""A tiny encoder of images and texts in one space, built in process, random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multi_token.testing.language_models import tiny_tokenizer


def tiny_joint_clip(folder: Path, *, seed: int = 0) -> str:
    """A random CLIP with its image processor and its tokenizer, saved; returns the folder's name.

    A text of at most 32 tokens begins and ends with a token of its own, as CLIP's do.
    """
    import torch
    import transformers as hf
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 32
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")],
    )
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("</s>"),
    }
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = hf.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=24, initializer_factor=4.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return str(folder)


def joint_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Fields of a small instance, and two images and two texts for it."""
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    (folder / "note.txt").write_text("a blue circle and a red square", encoding="utf-8")
    fields = {"type": "joint", "encoder": tiny_joint_clip(folder / "clip")}
    sources: list[Any] = [
        str(folder / "red.png"),
        {"text": "a cat"},
        Image.new("RGB", (20, 64), "blue"),
        str(folder / "note.txt"),
    ]
    return fields, sources
