"""train/stage_zero.py: each distinct item is read and encoded once, by one of the processes."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from multi_token.errors import RowError
from multi_token.language_model.loading import embedding_rms
from multi_token.media.fetch import Fetch
from multi_token.modalities.vector import VectorModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.projectors.base import ProjectorSpec
from multi_token.projectors.kinds import mlp
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import ClosedFormSpec
from multi_token.registry import register_modality, register_projector
from multi_token.train import item_sums
from multi_token.train.closed_form import fit_projector
from multi_token.train.item_sums import FitItem
from multi_token.train.prepare import Run, open_stages, prepare
from multi_token.train.run import closed_form_stage
from multi_token.train.stage_zero import find_items
from multi_token.types import Features, Media
from tests.train.fitting import calibrate, captioned_items, fit_closed_form
from tests.train.launchers import launched

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)
NUM_FILES = 12
NUM_ROWS = 60
WORDS = ["red", "blue", "cat", "dog", "a blue cat", "what is it", "yes or no"]


READ: list[str] = []
"""Names of the files that this process has read."""


class Counted(VectorModality):
    """Vectors in files; the names of those that were read are kept."""

    type: Literal["counted"] = "counted"  # type: ignore[assignment]
    dim: int = 5

    def load(self, source: Any, fetch: Fetch) -> Any:
        """See VectorModality."""
        READ.append(Path(source).name)
        return super().load(source, fetch)


def register() -> None:
    register_modality("counted", Counted)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows about 12 files, each with up to five captions, some of them twice."""
    register()
    folder = tmp_path_factory.mktemp("counted")
    numbers = np.random.default_rng(0)
    for i in range(NUM_FILES):
        np.save(folder / f"{i}.npy", numbers.normal(3.0, 2.0, (1 + i % 3, 5)).astype(np.float32))
    lines = []
    for i in range(NUM_ROWS):
        question = {"role": "user", "content": "What is <thing>?"}
        answer = {"role": "assistant", "content": WORDS[i % len(WORDS)]}
        name = f"{i * i % NUM_FILES}.npy" if i >= NUM_FILES else f"{i}.npy"
        lines.append(json.dumps({"id": i, "thing": name, "messages": [question, answer]}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture
def fields_of(recipe_fields: Fields, rows: Path) -> Fields:
    def fields(folder: Path, projector: Any = None, data: Any = None, **train: Any) -> Any:
        made = recipe_fields(folder, **train)
        thing = {"type": "counted", "projector": projector or {"type": "mlp"}}
        made["model"]["modalities"] = {"thing": thing}
        made["data"] = {"train": [{"rows": str(rows)}], **(data or {})}
        made["train"]["args"] |= {"max_steps": 1, "report_to": []}
        return made

    return fields


def prepared_run(fields: dict[str, Any]) -> Run:
    recipe = Recipe.model_validate(fields)
    return prepare(recipe, open_stages(recipe), QUIET)


def state_of(run: Run) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in run.model.projector("thing").state_dict().items()}


def occurrences(run: Run) -> list[Any]:
    (source,) = run.sources
    return list(source.conversations())


@pytest.mark.parametrize("projector", [{"type": "expand", "factor": 3}, {"type": "stack"}])
@pytest.mark.parametrize("targets", ["mean", "by_position"])
def test_each_file_is_read_and_encoded_once_and_counts_as_often_as_rows_name_it(
    fields_of: Fields, rows: Path, tmp_path: Path, projector: Any, targets: str
) -> None:
    closed_form = {"targets": targets, "penalty": 2.0}
    run = prepared_run(fields_of(tmp_path / "run", projector, closed_form=closed_form))
    encoded: list[int] = []
    run.model.encoder("thing").register_forward_hook(
        lambda _module, _args, features: encoded.append(len(features.values))
    )
    other = prepared_run(fields_of(tmp_path / "other", projector, closed_form=closed_form))
    READ.clear()
    closed_form_stage(run)
    assert sorted(READ) == sorted(f"{i}.npy" for i in range(NUM_FILES))
    assert sum(encoded) == NUM_FILES

    pairs = occurrences(other)
    items = captioned_items(pairs)
    assert len(items) == NUM_ROWS
    calibrate(other.model, "thing", [(item, processor) for item, _, processor in items])
    spec = other.recipe.train.closed_form
    assert spec is not None
    fit_closed_form(other.model, "thing", items, spec=spec)
    found, expected = state_of(run), state_of(other)
    assert found.keys() == expected.keys() and "closed_form.weight" in found
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_features_of_the_cache_are_fitted_without_reading_or_encoding_an_item_again(
    fields_of: Fields, tmp_path: Path
) -> None:
    states = []
    for cached in (False, True):
        run = prepared_run(fields_of(tmp_path / str(cached), feature_cache=cached))
        encoded: list[int] = []
        run.model.encoder("thing").register_forward_hook(lambda *_, e=encoded: e.append(1))
        READ.clear()
        closed_form_stage(run)
        assert (READ == []) == (encoded == []) == cached
        states.append(state_of(run))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


def test_data_workers_change_nothing(fields_of: Fields, tmp_path: Path) -> None:
    states = []
    for num_workers in (0, 2):
        fields = fields_of(tmp_path / str(num_workers))
        fields["train"]["args"]["dataloader_num_workers"] = num_workers
        run = prepared_run(fields)
        closed_form_stage(run)
        states.append(state_of(run))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_items_are_limited_and_spread_over_all_rows(fields_of: Fields, tmp_path: Path) -> None:
    fields = fields_of(tmp_path / "run", calibration_items=7, closed_form={"max_items": 20})
    run = prepared_run(fields)
    items = find_items(run, None, ["thing"])["thing"]
    assert items.counts.sum() == 7 and len(items.captioned) == 20
    rows = np.sort(items.captioned["row"])
    assert np.diff([0, *rows, NUM_ROWS]).max() <= 2.1 * NUM_ROWS / 20 + 1


def test_the_output_is_scaled_on_calibrated_items_where_few_are(
    fields_of: Fields, tmp_path: Path
) -> None:
    run = prepared_run(fields_of(tmp_path / "run", calibration_items=1, closed_form=None))
    items = find_items(run, None, ["thing"])["thing"]
    closed_form_stage(run)
    projector = run.model.projector("thing")
    item, processor = items.item(int(np.flatnonzero(items.counts)[0]))
    features = Features(processor.prepare(item).inputs["values"][None])
    measured = projector(features).detach().square().mean().sqrt()
    assert float(measured) == pytest.approx(embedding_rms(run.model), rel=1e-3)


class Counting(list[Any]):
    """Rows that count how many were parsed."""

    def __init__(self, rows: Any) -> None:
        super().__init__(rows)
        self.read: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        self.read.add(index)
        return super().__getitem__(index)


def test_a_million_rows_are_not_all_parsed_for_a_few_items(
    fields_of: Fields, tmp_path: Path
) -> None:
    fields = fields_of(tmp_path / "run", calibration_items=10, closed_form={"max_items": 100})
    run = prepared_run(fields)
    (source,) = run.sources
    many = Counting([source.rows[0]] * 1_000_000)
    many_rows = {"good_indices": range(1_000_000), "modalities": ()}
    run.sources = [replace(source, rows=many, **many_rows)]
    items = find_items(run, None, ["thing"])["thing"]
    assert len(items.captioned) == 100
    assert len(many.read) <= 2048


def test_rows_of_the_closed_form_share_the_items_of_the_training_rows(
    fields_of: Fields, rows: Path, tmp_path: Path
) -> None:
    few = rows.parent / "few.jsonl"
    few.write_text("".join(f"{line}\n" for line in rows.read_text().splitlines()[:20]))
    closed_form = {"rows": [{"rows": str(few)}]}
    run = prepared_run(fields_of(tmp_path / "run", closed_form=closed_form))
    READ.clear()
    closed_form_stage(run)
    assert len(READ) == NUM_FILES, "their lengths are known from the training rows"


class Sizes(ProjectorSpec):
    """The mean size of all features, which is not linear."""

    type: Literal["sizes"] = "sizes"  # type: ignore[assignment]

    def num_tokens(self, num_features: int) -> int:
        return 1

    def group(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        total = values.abs().sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]
        return total, mask.any(1, keepdim=True)

    def build_network(self, in_dim: int, out_dim: int) -> nn.Module:
        return mlp(in_dim, out_dim, 2)


def test_a_projector_that_arranges_features_without_a_linear_map_is_fitted_exactly(
    fields_of: Fields, tmp_path: Path
) -> None:
    register_projector("sizes", Sizes)
    fields = fields_of(tmp_path / "run", {"type": "sizes"}, closed_form={"penalty": 2.0})
    run = prepared_run(fields)
    READ.clear()
    closed_form_stage(run)
    assert len(READ) == 2 * NUM_FILES, "its items are read a second time"
    projector = run.model.projector("thing")
    items = captioned_items(occurrences(run))
    embed: Any = run.model.get_input_embeddings()
    x, y = [], []
    for item, caption, processor in items:
        prepared = processor.prepare(item)
        x.append(projector.arrange(Features(prepared.inputs["values"][None]))[0][0, 0].detach())
        ids = processor.tokenizer(" " + caption, add_special_tokens=False).input_ids[:1]
        y.append(embed(torch.tensor(ids))[0])
    inputs, targets = torch.stack(x).double(), torch.stack(y).double().detach()
    centred = inputs - inputs.mean(0)
    gram = centred.T @ centred + 2.0 * torch.eye(5).double()
    weight = torch.linalg.solve(gram, centred.T @ (targets - targets.mean(0)))
    assert projector.closed_form is not None
    torch.testing.assert_close(
        projector.closed_form.weight.double(), weight.T, rtol=1e-4, atol=1e-5
    )


def bytes_of_tensors() -> int:
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("targets", ["mean", "by_position"])
@pytest.mark.parametrize("kind", ["mlp", "expand"])
@pytest.mark.parametrize("num_features", [1, 30])
def test_memory_does_not_grow_with_the_number_of_captions(
    recipe_fields: Fields,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: Any,
    kind: str,
    num_features: int,
) -> None:
    # widths are tiny here, and so must be the block of rows that waits for a product
    monkeypatch.setattr(item_sums, "_BLOCK_BYTES", 4096)
    fields = recipe_fields(tmp_path)
    vector = {"type": "vector", "dim": 5, "projector": {"type": kind}}
    fields["model"]["modalities"] = {"vector": vector}
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    processor = model.require_processor()
    numbers = np.random.default_rng(0)
    held: list[int] = []

    def items() -> Any:
        for i in range(400):
            if i % 50 == 49:
                gc.collect()
                held.append(bytes_of_tensors())
            item = Media("vector", numbers.normal(size=(num_features, 5)))
            # each caption is another one
            ids = [3 + i % 50, 3 + i // 50, *range(3, 30)]
            yield FitItem(processor.prepare(item), 1, [(ids, 1)], number=i)

    spec = ClosedFormSpec(targets=targets)
    gc.freeze()  # only tensors from here on are looked at; a process may have millions of objects
    try:
        assert fit_projector(model, "vector", items(), spec=spec).num_captioned == 400
    finally:
        gc.unfreeze()
    # up to the first look, the sums were made, and the items kept that scale the output
    assert max(held[1:]) - held[0] < 20_000, "350 rows of 128 bytes, one for each caption, are more"


def test_stopped_by_ctrl_c_it_begins_again_and_ends_the_same(
    fields_of: Fields, tmp_path: Path
) -> None:
    stopped = prepared_run(fields_of(tmp_path / "stopped"))
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    stopped.model.encoder("thing").register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        closed_form_stage(stopped)
    assert not (tmp_path / "stopped" / "stages" / "0-closed-form" / "done.json").exists()
    again = prepared_run(fields_of(tmp_path / "stopped"))
    closed_form_stage(again)
    whole = prepared_run(fields_of(tmp_path / "whole"))
    closed_form_stage(whole)
    found, expected = state_of(again), state_of(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def main(job: dict[str, Any]) -> None:
    """Each of several processes: stage zero of each recipe, with its reads and its state."""
    from multi_token.distributed import exit_without_teardown, rank

    torch.set_num_threads(1)
    register()
    found = {}
    for name, fields in job["runs"].items():
        seen: dict[str, Any] = {"encoded": 0}
        run = prepared_run(fields)

        def count(_module: Any, _args: Any, features: Any, seen: Any = seen) -> None:
            seen["encoded"] += len(features.values)

        run.model.encoder("thing").register_forward_hook(count)
        READ.clear()
        try:
            closed_form_stage(run)
        except RowError as error:
            seen["error"] = str(error)
        seen["read"] = list(READ)
        seen["state"] = {key: value.tolist() for key, value in state_of(run).items()}
        found[name] = seen
    Path(f"{job['out']}-{rank()}").write_text(json.dumps(found))
    exit_without_teardown(0)


@pytest.mark.slow
def test_processes_share_the_items_and_fit_what_one_process_fits(
    fields_of: Fields, rows: Path, tmp_path: Path
) -> None:
    args = {"ddp_backend": "gloo", "max_steps": 1, "use_cpu": True, "report_to": []}
    damaged = rows.parent / "damaged.jsonl"
    lines = rows.read_text().splitlines()
    damaged.write_text("\n".join([*lines, lines[0].replace("0.npy", "damaged.npy")]) + "\n")
    # nothing is wrong with its header
    np.save(rows.parent / "damaged.npy", np.full((1, 5), np.nan, np.float32))
    runs = {"good": fields_of(tmp_path / "good", {"type": "stack", "factor": 2})}
    # lengths by header: the damaged file is opened by stage zero, in one process
    data = {"train": [{"rows": str(damaged)}], "lengths": "headers"}
    runs["bad"] = fields_of(tmp_path / "bad", data=data)
    for fields in runs.values():
        fields["train"]["args"] |= args
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"out": str(tmp_path / "seen"), "runs": runs}))
    launched(4, [__file__, str(job)])
    seen = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(4)]
    good = [one["good"] for one in seen]
    assert [one["encoded"] for one in good] == [NUM_FILES / 4] * 4
    assert sorted(name for one in good for name in one["read"]) == sorted(
        f"{i}.npy" for i in range(NUM_FILES)
    )
    alone = prepared_run(fields_of(tmp_path / "alone", {"type": "stack", "factor": 2}))
    closed_form_stage(alone)
    for one in good:
        for key, value in state_of(alone).items():
            torch.testing.assert_close(torch.tensor(one["state"][key]), value)
    errors = {one["bad"].get("error") for one in seen}
    assert len(errors) == 1, "the same in all processes"
    assert "row 0: thing: a vector holds nan" in str(errors.pop())


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
