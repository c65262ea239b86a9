"""Memory of a process that trains in shards, and a hook that refuses whole copies."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from multi_token.train.trainer import MultiTokenTrainer

_LOADS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "load_best")


def private_mb() -> float:
    """Private memory of this process: without the pages of mapped files, which it shares."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) / 1024


@contextmanager
def peak_mb(seen: dict[str, Any], name: str) -> Iterator[None]:
    """Note by how many MB private memory rises within, at most."""
    gc.collect()
    ended, start = threading.Event(), private_mb()
    seen[name] = 0.0

    def watch() -> None:
        while not ended.wait(0.002):
            seen[name] = max(seen[name], private_mb() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _whole_layers(module: nn.Module) -> int:
    layers = [m for m in module.modules() if isinstance(m, LlamaDecoderLayer)]
    return sum(not isinstance(next(layer.parameters()), DTensor) for layer in layers)


@contextmanager
def watched(seen: dict[str, Any]) -> Iterator[None]:
    """Note peaks of private memory, of the run and of each load, and the most layers in use.

    `layers`: decoder layers that are whole as one of them ends. Moving or casting a module with
    two whole layers fails, also where the CPU would make no copy but a GPU would.
    """
    known: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models are dropped meanwhile
    apply = nn.Module._apply
    seen["layers"] = 0

    def end(layer: nn.Module, *_: Any) -> None:
        if isinstance(layer, LlamaDecoderLayer):
            known.add(layer)
            seen["layers"] = max(seen["layers"], sum(map(_whole_layers, known)))

    def refuse(module: nn.Module, *args: Any, **options: Any) -> Any:
        assert _whole_layers(module) < 2, "the language model is moved or cast whole"
        return apply(module, *args, **options)

    with ExitStack() as stack:
        hook = nn.modules.module.register_module_forward_hook(end)
        stack.callback(hook.remove)
        stack.enter_context(patch.object(nn.Module, "_apply", refuse))
        for name in _LOADS:
            stack.enter_context(patch.object(MultiTokenTrainer, name, _measured(name, seen)))
        stack.enter_context(peak_mb(seen, "peak"))
        yield


def _measured(name: str, seen: dict[str, Any]) -> Any:
    method = getattr(MultiTokenTrainer, name)

    def measured(*args: Any, **options: Any) -> Any:
        with peak_mb(seen, name):
            return method(*args, **options)

    return measured
