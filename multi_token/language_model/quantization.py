"""Weights of the frozen language model in 8 or 4 bits: the recipe's section -> transformers' own.

Border: says what is asked of bitsandbytes and torchao, and counts bytes; loading.py loads.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multi_token.errors import LanguageModelError

if TYPE_CHECKING:
    from multi_token.recipe.recipe import Quantization

_PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao"}
_EXTRAS = {"bitsandbytes": "qlora", "torchao": "torchao"}


def quantization_config(spec: Quantization, *, dtype: str) -> Any:
    """What `from_pretrained` takes as `quantization_config`. `dtype`: the recipe's `model.dtype`.

    4bit is QLoRA's nf4 with double quantization (Dettmers et al., arXiv:2305.14314), 8bit LLM.int8
    (Dettmers et al., arXiv:2208.07339), int8 weight-only with one scale a row (torchao). Input
    embeddings and head keep their precision. Raises LanguageModelError for a missing package.
    """
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
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.double_quant is not False,
        bnb_4bit_compute_dtype=_compute_dtype(spec.compute_dtype, dtype),
    )


def _compute_dtype(asked: str | None, dtype: str) -> torch.dtype:
    """What 4-bit weights are multiplied in: as asked, else the recipe's, else what is fast here."""
    if asked is not None or dtype != "auto":
        return getattr(torch, asked or dtype)
    return torch.bfloat16 if torch.accelerator.is_available() else torch.float32


def keep_backward_layout(model: nn.Module) -> None:
    """Have 4-bit layers keep the form of weights that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes packs them anew in the first forward pass without
    gradients, for good, and gradients through the packed ones are wrong, with no more than a
    warning of torch's.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that are stored in integers, or hold such tensors inside."""
    return [
        p
        for p in module.parameters()
        if not p.is_floating_point() or hasattr(p, "__tensor_flatten__")
    ]


def module_bytes(module: nn.Module) -> int:
    """Bytes of all weights as they are stored, with the scales of quantized ones."""
    tensors = [*module.parameters(), *module.buffers()]
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
