"""Golden records: one function computes each, and this file as a program writes them again.

    python -m tests.golden.record            all of them (or: make golden)
    python -m tests.golden.record runs/dpo   those whose names begin so

Records are written on purpose only: read the difference in git before it is committed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.golden import answers, surfaces
from tests.golden.bench import Bench, files_of, keys_of, log_of, losses_of, sums_of
from tests.golden.recipes import LOSSES

FOLDER = Path(__file__).with_name("records")


def run_record(bench: Bench, name: str) -> dict[str, Any]:
    """Return the losses of a golden run, and the sums of its weights."""
    run = bench.run(name)
    return {"losses": losses_of(run), "sums": sums_of(run)}


def log_keys(bench: Bench) -> dict[str, list[str]]:
    """Run -> keys of its log, of all its steps together."""
    return {
        name: sorted({key for entry in log_of(bench.run(name)) for key in entry}) for name in LOSSES
    }


def folder(bench: Bench) -> dict[str, list[str]]:
    """Return the files of the run with an adapter and evaluation, and the keys of two of them."""
    run = bench.run("adapter")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    return {
        "files": files_of(run),
        "config.json": keys_of(config),
        "recipe.yaml": keys_of(recipe),
    }


def model_of(bench: Bench) -> Any:
    """The model that is asked."""
    return bench.once("model", lambda: answers.loaded(bench.run("taught")))


def served(bench: Bench) -> dict[str, Any]:
    """Answers over HTTP, the OpenAPI document and the metrics, all of one server."""
    from tests.serve.running_server import running

    def ask() -> dict[str, Any]:
        with running(model_of(bench)) as server:
            return {
                "answers": answers.served_answers(server.url, bench.material),
                "openapi": surfaces.openapi(server.url),
                "metrics": surfaces.metrics(server),
            }

    return bench.once("served", ask)


def vllm_metrics(bench: Bench) -> dict[str, Any]:
    """Metrics of a server whose answers come from a stand-in for vLLM."""
    from tests.serve.running_server import running
    from tests.serve.vllm_parts import VllmWithStandIn

    model = model_of(bench)
    with running(model, engine=VllmWithStandIn(model)) as server:
        return surfaces.metrics(server)


def generated(bench: Bench) -> dict[str, dict[str, Any]]:
    """Question -> ids and text, through `generate`."""
    return bench.once("generated", lambda: answers.generated(model_of(bench), bench.material))


def helps(bench: Bench) -> dict[str, str]:
    """Command -> its help text."""
    return bench.once("helps", surfaces.helps)


RECORDS: dict[str, Callable[[Bench], Any]] = {
    **{f"runs/{name}": partial(run_record, name=name) for name in LOSSES},
    "runs/two_processes": partial(run_record, name="two_processes"),
    "log_keys": log_keys,
    "folder": folder,
    "openapi": lambda bench: served(bench)["openapi"],
    "metrics": lambda bench: served(bench)["metrics"],
    "metrics_vllm": vllm_metrics,
    "answers": generated,
}
"""Name of a record, which is a JSON file -> what computes it. Help texts stand beside these."""


def read(name: str) -> Any:
    """A record as it was written."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def written(value: Any) -> str:
    """The text of a record: keys sorted, numbers to eight digits."""
    return json.dumps(_rounded(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def _save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text(text, encoding="utf-8")
    state = "new" if old is None else "as it was" if old == text else "changed"
    sys.stdout.write(f"{path.relative_to(FOLDER).as_posix()}: {state}\n")


def main(start: str) -> None:
    """Compute records whose names begin with `start`, and write them."""
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        for name, compute in RECORDS.items():
            if name.startswith(start):
                _save(FOLDER / f"{name}.json", written(compute(bench)))
        if "help".startswith(start):
            for old in FOLDER.glob("help/*.txt"):
                if old.stem not in helps(bench):
                    old.unlink()
            for name, text in helps(bench).items():
                _save(FOLDER / "help" / f"{name}.txt", text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
