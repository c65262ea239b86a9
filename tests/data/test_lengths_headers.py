"""`data.lengths: headers`: nothing is decoded before training, and training is the same."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import putchunk
from rich.console import Console
from safetensors.torch import load_file

from multi_token.data import sources as sources_module
from multi_token.data.dataset import row_to_sample
from multi_token.data.files.open import load_rows
from multi_token.data.lengths import LengthStore, processor_fingerprint
from multi_token.data.scan import scan
from multi_token.errors import RecipeError, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.image import ImageModality
from multi_token.processor import MultiTokenProcessor, build_processor
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.registry import register_modality
from multi_token.testing import tiny_image_encoder
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
SIZES = [(60, 20), (20, 60), (33, 33), (50, 30), (30, 50), (90, 12), (40, 38), (16, 64)]
DECODED: list[str] = []
"""Sources that the modality of this file has decoded in this process."""


class Watched(ImageModality):
    """Images; the list of those that were decoded is kept."""

    type: str = "watched"  # type: ignore[assignment]

    def load(self, source: Any, fetch: Fetch) -> Image.Image:
        """See ImageModality."""
        DECODED.append(str(source))
        return super().load(source, fetch)

    def num_features_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """See ImageModality."""
        return super().num_features_from_header(source, fetch)


def write_rows(folder: Path, *, damaged: int | None = None) -> Path:
    """Write eight rows with JPEGs of different sizes; the pixels of one are cut off."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, size in enumerate(SIZES):
        file = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(file, "JPEG", quality=95)
        data = file.getvalue()
        if number == damaged:
            begin = data.index(b"\xff\xda")  # here the header ends and the pixels begin
            data = data[: begin + 40]
        (folder / f"{number}.jpg").write_bytes(data)
        row = {
            "id": f"row {number}",
            "image": f"{number}.jpg",
            "messages": [
                {"role": "user", "content": "What is <image>?" + " so" * (number % 3)},
                {"role": "assistant", "content": "red and blue"[: 3 + number]},
            ],
        }
        lines.append(json.dumps(row) + "\n")
    path = folder / "rows.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def native(tmp_path_factory: Any) -> str:
    """Encoder with a number of patches that depends on the image's proportions."""
    register_modality("watched", Watched)
    return tiny_image_encoder(tmp_path_factory.mktemp("native"), "siglip2")


@pytest.fixture
def fields_of(recipe_fields: Fields, native: str, tmp_path: Path) -> Fields:
    """Fields of a run over the eight rows: `lengths`, `args` and more of its `train` section."""

    def fields(
        name: str, lengths: str, *, damaged: int | None = None, args: Any = None, **more: Any
    ) -> dict[str, Any]:
        rows = write_rows(tmp_path / "rows", damaged=damaged)
        common = {"per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 1}
        made = recipe_fields(
            tmp_path / name,
            closed_form=None,
            calibration_items=1,
            args={**common, "report_to": [], **(args or {})},
            **more,
        )
        image = {"type": "watched", "encoder": native, "projector": {"type": "linear"}}
        made["model"]["modalities"] = {"image": image}
        made["data"] = {"train": [{"rows": str(rows)}], "lengths": lengths}
        return made

    return fields


@pytest.fixture
def processor(fields_of: Fields, tmp_path: Path) -> MultiTokenProcessor:
    recipe = Recipe.model_validate(fields_of("run", "headers"))
    return build_processor(recipe, root=str(tmp_path / "rows"))


def look(processor: MultiTokenProcessor, folder: Path, **options: Any) -> Any:
    rows = load_rows(str(folder / "rows.jsonl"))

    def read(row: Any, row_id: str) -> Any:
        return row_to_sample(row, row_id, processor=processor, modalities=["image"])

    return scan(rows, read, source="rows.jsonl", progress=False, **options)


def test_a_scan_by_headers_decodes_nothing_and_finds_the_lengths_of_decoding(
    processor: MultiTokenProcessor, tmp_path: Path
) -> None:
    DECODED.clear()
    lengths_only = look(replace(processor, lengths_only=True), tmp_path / "rows")
    assert DECODED == [] and lengths_only.num_decoded == 0
    decoded = look(processor, tmp_path / "rows")
    assert len(DECODED) == decoded.num_decoded == len(SIZES)
    assert lengths_only == decoded
    assert len({length.num_media for length in decoded.lengths}) > 2, "they are of many lengths"


def test_an_image_damaged_after_its_header_passes_a_scan_by_headers_alone(
    processor: MultiTokenProcessor, tmp_path: Path
) -> None:
    whole = look(processor, tmp_path / "rows")
    write_rows(tmp_path / "rows", damaged=5)
    assert look(replace(processor, lengths_only=True), tmp_path / "rows") == whole
    assert [p.row_id for p in look(processor, tmp_path / "rows").problems] == ["row 5"]
    (tmp_path / "rows" / "2.jpg").unlink()
    (tmp_path / "rows" / "3.jpg").write_bytes(b"{}")
    found = look(replace(processor, lengths_only=True), tmp_path / "rows").problems
    assert [(p.row_id, p.kind) for p in found] == [
        ("row 2", "missing_file"),
        ("row 3", "undecodable"),
    ], "what headers show is found as ever"


def test_header_lengths_are_not_used_for_decoded_rows(
    processor: MultiTokenProcessor, tmp_path: Path
) -> None:
    asking = replace(processor, lengths_only=True)
    assert processor_fingerprint(asking) == processor_fingerprint(processor)
    folder, rows = tmp_path / "lengths", tmp_path / "rows"
    look(asking, rows, known=LengthStore(folder, asking))
    assert look(asking, rows, known=LengthStore(folder, asking)).num_known_before == len(SIZES)
    report = look(processor, rows, known=LengthStore(folder, processor))
    assert (report.num_known_before, report.num_decoded) == (0, len(SIZES))
    # the other way round they serve: who decoded knows more
    other = tmp_path / "other"
    look(processor, rows, known=LengthStore(other, processor))
    assert look(asking, rows, known=LengthStore(other, asking)).num_known_before == len(SIZES)


def learned(folder: Path) -> list[dict[str, Any]]:
    """Return the logs of all steps, without times."""
    done = json.loads((folder / "stages" / "1-projector" / "done.json").read_text())
    kept = ("step", "loss", "grad_norm", "padding_fraction", "supervised_fraction", "pack_use")
    return [{k: v for k, v in entry.items() if k in kept} for entry in done["log_history"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"args": {"train_sampling_strategy": "group_by_length"}},
        {"packing": True},
        {"packing": True, "args": {"dataloader_num_workers": 1}},
    ],
)
def test_header_lengths_and_decoded_lengths_train_the_same(
    fields_of: Fields, tmp_path: Path, more: dict[str, Any]
) -> None:
    said = {}
    for lengths in ("decode", "headers"):
        out = io.StringIO()
        fields = fields_of(lengths, lengths, **more)
        train(Recipe.model_validate(fields), console=Console(file=out, width=200))
        said[lengths] = out.getvalue()
    assert learned(tmp_path / "headers") == learned(tmp_path / "decode") != []
    files = sorted(path.name for path in (tmp_path / "decode").glob("*.safetensors"))
    assert files
    for name in files:
        one, other = (load_file(tmp_path / lengths / name) for lengths in ("decode", "headers"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert "lengths of 8 rows: 8 without decoding, 0 decoded\n" in said["headers"]
    assert "without decoding" not in said["decode"]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("packing", [False, True])
def test_a_damaged_file_ends_the_run_with_row_and_file_and_the_same_command_continues(
    fields_of: Fields, tmp_path: Path, num_workers: int, packing: bool
) -> None:
    args = {"dataloader_num_workers": num_workers, "save_steps": 1}
    fields = fields_of("run", "headers", damaged=6, packing=packing, args=args)
    fields["train"]["stages"][0]["args"] = {"num_train_epochs": 1}
    recipe, quiet = Recipe.model_validate(fields), Console(quiet=True)
    with pytest.raises(
        RowError,
        match=r"(?s)^row row 6: image: 6\.jpg \(JPEG, 40 x 38 pixels\) is truncated or damaged "
        r".*\(found at step \d.*`data\.lengths: headers`",
    ) as caught:
        train(recipe, console=quiet)
    assert "\n" not in str(caught.value) and caught.value.row_id == "row 6"
    write_rows(tmp_path / "rows")
    if packing:  # or decode what is left: batches are the same
        fields["data"]["lengths"] = "decode"
    train(Recipe.model_validate(fields), console=quiet)
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.slow
def test_items_decoded_before_training_name_their_row_too(fields_of: Fields) -> None:
    fields = fields_of("run", "headers", damaged=6)
    fields["train"] |= {"closed_form": {}, "calibration_items": 8}
    with pytest.raises(RowError, match=r"^row row 6: image: 6\.jpg .* is truncated"):
        train(Recipe.model_validate(fields), console=Console(quiet=True))


@pytest.mark.slow
def test_with_a_feature_cache_every_item_is_decoded_and_bad_rows_are_found_first(
    fields_of: Fields,
) -> None:
    fields = fields_of("run", "headers", damaged=6, feature_cache=True)
    with pytest.raises(RowError, match=r"row 6: image: 6\.jpg .* \(1 of 8 rows are bad"):
        train(Recipe.model_validate(fields), console=Console(quiet=True))


@pytest.mark.slow
def test_held_out_rows_are_always_decoded(fields_of: Fields, tmp_path: Path) -> None:
    fields = fields_of("run", "headers")
    damaged = write_rows(tmp_path / "held_out", damaged=1)
    fields["data"]["eval"] = [{"rows": str(damaged)}]
    with pytest.raises(RowError, match=r"row 1: image: 1\.jpg .* \(1 of 8 rows are bad"):
        train(Recipe.model_validate(fields), console=Console(quiet=True))


TWO_PROCESSES = """
import json, sys
import torch
from rich.console import Console
from multi_token.errors import MultiTokenError
from multi_token.recipe.recipe import Recipe
from multi_token.registry import register_modality
from multi_token.distributed import exit_without_teardown, rank
from multi_token.train.run import train
from tests.data.test_lengths_headers import Watched

torch.set_num_threads(1)
register_modality("watched", Watched)
fields, out = json.load(open(sys.argv[1])), sys.argv[2]
try:
    train(Recipe.model_validate(fields), console=Console(quiet=True))
    said = "nothing"
except MultiTokenError as error:
    said = f"{type(error).__name__}: {error}"
open(f"{out}-{rank()}", "w").write(said)
exit_without_teardown(0)
"""


@pytest.mark.slow
def test_a_damaged_file_ends_all_processes_with_the_same_error(
    fields_of: Fields, tmp_path: Path
) -> None:
    args = {"dataloader_num_workers": 1, "ddp_backend": "gloo"}
    fields = fields_of("run", "headers", damaged=6, args=args)
    fields["train"]["stages"][0]["args"] = {"num_train_epochs": 1}
    script, job = tmp_path / "two.py", tmp_path / "job.json"
    script.write_text(TWO_PROCESSES)
    job.write_text(json.dumps(fields))
    root = Path(__file__).resolve().parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), str(job), str(tmp_path / "said")],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("RowError: row row 6: image: 6.jpg (JPEG, 40 x 38 pixels) is trunc")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("data.on_bad_row=skip", "`data.lengths: headers` .* `data.on_bad_row: skip`"),
        ("data.stream=true", "`data.lengths: headers` .* `data.stream`"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused_with_both_fields(
    fields_of: Fields, more: str, words: str
) -> None:
    import yaml

    text = yaml.safe_dump(fields_of("run", "headers"))
    with pytest.raises(RecipeError, match=words):
        parse_recipe(text, [more, "train.stages.0.args.max_steps=1"])


def test_a_scan_that_decodes_many_rows_suggests_headers(
    fields_of: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "_MANY_ROWS", 7)
    for lengths, suggested in (("decode", True), ("headers", False)):
        recipe = Recipe.model_validate(fields_of(lengths, lengths))
        processor = build_processor(recipe, root=str(tmp_path / "rows"))
        rows = load_rows(str(tmp_path / "rows" / "rows.jsonl"))
        source = sources_module.TrainingSource(
            rows, processor, "rows", headers=lengths == "headers"
        )
        for _ in range(2):  # the second time all are remembered
            out = io.StringIO()
            sources_module.good_rows([source], recipe, Console(file=out, width=300))
            assert ("would read headers alone" in out.getvalue()) == suggested
            suggested = False


@pytest.mark.slow
def test_a_damaged_file_is_named_where_the_reference_of_preferences_is_computed(
    fields_of: Fields,
) -> None:
    fields = fields_of("run", "headers", damaged=6)
    rows = Path(fields["data"]["train"][0]["rows"])
    pairs = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        answer = row["messages"].pop()["content"]
        pairs.append(json.dumps({**row, "chosen": answer, "rejected": "green"}) + "\n")
    rows.write_text("".join(pairs))
    fields["train"]["stages"][0]["dpo"] = {}
    with pytest.raises(RowError, match=r"row 6: image: 6\.jpg .*found at the reference of both"):
        train(Recipe.model_validate(fields), console=Console(quiet=True))


def test_rows_without_header_lengths_are_decoded_and_counted(
    fields_of: Fields, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(fields_of("run", "headers"))
    folder = tmp_path / "rows"
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (60, 20), "red").save(file, "PNG")
    plain = file.getvalue()
    end, exif = plain.index(b"IEND") - 4, io.BytesIO()
    putchunk(exif, b"eXIf", turned.tobytes()[6:])
    (folder / "0.jpg").write_bytes(plain[:end] + exif.getvalue() + plain[end:])
    with (folder / "rows.jsonl").open("a") as rows_file:
        messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "red"}]
        rows_file.write(json.dumps({"id": "text", "messages": messages}) + "\n")
        messages[0]["content"] = "And <image>?"
        same = {"id": "same", "messages": messages, "image": "0.jpg"}
        rows_file.write(json.dumps(same) + "\n")
    rows = load_rows(str(folder / "rows.jsonl"))
    processor = build_processor(recipe, root=str(folder))
    source = sources_module.TrainingSource(rows, processor, "rows", headers=True)
    DECODED.clear()
    for said in (
        "lengths of 10 rows: 9 without decoding, 1 decoded\n",
        "lengths of 10 rows: 0 without decoding, 0 decoded, 10 remembered\n",
    ):
        out = io.StringIO()
        (found,) = sources_module.good_rows([source], recipe, Console(file=out, width=300))
        assert said in out.getvalue()
        assert DECODED == ["0.jpg"]
    expected = look(processor, folder)
    assert list(found.lengths) == [length.num_tokens for length in expected.lengths]
