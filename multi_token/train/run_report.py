"""Report of a run: `report.json` and a self-contained `report.html`, updated while it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from multi_token.checkpoint.atomic import atomic_file
from multi_token.recipe.recipe import Recipe
from multi_token.report.chart import chart
from multi_token.report.html import columns, facts_table, page
from multi_token.report.machine import machine_facts

JSON, HTML = "report.json", "report.html"
_APART = 2.0
"""Seconds between two writes, so that fast steps do not wait for the page."""
_CURVES = (
    ("loss", "Loss", "cross entropy at supervised tokens (log scale)", True),
    ("eval_loss", "Loss on held-out rows", "cross entropy (log scale)", True),
    ("eval_exact_answers", "Exact answers on held-out rows", "share of all answers", False),
    ("eval_shuffled_loss_increase", "Use of the media", "loss with shuffled media, less", False),
    ("tokens_per_second", "Speed", "real tokens a second", False),
    ("learning_rate", "Learning rate", "of the first group", False),
    ("data_wait_fraction", "Waiting for data", "share of a step", False),
    ("encoder_fraction", "Encoders", "share of a step", False),
    ("mfu", "Model FLOPs utilization", "share of the device's peak", False),
)
_SHARES = {"eval_exact_answers", "data_wait_fraction", "encoder_fraction", "mfu"}

_STYLE = """pre { padding: 16px 18px; overflow: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px; font-size: .85rem; }
.charts { margin-bottom: 12px; }
details { margin-top: 12px; }
thead th { width: auto; font-weight: 600; }
"""


class RunReport:
    """The report of a run so far; after a restart it continues the one in the run's folder."""

    def __init__(self, folder: Path, recipe: Recipe, parts: Sequence[str]) -> None:
        """`parts`: lines about the parts of the model."""
        self.folder = folder
        file = folder / JSON
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.facts: dict[str, Any] = {
            "hardware": hardware(),
            "parts": list(parts),
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "stages": before.get("stages", []),
        }
        self._written = 0.0

    @property
    def _stage(self) -> dict[str, Any]:
        return self.facts["stages"][-1]

    def start_stage(self, stage: str, trainable: Sequence[str]) -> None:
        """Start or resume a stage, and drop later stages, left by an earlier attempt."""
        names = [entry["name"] for entry in self.facts["stages"]]
        if stage in names:
            del self.facts["stages"][names.index(stage) + 1 :]
        else:
            self.facts["stages"].append({"name": stage, "log": [], "samples": []})
        self._stage["learns"] = [line.strip() for line in trainable]

    def log(
        self,
        history: Sequence[Mapping[str, Any]],
        max_steps: int,
        *,
        data_wait: float | None = None,
    ) -> None:
        """Take over the log of the stage, which the trainer keeps across restarts.

        `data_wait`: share of the time since the last start that steps waited for data.
        """
        if data_wait is not None:
            self._stage["data_wait"] = data_wait
        self._stage["log"] = [dict(entry) for entry in history]
        self._stage["max_steps"] = max_steps
        # a resumed run repeats the steps after its checkpoint, and their samples
        reached = max((entry.get("step", 0) for entry in history), default=0)
        self._stage["samples"] = [s for s in self._stage["samples"] if s["step"] <= reached]
        self.write()

    def add_samples(self, step: int, answers: Sequence[Mapping[str, str]]) -> None:
        """Add the answers to held-out rows at a step."""
        kept = [s for s in self._stage["samples"] if s["step"] != step]
        self._stage["samples"] = [*kept, {"step": step, "answers": [dict(a) for a in answers]}]
        self.write(at_once=True)

    def blind(self, found: Mapping[str, Any]) -> None:
        """Add the blind test at the end."""
        self.facts["blind"] = dict(found)

    def write(self, *, at_once: bool = False) -> None:
        """Write both files atomically, at most once in `_APART` seconds unless `at_once`."""
        # monotonic: the time of day may be set back, which would stop the updates
        if not at_once and time.monotonic() - self._written < _APART:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # JSON has no NaN, and a diverged run needs its report most
        plain = json.loads(json.dumps(self.facts), parse_constant=lambda _: None)
        text = json.dumps(plain, indent=1, allow_nan=False)
        # a reader (the browser, a poller) must never see half a file
        for name, content in ((JSON, text), (HTML, render_page(self.facts))):
            with atomic_file(self.folder / name) as partial:
                partial.write_text(content, encoding="utf-8")
        self._written = time.monotonic()


def hardware() -> dict[str, str]:
    """Return facts about the machine, and its accelerators by name and memory."""
    facts = dict(machine_facts())
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        facts[f"device {index}"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return facts


def points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of one key of a log, without NaN."""
    found = [(int(e["step"]), e[key]) for e in log if key in e and "step" in e]
    # NaN is the one value that differs from itself
    return [(step, float(value)) for step, value in found if value is not None and value == value]


def render_page(facts: Mapping[str, Any]) -> str:
    """Render the page: trained groups, curves and answers of each stage, blind test, recipe."""
    out = facts["recipe"]["train"]["output_dir"]
    parts = dict(line.strip().partition(": ")[::2] for line in facts["parts"])
    recipe = escape(json.dumps(facts["recipe"], indent=1, ensure_ascii=False))
    return page(
        "run",
        title=f"Run {Path(out).name}",
        claim=escape("; ".join(facts["parts"][:1]) or "A run that has not begun."),
        body=[
            *map(_stage, facts["stages"]),
            _blind(facts["blind"]) if "blind" in facts else "",
            columns([facts_table("Hardware", facts["hardware"]), facts_table("Parts", parts)]),
            f"<h2>Recipe</h2>\n<pre>{recipe}</pre>",
        ],
        footer="Updated while the run trains; reload it to see more. The same numbers are in "
        "report.json.",
        own_style=_STYLE,
    )


def _stage(stage: Mapping[str, Any]) -> str:
    log = stage["log"]
    reached = max((entry.get("step", 0) for entry in log), default=0)
    steps = f"step {reached} of {stage.get('max_steps', '?')}"
    if "data_wait" in stage:
        steps += f"; {stage['data_wait']:.1%} of the time was waiting for data"
    groups = sorted({key for entry in log for key in entry if key.startswith("grad_norm")})
    curves = [
        _figure(points(log, key), name, note, log=as_log, share=key in _SHARES)
        for key, name, note, as_log in _CURVES
    ]
    curves += [
        _figure(points(log, key), f"Gradient norm{key[9:].replace('/', ' of ')}", "", log=True)
        for key in groups
    ]
    learns = "".join(f"<li>{escape(line)}</li>" for line in stage.get("learns", ()))
    return (
        f"<h2>Stage {escape(stage['name'])}</h2><p>{escape(steps)}</p><ul>{learns}</ul>"
        f'<div class="charts">{"".join(curves)}</div>{_samples(stage["samples"])}'
    )


def _figure(
    curve: Sequence[tuple[int, float]], name: str, note: str, *, log: bool, share: bool = False
) -> str:
    if not curve:
        return ""
    drawn = chart(curve, label=name, log=log, share=share)
    return f"<figure><figcaption><b>{escape(name)}</b>{escape(note)}</figcaption>{drawn}</figure>"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Render the latest answers, and those of earlier evaluations folded away."""
    if not samples:
        return ""

    def rows(sample: Mapping[str, Any]) -> str:
        return "".join(
            f"<tr>{_cell(a['question'])}{_cell(a['answer'])}{_cell(a['truth'])}</tr>"
            for a in sample["answers"]
        )

    def table(sample: Mapping[str, Any]) -> str:
        heads = "".join(f'<th scope="col">{h}</th>' for h in ("question", "answer", "truth"))
        return (
            f'<div class="facts"><h2>Answers at step {sample["step"]}</h2><table><thead><tr>'
            f"{heads}</tr></thead><tbody>{rows(sample)}</tbody></table></div>"
        )

    *before, last = samples
    earlier = "".join(map(table, reversed(before)))
    folded = f"<details><summary>Earlier answers</summary>{earlier}</details>" if earlier else ""
    return table(last) + folded


def _cell(text: str) -> str:
    return f"<td>{escape(text) or '<i>nothing</i>'}</td>"


def _blind(found: Mapping[str, Any]) -> str:
    def cells(c: Mapping[str, Any]) -> str:
        change = f"{c['loss_increase']:+.3f} ± {2 * c['standard_error']:.3f}"
        return f"{c['loss']:.3f} ({change}), {c['accuracy']:.0%} exact"

    warnings = "".join(f"<p><b>Warning:</b> {escape(w)}</p>" for w in found["warnings"])
    table = facts_table("Loss by media", {c["media"]: cells(c) for c in found["conditions"]})
    return (
        "<h2>Does the model use its media?</h2><p>The same held-out rows with original media, "
        f"media of other rows (shuffled) and mean features (ablated) ({found['num_rows']} rows; "
        f"± two standard errors).</p>{warnings}{table}"
    )
