"""Runs over streams: stopped, killed and shared out, they learn what one uninterrupted does."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from rich.console import Console

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.stream_loader import StreamLoader
from multi_token.errors import Interrupted, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.image import ImageModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.train import plan_run, train
from multi_token.train.prepare import open_stages, prepare
from multi_token.train.resume import claim_run_folder
from multi_token.train.run import run_stages
from multi_token.types import Media
from tests.data.streams import BAD, WORDS, row_of
from tests.train.bits import assert_same_bits, run_until, weights

pytestmark = pytest.mark.slow

Fields = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def rows(data: Path, tmp_path_factory: Any) -> Path:
    """A folder with `tables/`, 24 rows in three .parquet files, and `texts.jsonl`, five more."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "tables").mkdir()
    all_rows = [row_of(n, data) for n in range(24)]
    schema = pyarrow.Table.from_pylist(all_rows).schema
    for i in range(3):
        table = pyarrow.Table.from_pylist(all_rows[8 * i : 8 * i + 8], schema=schema)
        parquet.write_table(table, folder / "tables" / f"{i}.parquet", row_group_size=3)
    texts = [row_of(4 * n + 3, data) | {"id": f"t{n}"} for n in range(5)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture(scope="module")
def fields_of(recipe_fields: Fields, rows: Path) -> Fields:
    """A run of six steps over a mixture that learns an adapter with dropout."""

    def fields(out: Path, *, args: Any = None, data: Any = None, **more: Any) -> dict[str, Any]:
        common = {
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "max_steps": 6,
            "save_steps": 1,
            "report_to": [],
        }
        made = recipe_fields(
            out,
            stages=[{"name": "adapter", "learn": {"projectors": 1e-2, "adapter": 1e-2}}],
            args={**common, **(args or {})},
            adapter={"r": 4, "lora_dropout": 0.2},
            calibration_items=8,
            **more,
        )
        made["data"] = {
            "train": [
                {"rows": str(rows / "tables"), "weight": 3},
                {"rows": str(rows / "texts.jsonl")},
            ],
            "stream": {"window": 8},
            "max_tokens": 120,
            **(data or {}),
        }
        return made

    return fields


def trained(fields: dict[str, Any], console: Console | None = None) -> Any:
    return train(Recipe.model_validate(fields), console=console or Console(quiet=True))


def history(out: Path) -> list[dict[str, float]]:
    done = json.loads((out / "stages" / "1-adapter" / "done.json").read_text())
    return [entry for entry in done["log_history"] if "loss" in entry]


def test_the_first_rows_keep_no_media_while_a_stage_trains(
    fields_of: Fields, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(fields_of(tmp_path / "run", args={"max_steps": 1}))
    stages = open_stages(recipe)
    claim_run_folder(tmp_path / "run", recipe)
    run = prepare(recipe, stages, Console(quiet=True))
    images = [row.get("image") for source in run.sources for row in source.rows]
    assert sum(image is not None and bool(image["bytes"]) for image in images) > 3
    run_stages(run)
    images = [row.get("image") for source in run.sources for row in source.rows]
    assert sum(image is not None and bool(image["bytes"]) for image in images) == 1


PACKED = {"packing": True, "pack_tokens": 120}


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(fields_of: Fields, tmp_path_factory: Any) -> Path:
    """A run that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trained(fields_of(out))
    return out


@pytest.mark.parametrize(
    "way",
    [pytest.param({}, id="padded"), pytest.param(PACKED, id="packed", marks=pytest.mark.slow)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    fields_of: Fields, tmp_path: Path, at: Any, whole: Path, way: dict[str, Any]
) -> None:
    if way:
        whole = tmp_path / "whole"
        trained(fields_of(whole, **way))
    at(4, stop)
    with pytest.raises(Interrupted, match="stopped at step 4 of 6"):
        trained(fields_of(tmp_path / "cut", **way))
    at(4, lambda: None)
    # helpers read ahead, and may be others than before
    args = {"dataloader_num_workers": 1}
    trained(fields_of(tmp_path / "cut", args=args, **way))
    assert_same_bits(whole, tmp_path / "cut")
    ours, theirs = history(whole), history(tmp_path / "cut")
    assert [(e["loss"], e["epoch"]) for e in ours] == [(e["loss"], e["epoch"]) for e in theirs]


def test_a_run_that_was_killed_after_its_last_step_does_no_more(
    fields_of: Fields, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "stages" / "1-adapter" / "done.json").unlink()
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(whole), str(out)))
    trained(fields_of(out))
    assert_same_bits(whole, out)
    assert [entry["step"] for entry in history(out)] == list(range(1, 7))


@pytest.mark.parametrize("way", [{}, PACKED], ids=["padded", "packed"])
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(
    fields_of: Fields, tmp_path: Path, way: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    args = {"max_steps": 12, "dataloader_num_workers": 1}
    trained(fields_of(tmp_path / "whole", args=args, **way))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields_of(tmp_path / "cut", args=args, **way)))
    seed = random.randrange(10**6)
    step = random.Random(seed).randrange(2, 10)
    print(f"killed once step {step} was logged (seed {seed})")  # noqa: T201 - shown on a failure
    assert run_until(recipe, f"adapter {step}/12") == -signal.SIGKILL
    assert run_until(recipe, None) == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_bad_rows_are_in_the_log_and_in_words_and_survive_a_stop(
    fields_of: Fields, rows: Path, tmp_path: Path, at: Any, capsys: Any
) -> None:
    texts = rows / "texts.jsonl"
    (tmp_path / "bad.jsonl").write_text("{\n" + json.dumps(BAD) + "\n" + texts.read_text())
    data = {
        "train": [{"rows": str(rows / "tables")}, {"rows": str(tmp_path / "bad.jsonl")}],
        "on_bad_row": "skip",
    }
    out = tmp_path / "out"
    at(5, stop)
    with pytest.raises(Interrupted):
        trained(fields_of(out, data=data))
    at(5, lambda: None)
    trained(fields_of(out, data=data), Console(width=1000))
    counts = [entry["bad_rows"] for entry in history(out)]
    assert counts == sorted(counts) and counts[-1] > counts[0]
    assert f"rows of the stream: {counts[-1]:.0f} skipped in this stage" in capsys.readouterr().out
    with pytest.raises(RowError, match=r"bad.jsonl|row bad"):
        trained(fields_of(tmp_path / "raise", data=data | {"on_bad_row": "raise"}))


def test_a_plan_of_a_stream_counts_from_its_first_rows(
    fields_of: Fields, tmp_path: Path, capsys: Any
) -> None:
    plan_run(Recipe.model_validate(fields_of(tmp_path / "run")), console=Console(width=1000))
    shown = capsys.readouterr().out
    assert "data.stream: its first rows are read for statistics and the plan" in shown
    assert "from 12 rows of" in shown
    assert not (tmp_path / "run").exists()


def test_features_that_were_kept_before_stand_in_for_media(
    fields_of: Fields, data: Path, tmp_path: Path, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"path": str(tmp_path / "features")}
    fields = fields_of(tmp_path / "run", feature_cache=cache, args={"max_steps": 2})
    recipe = Recipe.model_validate(fields)
    whole_model = MultiTokenForConditionalGeneration.from_spec(recipe.model)
    kept = FeatureCache(tmp_path / "features")
    images = [Media("image", (data / f"{c}.png").read_bytes()) for c in WORDS[:3]]
    encoders: Any = whole_model.encoders
    kept.fill([(item, Fetch()) for item in images], whole_model.modalities, encoders)
    at(1, lambda: monkeypatch.setattr(ImageModality, "load", None))  # no image is opened then
    trained(fields)
    assert len(FeatureCache(tmp_path / "features")) == 3


def test_the_word_true_is_a_stream_with_the_default_window(
    fields_of: Fields, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(fields_of(tmp_path, data={"stream": True}))
    assert recipe.data.stream is not None and recipe.data.stream.window == 1024


# --- several processes --------------------------------------------------------------------------

TWO = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "lr_scheduler_type": "constant"}
ONE = {**TWO, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def two(fields_of: Fields, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """Return the trained tensors of two processes, started once."""
    folder = tmp_path_factory.mktemp("two")
    quiet = {"adapter": {"r": 4}}
    job = folder / "job.json"
    runs = [
        {"name": name, "fields": {**made, "train": {**made["train"], **quiet}}}
        for name, made in (
            ("padded", fields_of(folder / "padded", args=TWO)),
            ("packed", fields_of(folder / "packed", args=TWO, **PACKED)),
        )
    ]
    job.write_text(json.dumps({"out": str(folder / "seen.json"), "runs": runs}))
    script = Path(__file__).with_name("in_processes.py")
    root = script.parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), str(job)),
        ],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "seen.json").read_text())


class OfBoth:
    """The packs of two processes one after the other, for one that accumulates gradients."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        loaders = []
        for process in (0, 1):
            args = copy.copy(self.loader.args)
            type_of = type("Args", (type(args),), {"world_size": 2, "process_index": process})
            args.__class__ = type_of
            loaders.append(
                iter(
                    StreamLoader(
                        self.loader.streams, args, self.loader.collate, packing=self.loader.packing
                    )
                )
            )
        while True:
            for each in loaders:
                yield next(each)


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_two_processes_learn_from_a_stream_what_one_does(
    two: Any, fields_of: Fields, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    folder, seen = two
    assert all("error" not in one for ones in seen.values() for one in ones), seen
    if way == "packed":
        from multi_token.data.stream_loader import StreamProgress

        loader = StreamProgress.loader
        monkeypatch.setattr(StreamProgress, "loader", lambda self, *a: OfBoth(loader(self, *a)))
        args, more = {**TWO, "gradient_accumulation_steps": 2}, PACKED
    else:
        args, more = ONE, {}
    fields = fields_of(tmp_path / way, args=args, **more)
    fields["train"]["adapter"] = {"r": 4}
    trained(fields)
    ours = [(e["loss"], e["grad_norm"]) for e in history(tmp_path / way)]
    theirs = [(e["loss"], e["grad_norm"]) for e in history(folder / way)]
    assert len(ours) == 6
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), atol=1e-5, rtol=1e-5)
    after = weights(folder / way)
    for name, tensor in weights(tmp_path / way).items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=0, msg=name)
