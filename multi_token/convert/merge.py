"""Merges the adapter into the language model, and dequantizes its base."""

from __future__ import annotations

from typing import Any

from torch import nn

from multi_token.checkpoint.fingerprint import fingerprint
from multi_token.errors import ConvertError
from multi_token.model import MultiTokenForConditionalGeneration


def merge(model: MultiTokenForConditionalGeneration) -> None:
    """Merge LoRA into the language model, with floating-point weights.

    Raises ConvertError for a quantization that cannot be undone.
    """
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    language_model: Any = model.language_model
    adapter = None
    if hasattr(language_model, "peft_config"):
        config = language_model.peft_config["default"]
        if not _is_quantized(language_model):
            model.language_model = language_model.merge_and_unload()
        else:
            # merged after dequantization: into quantized weights, the sum would be rounded again
            adapter = (config, get_peft_model_state_dict(language_model))
            model.language_model = language_model.unload()
    if _is_quantized(model.language_model):
        model.language_model = _dequantize(model.language_model)
    if adapter is not None:
        config, tensors = adapter
        peft_model: Any = get_peft_model(model.language_model, config)
        set_peft_model_state_dict(peft_model, tensors)
        model.language_model = peft_model.merge_and_unload()
    model.language_model.requires_grad_(False).eval()
    # merging changes every matrix, and so the fingerprint that loading compares
    model.config.identity = fingerprint(model.language_model)


def _is_quantized(language_model: Any) -> bool:
    return getattr(language_model.config, "quantization_config", None) is not None


def _dequantize(language_model: Any) -> Any:
    held = [
        (module, tensor)
        for module in language_model.modules()
        for tensor in [module._parameters.get("weight")]
        # a tensor that holds tensors (torchao); bitsandbytes' are known to transformers
        if hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "dequantize")
    ]
    if held:
        for module, tensor in held:
            module.weight = nn.Parameter(tensor.dequantize(), requires_grad=False)
        language_model.hf_quantizer.remove_quantization_config(language_model)
        return language_model
    try:
        return language_model.dequantize()
    except (NotImplementedError, ValueError) as error:
        method = getattr(language_model.config.quantization_config, "quant_method", "some method")
        raise ConvertError(
            f"the language model is quantized ({getattr(method, 'value', method)}) and cannot be "
            f"dequantized: {str(error).partition(chr(10))[0]}; export the run on the language "
            "model before its quantization (--language-model NAME)"
        ) from None
