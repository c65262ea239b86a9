"""Run by torchrun: trains one recipe, and writes how much of its language model a process held.

    {"out": FILE, "fields": ...}

`layers`: most decoder layers that were whole at once while one of them ran. `peak_mb`: most private
memory (RssAnon, without the pages of mapped files) since the model began to load.
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from multi_token.distributed import all_gather, exit_without_teardown, is_main_process
from multi_token.recipe.recipe import Recipe
from multi_token.train import prepare as prepare_module
from multi_token.train import run as run_module


def private_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) / 1024


class Peak(threading.Thread):
    """Watches private memory until `stop` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.start_mb = self.peak_mb = private_mb()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.peak_mb = max(self.peak_mb, private_mb())


def main(job: dict[str, Any]) -> None:
    seen: dict[str, Any] = {"layers": 0}
    known: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def watch(layer: nn.Module, *_: Any) -> None:
        """As a decoder layer ends: count the layers whose weights are whole here."""
        if not isinstance(layer, LlamaDecoderLayer):
            return
        known.add(layer)
        whole = [k for k in known if not isinstance(next(k.parameters()), DTensor)]
        seen["layers"] = max(seen["layers"], len(whole))

    nn.modules.module.register_module_forward_hook(watch)
    composed, peak = prepare_module.compose_model, Peak()

    def started(*args: Any, **options: Any) -> Any:
        if not peak.is_alive():
            peak.start_mb = peak.peak_mb = private_mb()
            peak.start()
        return composed(*args, **options)

    prepare_module.compose_model = started  # type: ignore[assignment]
    run_module.train(Recipe.model_validate(job["fields"]), console=Console(quiet=True))
    peak.ended.set()
    seen["peak_mb"] = peak.peak_mb - peak.start_mb
    found = all_gather(seen)
    if is_main_process():
        Path(job["out"]).write_text(json.dumps(found))
    exit_without_teardown(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
