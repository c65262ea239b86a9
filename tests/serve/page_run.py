"""Files of a trained run that the chat page reads: a recipe, rows of several kinds, a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HOSTILE = '<img src="x" onerror="window.hacked = 1">'


def page_run(recipe_fields: Callable[..., dict[str, Any]], folder: Path) -> Path:
    """A run with a row that contains HTML, one whose images are missing, and the recipe's four."""
    fields = recipe_fields(folder)
    rows = [
        {
            "vector": [1, 2, 3, 4, 5],
            "messages": [
                {"role": "system", "content": "You name things."},
                {"role": "user", "content": f"{HOSTILE} is <vector>?"},
                {"role": "assistant", "content": "a vector"},
            ],
        },
        {
            "images": ["/etc/hostname", "nowhere.png"],
            "messages": [
                {"role": "user", "content": "<image> <image>"},
                {"role": "assistant", "content": "lost"},
            ],
        },
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields["data"]["eval"] = [{"rows": str(folder / "rows.jsonl")}, {"rows": "gone/away"}]
    fields["model"]["modalities"]["vector"] = {"type": "vector", "dim": 5}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    (folder / "report.html").write_text(
        "<!doctype html><title>Report</title><h1>Trained</h1><script>document.title = 1</script>"
    )
    return folder
