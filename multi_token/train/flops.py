"""FLOPs of a training step, with frozen parts counted as frozen.

FLOPs of the language model follow from its weights and the lengths of its rows (as in Kaplan et
al., arXiv:2001.08361, and PaLM's model FLOPs, arXiv:2204.02311, appendix B): for each weight and
token, 2 forward, 2 more backward where a gradient passes through, 2 more where the weight is
trained. FLOPs of an encoder or a projector are counted in its first call, and scaled by the size of
its input from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from multi_token.language_model.forward import base_language_model

_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class TokenCounts:
    """Counts of one batch on one device, from which the language model's FLOPs follow."""

    num_tokens: int
    """Real tokens; those of a shared prefix count once."""
    num_pairs: int
    """(query, key) pairs of one head and layer: the squared lengths of the rows, summed."""
    num_logits: int
    """Positions whose logits are computed."""


@dataclass(frozen=True)
class LanguageModelCost:
    """Weights of a language model's matrix products, all and trainable."""

    num_body: int
    num_head: int
    num_body_trainable: int
    num_head_trainable: int
    attention_width: int
    """Heads x width of a head, summed over the layers that attend."""
    differentiated: bool
    """True where gradients pass through it: a parameter in it or before it is trained."""

    @classmethod
    def of(cls, language_model: Any, *, trains_before: bool) -> LanguageModelCost:
        """`trains_before`: a projector or an encoder is trained."""
        head = base_language_model(language_model).get_output_embeddings()
        config = base_language_model(language_model).config.get_text_config()
        body = list(_weights(language_model, _active_share(config), leave_out=head))
        heads = list(_weights(head, 1.0)) if head is not None else []
        trained_body = sum(n for n, trained in body if trained)
        trained_head = sum(n for n, trained in heads if trained)
        return cls(
            num_body=sum(n for n, _ in body),
            num_head=sum(n for n, _ in heads),
            num_body_trainable=trained_body,
            num_head_trainable=trained_head,
            attention_width=_attention_width(config),
            differentiated=trains_before or trained_body + trained_head > 0,
        )

    def forward(self, work: TokenCounts) -> int:
        """Return the FLOPs of the forward pass."""
        linear = 2 * (self.num_body * work.num_tokens + self.num_head * work.num_logits)
        # scores and weighted values are two products, each 2 FLOPs a pair and unit of width; the
        # causal half is not taken off, as in torch's flop counter
        return linear + 4 * self.attention_width * work.num_pairs

    def backward(self, work: TokenCounts) -> int:
        """Return the FLOPs of the backward pass: through activations, and for trained weights."""
        if not self.differentiated:
            return 0
        # gradients of activations cost a forward pass again; attention has two factors with
        # gradients, so its products count twice
        activations = self.forward(work) + 4 * self.attention_width * work.num_pairs
        weights = 2 * (
            self.num_body_trainable * work.num_tokens + self.num_head_trainable * work.num_logits
        )
        return activations + weights


def _weights(
    module: nn.Module, active_share: float, *, leave_out: nn.Module | None = None
) -> Iterator[tuple[int, bool]]:
    """Yield (weights that a token is multiplied by, trainable) for every matrix inside."""
    seen: set[int] = set()
    for part in module.modules():
        # an embedding is a lookup and no product
        if part is leave_out or isinstance(part, nn.Embedding):
            continue
        if isinstance(part, nn.Linear):
            # by its sizes: quantized weights are stored in another shape
            yield part.in_features * part.out_features, part.weight.requires_grad
            continue
        for parameter in part.parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # transformers stacks the experts of a layer in one parameter of three dimensions
            experts = parameter.ndim == 3 and not isinstance(part, nn.Conv1d)
            share = active_share if experts else 1.0
            yield round(parameter.numel() * share), parameter.requires_grad


def _active_share(config: Any) -> float:
    """Return the share of experts that a token goes through; 1 for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    num_experts = next((getattr(config, n) for n in names if getattr(config, n, None)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / num_experts if num_experts and chosen else 1.0


def _attention_width(config: Any) -> int:
    num_heads = getattr(config, "num_attention_heads", None)
    if not num_heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    kinds = getattr(config, "layer_types", None)
    num_layers = config.num_hidden_layers
    if kinds:
        # layers of linear attention or convolution compute no pairs
        num_layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return num_layers * num_heads * width


class CountFlops(TorchDispatchMode):
    """Sums the FLOPs of matrix products, convolutions and attention while it is entered.

    The formulas are torch's (`flop_registry`), without its tracking of modules. torch 2.13 has no
    formula for its CPU attention, which is counted by that for GPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet.__name__ == _CPU_ATTENTION:
            query, key, value = args[:3]
            self.total += sdpa_flop_count(query.shape, key.shape, value.shape)
        return out


def num_elements(inputs: Any) -> int:
    """Count the elements of all tensors in a nest of tuples, mappings and Features."""
    if isinstance(inputs, Tensor):
        return inputs.numel()
    if isinstance(inputs, Mapping):
        return sum(map(num_elements, inputs.values()))
    if isinstance(inputs, (tuple, list)):
        return sum(map(num_elements, inputs))
    values = getattr(inputs, "values", None)  # types.Features
    return values.numel() if isinstance(values, Tensor) else 0


def format_count(num: float) -> str:
    """Format a count in steps of a thousand: 12300000000 -> `12.3 G`."""
    if num <= 0 or not math.isfinite(num):
        return f"{num:g}"
    step = min(int(math.log10(num) // 3), 7) if num >= 1 else 0
    return f"{num / 1000**step:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][step]}".strip()
