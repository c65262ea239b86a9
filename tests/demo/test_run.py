"""demo/run.py: the short demo, on the real models, with every number it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from multi_token.demo.run import QUICK, run

PROMISED = {
    "num_names",
    "held_out_accuracy",
    "closed_form_accuracy",
    "shuffled_accuracy",
    "two_image_accuracy",
    "text_logits_identical",
    "train_seconds",
    "total_seconds",
    "data_wait_share",
    "examples",
}


@pytest.mark.slow
def test_the_short_demo_writes_a_report_with_every_promised_number(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    console = Console(quiet=True)
    first = run(out, size=QUICK, seed=0, console=console)
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= PROMISED
    assert report["num_names"] == QUICK.num_names == first["num_names"]
    assert report["text_logits_identical"] is True
    # recognized before any gradient step, and not from the words of the question
    assert report["closed_form_accuracy"] >= 0.5
    assert report["shuffled_accuracy"] <= 0.2
    assert 0 <= report["data_wait_share"] <= 1
    losses = [loss for _, loss in report["losses"]]
    assert losses[-1] < losses[0]
    for example in report["examples"]:
        assert all((out / image).is_file() for image in example["images"])
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="data:image/' in page

    again = run(out, size=QUICK, seed=0, console=console)
    assert again["train_seconds"] == first["train_seconds"]  # it was not trained a second time
    assert again["held_out_accuracy"] == first["held_out_accuracy"]
