"""Report of a run: `report.json` and a self-contained `report.html`, updated while it trains."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from multi_token.checkpoint.atomic import atomic_file
from multi_token.errors import CheckpointError, first_line
from multi_token.recipe.recipe import Recipe
from multi_token.report.chart import Curve, Point, chart
from multi_token.report.html import columns, facts_table, page
from multi_token.report.machine import machine_facts
from multi_token.train.resume import raise_on_write_error

JSON, HTML, HISTORY = "report.json", "report.html", "history.jsonl"
_APART, _TIMES_APART = 2.0, 100
"""Seconds between two writes, and the same as a multiple of the last write's duration."""
_MOST_SAMPLES = 50
"""Evaluations whose answers are kept; of more, every second one is dropped."""
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
    """The report of a run so far; after a restart it continues the one in the run's folder.

    Both files are written again and again, so neither their size nor the time for them grows with
    the run: curves and earlier answers are thinned. All entries of a stage's log stand in its
    `history.jsonl`, which is written once at each start and then grows at its end.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        parts: Sequence[str],
        *,
        print_fn: Callable[[str], object] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`parts`: lines about the parts of the model. `clock`: seconds that are never set back.

        `print_fn` gets the reason while the files cannot be written. Raises CheckpointError for a
        damaged report in the folder.
        """
        self.folder = folder
        self.print_fn = print_fn
        self.clock = clock
        self.facts: dict[str, Any] = {
            "hardware": hardware(),
            "parts": list(parts),
            "recipe": _without_nan(recipe.model_dump(mode="json", exclude_none=True)),
            "stages": _stages_before(folder / JSON),
        }
        self._curves: dict[str, Curve] = {}
        self._history: Path | None = None
        self._num_logged: int | None = None
        """Entries of the trainer's log that this report has; None after a start."""
        self._lines: list[str] = []
        """Lines of the history that are not written yet."""
        self._appends = False
        """False until the history of this start is begun."""
        self._next_write = -math.inf
        self._fault: OSError | None = None

    @property
    def _stage(self) -> dict[str, Any]:
        return self.facts["stages"][-1]

    def start_stage(self, stage: str, folder: Path, trainable: Sequence[str]) -> None:
        """Start or resume a stage, and drop later stages, left by an earlier attempt."""
        names = [entry["name"] for entry in self.facts["stages"]]
        if stage in names:
            del self.facts["stages"][names.index(stage) + 1 :]
        else:
            self.facts["stages"].append({"name": stage, "step": 0, "curves": {}, "samples": []})
        self._stage["learns"] = [line.strip() for line in trainable]
        self._stage["history"] = os.path.relpath(folder / HISTORY, self.folder)
        self._history, self._num_logged = folder / HISTORY, None
        self._curves, self._lines = {}, []

    def log(
        self,
        history: Sequence[Mapping[str, Any]],
        max_steps: int,
        *,
        data_wait: float | None = None,
    ) -> None:
        """Take over the new entries of the stage's log, which the trainer keeps across restarts.

        `data_wait`: share of the time since the last start that steps waited for data.
        """
        if data_wait is not None:
            self._stage["data_wait"] = data_wait
        self._stage["max_steps"] = max_steps
        if self._num_logged is None or self._num_logged > len(history):
            # a resumed run repeats the steps after its checkpoint, and their answers
            reached = max((entry.get("step", 0) for entry in history), default=0)
            self._stage["samples"] = [s for s in self._stage["samples"] if s["step"] <= reached]
            self._stage.update(step=0, curves={})
            self._num_logged, self._curves, self._lines = 0, {}, []
            self._appends = False
        for entry in history[self._num_logged :]:
            self._add(entry)
        self._num_logged = len(history)
        self.write()

    def _add(self, entry: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(_without_nan(dict(entry))) + "\n")
        step = int(entry.get("step", 0))
        self._stage["step"] = max(step, self._stage["step"])
        for key, value in entry.items():
            if key != "step" and isinstance(value, (int, float)):
                self._curves.setdefault(key, Curve()).add(step, float(value))

    def add_samples(self, step: int, answers: Sequence[Mapping[str, str]]) -> None:
        """Add the answers to held-out rows at a step."""
        kept = [s for s in self._stage["samples"] if s["step"] != step]
        if len(kept) >= _MOST_SAMPLES:
            kept = kept[::2]
        self._stage["samples"] = [*kept, {"step": step, "answers": [dict(a) for a in answers]}]
        self.write()

    def blind(self, found: Mapping[str, Any]) -> None:
        """Add the blind test at the end."""
        self.facts["blind"] = _without_nan(found)

    def write(self, *, at_once: bool = False) -> None:
        """Write the files atomically: at once, or if it is time again.

        Two writes are 100 times the duration of the first of them apart, and `_APART` seconds at
        least, so writing takes less than a hundredth of a run. While the files cannot be written (a
        full disk), the run goes on; `raise_if_unwritten` tells it at the end.
        """
        begin = self.clock()
        if not at_once and begin < self._next_write:
            return
        try:
            self._write()
        except OSError as error:
            if self._fault is None:
                self.print_fn(
                    f"the report in {self.folder} could not be written: "
                    f"{error.strerror or error}; training goes on, so free some space there"
                )
            self._fault = error
        else:
            self._fault = None
        end = self.clock()
        self._next_write = end + max(_APART, _TIMES_APART * (end - begin))

    def raise_if_unwritten(self) -> None:
        """Raise CheckpointError if the last state could not be written."""
        with raise_on_write_error(self.folder):
            if self._fault is not None:
                raise self._fault

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.facts["stages"]:
            self._stage["curves"] |= {key: c.points() for key, c in self._curves.items()}
        # a reader (the browser, a poller) must never see half a file
        for name, content in (
            # on one line: with an indent, Python encodes without its encoder in C
            (JSON, json.dumps(self.facts, allow_nan=False)),
            (HTML, render_page(self.facts)),
        ):
            with atomic_file(self.folder / name) as partial:
                partial.write_text(content, encoding="utf-8")
        if self._history is None or not self._lines:
            return
        data = "".join(self._lines).encode()
        if self._appends:
            with self._history.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(data) < len(data):
                    # a full disk may take a part; the same lines come again with the next write
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._history) as partial:
                partial.write_bytes(data)
        self._appends, self._lines = True, []


def _stages_before(file: Path) -> list[dict[str, Any]]:
    """Return the stages of the report that an earlier start of this run has written."""
    if not file.is_file():
        return []
    try:
        stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
        # reports of earlier versions have a log in place of curves
        return [{"curves": {}, "step": 0, **stage} for stage in stages]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({first_line(error)}); remove it, and the report begins again"
        ) from error


def _without_nan(value: Any) -> Any:
    """Return the value as JSON, with None for NaN and infinity, which JSON lacks."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def hardware() -> dict[str, str]:
    """Return facts about the machine, and its accelerators by name and memory."""
    facts = dict(machine_facts())
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        facts[f"device {index}"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return facts


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
        "report.json, and all of the log in stages/*/history.jsonl.",
        own_style=_STYLE,
    )


def _stage(stage: Mapping[str, Any]) -> str:
    steps = f"step {stage['step']} of {stage.get('max_steps', '?')}"
    if "data_wait" in stage:
        steps += f"; {stage['data_wait']:.1%} of the time was waiting for data"
    curves: Mapping[str, Sequence[Point]] = stage["curves"]
    figures = [
        _figure(curves.get(key, ()), name, note, log=as_log, share=key in _SHARES)
        for key, name, note, as_log in _CURVES
    ]
    figures += [
        _figure(curves[key], f"Gradient norm{key[9:].replace('/', ' of ')}", "", log=True)
        for key in sorted(curves)
        if key.startswith("grad_norm")
    ]
    learns = "".join(f"<li>{escape(line)}</li>" for line in stage.get("learns", ()))
    return (
        f"<h2>Stage {escape(stage['name'])}</h2><p>{escape(steps)}</p><ul>{learns}</ul>"
        f'<div class="charts">{"".join(figures)}</div>{_samples(stage["samples"])}'
    )


def _figure(curve: Sequence[Point], name: str, note: str, *, log: bool, share: bool = False) -> str:
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
