"""Imports LLaVA-1.5 and LLaVA-NeXT in transformers' format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multi_token.checkpoint.atomic import staged_folder
from multi_token.convert.chat_templates import VICUNA, prepend_bos
from multi_token.convert.llava_legacy import import_legacy, is_legacy
from multi_token.convert.tensors import read_json
from multi_token.errors import ConvertError, MultiTokenError
from multi_token.projectors.kinds import Mlp

if TYPE_CHECKING:
    from multi_token.modalities.image import ImageModality

IMAGE = "image"
"""The modality's name in an imported run: rows say `<image>`, as LLaVA's do."""


def is_llava(fields: Mapping[str, Any]) -> bool:
    """Return True if a config.json is LLaVA's, in transformers' format or in LLaVA's own."""
    return _is_transformers(fields) or is_legacy(fields)


def import_llava(
    source: Path, out: Path, *, language_model: str | None = None, encoder: str | None = None
) -> None:
    """Write the run `out` with the weights of `source`.

    In transformers' format, `source` holds the language model and the vision tower too: they are
    copied to `out`/language_model and `out`/encoders/image. LLaVA's own folders only name them;
    `language_model` and `encoder` replace names that cannot be loaded.

    Nothing is written unless everything fits. Raises ConvertError, which names every tensor and
    setting that a run cannot hold, or CheckpointError for tensors that do not fit.
    """
    fields = read_json(source / "config.json")
    if not is_llava(fields):
        raise ConvertError(
            f"{source} is not LLaVA: expected a config.json of type llava or llava_next with "
            "`vision_config` and `text_config`, or LLaVA's own with `mm_vision_tower`"
        )
    with staged_folder(out) as partial:
        if is_legacy(fields):
            import_legacy(source, fields, partial, language_model=language_model, encoder=encoder)
        elif language_model is not None or encoder is not None:
            raise ConvertError(
                f"{source} holds its language model and its vision tower; leave out "
                "--language-model and --encoder"
            )
        else:
            _import_transformers(source, fields, partial)


def _is_transformers(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") in ("llava", "llava_next") and "text_config" in fields


def _import_transformers(source: Path, fields: Mapping[str, Any], out: Path) -> None:
    from multi_token.checkpoint.save import save
    from multi_token.model import MultiTokenForConditionalGeneration

    model, processor = _load(source, is_next=fields["model_type"] == "llava_next")
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    # transformers' processor renders the template and lets the tokenizer add the BOS
    tokenizer.chat_template = prepend_bos(template or VICUNA, tokenizer)
    language_model = _text_model(model)
    language_model.save_pretrained(out / "language_model")
    tokenizer.save_pretrained(out / "language_model")
    # from_spec reads the copies: two language models need not be in memory at once
    del language_model
    model.model.language_model = model.lm_head = nn.Identity()
    tower = model.model.vision_tower
    tower.save_pretrained(out / "encoders" / IMAGE)
    _without_tiles(processor.image_processor).save_pretrained(out / "encoders" / IMAGE)
    spec = _spec(model.config, processor.image_processor, out)
    try:
        run = MultiTokenForConditionalGeneration.from_spec(spec)
    except MultiTokenError as error:
        raise ConvertError(f"{source} cannot become a run: {error}") from error
    projector = run.projector(IMAGE)
    found = dict(model.model.multi_modal_projector.state_dict())
    tensors = {f"network.{i}.weight": found[f"linear_{n}.weight"] for n, i in ((1, 0), (2, 2))}
    tensors |= {
        # `multimodal_projector_bias: false`: zeros compute the same
        f"network.{i}.bias": found.get(f"linear_{n}.bias", torch.zeros(projector.out_dim))
        for n, i in ((1, 0), (2, 2))
    }
    if projector.line_break is not None:
        tensors["line_break"] = model.model.image_newline
    tensors |= {"feature_mean": projector.feature_mean, "feature_scale": projector.feature_scale}
    projector.load_state_dict(tensors)
    save(run, out)


def _load(source: Path, *, is_next: bool) -> tuple[Any, Any]:
    """The model, all of whose tensors the folder holds, and its processor."""
    import transformers as hf

    name = "LlavaNext" if is_next else "Llava"
    cls = getattr(hf, f"{name}ForConditionalGeneration")
    try:
        processor = getattr(hf, f"{name}Processor").from_pretrained(source)
        # ignore_mismatched_sizes: wrong shapes are then in the report, with all other faults
        model, report = cls.from_pretrained(
            source, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except MultiTokenError:
        raise
    except Exception as error:  # of json, safetensors, tokenizers, pickle and transformers
        raise ConvertError(f"{source} cannot be read as {name}: {error}") from error
    faults = [
        *(f"lacks {key}" for key in sorted(report["missing_keys"])),
        *(f"has {key}, which has no place" for key in sorted(report["unexpected_keys"])),
        *(
            f"has {key} of shape {tuple(found)} instead of {tuple(expected)}"
            for key, found, expected in sorted(report["mismatched_keys"])
        ),
    ]
    if model.config.projector_hidden_act != "gelu":
        faults.append(
            f"has `projector_hidden_act` {model.config.projector_hidden_act!r}, ours is gelu"
        )
    if faults:
        raise ConvertError(f"{source} cannot be imported: it {'; it '.join(faults)}")
    return model.eval(), processor


def _text_model(model: Any) -> Any:
    """The language model alone, around the modules of LLaVA."""
    from transformers import AutoModelForCausalLM

    config = model.config.get_text_config()
    inner, head = model.model.language_model, model.lm_head
    # from the tensors: LLaVA's text_config need not say that head and embeddings are tied
    config.tie_word_embeddings = head.weight is inner.get_input_embeddings().weight
    # built on the meta device, since all of its tensors are replaced
    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM.from_config(config)
    setattr(causal, causal.base_model_prefix, inner)
    causal.set_output_embeddings(head)
    causal.generation_config = model.generation_config
    left = [name for name, tensor in causal.state_dict().items() if tensor.device.type == "meta"]
    if left:
        raise ConvertError(
            f"{type(causal).__name__} has {', '.join(left)}, which LLaVA does not hold"
        )
    return causal


def _without_tiles(processor: Any) -> Any:
    """The image processor of a single tile, from NeXT's, which cuts tiles."""
    if not hasattr(processor, "image_grid_pinpoints"):
        return processor
    from transformers import CLIPImageProcessorPil

    fields = processor.to_dict()
    for key in ("image_grid_pinpoints", "image_processor_type", "processor_class", "do_pad"):
        fields.pop(key, None)
    return CLIPImageProcessorPil(**fields)


def _spec(config: Any, image_processor: Any, out: Path) -> Any:
    from multi_token.recipe.model import ModelSpec
    from multi_token.registry import validate_fields

    layer = config.vision_feature_layer
    fields: dict[str, Any] = {
        "type": "image",
        "encoder": str(out / "encoders" / IMAGE),
        "layer": layer if isinstance(layer, int) else list(layer),
        "projector": {"type": "mlp", "standardize": False},
    }
    fields["features"] = _feature_selection(fields, config.vision_feature_select_strategy)
    if config.model_type == "llava_next":
        fields["tile_grids"] = _tile_grids(config, image_processor)
        fields["projector"]["line_break"] = True
    return validate_fields(
        ModelSpec,
        {"language_model": str(out / "language_model"), "modalities": {IMAGE: fields}},
        where="the imported recipe",
    )


def _feature_selection(fields: Mapping[str, Any], strategy: str) -> str:
    """Our `features` for LLaVA's strategy."""
    from multi_token.modalities.image import ImageModality

    # LLaVA's `default` drops the first feature, whatever it is; ours drops prefix tokens alone
    prefix = num_prefix_tokens(ImageModality.model_validate(fields))
    if strategy == "full":
        return "all" if prefix else "patches"
    if prefix != 1:
        raise ConvertError(
            "`vision_feature_select_strategy: default` leaves out the first feature, but this "
            f"vision tower has {prefix} tokens before its patches: a patch would be lost or a "
            "token left, which no setting of a recipe does"
        )
    return "patches"


def num_prefix_tokens(modality: ImageModality) -> int:
    """How many tokens (CLS, registers) stand before the patches of a vision tower."""
    from PIL import Image

    blank = Image.new("RGB", (64, 64))
    plain = {"tile_grids": None, "projector": Mlp()}
    num_all, num_patches = (
        modality.model_copy(update={**plain, "features": kind}).prepare(blank).num_features
        for kind in ("all", "patches")
    )
    return num_all - num_patches


def _tile_grids(config: Any, processor: Any) -> list[list[int]]:
    """NeXT's pinpoints are pixels (height, width); ours are rows and columns of tiles."""
    side = config.vision_config.image_size
    pinpoints = [list(p) for p in config.image_grid_pinpoints]
    seen = [list(p) for p in getattr(processor, "image_grid_pinpoints", [])]
    if pinpoints != seen:
        raise ConvertError(
            f"`image_grid_pinpoints` are {pinpoints} in config.json, but {seen} in the image "
            "processor's file; make them equal"
        )
    sizes = {*dict(processor.size).values(), *dict(processor.crop_size or {}).values()} - {None}
    if sizes != {side}:
        raise ConvertError(
            f"the image processor makes tiles by way of sizes {sorted(sizes)}, the vision tower "
            f"takes {side}; only tiles of that size can be imported"
        )
    wrong = [p for p in pinpoints if p[0] % side or p[1] % side]
    if wrong:
        raise ConvertError(f"`image_grid_pinpoints` {wrong} are no multiples of {side} pixels")
    return [[height // side, width // side] for height, width in pinpoints]
