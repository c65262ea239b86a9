"""A language model lands a craft: the words of SmolLM2-135M-Instruct fly gymnasium's LunarLander.

    python examples/lander.py [--quick] [--out runs/lander] [--seed 0]

LunarLander's own heuristic pilot flies. Each of its decisions becomes a row: the game state (8
numbers), a screenshot or both, with the pilot's action (one word of four) as the answer. For each
of the three views a projector is trained on these rows, with the language model frozen. The model
then flies 50 unseen games, and so do the pilot, a random player and a perceptron trained on the
same rows. Writes `report.json`, `report.html` and a video of a landing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.command import run_command, stage_losses
from parts.flights import ACTIONS, HOLD, Flight, Pilot, fly, heuristic_pilot, write_video
from parts.page import ReportSection, Tile, loss_figures, table, video_figure, write_page
from PIL import Image
from rich.console import Console
from torch import nn

from multi_token.demo.parts import encoder_folder, language_model_folder
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.report.machine import machine_facts
from multi_token.train.run import train

VIEWS = {
    "state": "<game-state>",
    "screenshot": "<screenshot>",
    "both": "<screenshot><game-state>",
}
"""View of the game -> the user's message."""
NOISE = 0.3
"""Share of random actions while rows are recorded."""
RECORDED_SEEDS = (1_000_000, 2_000_000)
"""Seeds of the games that rows are made of; games flown for the report have lower seeds."""
TEMPLATE = (
    "Land:{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
"""Three tokens beside the items; the model's own template has twenty, each of which costs time."""


@dataclass(frozen=True)
class Size:
    """Numbers of games, rows and steps."""

    num_decisions: int = 2500
    num_steps: int = 300
    batch_size: int = 32
    num_flights: int = 50


QUICK = Size(num_decisions=48, num_steps=6, batch_size=8, num_flights=2)


def screenshot(flight: Flight) -> Image.Image:
    """Return the screen at half its size: the encoder takes 224 x 224."""
    return flight.frame().resize((300, 200), Image.Resampling.BOX)


def row(view: str, *, state: Any = None, screenshot: Any = None) -> dict[str, Any]:
    """Return the prompt; a row for training has the answer after it."""
    given = {"game-state": state, "screenshot": screenshot}
    shown = {name: item for name, item in given.items() if f"<{name}>" in VIEWS[view]}
    return {**shown, "messages": [{"role": "user", "content": VIEWS[view]}]}


@dataclass(frozen=True)
class Recorded:
    """Decisions of the pilot: a file of rows for each view, and their numbers."""

    folder: Path
    states: np.ndarray  # [decisions, 8]
    actions: np.ndarray  # [decisions]

    def rows(self, view: str) -> dict[str, str]:
        """One view of all decisions, as a recipe names it."""
        return {"rows": str(self.folder / f"{view}.jsonl")}


def record(folder: Path, num_decisions: int, *, seed: int) -> Recorded:
    """Let the pilot fly and write its decisions as rows.

    Often a random action is flown in place of the pilot's, while the row keeps the pilot's. So the
    rows show how to recover from mistakes that a model makes and the pilot never would (DART,
    arXiv:1703.09327).
    """
    (folder / "screenshots").mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    states, actions, paths = [], [], []
    while len(states) < num_decisions:
        flight = Flight(int(chance.integers(*RECORDED_SEEDS)))
        while not flight.done and len(states) < num_decisions:
            (action,) = heuristic_pilot([flight])
            states.append(flight.state.round(4))
            actions.append(action)
            paths.append(f"screenshots/{len(paths):05d}.png")
            screenshot(flight).save(folder / paths[-1], compress_level=1)
            # The row has the pilot's action, the game often a random one: so rows hold states that
            # the pilot never gets into, with the way out.
            flight.act(int(chance.integers(4)) if chance.random() < NOISE else action)
    for view in VIEWS:
        with (folder / f"{view}.jsonl").open("w", encoding="utf-8") as file:
            for state, path, action in zip(states, paths, actions, strict=True):
                asked = row(view, state=state.tolist(), screenshot=path)
                asked["messages"].append({"role": "assistant", "content": ACTIONS[action]})
                file.write(json.dumps(asked) + "\n")
    return Recorded(folder, np.stack(states), np.array(actions))


def recipe(data: Recorded, view: str, out: Path, size: Size, *, seed: int) -> Recipe:
    """Return the recipe of a view: the same keys as any user's."""
    projector = {"type": "expand", "factor": 1}  # one token an item: a word is all it has to say
    modalities: dict[str, Any] = {
        "game-state": {"type": "vector", "dim": 8, "projector": projector},
        "screenshot": {
            "type": "image",
            "encoder": str(encoder_folder()),
            "features": "pooled",
            "projector": projector,
        },
    }
    used = [name for name in modalities if f"<{name}>" in VIEWS[view]]
    # rows with one item each: the closed-form start needs them
    single = [data.rows(one) for one in ("state", "screenshot") if view in (one, "both")]
    fields: dict[str, Any] = {
        "model": {
            "language_model": str(language_model_folder()),
            "chat_template": TEMPLATE,
            "modalities": {name: modalities[name] for name in used},
        },
        "data": {"train": [data.rows(view)]},
        "train": {
            "output_dir": str(out / view),
            "seed": seed,
            "closed_form": {"rows": single},
            "feature_cache": True,
            "packing": {"share": True},
            "stages": [
                {
                    "name": "projectors",
                    "learn": {"projectors": 3e-3},
                    "args": {"max_steps": size.num_steps},
                }
            ],
            "args": {
                "per_device_train_batch_size": size.batch_size,
                "logging_steps": 2,
                "use_cpu": True,
            },
        },
    }
    return parse_recipe(json.dumps(fields), where="the lander's recipe")


class ModelPilot:
    """The model, shown one view; its word is the action."""

    def __init__(self, model: MultiTokenForConditionalGeneration, view: str) -> None:
        self.model = model
        self.view = view
        self.num_unknown = 0
        """Answers that are none of the four words; they fire no engine."""

    def __call__(self, flights: Sequence[Flight]) -> list[int]:
        # Drawing a frame takes longer than a game step, so it is drawn only where it is shown.
        sees = self.view != "state"
        asked = [
            row(self.view, state=f.state, screenshot=screenshot(f) if sees else None)
            for f in flights
        ]
        answers = self.model.generate(asked, max_new_tokens=1, batch_size=len(asked))
        self.num_unknown += sum(answer not in ACTIONS for answer in answers)
        return [ACTIONS.index(answer) if answer in ACTIONS else 0 for answer in answers]


def perceptron_pilot(data: Recorded, *, seed: int) -> Pilot:
    """Train a two-layer perceptron of the state on the same rows, as a baseline."""
    torch.manual_seed(seed)
    states, actions = torch.tensor(data.states), torch.tensor(data.actions)
    mean, scale = states.mean(0), states.std(0) + 1e-6
    network = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, len(ACTIONS)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(3000):
        chosen = torch.randint(len(states), (64,))
        logits = network((states[chosen] - mean) / scale)
        loss = nn.functional.cross_entropy(logits, actions[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def pilot(flights: Sequence[Flight]) -> list[int]:
        now = torch.tensor(np.stack([flight.state for flight in flights]))
        return network((now - mean) / scale).argmax(-1).tolist()

    return pilot


def run(out: Path, size: Size, seed: int, console: Console) -> dict[str, Any]:
    """Record, train, fly and write the report to `out`; return its numbers."""
    began = time.perf_counter()
    console.rule("rows")
    data = record(out / "data", size.num_decisions, seed=seed)
    console.print(f"{len(data.states)} decisions of the pilot", highlight=False)

    chance = np.random.default_rng(seed)
    pilots: dict[str, Pilot] = {
        "random": lambda flights: chance.integers(len(ACTIONS), size=len(flights)).tolist(),
        "pilot": heuristic_pilot,
        "perceptron": perceptron_pilot(data, seed=seed),
    }
    losses, train_seconds, models = {}, {}, {}
    for view in VIEWS:
        console.rule(f"training: {view}")
        model, train_seconds[view] = _train_once(
            recipe(data, view, out, size, seed=seed), console=console
        )
        losses[view] = stage_losses(out / view)
        pilots[view] = models[view] = ModelPilot(model, view)

    console.rule("flights")
    seeds = range(1000 * seed, 1000 * seed + size.num_flights)
    flown: dict[str, list[Flight]] = {}
    for name, pilot in pilots.items():
        started = time.perf_counter()
        flown[name] = fly(pilot, seeds)
        console.print(
            f"{LABELS[name]}: mean return {_mean_return(flown[name]):.1f}, {_landed(flown[name])} "
            f"of {len(seeds)} landed ({time.perf_counter() - started:.0f} s)",
            highlight=False,
        )
    # The first landing, or any flight: with few steps the model lands none.
    filmed = next((flight for flight in flown["state"] if flight.landed), flown["state"][0])
    write_video(filmed, out / "landing.mp4")

    report: dict[str, Any] = {
        "mean_return": {name: _mean_return(flights) for name, flights in flown.items()},
        "landed": {name: _landed(flights) for name, flights in flown.items()},
        "returns": {name: [round(f.total, 1) for f in flights] for name, flights in flown.items()},
        "num_decisions": {name: sum(len(f.actions) for f in flown[name]) for name in flown},
        "num_unknown_answers": {view: model.num_unknown for view, model in models.items()},
        "train_seconds": train_seconds,
        "total_seconds": round(time.perf_counter() - began, 1),
        "losses": losses,
        "video": {"seed": filmed.seed, "return": round(filmed.total, 1), "landed": filmed.landed},
        "seed": seed,
        "size": asdict(size),
        "machine": machine_facts(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_report(out, report)
    return report


LABELS = {
    "random": "A random player",
    "pilot": "The heuristic pilot",
    "perceptron": "A perceptron, given the state",
    "state": "The language model, shown the state",
    "screenshot": "The language model, shown a screenshot",
    "both": "The language model, shown both",
}


def _train_once(
    plan: Recipe, *, console: Console
) -> tuple[MultiTokenForConditionalGeneration, float]:
    """Return the model and its training time, also from an earlier run of the same command."""
    started = time.perf_counter()
    model = train(plan, console=console)
    kept = Path(plan.train.output_dir) / "train_seconds.json"
    if not kept.is_file():
        kept.write_text(json.dumps(round(time.perf_counter() - started, 1)), encoding="utf-8")
    return model, json.loads(kept.read_text(encoding="utf-8"))


def _landed(flights: Sequence[Flight]) -> int:
    return sum(flight.landed for flight in flights)


def _mean_return(flights: Sequence[Flight]) -> float:
    return round(sum(flight.total for flight in flights) / len(flights), 1)


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write the page, from the numbers of `report.json` and the video beside it."""
    means, landed, filmed = report["mean_return"], report["landed"], report["video"]
    num_flights = report["size"]["num_flights"]
    minutes, seconds = divmod(round(sum(report["train_seconds"].values())), 60)
    rows = [
        (label, f"{means[name]:.1f}", f"{min(report['returns'][name]):.1f}", landed[name])
        for name, label in LABELS.items()
    ]
    write_page(
        out / "report.html",
        title="A language model lands a craft",
        claim=(
            "SmolLM2-135M-Instruct stays frozen. A small projector was trained to turn eight "
            "numbers into one token; the model's next word is the engine to fire. So it earns "
            f"<strong>{means['state']:.0f}</strong> a flight on {num_flights} unseen seeds. 200 "
            f"counts as solved; the heuristic pilot earns {means['pilot']:.0f}. "
            f"All three models together were trained for {minutes} min {seconds} s."
        ),
        tiles=[
            Tile(
                name.capitalize(),
                f"{means[name]:.0f}",
                f"{landed[name]} of {num_flights} landed",
                part=landed[name] / num_flights,
            )
            for name in (*VIEWS, "perceptron", "pilot", "random")
        ],
        sections=[
            ReportSection(
                "A flight",
                f"Seed {filmed['seed']}, flown by the state alone, with a return of "
                f"{filmed['return']:.0f}.",
                video_figure(out / "landing.mp4", f"Each word of the model fires {HOLD} frames"),
            ),
            ReportSection(
                "All flights",
                f"The same {num_flights} seeds for all; none of them is in the rows. A screenshot "
                "shows no motion, and features of an encoder of everyday images hold little about "
                "the position of the craft.",
                table(["Who flies", "Mean return", "Worst", "Landed"], rows),
            ),
            ReportSection(
                "Training",
                f"{report['size']['num_steps']} steps of {report['size']['batch_size']} rows each.",
                loss_figures(report["losses"]),
            ),
        ],
        facts={
            "Training seconds": report["train_seconds"],
            "Size": report["size"],
            "Machine": report["machine"],
        },
    )


if __name__ == "__main__":
    run_command("lander", __doc__ or "", run, full=Size(), quick=QUICK)
