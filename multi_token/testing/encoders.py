"""Tiny encoders of every modality, built in process with random weights, saved as published ones.

Each function writes the model and its processor into `folder`, and returns the folder's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from multi_token.testing.language_models import tiny_llama_config, tiny_tokenizer

SENTENCES = [
    "The warehouse in Oslo holds blue crates. Who keeps the red lamp? It is a secret!",
    "A document may be long: it has chapters, and each of them has many sentences.",
    "passage: Anna lives in Rome and likes green apples, while Ben has a dog and an old boat.",
]
"""Text that the sentence encoders' tokenizer is trained on."""
LLAVA_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of content parts that puts images first, as those of LLaVA's processors do."""

_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_MLP = {**_SMALL, "intermediate_size": 48}
_VIT = {**_MLP, "image_size": 32, "patch_size": 8}
_SQUARE = {"height": 32, "width": 32}
_CROP = {"size": {"shortest_edge": 32}, "crop_size": _SQUARE}
_TEXT = {**_MLP, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}

_TOWERS = {"text_config": {**_TEXT, "pad_token_id": 1}, "vision_config": _VIT}
_NATIVE = {**_TOWERS, "vision_config": {**_MLP, "num_patches": 16, "patch_size": 8}}
_DINO = {**_SMALL, "image_size": 32, "patch_size": 8}
_TUBE = {"tubelet_size": [2, 8, 8], "hidden_dropout_prob": 0.0}
_HEADLESS = {"include_top": False}
_NARROW = {
    "image_size": 32,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.25,
    "hidden_dim": 320,
}
_PREDICTOR = {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 4, "pred_num_mask_tokens": 1}
_VJEPA = {**_SMALL, **_PREDICTOR, "pred_hidden_size": 24, "patch_size": 8, "crop_size": 32}

# Kind -> model family, its configuration, the image processor and its fields.
_IMAGE: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "clip": ("CLIP", _TOWERS, "CLIP", _CROP),
    "siglip": ("Siglip", _TOWERS, "Siglip", {"size": _SQUARE}),
    "siglip2": ("Siglip2", _NATIVE, "Siglip2", {"patch_size": 8, "max_num_patches": 16}),
    "dinov2": ("Dinov2", _DINO, "Bit", _CROP),
    "dinov2_with_registers": ("Dinov2WithRegisters", _DINO, "Bit", _CROP),
    "efficientnet": ("EfficientNet", _NARROW, "EfficientNet", {"size": _SQUARE, **_HEADLESS}),
}
# Kind -> model family, its configuration, and the field that holds the number of frames.
_VIDEO: dict[str, tuple[str, dict[str, Any], str]] = {
    "videomae": ("VideoMAE", _VIT, "num_frames"),
    "timesformer": ("Timesformer", _VIT, "num_frames"),
    "vivit": ("Vivit", {**_VIT, **_TUBE}, "num_frames"),
    "vjepa2": ("VJEPA2", {**_VJEPA, "mlp_ratio": 1.5}, "frames_per_clip"),
}


def save_random(folder: Path, seed: int, build: Callable[[], Any], *parts: Any) -> str:
    """Save the model that `build` makes with this seed, and its processors; return the folder."""
    # fork_rng keeps the caller's random state, so a test does not depend on the parts built before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    for part in (model, *parts):
        part.save_pretrained(folder)
    return str(folder)


def randomized(model: Any, *, std: float, min_ndim: int = 2) -> Any:
    """Set the weights of a model whose usual start gives nearly equal features."""
    for parameter in model.parameters():
        # Weights alone by default: random norms would scale some features to nothing.
        if parameter.ndim >= min_ndim:
            torch.nn.init.normal_(parameter, std=std)
    return model


def _model(family: str, fields: Mapping[str, Any]) -> Any:
    # Copied, since configurations may change the mappings that they get.
    config = getattr(hf, f"{family}Config")(**deepcopy(dict(fields)))
    return getattr(hf, f"{family}Model")(config)


def tiny_image_encoder(folder: Path, kind: str = "clip", *, seed: int = 0) -> str:
    """A vision encoder with its image processor.

    `kind`: clip, siglip, siglip2 (native aspect), dinov2, dinov2_with_registers, efficientnet.
    """
    family, fields, processor, options = _IMAGE[kind]
    image_processor = getattr(hf, f"{processor}ImageProcessorPil")(**options)
    return save_random(folder, seed, lambda: _model(family, fields), image_processor)


def tiny_video_encoder(folder: Path, kind: str, *, num_frames: int = 8, seed: int = 0) -> str:
    """A video encoder with its image processor, so that torchvision is not needed.

    `kind`: xclip, videomae, timesformer, vivit, vjepa2; frames of 32 x 32 pixels in 16 patches.
    """
    if kind == "xclip":
        # More text layers than vision layers, which must not be taken for the encoder's.
        text = {**_TEXT, "num_hidden_layers": 5}
        across = {"mit_hidden_size": 16, "mit_intermediate_size": 24}
        across |= {"mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}
        vision = {**_VIT, **across, "num_frames": num_frames, "drop_path_rate": 0.0}
        family, fields = "XCLIP", {"text_config": text, "vision_config": vision}
        fields |= {"projection_dim": 16, "prompt_layers": 1, "prompt_num_attention_heads": 2}
    else:
        family, fields, length = _VIDEO[kind]
        fields = {**fields, length: num_frames}
    processor = hf.VideoMAEImageProcessorPil(**_CROP)
    return save_random(folder, seed, lambda: randomized(_model(family, fields), std=0.2), processor)


def tiny_whisper(folder: Path, *, chunk_seconds: int = 1, seed: int = 0) -> str:
    """A Whisper with windows of `chunk_seconds` at 16 kHz and its feature extractor.

    Like the published models it makes 50 frames a second.
    """
    fields: dict[str, Any] = {"vocab_size": 64, "num_mel_bins": 16, "d_model": 32, "init_std": 0.3}
    for half, num_layers in (("encoder", 3), ("decoder", 2)):
        fields |= {f"{half}_layers": num_layers, f"{half}_attention_heads": 4}
        fields[f"{half}_ffn_dim"] = 48
    fields |= {"max_source_positions": 50 * chunk_seconds, "max_target_positions": 8}
    fields |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    fields |= {"decoder_start_token_id": 5}
    # The defaults name ids beyond this vocabulary.
    fields |= {"suppress_tokens": None, "begin_suppress_tokens": None}
    extractor = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=chunk_seconds)
    return save_random(folder, seed, lambda: _model("Whisper", fields), extractor)


def tiny_wav2vec2(
    folder: Path,
    kind: Literal["wav2vec2", "hubert", "wavlm"] = "wav2vec2",
    *,
    norm: Literal["group", "layer"] = "group",
    seed: int = 0,
) -> str:
    """An encoder of raw waveforms at 16 kHz with its feature extractor.

    `norm`: `group` normalizes over time, as the published base sizes do, so that padding changes
    the features; `layer` does not, as the large sizes.
    """
    fields: dict[str, Any] = {
        **_MLP,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (80, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 16,
        # 16 channels per group: with 8, oneDNN computes bfloat16 wrongly on CPUs with AMX
        # (torch 2.13).
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
        "initializer_range": 0.3,
    }
    family = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}[kind]
    extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return save_random(folder, seed, lambda: _model(family, fields), extractor)


def tiny_clap(folder: Path, *, fused: bool = False, seed: int = 0) -> str:
    """A CLAP with windows of 1 s at 48 kHz and its feature extractor."""
    audio: dict[str, Any] = {
        "num_mel_bins": 64,  # transformers' own fusion takes no other number
        "spec_size": 128,
        "patch_size": 8,
        "patch_stride": [8, 8],
        "window_size": 4,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [1, 2],
        "num_attention_heads": [2, 4],
        "num_hidden_layers": 2,
        "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None,
    }
    text = {**_MLP, "num_hidden_layers": 1, "vocab_size": 64}
    fields = {"text_config": text, "audio_config": audio, "projection_dim": 24}
    extractor = hf.ClapFeatureExtractor(
        max_length_s=1, truncation="fusion" if fused else "rand_trunc"
    )
    return save_random(folder, seed, lambda: _model("Clap", fields), extractor)


def tiny_sentence_encoder(
    folder: Path, kind: str = "bert", *, max_tokens: int = 64, seed: int = 0
) -> str:
    """A sentence encoder with its tokenizer.

    `kind`: bert, roberta (byte-level tokens), t5 (its decoder is not needed).
    """
    if kind == "roberta":
        tokenizer = tiny_tokenizer()
    else:
        # WordPiece, which lowers letters and drops blanks
        blank = hf.BertTokenizer()
        tokenizer = blank.train_new_from_iterator(SENTENCES, vocab_size=200, show_progress=False)
    tokenizer.model_max_length = max_tokens
    fields: dict[str, Any] = {
        **_MLP,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        "max_position_embeddings": max_tokens,
    }
    if kind == "roberta":
        # RoBERTa counts positions from the padding id on.
        fields["max_position_embeddings"] += tokenizer.pad_token_id + 1
    elif kind == "t5":
        fields = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 48}
        fields |= {"num_layers": 2, "num_heads": 4}
    family = {"bert": "Bert", "roberta": "Roberta", "t5": "T5"}[kind]
    return save_random(folder, seed, lambda: _model(family, fields), tokenizer)


def tiny_protein_encoder(folder: Path, *, max_tokens: int = 64, seed: int = 0) -> str:
    """An ESM-2 with its tokenizer: a token for each amino acid."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(letters), encoding="utf-8")
    tokenizer = hf.EsmTokenizer(str(folder / "vocab.txt"))
    fields: dict[str, Any] = {
        **_MLP,
        "num_hidden_layers": 2,
        "vocab_size": len(letters),
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "max_position_embeddings": max_tokens,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return save_random(folder, seed, lambda: _model("Esm", fields), tokenizer)


def tiny_joint_clip(folder: Path, *, seed: int = 0) -> str:
    """A CLIP with its image processor and its tokenizer, for texts of at most 32 tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 32
    # Like CLIP's, a text begins and ends with a token of its own.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")],
    )
    text = {
        **_MLP,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("</s>"),
    }
    fields = {"text_config": text, "vision_config": {**_VIT, "num_hidden_layers": 2}}
    fields |= {"projection_dim": 24, "initializer_factor": 4.0}
    processor = hf.CLIPImageProcessorPil(**_CROP)
    return save_random(folder, seed, lambda: _model("CLIP", fields), tokenizer, processor)


def tiny_patchtst(folder: Path, *, channels: int = 2, seed: int = 0, **fields: Any) -> str:
    """A PatchTST over windows of 32 steps in 4 patches; `fields`: more of its configuration."""
    sizes: dict[str, Any] = {
        "num_input_channels": channels,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "ffn_dim": 32,
        "scaling": "std",
        **fields,
    }
    return save_random(
        folder, seed, lambda: randomized(_model("PatchTST", sizes), std=0.3, min_ndim=0)
    )


def tiny_llava(
    folder: Path, *, anyres: bool = False, seed: int = 0, vision: Any = None, **fields: Any
) -> str:
    """A LLaVA-1.5, or LLaVA-NeXT if `anyres`, with its processor, in transformers' format.

    `vision`: the vision tower's configuration (default: a CLIP of 16 patches and a CLS token);
    `fields`: more of the model's configuration. Like the published models it has a chat template
    of content parts, and a tokenizer that puts the BOS in front.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    vision = vision or hf.CLIPVisionConfig(**_VIT, initializer_range=0.5)
    shared: dict[str, Any] = {
        "vision_config": vision,
        "text_config": tiny_llama_config(tokenizer, max_length=1024),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": "default",
        **fields,
    }
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": shared["vision_feature_select_strategy"],
        "num_additional_image_tokens": int(vision.model_type.startswith("clip")),
        "chat_template": LLAVA_TEMPLATE,
    }
    processor: Any
    if anyres:
        pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
        config: Any = hf.LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared)
        cutter = hf.LlavaNextImageProcessorPil(**_CROP, image_grid_pinpoints=pinpoints)
        processor = hf.LlavaNextProcessor(image_processor=cutter, **options)
    else:
        config = hf.LlavaConfig(**shared)
        processor = hf.LlavaProcessor(hf.CLIPImageProcessorPil(**_CROP), **options)

    def build() -> Any:
        model = hf.AutoModelForImageTextToText.from_config(config)
        randomized(model.model.multi_modal_projector, std=0.2, min_ndim=0)
        return model

    return save_random(folder, seed, build, processor)
