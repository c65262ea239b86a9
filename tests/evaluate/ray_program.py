"""Run by the test of Ray Data: jobs over rows on a local Ray, whose results are written as JSON.

{"run": FOLDER, "recipe": FILE, "root": FOLDER, "rows": [...], "mark": FILE, "out": FILE}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # else Ray kills actors of this job where other programs fill the memory, and retries for ever
    "RAY_memory_monitor_refresh_ms": "0",
}

import ray  # type: ignore[import-not-found]
import ray.data  # type: ignore[import-not-found]

from multi_token import EncodeRows, EvaluateRows, PredictRows

JOB = json.loads(Path(sys.argv[1]).read_text())


class Dying(PredictRows):
    """The process of the first actor that gets a second batch dies with it."""

    def __init__(self, mark: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mark = Path(mark)
        self.num_batches = 0

    def __call__(self, batch: Any) -> Any:
        self.num_batches += 1
        if self.num_batches == 2 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return super().__call__(batch)


def main() -> None:
    """Evaluate and predict in one pass, then encode."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items(JOB["rows"], override_num_blocks=6)
    run = {"run": JOB["run"], "root": JOB["root"]}
    one = ray.data.ActorPoolStrategy(size=1)
    # Two actors, and a CPU for the tasks between them. By default Ray restarts and retries without
    # end; here one is killed once.
    share: dict[str, Any] = {"batch_size": 3, "num_cpus": 0.25}
    share |= {"max_restarts": 3, "max_task_retries": 3}
    found = (
        rows.map_batches(EvaluateRows, fn_constructor_kwargs=run, compute=one, **share)
        .map_batches(
            Dying,
            fn_constructor_kwargs={**run, "mark": JOB["mark"], "max_new_tokens": 5},
            compute=one,
            **share,
        )
        .select_columns(["id", "answer", "error", "loss", "exact"])
        .take_all()
    )
    given = {"recipe": JOB["recipe"], "root": JOB["root"]}
    encoded = rows.map_batches(
        EncodeRows, fn_constructor_kwargs=given, compute=one, **{**share, "batch_size": 8}
    ).take_all()
    Path(JOB["out"]).write_text(json.dumps({"found": found, "encoded": encoded}))
    ray.shutdown()


if __name__ == "__main__":
    main()
