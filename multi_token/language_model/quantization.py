"""Quantization of the frozen language model to 8 or 4 bits, and the bytes that weights take.

The recipe's section becomes a config of transformers, for bitsandbytes or torchao.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from multi_token.errors import LanguageModelError
from multi_token.recipe.model import Quantization

QuantizationConfig = Any
"""A quantization config of transformers, or its fields as a dict."""
_PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao"}
_EXTRAS = {"bitsandbytes": "qlora", "torchao": "torchao"}


def quantization_config(spec: Quantization | QuantizationConfig, *, dtype: str) -> Any:
    """Return the `quantization_config` of `from_pretrained`; `dtype` is `model.dtype`.

    4bit is QLoRA's nf4 with double quantization (Dettmers et al., arXiv:2305.14314), 8bit LLM.int8
    (Dettmers et al., arXiv:2208.07339), int8 weight-only with one scale a row (torchao). Input
    embeddings and head keep their precision. A config of transformers is returned as it is. Raises
    LanguageModelError for a missing package.
    """
    if not isinstance(spec, Quantization):
        return spec
    package = _PACKAGES[spec.kind]
    if find_spec(package) is None:
        raise LanguageModelError(
            f"model.quantization: {spec.kind} needs the package {package}, which is not installed; "
            f'install it with: pip install "multi_token[{_EXTRAS[package]}]"'
        )
    if spec.kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if spec.kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if dtype == "auto":
        # `auto` is the precision of files, which says nothing about products with 4-bit weights.
        dtype = "bfloat16" if torch.accelerator.is_available() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.double_quant is not False,
        bnb_4bit_compute_dtype=getattr(torch, spec.compute_dtype or dtype),
    )


def split_quantization(given: QuantizationConfig | None) -> tuple[Any, QuantizationConfig | None]:
    """Return (`quantization` of a recipe, config of transformers): one of them is None.

    `given`: a kind, fields with a `kind`, or whatever `from_pretrained` of transformers takes.
    """
    is_ours = isinstance(given, str | Quantization) or (isinstance(given, dict) and "kind" in given)
    return (given, None) if is_ours else (None, given)


def keep_backward_layout(model: nn.Module) -> None:
    """Keep 4-bit layers in the layout that has a backward pass."""
    # On a CPU with AVX512-BF16, bitsandbytes repacks weights for good in the first forward without
    # gradients. Gradients through repacked weights are wrong, with only a warning of torch.
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return parameters stored as integers, or as a tensor that wraps integers (torchao)."""
    # a shard of FSDP2 wraps floats
    return [
        p
        for p in module.parameters()
        if not p.is_floating_point()
        or (hasattr(p, "__tensor_flatten__") and not isinstance(p, DTensor))
    ]


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of all stored weights, with the scales of quantized ones."""
    tensors = [*module.parameters(), *module.buffers()]
    # By id: tied weights are listed twice and stored once.
    return sum(_bytes_of(tensor) for tensor in {id(t): t for t in tensors}.values())


def _bytes_of(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a tensor that holds tensors
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes_of(getattr(tensor, name)) for name in names)
    total = tensor.numel() * tensor.element_size()
    state = getattr(tensor, "quant_state", None)  # bitsandbytes, 4 bits
    while state is not None:
        kept = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
        total += sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))
        state = getattr(state, "state2", None)
    scales = getattr(tensor, "SCB", None)  # bitsandbytes, 8 bits
    return total + (scales.numel() * scales.element_size() if scales is not None else 0)
