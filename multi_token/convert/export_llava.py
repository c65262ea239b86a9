"""Exports a run of LLaVA's shape to transformers' Llava or LlavaNext."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multi_token.convert.chat_templates import accept_content_parts, part_placeholder
from multi_token.convert.llava import num_prefix_tokens
from multi_token.convert.merge import merge
from multi_token.encoders import has_lora, merge_lora
from multi_token.errors import ConvertError

if TYPE_CHECKING:
    from multi_token.modalities.image import ImageModality
    from multi_token.model import MultiTokenForConditionalGeneration

IMAGE_TOKEN = part_placeholder("image")


def export_llava(model: MultiTokenForConditionalGeneration, out: Path) -> None:
    """Write model, processor and tokenizer to `out`, for transformers' Auto classes.

    LoRA (the language model's and the vision tower's) is merged into copies, feature statistics
    are folded into the first linear layer, and `<image>` joins the vocabulary. Everything has the
    language model's precision. The result is compared with the run on an image and a question
    before anything is written.

    Raises ConvertError, with the reason, if the run does not have LLaVA's shape.
    """
    tokenizer = copy.deepcopy(model.require_processor().tokenizer)
    name = _exportable_modality(model)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    with _merged_copy(model):
        built = _build(model, name, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        num_ids = built.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > num_ids:
            _grow_vocabulary(built, len(tokenizer))
        processor = _processor(model, name, tokenizer, built.config)
        _check_parity(model, name, built, processor)
    built.to(built.model.language_model.dtype)
    built.save_pretrained(out)
    processor.save_pretrained(out)


@contextmanager
def _merged_copy(model: MultiTokenForConditionalGeneration) -> Iterator[None]:
    """The model around copies of its language model and encoders: float32, with LoRA merged."""
    # projectors are not copied, since nothing changes them
    own = model.language_model, model.encoders, model.config.identity
    model.language_model, model.encoders = copy.deepcopy(own[:2])
    try:
        merge(model)
        model.encoders.float()
        yield
    finally:
        model.language_model, model.encoders, model.config.identity = own


def _exportable_modality(model: MultiTokenForConditionalGeneration) -> str:
    """The one modality's name. Raises ConvertError with everything that LLaVA does not have."""
    from multi_token.modalities.image import ImageModality
    from multi_token.projectors.kinds import Mlp

    name, *others = model.modalities
    modality = model.modalities[name]
    if others or not isinstance(modality, ImageModality):
        kinds = ", ".join(f"{key} ({m.type})" for key, m in model.modalities.items())
        raise ConvertError(f"LLaVA has one modality, image; this run has {kinds}")
    faults = []
    spec = modality.projector
    if not isinstance(spec, Mlp) or spec.num_layers != 2:
        faults.append(f"its projector is {spec!r}, LLaVA's an mlp of 2 layers")
    elif model.projector(name).closed_form is not None:
        faults.append(
            "its projector has a closed-form part beside the perceptron, and their sum is no "
            "perceptron of 2 layers; train with `closed_form: null` for LLaVA's shape"
        )
    if modality.features not in ("patches", "all"):
        faults.append(f"it takes `features: {modality.features}`, LLaVA patches")
    if modality.facts is not None:
        faults.append(f"it writes facts ({modality.facts!r}) before images, LLaVA no text")
    if faults:
        raise ConvertError(f"this run does not have LLaVA's shape: {'; '.join(faults)}")
    return name


def _build(model: MultiTokenForConditionalGeneration, name: str, image_id: int) -> Any:
    """transformers' model with the merged copy and copies of the other parts in it."""
    import transformers as hf

    modality: Any = model.modalities[name]
    causal: Any = model.language_model
    head = causal.get_output_embeddings()
    inner = getattr(causal, causal.base_model_prefix, None)
    if inner is None or not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConvertError(
            f"LLaVA needs a linear head without bias on the base model; {type(causal).__name__} "
            "has none"
        )
    encoder: Any = copy.deepcopy(model.encoder(name))
    if has_lora(encoder):
        merge_lora(encoder)
    tower = encoder.tower
    _check_tower(tower)
    text_config = copy.deepcopy(causal.config.get_text_config())
    for config in (tower.config, text_config):
        config._name_or_path = ""  # a local path, which the file would publish
    anyres = modality.tile_grids is not None
    layer = _last_layer(model, name) if modality.layer is None else modality.layer
    fields: dict[str, Any] = {
        "vision_config": tower.config,
        "text_config": text_config,
        "image_token_index": image_id,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": _strategy(modality),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": head.weight is inner.get_input_embeddings().weight,
    }
    if anyres:
        side = tower.config.image_size
        fields["image_grid_pinpoints"] = [[r * side, c * side] for r, c in modality.tile_grids]
    kind = "LlavaNext" if anyres else "Llava"
    # on the meta device: every module is replaced by one of the run below
    with torch.device("meta"):
        built: Any = getattr(hf, f"{kind}ForConditionalGeneration")(
            getattr(hf, f"{kind}Config")(**fields)
        )
    built.model.language_model = inner
    built.lm_head = head
    built.model.vision_tower = tower
    first, second = _fold_standardization(model, name)
    built.model.multi_modal_projector.linear_1 = first
    built.model.multi_modal_projector.linear_2 = second
    line_break = model.projector(name).line_break
    if anyres and line_break is not None:
        built.model.image_newline = nn.Parameter(line_break.detach().clone())
    built.generation_config = copy.deepcopy(causal.generation_config)
    return built.requires_grad_(False).eval()


def _check_tower(tower: Any) -> None:
    from transformers import AutoModel

    with torch.device("meta"):
        theirs = AutoModel.from_config(tower.config)
    # the class that LLaVA will choose by the config need not be the run's (CLIP's full model, say)
    sizes = [getattr(tower.config, key, None) for key in ("image_size", "patch_size")]
    if type(theirs) is not type(tower) or not all(isinstance(size, int) for size in sizes):
        raise ConvertError(
            f"LLaVA would load {type(theirs).__name__} where this run has {type(tower).__name__}, "
            f"for images of {sizes[0]} and patches of {sizes[1]} pixels; it takes vision towers "
            "of one image size, such as CLIP and SigLIP"
        )


@torch.no_grad()
def _last_layer(model: MultiTokenForConditionalGeneration, name: str) -> int:
    """LLaVA's index of the tower's output. Raises ConvertError if a norm follows the last layer."""
    modality: Any = model.modalities[name]
    tower: Any = model.encoders[name].tower  # type: ignore[union-attr]
    inputs = modality.collate([modality.prepare(_noise_image())])
    output = tower(inputs["pixel_values"].to(model.device), output_hidden_states=True)
    if not torch.equal(output.last_hidden_state, output.hidden_states[-1]):
        raise ConvertError(
            f"this run takes the output of {type(tower).__name__}, which has a norm after its "
            "last layer; LLaVA takes hidden states, so train with `layer: -1` or `-2`"
        )
    return -1


def _strategy(modality: ImageModality) -> str:
    """LLaVA's feature selection: `default` leaves out the first feature, `full` none."""
    prefix = num_prefix_tokens(modality)
    if modality.features == "all" or prefix == 0:
        return "full"
    if prefix == 1:
        return "default"
    raise ConvertError(
        f"this vision tower has {prefix} tokens before its patches, and LLaVA can leave out one"
    )


@torch.no_grad()
def _fold_standardization(
    model: MultiTokenForConditionalGeneration, name: str
) -> tuple[nn.Linear, nn.Linear]:
    """Copies of the projector's two layers, the standardization folded into the first."""
    projector = model.projector(name)
    first, second = copy.deepcopy([m for m in projector.network if isinstance(m, nn.Linear)])  # type: ignore[union-attr]
    # W (x - mean) * scale + b = (W * scale) x + (b - (W * scale) mean); in float64, because the
    # parity check compares logits
    weight = first.weight.double() * projector.feature_scale.double()
    first.bias.copy_(first.bias.double() - weight @ projector.feature_mean.double())
    first.weight.copy_(weight)
    return first, second


@torch.no_grad()
def _grow_vocabulary(built: Any, num_ids: int) -> None:
    """Add rows to embeddings and head, each the mean of the existing rows."""
    before = built.get_input_embeddings().weight.shape[0]
    built.resize_token_embeddings(num_ids, mean_resizing=False)
    # the mean is never the likeliest, so the new id is never generated; a set, for tied matrices
    for matrix in {built.get_input_embeddings().weight, built.lm_head.weight}:
        matrix[before:] = matrix[:before].mean(0)


def _processor(
    model: MultiTokenForConditionalGeneration, name: str, tokenizer: Any, config: Any
) -> Any:
    """LLaVA's processor around the encoder's own and the run's tokenizer and template."""
    import transformers as hf

    from multi_token.chat.template import ChatTemplate

    modality: Any = model.modalities[name]
    cutter: Any = modality.auto("AutoImageProcessor")
    side = config.vision_config.image_size
    fields = cutter.to_dict()
    # names of the encoder's own processor classes
    for key in ("image_processor_type", "processor_class"):
        fields.pop(key, None)
    kind = "Llava"
    if modality.tile_grids is not None:
        kind = "LlavaNext"
        square = {"height": side, "width": side}
        fields |= {"size": square, "crop_size": square, "do_pad": True}
        cutter = hf.LlavaNextImageProcessorPil(
            **fields, image_grid_pinpoints=config.image_grid_pinpoints
        )
    elif modality.pad_to_square:
        cutter = hf.LlavaImageProcessorPil(**{**fields, "do_pad": True})
    template = model.require_processor().chat.template
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        template = template.removeprefix("{{ bos_token }}")  # this tokenizer writes it by itself
    if not ChatTemplate(template, tokenizer).takes_content_parts:
        template = accept_content_parts(template)
    tokenizer.chat_template = template
    return getattr(hf, f"{kind}Processor")(
        image_processor=cutter,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=num_prefix_tokens(modality),
        chat_template=template,
    )


@torch.no_grad()
def _check_parity(
    model: MultiTokenForConditionalGeneration, name: str, built: Any, processor: Any
) -> None:
    """Compare ids, pixels and logits with the run's, on an image and a question."""
    from accelerate.utils import send_to_device

    from multi_token.chat.format import ChatFormat
    from multi_token.generate import collate_prompts, single_question
    from multi_token.types import Conversation, Media, Message, Text

    ours_processor = model.require_processor()
    question = "\nWhat is this?"
    batch = collate_prompts(
        ours_processor, [single_question(question[1:], [Media(name, _noise_image())])]
    )
    positions = batch["media"][name]["positions"]
    image_id = built.config.image_token_id
    ids = batch["input_ids"].view(-1).clone()
    # one placeholder text in the prompt, expanded to the run's number of tokens: so ids compare
    ids[positions] = image_id
    spelled = Conversation((Message("user", (Text(IMAGE_TOKEN + question),)),))
    exported = ChatFormat(processor.tokenizer, ours_processor.chat.template)
    short = exported.tokenize(spelled, [], prompt_only=True).input_ids.tolist()
    inputs = dict(processor(images=[_noise_image()], text=IMAGE_TOKEN, return_tensors="pt"))
    places = [i for i in inputs["input_ids"].view(-1).tolist() if i == image_id]
    at = short.index(image_id) if image_id in short else 0
    if [*short[:at], *places, *short[at + 1 :]] != ids.tolist():
        raise ConvertError(
            "transformers' processor gives other ids than this run: its tokenizer does not keep "
            f"the texts around {IMAGE_TOKEN} apart, or gives an image another number of tokens"
        )
    pixels = inputs["pixel_values"].flatten(0, -4)
    expected = batch["media"][name]["inputs"]["pixel_values"]
    if pixels.shape != expected.shape or not torch.allclose(pixels, expected, atol=1e-5):
        raise ConvertError(
            "transformers' image processor for LLaVA gives other pixels than this run's encoder: "
            "it resizes or crops differently"
        )
    inputs |= {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    theirs = built(**send_to_device(inputs, model.device)).logits.float()
    batch = send_to_device(batch, model.device)
    ours = model(input_ids=batch["input_ids"], media=batch["media"]).logits.float()
    difference = float((ours - theirs[..., : ours.shape[-1]]).abs().max())
    # float32 on both sides: rounding stays far below a thousandth of the logits' spread
    if difference > 1e-3 * float(theirs.std()):
        raise ConvertError(
            f"LLaVA around {type(model.language_model).__name__} gives other logits than this run "
            f"(by up to {difference:.3g}): the model changes logits after its linear head"
        )


def _noise_image() -> Any:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels: Tensor = torch.randint(0, 256, (96, 64, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
