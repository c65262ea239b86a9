"""Tiny random parts in place of the hub names of ready recipes, of the same architectures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import transformers as hf

from multi_token.chat.named import named_template
from multi_token.testing.encoders import (
    save_random,
    tiny_clap,
    tiny_image_encoder,
    tiny_sentence_encoder,
    tiny_video_encoder,
    tiny_whisper,
)
from multi_token.testing.language_models import tiny_llama_config, tiny_tokenizer

THINKING = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }}\n"
    "{%- if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif -%}"
    "{{ m['content'] }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif -%}"
)
"""Qwen3's treatment of thoughts, in short."""


def siglip(folder: Path) -> str:
    """A SigLIP with a grid of 6 x 6, which factors of 2 and 3 divide."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 48, "patch_size": 8}
    text = {**vision, "vocab_size": 64}
    config = hf.SiglipConfig(text_config=text, vision_config=vision)
    processor = hf.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    return save_random(folder, 0, lambda: hf.SiglipModel(config), processor)


def _causal(folder: Path, kind: str, template: str | None) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    fields = tiny_llama_config(tokenizer, max_length=2048).to_dict()
    for key in ("model_type", "architectures", "rope_parameters", "head_dim"):
        fields.pop(key, None)
    config = hf.AutoConfig.for_model(kind, **fields, head_dim=8)
    return save_random(folder, 0, lambda: hf.AutoModelForCausalLM.from_config(config), tokenizer)


# Pattern of a hub name -> builder of its stand-in. More than one name may have one stand-in.
LANGUAGE_MODELS: dict[str, Callable[[Path], str]] = {
    r"Qwen/Qwen3-.*": lambda folder: _causal(folder, "qwen3", THINKING),
    r"HuggingFaceTB/SmolLM2-.*": lambda f: _causal(f, "llama", named_template("smollm2")),
    r"lmsys/vicuna-.*": lambda folder: _causal(folder, "llama", None),
}
ENCODERS: dict[str, Callable[[Path], str]] = {
    r"google/siglip2-.*-patch16-512": lambda folder: tiny_image_encoder(folder, "siglip"),
    r"google/siglip2-.*": siglip,
    r"openai/clip-.*": tiny_image_encoder,
    r"openai/whisper-.*": tiny_whisper,
    r"laion/clap-.*": tiny_clap,
    r"microsoft/xclip-.*": lambda folder: tiny_video_encoder(folder, "xclip"),
    r"sentence-transformers/.*": tiny_sentence_encoder,
}


class StandIns:
    """Builds each stand-in once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, kinds: dict[str, Callable[[Path], str]]) -> str:
        """Return the folder of the stand-in of a hub name; KeyError for an unknown one."""
        for number, (pattern, build) in enumerate(kinds.items()):
            if re.fullmatch(pattern, name):
                folder = self.folder / f"{len(kinds)}-{number}"
                return str(folder) if folder.is_dir() else build(folder)
        raise KeyError(f"{name} has no stand-in; add one to tests/recipes/stand_ins.py")
