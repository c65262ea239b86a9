"""Hidden states of intermediate layers, without running the layers after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from multi_token.errors import MultiTokenError


class _StopForward(Exception):
    """Ends a forward after the last layer that is needed."""


class HiddenStates:
    """Takes hidden states of one tower, counted as transformers does: 0 is the input of the first
    layer, -1 the output of the last.

    LLaVA takes -2 of CLIP, so the tower's last layer would be computed for nothing. Some families
    normalize a state after its layer, so a state can differ from the layer's output. The first call
    runs all layers and compares; if states and outputs are bit-identical, later calls stop after
    the last layer that is needed.
    """

    def __init__(self, taken: Sequence[int]) -> None:
        self.taken = tuple(taken)
        self._ends_early: bool | None = None
        """None before the first call."""

    def __call__(
        self, tower: nn.Module, layers: Sequence[nn.Module], run: Callable[..., Any]
    ) -> list[Tensor]:
        """Return the states that `taken` names.

        `run(**options)` runs the tower on its inputs; `layers` are the tower's, from first to last.
        Raises MultiTokenError for a state that the tower does not have.
        """
        sources = [layers[i] for i in self._positions(layers)]
        # Activation checkpointing runs a trained layer again in the backward pass, which has to
        # reach its own end; an exception in the middle of it would break the recomputation.
        if sources and self._ends_early and not torch.is_grad_enabled():
            return _run_until(layers, sources, run)
        outputs, hooks = _record_outputs(sources)
        with hooks:
            states = run(output_hidden_states=True).hidden_states
        try:
            chosen = [states[n] for n in self.taken]
        except IndexError:
            raise MultiTokenError(
                f"{type(tower).__name__} has hidden states 0 to {len(states) - 1} (or counted from "
                f"the end, -1 to -{len(states)}), the recipe asks for layer "
                f"{self.taken[0] if len(self.taken) == 1 else self.taken}"
            ) from None
        # Meta tensors hold no values, so a comparison on them decides nothing.
        if self._ends_early is None and not any(state.is_meta for state in chosen):
            self._ends_early = (
                bool(sources)
                and len(states) == len(layers) + 1
                and all(
                    layer in outputs and torch.equal(outputs[layer], state)
                    for state, layer in zip(chosen, sources, strict=True)
                )
            )
        return chosen

    def _positions(self, layers: Sequence[nn.Module]) -> list[int]:
        """Layers whose outputs are the states; [] if stopping early would save nothing."""
        num_states = len(layers) + 1
        positions = [(n if n >= 0 else num_states + n) - 1 for n in self.taken]
        inside = all(0 <= i < len(layers) for i in positions)
        return positions if inside and max(positions) < len(layers) - 1 else []


def _record_outputs(layers: Sequence[nn.Module]) -> tuple[dict[nn.Module, Tensor], ExitStack]:
    """Register hooks that record the layers' outputs; the stack removes them."""
    outputs: dict[nn.Module, Tensor] = {}
    stack = ExitStack()

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output

    # A layer that is taken twice needs one hook.
    for layer in dict.fromkeys(layers):
        stack.callback(layer.register_forward_hook(keep).remove)
    return outputs, stack


def _run_until(
    layers: Sequence[nn.Module], wanted: Sequence[nn.Module], run: Callable[..., Any]
) -> list[Tensor]:
    """Outputs of the wanted layers; layers after the last of them are not run."""
    outputs, stack = _record_outputs(wanted)
    last = max(wanted, key=list(layers).index)

    def end(*_: Any) -> None:
        raise _StopForward

    with stack:
        # Registered after the recording hook of the same layer, and hooks run in that order.
        stack.callback(last.register_forward_hook(end).remove)
        with suppress(_StopForward):
            run()
    return [outputs[layer] for layer in wanted]


def layers_up_to(
    layers: Sequence[nn.Module], taken: int | tuple[int, ...] | None
) -> Sequence[nn.Module]:
    """Return the layers that the hidden states `taken` depend on; all of them for None."""
    if taken is None:
        return layers
    states = taken if isinstance(taken, tuple) else (taken,)
    return layers[: max(n if n >= 0 else len(layers) + 1 + n for n in states)]
