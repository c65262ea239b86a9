"""Run by torchrun: trains the recipes of a job file in turn and writes the observations.

    {"out": FILE, "runs": [{"name": ..., "fields": ..., "stop_at": 2, "other": {"train.seed": 1}}]}

`stop_at`: the last process gets SIGTERM in this step. `poison_at`: its projectors hold NaN from
this step on. `other`: fields of the last process alone.
`without`: a method that transformers' Trainer lacks meanwhile, as in an older version.
`folders`: where each process looks for files that the recipe names by a relative path.
`memory`: whether to watch memory (memory.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from multi_token.distributed import (
    all_gather,
    exit_without_teardown,
    is_main_process,
    num_processes,
    rank,
)
from multi_token.errors import MultiTokenError
from multi_token.modalities.base import Encoder
from multi_token.modalities.vector import VectorModality
from multi_token.recipe.recipe import Recipe
from multi_token.registry import register_modality
from multi_token.train import run as run_module
from multi_token.train import stage as stage_module
from multi_token.types import Features
from tests.train.memory import watched as watched_memory

QUIET = Console(quiet=True)


class WaveringEncoder(Encoder):
    """Features that depend on the batch and on chance if BatchNorm and dropout are active."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.layer = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, **inputs: Tensor) -> Features:
        """`values` [items, length, 5], `mask` [items, length]."""
        values = torch.tanh(self.layer(inputs["values"]))
        values = self.norm(values.transpose(1, 2)).transpose(1, 2)
        return Features(self.dropout(values), inputs["mask"].bool())


class Wavering(VectorModality):
    """A vector whose encoder has layers that differ between train and eval mode."""

    type: Literal["wavering"] = "wavering"  # type: ignore[assignment]
    dim: int = 5

    def build_encoder(self) -> WaveringEncoder:  # type: ignore[override]
        return WaveringEncoder()


class Watch(TrainerCallback):
    """Observes the model while it trains, and stops the run at a step."""

    def __init__(self, trainer: Any, seen: dict[str, Any], job: dict[str, Any]) -> None:
        self.trainer = trainer
        self.seen = seen
        self.stop_at = job.get("stop_at")
        self.poison_at = job.get("poison_at")

    def _pieces(self) -> list[DTensor]:
        return [p for p in self.trainer.model.parameters() if isinstance(p, DTensor)]

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.seen["num_pieces_after_evaluation"] = len(self._pieces())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pieces = self._pieces()
        self.seen["wrapper"] = type(self.trainer.model_wrapped).__name__
        self.seen["num_pieces"] = len(pieces)
        self.seen["share"] = sum(p.to_local().numel() for p in pieces) / max(
            1, sum(p.numel() for p in pieces)
        )
        self.seen["steps"] = self.seen.get("steps", 0) + 1
        is_last = rank() == num_processes() - 1
        if self.stop_at == state.global_step + 1 and is_last:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.poison_at == state.global_step + 1 and is_last:
            for parameter in self.trainer.model.projectors.parameters():
                parameter.data.fill_(float("nan"))


@contextmanager
def without_method(name: str) -> Iterator[None]:
    """Take a method from transformers' Trainer."""
    method = vars(Trainer)[name]
    delattr(Trainer, name)
    try:
        yield
    finally:
        setattr(Trainer, name, method)


def main(job: dict[str, Any]) -> None:
    """Train, and write the observations of each process."""
    register_modality("wavering", Wavering)
    if job.get("deepspeed"):
        import deepspeed  # type: ignore[import-not-found]

        # else it compiles an exchange of its own by shared memory, for minutes; gloo has one
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bar = stage_module.ProgressBarCallback
    found = {}
    for one in job["runs"]:
        seen: dict[str, Any] = {}

        def watched(
            trainer: Any, console: Any, title: str, seen: Any = seen, one: Any = one
        ) -> Any:
            trainer.add_callback(Watch(trainer, seen, one))
            return bar(trainer, console, title)

        stage_module.ProgressBarCallback = watched  # type: ignore[misc,assignment]
        fields = one["fields"]
        if "folders" in one:
            os.chdir(one["folders"][rank()])
        if num_processes() > 1 and rank() == num_processes() - 1:
            for key, value in one.get("other", {}).items():
                at = fields
                *outer, last = [int(k) if k.isdigit() else k for k in key.split(".")]
                for k in outer:
                    at = at[k]
                at[last] = value
        try:
            with (
                watched_memory(seen) if one.get("memory") else nullcontext(),
                without_method(one["without"]) if "without" in one else nullcontext(),
            ):
                run_module.train(Recipe.model_validate(fields), console=QUIET)
        except MultiTokenError as error:
            seen["error"] = f"{type(error).__name__}: {error}"
        found[one["name"]] = all_gather(seen)
    if is_main_process():
        Path(job["out"]).write_text(json.dumps(found))
    exit_without_teardown(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
