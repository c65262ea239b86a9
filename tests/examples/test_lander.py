"""examples/lander.py: its games, and the short form of the whole, as anyone would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="the extra `examples` is not installed")
pytest.importorskip("Box2D", reason="the extra `examples` is not installed")

import av
from parts.flights import ACTIONS, HOLD, Flight, fly, heuristic_pilot, write_video

ROOT = Path(__file__).resolve().parents[2]
PILOTS = {"random", "pilot", "perceptron", "state", "screenshot", "both"}


def test_the_pilot_lands_while_a_craft_without_engines_falls() -> None:
    landed = fly(heuristic_pilot, [0, 1])
    fallen = fly(lambda flights: [ACTIONS.index("wait")] * len(flights), [0, 1])
    assert all(flight.landed and flight.total > 200 for flight in landed)
    assert not any(flight.landed or flight.total > 0 for flight in fallen)


def test_the_same_seed_and_actions_are_the_same_game() -> None:
    (first,) = fly(heuristic_pilot, [3])
    again = Flight(3)
    for action in first.actions:
        again.act(action)
    assert again.done and again.total == first.total


def test_a_video_shows_every_frame_of_a_flight(tmp_path: Path) -> None:
    (flight,) = fly(lambda flights: [0] * len(flights), [0])
    write_video(flight, tmp_path / "fall.mp4")
    num_frames = count_frames(tmp_path / "fall.mp4")
    assert HOLD * (len(flight.actions) - 1) < num_frames <= HOLD * len(flight.actions)


@pytest.mark.slow
def test_the_short_form_writes_a_report_and_a_video(tmp_path: Path) -> None:
    out = tmp_path / "lander"
    command = [sys.executable, "examples/lander.py", "--quick", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads((out / "report.json").read_text())
    num_flights = report["size"]["num_flights"]
    assert set(report["mean_return"]) == set(report["landed"]) == PILOTS
    for name, returns in report["returns"].items():
        assert len(returns) == num_flights
        assert report["mean_return"][name] == pytest.approx(sum(returns) / num_flights, abs=0.1)
    assert report["mean_return"]["pilot"] > 100 > report["mean_return"]["random"]
    for view in ("state", "screenshot", "both"):
        losses = [loss for _, loss in report["losses"][view]]
        assert losses[-1] < losses[0]
        assert report["train_seconds"][view] > 0
    assert count_frames(out / "landing.mp4") > 10
    page = (out / "report.html").read_text()
    assert 'src="data:video/mp4;base64,' in page and "http://" not in page


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
