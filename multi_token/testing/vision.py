"""Tiny vision encoders, and LLaVA models, built in process, random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multi_token.testing.language_models import tiny_tokenizer

LLAVA_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template of content parts that puts images first, as those of LLaVA's processors do."""


def tiny_image_encoder(folder: Path, kind: str = "clip", *, seed: int = 0) -> str:
    """A random vision encoder with its image processor, saved; returns the folder's name.

    `kind`: clip, siglip, siglip2 (native aspect), dinov2, dinov2_with_registers, efficientnet.
    """
    import torch
    import transformers as hf

    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vit = {**small, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
    text = {**small, "intermediate_size": 48, "vocab_size": 64}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    size = {"height": 32, "width": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "clip":
            model: Any = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vit))
            processor: Any = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
        elif kind == "siglip":
            model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vit))
            processor = hf.SiglipImageProcessorPil(size=size)
        elif kind == "siglip2":
            vision = {**small, "intermediate_size": 48, "num_patches": 16, "patch_size": 8}
            model = hf.Siglip2Model(hf.Siglip2Config(text_config=text, vision_config=vision))
            processor = hf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
        elif kind in ("dinov2", "dinov2_with_registers"):
            names = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
            config = getattr(hf, f"{names[kind]}Config")(**small, image_size=32, patch_size=8)
            model = getattr(hf, f"{names[kind]}Model")(config)
            processor = hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
        elif kind == "efficientnet":
            config = hf.EfficientNetConfig(
                image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320
            )
            model = hf.EfficientNetModel(config)
            processor = hf.EfficientNetImageProcessorPil(size=size, include_top=False)
        else:
            raise ValueError(f"no tiny encoder of kind {kind!r}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def image_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Example of the kit for `image`: patches of a tiny CLIP, of a file and an image in memory."""
    from PIL import Image

    path = folder / "wide.png"
    Image.radial_gradient("L").resize((60, 30)).save(path)
    picture = Image.linear_gradient("L").resize((32, 48)).convert("RGB")
    encoder = tiny_image_encoder(folder / "clip", "clip")
    return {"type": "image", "encoder": encoder}, [str(path), picture]


def tiny_llava(
    folder: Path, *, anyres: bool = False, seed: int = 0, vision: Any = None, **fields: Any
) -> str:
    """A random LLaVA-1.5, or LLaVA-NeXT if `anyres`, with its processor, in transformers' format.

    `vision`: the vision tower's configuration (default: a CLIP of 16 patches and a CLS token);
    `fields`: more of the model's configuration. Like the published ones it has a chat template
    of content parts, and a tokenizer that puts the BOS in front. Returns the folder's name.
    """
    import torch
    import transformers as hf
    from tokenizers import AddedToken, processors

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = vision or hf.CLIPVisionConfig(
        **small, intermediate_size=48, image_size=32, patch_size=8, initializer_range=0.5
    )
    text_size: dict[str, Any] = {**small, "num_hidden_layers": 2}
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        **text_size,
        intermediate_size=64,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    shared: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": "default",
        **fields,
    }
    size = {"height": 32, "width": 32}
    crop: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": size}
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": shared["vision_feature_select_strategy"],
        "num_additional_image_tokens": int(vision.model_type.startswith("clip")),
        "chat_template": LLAVA_TEMPLATE,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if anyres:
            pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
            config = hf.LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared)
            model: Any = hf.LlavaNextForConditionalGeneration(config)
            cutter = hf.LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=pinpoints)
            processor: Any = hf.LlavaNextProcessor(image_processor=cutter, **options)
        else:
            model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**shared))
            processor = hf.LlavaProcessor(hf.CLIPImageProcessorPil(**crop), **options)
        for parameter in model.model.multi_modal_projector.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
