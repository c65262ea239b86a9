"""Script for torchrun: reads the rows of a job file as training does, and writes what it read.

{"out": FILE, "fields": ..., "folders": [FOLDER of each process]}
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from multi_token.data.files.open import load_rows
from multi_token.data.sources import TrainingSource, good_rows
from multi_token.distributed import all_gather, exit_without_teardown, is_main_process, rank
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.processor import build_processor
from multi_token.recipe.recipe import Recipe


@dataclass(frozen=True)
class Counting(Fetch):
    """Fetch that lists the sources it read."""

    opened: list[str] = field(default_factory=list)

    def read(self, source: Any) -> bytes:
        """Read a source; see Fetch."""
        self.opened.append(Path(source).stem)
        return super().read(source)


def main(job: dict[str, Any]) -> None:
    """Scan twice, as a run that is started again."""
    torch.distributed.init_process_group("gloo")
    os.chdir(job["folders"][rank()])
    recipe = Recipe.model_validate(job["fields"])
    seen: dict[str, Any] = {}
    for start in ("first", "second"):
        fetch = Counting(root=".")
        processor = build_processor(recipe)
        object.__setattr__(processor, "fetch", fetch)
        sources = [TrainingSource(load_rows("rows.jsonl"), processor, "rows.jsonl")]
        try:
            (found,) = good_rows(sources, recipe, Console(quiet=True))
            seen[start] = {"good": list(found.good_indices or ()), "lengths": list(found.lengths)}
        except MultiTokenError as error:
            seen[start] = {"error": f"{type(error).__name__}: {error}"}
        seen[start]["opened"] = fetch.opened
        torch.distributed.barrier()
    everyone = all_gather(seen)
    if is_main_process():
        Path(job["out"]).write_text(json.dumps(everyone))
    exit_without_teardown(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
