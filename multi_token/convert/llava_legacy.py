"""Imports LLaVA's own folders: `mm_projector.bin`, or LoRA with `non_lora_trainables.bin`."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from multi_token.convert.chat_templates import VICUNA
from multi_token.convert.tensors import load_foreign_adapter, read_json, read_tensors
from multi_token.errors import ConvertError, MultiTokenError

IMAGE = "image"
PROJECTOR = "mm_projector.bin"
ADAPTER, BESIDE_ADAPTER = "adapter_config.json", "non_lora_trainables.bin"
_FEATURES = {"patch": "patches", "cls_patch": "all"}


def is_legacy(fields: Mapping[str, Any]) -> bool:
    """Return True if a config.json is LLaVA's own."""
    return "mm_vision_tower" in fields


def import_legacy(
    source: Path,
    fields: Mapping[str, Any],
    out: Path,
    *,
    language_model: str | None,
    encoder: str | None,
) -> None:
    """Write a run that names `language_model` and `encoder` (default: what the folder names)."""
    from multi_token.checkpoint.load import check_state_dict
    from multi_token.checkpoint.save import save
    from multi_token.language_model.loading import load_tokenizer
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.model import ModelSpec
    from multi_token.registry import validate_fields

    adapter = read_json(source / ADAPTER)
    has_adapter = (source / ADAPTER).is_file()
    if has_adapter and (source / BESIDE_ADAPTER).is_file():
        found = read_tensors(source / BESIDE_ADAPTER)
        named = adapter.get("base_model_name_or_path")
    elif (source / PROJECTOR).is_file():
        found, named = read_tensors(source / PROJECTOR), fields.get("_name_or_path")
    else:
        raise ConvertError(
            f"{source} is LLaVA's own, but holds neither {PROJECTOR} nor {ADAPTER} with "
            f"{BESIDE_ADAPTER}; convert a complete model to transformers' format first, with "
            "transformers' convert_llava_weights_to_hf.py"
        )
    base = language_model or named
    if not base:
        raise ConvertError(f"{source} names no language model; name it with --language-model")
    tensors, line_break = _to_our_names(found, source)
    modality = _modality(fields, encoder or str(fields["mm_vision_tower"]), tensors)
    if (line_break is not None) != ("tile_grids" in modality):
        raise ConvertError(
            f"{source} {'lacks' if line_break is None else 'has'} an image_newline, and its "
            f"`image_aspect_ratio` is {fields.get('image_aspect_ratio')!r}; a newline goes with "
            "anyres, and anyres with a newline"
        )
    try:
        # LLaVA-1.5 names Vicuna, whose tokenizer has no template
        template = None if load_tokenizer(base).chat_template else VICUNA
        spec = {"language_model": base, "chat_template": template, "modalities": {IMAGE: modality}}
        run = MultiTokenForConditionalGeneration.from_spec(
            validate_fields(ModelSpec, spec, where="the imported recipe")
        )
    except (MultiTokenError, OSError, ValueError) as error:
        raise ConvertError(
            f"{source} cannot become a run: {str(error).splitlines()[0]}. Name its parts with "
            "--language-model and --encoder"
        ) from error
    projector = run.projector(IMAGE)
    if line_break is not None:
        tensors["line_break"] = line_break
    # LLaVA does not standardize: mean 0 and scale 1, as the projector is built
    tensors |= {"feature_mean": projector.feature_mean, "feature_scale": projector.feature_scale}
    check_state_dict(source, projector.state_dict(), tensors)
    projector.load_state_dict(tensors)
    if has_adapter:
        load_foreign_adapter(run, source, out)
    save(run, out)


def _to_our_names(
    found: Mapping[str, Tensor], source: Path
) -> tuple[dict[str, Tensor], Tensor | None]:
    """LLaVA's names -> the projector's network and the line break."""
    tensors: dict[str, Tensor] = {}
    line_break: Tensor | None = None
    left = []
    for name, tensor in found.items():
        # prefixes of PEFT, of the causal model and of its base, depending on how it was saved
        short = re.sub(r"^(base_model\.)?(model\.)+", "", name)
        if short == "image_newline":
            line_break = tensor.float()
        elif match := re.fullmatch(r"mm_projector\.((\d+\.)?(weight|bias))", short):
            tensors[f"network.{match[1]}"] = tensor.float()
        else:
            left.append(f"{name} {tuple(tensor.shape)}")
    if left:
        raise ConvertError(f"{source} holds tensors that a run does not: {', '.join(sorted(left))}")
    return tensors, line_break


def _modality(
    fields: Mapping[str, Any], encoder: str, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """LLaVA's settings -> those of our `image`. Raises ConvertError."""
    kind = str(fields.get("mm_projector_type", "linear"))
    select = str(fields.get("mm_vision_select_feature", "patch"))
    aspect = fields.get("image_aspect_ratio") or "square"
    faults = []
    perceptron = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind != "linear" and perceptron is None:
        faults.append(f"`mm_projector_type` {kind!r} (linear and mlp<n>x_gelu can be)")
    if select not in _FEATURES:
        faults.append(f"`mm_vision_select_feature` {select!r}")
    if fields.get("mm_use_im_start_end"):
        faults.append("`mm_use_im_start_end`: tokens of its own around an image")
    if aspect not in ("square", "pad", "anyres"):
        faults.append(f"`image_aspect_ratio` {aspect!r}")
    # other merge types keep the padding of a tile, which our tiles have cut off
    if aspect == "anyres" and fields.get("mm_patch_merge_type", "flat") != "spatial_unpad":
        faults.append("`image_aspect_ratio: anyres` without `mm_patch_merge_type: spatial_unpad`")
    if faults:
        raise ConvertError(f"a recipe has no such settings as this LLaVA: {'; '.join(faults)}")
    projector: dict[str, Any] = {"type": "linear", "standardize": False}
    if perceptron is not None:
        projector |= {"type": "mlp", "num_layers": int(perceptron[1])}
    modality = {
        "type": "image",
        "encoder": encoder,
        "layer": int(fields.get("mm_vision_select_layer", -2)),
        "features": _FEATURES[select],
        "pad_to_square": aspect == "pad",
        "projector": projector,
    }
    if aspect == "anyres":
        projector["line_break"] = True
        modality["tile_grids"] = _tile_grids(fields.get("image_grid_pinpoints"), modality)
    return modality


def _tile_grids(pinpoints: Any, modality: Mapping[str, Any]) -> list[list[int]]:
    """LLaVA's own pinpoints are pixels (width, height), as a list or as text."""
    from multi_token.modalities.image import Tower, tile_shape

    # NeXT's own training wrote the argument's text into config.json
    try:
        listed = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        sizes = [(int(width), int(height)) for width, height in listed]
    except (TypeError, ValueError, SyntaxError):
        raise ConvertError(
            f"`image_grid_pinpoints` {pinpoints!r}: expected pairs of width and height"
        ) from None
    try:
        side, _ = tile_shape(Tower(modality["encoder"], None, "patches", modality["layer"]))
    except (OSError, ValueError) as error:
        raise ConvertError(
            f"no vision encoder could be loaded from {modality['encoder']!r}; name it with "
            f"--encoder: {str(error).splitlines()[0]}"
        ) from None
    wrong = [size for size in sizes if size[0] % side or size[1] % side]
    if wrong:
        raise ConvertError(f"`image_grid_pinpoints` {wrong} are no multiples of {side} pixels")
    return [[height // side, width // side] for width, height in sizes]
