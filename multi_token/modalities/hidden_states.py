"""The hidden states that a recipe takes of a tower, without running the layers behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from multi_token.errors import MultiTokenError


class _StopForward(Exception):
    """The last layer that is needed has answered."""


class HiddenStates:
    """Takes states of one tower, counted as transformers does: 0 goes into the first layer, -1 is
    the last.

    LLaVA takes -2 of CLIP, so that the tower's last layer is computed for nobody. Whether a state
    is what the layer before it gives out differs between families (some norm the last one): the
    first call runs all and compares, and only where they are equal to the bit, later ones end
    behind the last layer that is needed.
    """

    def __init__(self, taken: Sequence[int]) -> None:
        self.taken = tuple(taken)
        self._ends_early: bool | None = None
        """None: not tried yet."""

    def __call__(
        self, tower: nn.Module, layers: Sequence[nn.Module], run: Callable[..., Any]
    ) -> list[Tensor]:
        """The states, as `taken` names them. `run(**options)`: the tower on its inputs.

        `layers`: the tower's, from first to last. Raises MultiTokenError for a state that it does
        not have.
        """
        behind = [layers[i] for i in self._positions(layers)]
        # a layer that learns may be computed again on the way back, which must find its own end
        if behind and self._ends_early and not torch.is_grad_enabled():
            return _run_until(layers, behind, run)
        outputs, remove = _register_hooks(behind)
        with remove:
            states = run(output_hidden_states=True).hidden_states
        try:
            chosen = [states[n] for n in self.taken]
        except IndexError:
            raise MultiTokenError(
                f"{type(tower).__name__} has hidden states 0 to {len(states) - 1} (or counted from "
                f"the end, -1 to -{len(states)}), the recipe asks for layer "
                f"{self.taken[0] if len(self.taken) == 1 else self.taken}"
            ) from None
        if self._ends_early is None and not any(state.is_meta for state in chosen):
            self._ends_early = len(states) == len(layers) + 1 and _equal(chosen, behind, outputs)
        return chosen

    def _positions(self, layers: Sequence[nn.Module]) -> list[int]:
        """Return the layers whose outputs the states are; [] if there are none, or none is saved.

        Nothing is saved where the last layer is needed as well.
        """
        num_states = len(layers) + 1
        positions = [(n if n >= 0 else num_states + n) - 1 for n in self.taken]
        inside = all(0 <= i < len(layers) for i in positions)
        return positions if inside and max(positions) < len(layers) - 1 else []


def _register_hooks(layers: Sequence[nn.Module]) -> tuple[dict[nn.Module, Tensor], ExitStack]:
    """Return the list of their outputs, and the handles that remove the hooks."""
    outputs: dict[nn.Module, Tensor] = {}
    stack = ExitStack()

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output

    for layer in dict.fromkeys(layers):
        stack.callback(layer.register_forward_hook(keep).remove)
    return outputs, stack


def _run_until(
    layers: Sequence[nn.Module], wanted: Sequence[nn.Module], run: Callable[..., Any]
) -> list[Tensor]:
    """The outputs of the wanted layers; those behind the last of them are not run."""
    outputs, stack = _register_hooks(wanted)
    last = max(wanted, key=list(layers).index)

    def end(*_: Any) -> None:
        raise _StopForward

    with stack:
        stack.callback(last.register_forward_hook(end).remove)
        with suppress(_StopForward):
            run()
    return [outputs[layer] for layer in wanted]


def _equal(
    states: Sequence[Tensor], layers: Sequence[nn.Module], outputs: dict[nn.Module, Tensor]
) -> bool:
    """Return True if each state is bit-identical to the output of its layer."""
    return bool(layers) and all(
        layer in outputs
        and outputs[layer].shape == state.shape
        and torch.equal(outputs[layer], state)
        for state, layer in zip(states, layers, strict=True)
    )
