"""How many floating point operations a step needs, with frozen parts counted as frozen.

The language model's follow from its weights and the lengths of its rows (as in Kaplan et al.,
arXiv:2001.08361, and PaLM's model FLOPs, arXiv:2204.02311, appendix B): 2 for each weight and token
forward, 2 more backward where a gradient passes through, 2 more where the weight itself learns.
What an encoder or a projector needs is counted once, in its first call, and scaled from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from multi_token.language_model.forward import base_language_model

_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of one batch for the language model, on one device."""

    num_tokens: int
    """Real tokens; those of a shared prefix count once."""
    num_pairs: int
    """(query, key) pairs of one head and layer: the squared lengths of the rows, summed."""
    num_logits: int
    """Positions whose logits are computed."""


@dataclass(frozen=True)
class LanguageModelCost:
    """Weights by which a language model multiplies, and those of them that learn."""

    num_body: int
    num_head: int
    num_body_trainable: int
    num_head_trainable: int
    attention_width: int
    """Heads x width of a head, summed over the layers that attend."""
    differentiated: bool
    """True if gradients pass through it: something in it or before it is trained."""

    @classmethod
    def of(cls, language_model: Any, *, trains_before: bool) -> LanguageModelCost:
        """`learns_before`: a projector or an encoder learns, which stand before it."""
        head = base_language_model(language_model).get_output_embeddings()
        config = base_language_model(language_model).config.get_text_config()
        body = list(_weights(language_model, _active_share(config), leave_out=head))
        heads = list(_weights(head, 1.0)) if head is not None else []
        learned_body = sum(n for n, learns in body if learns)
        learned_head = sum(n for n, learns in heads if learns)
        return cls(
            num_body=sum(n for n, _ in body),
            num_head=sum(n for n, _ in heads),
            num_body_trainable=learned_body,
            num_head_trainable=learned_head,
            attention_width=_attention_width(config),
            differentiated=trains_before or learned_body + learned_head > 0,
        )

    def forward(self, work: TokenCounts) -> int:
        """FLOPs of the forward pass."""
        linear = 2 * (self.num_body * work.num_tokens + self.num_head * work.num_logits)
        return linear + 4 * self.attention_width * work.num_pairs

    def backward(self, work: TokenCounts) -> int:
        """FLOPs of the backward pass: through activations, and for the weights that learn."""
        if not self.differentiated:
            return 0
        activations = self.forward(work) + 4 * self.attention_width * work.num_pairs
        weights = 2 * (
            self.num_body_trainable * work.num_tokens + self.num_head_trainable * work.num_logits
        )
        return activations + weights


def _weights(
    module: nn.Module, active_share: float, *, leave_out: nn.Module | None = None
) -> Iterator[tuple[int, bool]]:
    """(weights that a token is multiplied by, whether they learn) of every matrix inside."""
    seen: set[int] = set()
    for part in module.modules():
        if part is leave_out or isinstance(part, nn.Embedding):
            continue
        if isinstance(part, nn.Linear):  # quantized weights are stored in another shape
            yield part.in_features * part.out_features, part.weight.requires_grad
            continue
        for parameter in part.parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            experts = parameter.ndim == 3 and not isinstance(part, nn.Conv1d)
            share = active_share if experts else 1.0
            yield round(parameter.numel() * share), parameter.requires_grad


def _active_share(config: Any) -> float:
    """The share of a mixture's experts that a token goes through; 1 where there are none."""
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
        num_layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return num_layers * num_heads * width


@dataclass
class ModuleCost:
    """FLOPs of an encoder or projector for each element of its input, from its first call."""

    forward_per_element: float = 0.0
    backward_share: float = 0.0
    """Backward FLOPs in units of the forward pass: 0 if frozen, 2 if fully trained."""
    counted: bool = False
    _mode: Any = None
    _handles: list[Any] = field(default_factory=list)
    _linear: list[int] = field(default_factory=lambda: [0, 0])

    def begin(self, module: nn.Module) -> None:
        """Called before the module's first forward."""
        self._linear = [0, 0]
        for part in module.modules():
            if isinstance(part, nn.Linear):
                self._handles.append(part.register_forward_pre_hook(self._see))
        self._mode = CountFlops()
        self._mode.__enter__()

    def end(self, num_elements: int) -> None:
        """Called behind it, also if it raised."""
        self._mode.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        forward, backward = self._linear
        self.forward_per_element = self._mode.total / max(num_elements, 1)
        self.backward_share = backward / forward if forward else 0.0
        self.counted = True
        self._mode, self._handles = None, []

    def _see(self, part: Any, args: tuple[Any, ...]) -> None:
        flops = 2 * args[0].numel() * part.out_features
        self._linear[0] += flops
        if torch.is_grad_enabled():
            self._linear[1] += flops * (int(args[0].requires_grad) + int(part.weight.requires_grad))

    def total(self, num_elements: int) -> float:
        """FLOPs, forward and backward, of so many input elements."""
        return num_elements * self.forward_per_element * (1 + self.backward_share)


class CountFlops(TorchDispatchMode):
    """Adds up the FLOPs of matrix products, convolutions and attention while it is entered.

    torch's own formulas, without its tracking of modules; its attention for a CPU, which has none,
    is counted by that of the others.
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
    """Numbers in all tensors of a nest of tuples, mappings and dataclasses of features."""
    if isinstance(inputs, Tensor):
        return inputs.numel()
    if isinstance(inputs, Mapping):
        return sum(map(num_elements, inputs.values()))
    if isinstance(inputs, (tuple, list)):
        return sum(map(num_elements, inputs))
    values = getattr(inputs, "values", None)  # types.Features
    return values.numel() if isinstance(values, Tensor) else 0


def format_count(num: float) -> str:
    """12 300 000 000 -> `12.3 G`: a count in steps of a thousand."""
    if num <= 0 or not math.isfinite(num):
        return f"{num:g}"
    step = min(int(math.log10(num) // 3), 7) if num >= 1 else 0
    return f"{num / 1000**step:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][step]}".strip()
