"""Loading of tokenizer and language model from a hub name, a folder or a GGUF file."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from multi_token.errors import LanguageModelError, first_line
from multi_token.hub import hub_arguments, limited_hub_waits
from multi_token.language_model.quantization import (
    keep_backward_layout,
    quantization_config,
    quantized_parameters,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from multi_token.language_model.quantization import QuantizationConfig
    from multi_token.recipe.model import Quantization

# Errors for a file that is truncated, of another format, or needs a missing package.
LOAD_FAULTS = (
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    ValueError,
    struct.error,
)
DeviceMap = str | Mapping[str, int | str]
"""`auto` and other words of accelerate, or module of the language model -> its device."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a hub name, a folder or a GGUF file. Raises LanguageModelError."""
    from transformers import AutoTokenizer

    source, options = gguf_arguments(name)
    try:
        with limited_hub_waits(name, LanguageModelError):
            return AutoTokenizer.from_pretrained(
                source, revision=revision, **options, **hub_arguments()
            )
    except LOAD_FAULTS as error:
        raise LanguageModelError(
            f"no tokenizer could be loaded from {name!r} (a hub name, a folder or a GGUF file is "
            f"expected): {first_line(error)}"
        ) from None


def load_language_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization | QuantizationConfig | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a decoder-only model of transformers, frozen and in eval mode.

    Args:
        name: A hub name, a folder, a GGUF file, or a folder with one GGUF file and no other
            weights.
        revision: Branch, tag or commit of a hub name.
        dtype: `auto` for the precision of the files, or a name of torch's.
        attn_implementation: transformers' choice by default.
        quantization: Weights in 4 or 8 bits, as the recipe or as transformers spells it; None
            keeps them as they are.
        device_map: Devices of its parts; None loads it on the CPU.

    Returns:
        The model. `probe.py` checks later, on its device, that it can run from embeddings.

    Raises:
        LanguageModelError: If no model can be loaded, or not be quantized, or if the map offloads
            the input embeddings.
    """
    from accelerate.utils import check_device_map
    from transformers import AutoModelForCausalLM

    source, options = gguf_arguments(name)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = device_map
    if quantization is not None:
        _check_not_quantized(name, source, options, revision)
        options["quantization_config"] = quantization_config(quantization, dtype=dtype)
    try:
        with limited_hub_waits(name, LanguageModelError):
            model: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                **options,
                **hub_arguments(of_weights=True),
            )
        if isinstance(device_map, Mapping):
            # transformers leaves modules that the map does not name on the CPU, without a word
            check_device_map(model, dict(device_map))
    except LOAD_FAULTS as error:
        raise LanguageModelError(
            f"no language model could be loaded from {name!r} (a hub name, a folder or a GGUF file "
            f"of a decoder-only model is expected): {first_line(error)}"
        ) from None
    if "gguf_file" in options:
        # GGUF weights are dequantized while they load. With transformers' mark of a quantized
        # model, training and saving would refuse the model.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
    if quantization is not None and not quantized_parameters(model):
        raise LanguageModelError(
            f"no weight of {name!r} ({type(model).__name__}) could be quantized to "
            f"{getattr(quantization, 'kind', quantization)}: its layers are not torch's linear "
            "ones; set model.quantization to null, or try another kind"
        )
    if device_map is not None and model.get_input_embeddings().weight.is_meta:
        raise LanguageModelError(
            f"the device map keeps the input embeddings of {name!r} off the devices that compute "
            f"({model.hf_device_map}), and media are written beside them; give them a device"
        )
    keep_backward_layout(model)
    return model.requires_grad_(False).eval()


def gguf_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """Return name and options for `from_pretrained`: a GGUF file is a folder and `gguf_file`."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LanguageModelError(f"expected a GGUF file, found nothing at {path.absolute()}")
        file = path
    else:
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if not files or any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            return name, {}
        if len(files) > 1:
            raise LanguageModelError(
                f"{name} holds {len(files)} GGUF files and no other weights; set "
                f"model.language_model to one of them: {', '.join(f.name for f in files)}"
            )
        (file,) = files
    if find_spec("gguf") is None:
        raise LanguageModelError(
            f"reading {file.name} needs the package gguf, which is not installed; install it with: "
            'pip install "multi_token[gguf]"'
        )
    return str(file.parent), {"gguf_file": file.name}


def _check_not_quantized(
    name: str, source: str, options: Mapping[str, Any], revision: str | None
) -> None:
    if "gguf_file" in options:
        raise LanguageModelError(
            f"model.quantization cannot be used with the GGUF file of {name!r}, which is opened to "
            "full precision; set it to null, or name a folder with safetensors"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision, **hub_arguments())
    except (OSError, ValueError):
        return  # the loading that follows reports the error
    own = getattr(config, "quantization_config", None)
    if own is not None:
        fields = own if isinstance(own, dict) else own.to_dict()
        raise LanguageModelError(
            f"{name} is quantized already ({fields.get('quant_method')}), so model.quantization "
            "cannot be applied on top; set it to null to use the weights as they are"
        )


@torch.no_grad()
def embedding_rms(model: Any) -> float:
    """Return the root mean square of the input embeddings, of up to about 4096 ids.

    `model`: a language model, or a MultiTokenForConditionalGeneration.
    """
    # Through the module, not its weight: Gemma's scales inside its forward.
    embed = model.get_input_embeddings()
    num_ids = int(embed.weight.shape[0])
    ids = torch.arange(0, num_ids, max(1, num_ids // 4096), device=embed.weight.device)
    return float(embed(ids).float().square().mean().sqrt())
