"""Several processes train like one: DDP, FSDP, packs, QLoRA (distributed.py, train/fsdp.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from multi_token.recipe.recipe import Recipe
from multi_token.registry import register_modality
from multi_token.testing.encoders import tiny_wav2vec2
from multi_token.testing.files import write_tone
from multi_token.train.resume import run_lock
from multi_token.train.run import train
from tests.train.in_processes import Wavering
from tests.train.launchers import launched

pytestmark = pytest.mark.slow

Fields = Callable[..., dict[str, Any]]
SCRIPT = Path(__file__).with_name("in_processes.py")
# what each of 16 rows shows: in the second step of four rows, the second process has only text
SHOWN = [
    *(["image"], ["wavering"], ["image", "wavering"], []),
    *(["wavering"], ["image"], [], []),
    *([], ["image"], ["wavering"], ["wavering", "wavering"]),
    *(["image"], [], [], ["wavering"]),
]
LEARN = {
    "projector": {"projectors": 3e-3},
    "adapter": {"projectors": 3e-3, "adapter": 2e-3},
    "full": {"projectors": 3e-3, "language_model": 1e-3},
}
ENCODER = {
    "encoder": {"projectors": 3e-3, "encoders": {"image": 1e-3}},
    "speech": {"projectors": 3e-3, "encoders": {"speech": 1e-3}},
}
# features of the layer before the last one, so that no gradient reaches the last layer and norm
BEFORE_LAST = {"features": "patches", "layer": -2, "projector": {"type": "mlp"}}
ONE = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
TWO = {"per_device_train_batch_size": 2}
FOUR = {"per_device_train_batch_size": 1}
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
# packs have the tokens of two rows of mean length, in any number of processes
PACKS_OF_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
AGAIN = {"per_device_train_batch_size": 2, "activation_checkpointing": True}
# logits of a few tokens at a time, in other numbers of chunks on each process
CHUNKS = {"logits_megabytes": 0.004}
RANDOM = {"train_sampling_strategy": "random"}
# evaluated after the steps 2, 4, 6 and 8, saved after 3, 6 and 8, and where the run is stopped
WATCHED = {"max_steps": 8, "eval_steps": 2, "save_steps": 3}
STOPPED_AT = 7
NEXT_STEP = {"eval": 3, "save": 4, "eval then save": 7, "resume": 8}
# the loss falls, so the highest one is that of the first evaluation
BEST = {
    "max_steps": 3,
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "greater_is_better": True,
}
HELD_OUT = {"held_out": True, "blind": False, "num_samples": 0}


@pytest.fixture(scope="module")
def tied(parts: Path, tmp_path_factory: Any) -> Path:
    """The tiny language model with one matrix for embeddings and head."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tied") / "language_model"
    config = AutoConfig.from_pretrained(parts / "language_model", tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(parts / "language_model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: Any) -> dict[str, Any]:
    """Model and data of a run on recordings, by an encoder with LayerDrop and without dropout."""
    folder = tmp_path_factory.mktemp("speech")
    encoder = tiny_wav2vec2(folder / "encoder", norm="layer")
    config = json.loads((folder / "encoder" / "config.json").read_text())
    config |= {key: 0.0 for key in config if key.endswith("_dropout")} | {"layerdrop": 0.5}
    (folder / "encoder" / "config.json").write_text(json.dumps(config))
    lines = []
    for number in range(16):
        name = f"{number}.wav"
        write_tone(folder / name, 0.3 + 0.03 * (number * 5 % 16), 16_000, hertz=200 + 40 * number)
        turns = [("user", "Say <speech>"), ("assistant", "red blue green"[: 3 + number % 11])]
        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append(json.dumps({"id": name, "speech": name, "messages": messages}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return {
        "modalities": {
            "speech": {
                "type": "speech",
                "encoder": encoder,
                "projector": {"type": "stack", "factor": 8},
            }
        },
        "data": {"train": [{"rows": str(folder / "rows.jsonl")}]},
    }


@pytest.fixture(scope="module")
def fields_of(
    recipe_fields: Fields, data: Path, tied: Path, speech: dict[str, Any], tmp_path_factory: Any
) -> Fields:
    """Fields of a run: trainable parts, batches, and more."""
    register_modality("wavering", Wavering)
    folder = tmp_path_factory.mktemp("sixteen")
    lines = []
    for number, shown in enumerate(SHOWN):
        row: dict[str, Any] = {
            "id": str(number),
            "messages": [
                {"role": "user", "content": "What is " + " ".join(f"<{s}>" for s in shown) + "?"},
                {"role": "assistant", "content": "red blue green"[: 3 + number % 11]},
            ],
        }
        if "image" in shown:
            row["images"] = [str(data / f"{('red', 'blue', 'green')[number % 3]}.png")]
        values = [[float((number * k) % 5) for k in range(5)]] * shown.count("wavering")
        if values:
            row["wavering"] = values if len(values) > 1 else values[0]
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))

    def fields(
        out: Path,
        learn: str,
        args: dict[str, Any],
        *,
        is_tied: bool = False,
        quantization: str | None = None,
        held_out: bool = False,
        image: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        common = {
            "use_cpu": True,
            "logging_steps": 1,
            "max_steps": 6,
            "lr_scheduler_type": "constant",
            # Adam divides by the gradient's size: of one near zero it would take the rounding for
            # a direction
            "adam_epsilon": 1e-5,
            "save_steps": 2,
            "report_to": [],
        }
        if not more.get("packing"):
            order = "group_by_length" if learn == "projector" else "sequential"
            common["train_sampling_strategy"] = order
        stages = [{"name": learn, "learn": (LEARN | ENCODER)[learn]}]
        made = recipe_fields(out, stages=stages, args={**common, **args}, **more)
        made["model"]["modalities"]["wavering"] = {
            "type": "wavering",
            "projector": {"type": "expand", "factor": 2},
        }
        made["model"]["modalities"]["image"] |= image or {}
        if is_tied:
            made["model"]["language_model"] = str(tied)
        if quantization is not None:
            made["model"]["quantization"] = quantization
        rows = [{"rows": str(folder / "rows.jsonl")}]
        made["data"] = {"train": rows, "eval": rows} if held_out else {"train": rows}
        if learn == "speech":
            made["model"]["modalities"], made["data"] = speech["modalities"], speech["data"]
        return made

    return fields


def processes(num: int, folder: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of `num` processes: by run, a list with an entry of each."""
    job, out = folder / "job.json", folder / "seen.json"
    job.write_text(json.dumps({"out": str(out), "runs": runs}))
    launched(num, [str(SCRIPT), str(job)])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(fields_of: Fields, tmp_path_factory: Any) -> Callable[..., Path]:
    """The folder of a run by one process, each trained once."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)

    def run(learn: str, args: dict[str, Any] | None = None, **more: Any) -> Path:
        out = folder / f"{learn}-{args}-{more}"
        if not out.exists():
            fields = fields_of(out, learn, {**ONE, **(args or {})}, **more)
            train(Recipe.model_validate(fields), console=Console(quiet=True))
        return out

    return run


@pytest.fixture(scope="module")
def two(fields_of: Fields, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """All that two processes are asked, in one start of them."""
    folder = tmp_path_factory.mktemp("two")
    rows = fields_of(folder, "full", TWO)["data"]["train"][0]["rows"]
    here, elsewhere = folder / "here", folder / "elsewhere"
    for place, word in ((here, "red"), (elsewhere, "tan")):
        place.mkdir()
        (place / "rows.jsonl").write_text(
            Path(rows).read_text().replace("red blue", f"{word} blue")
        )

    def run(name: str, learn: str, args: dict[str, Any] = TWO, **more: Any) -> dict[str, Any]:
        keys = ("stop_at", "poison_at", "other", "folders", "without")
        around = {key: more.pop(key) for key in keys if key in more}
        out = more.pop("out", name)
        return {
            "name": name,
            "fields": fields_of(folder / out, learn, args, **more),
            **around,
        }

    matrix = [
        run(f"{learn} {fsdp} {part}", learn, {**TWO, **WATCHED}, fsdp=fsdp, **HELD_OUT, **more)
        for learn in LEARN
        for fsdp in (False, True)
        for part, stop in (("begun", {"stop_at": STOPPED_AT}), ("ended", {}))
        for more in ({**stop, "out": f"watched {learn} {fsdp}"},)
    ]
    runs = [
        *matrix,
        *[
            run(f"best {learn}", learn, {**TWO, **BEST}, fsdp=True, **HELD_OUT)
            for learn in ("adapter", "full")
        ],
        run("accumulated", "adapter", ACCUMULATED),
        run("cached", "projector", feature_cache=True),
        run("adapter tied", "adapter", fsdp=True, is_tied=True, **CHUNKS),
        run("full tied", "full", ACCUMULATED, fsdp=True, is_tied=True, **CHUNKS),
        run("encoder", "encoder", image=BEFORE_LAST),
        run("encoder again", "encoder", AGAIN, image=BEFORE_LAST),
        run("speech again", "speech", {**AGAIN, "max_steps": 3}),
        run("packed", "adapter", packing=True, **CHUNKS),
        run("packed pieces", "adapter", packing=True, fsdp=True),
        run("ddp stopped", "adapter", stop_at=3),
        run("full stopped", "full", fsdp=True, stop_at=3),
        run("by length on", "projector", stop_at=5, out="by length"),
        run("by length on again", "projector", out="by length"),
        run("random on", "projector", {**TWO, **RANDOM}, stop_at=5, out="random"),
        run("random on again", "projector", {**TWO, **RANDOM}, out="random"),
        run("packed on", "adapter", packing=True, stop_at=5, out="packed twice"),
        run("packed on again", "adapter", packing=True, out="packed twice"),
        run("packed stopped", "adapter", packing=True, stop_at=3),
        run("for four", "adapter", stop_at=3),
        run("pieces for four", "full", fsdp=True, stop_at=3),
        run("packed for four", "adapter", PACKS_OF_TWO, packing=True, stop_at=3),
        run("no number", "adapter", poison_at=3),
        run("no number in pieces", "adapter", fsdp=True, poison_at=3),
        *([run("qlora", "adapter", quantization="4bit")] if find_spec("bitsandbytes") else []),
        run("old", "adapter", fsdp=True, without="_sync_replicated_trainable_parameters"),
        run("other recipe", "projector", other={"train.seed": 5}),
        run("in use", "projector"),
        run("other rows", "projector", folders=[str(here), str(elsewhere)]),
    ]
    runs[-1]["fields"]["data"] = {"train": [{"rows": "rows.jsonl"}]}
    (old,) = (one for one in runs if one["name"] == "old")
    old["fields"]["data"] = {"train": [{"rows": "missing.jsonl"}]}
    with run_lock(folder / "in use", print):
        return folder, processes(2, folder, runs)


def log(out: Path) -> list[dict[str, float]]:
    (done,) = (out / "stages").glob("1-*/done.json")
    return json.loads(done.read_text())["log_history"]


def history(out: Path) -> list[tuple[float, float]]:
    return [(e["loss"], e["grad_norm"]) for e in log(out) if "loss" in e]


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = [out / "projectors.safetensors"]
    files += out.glob("encoders.safetensors")
    files += (out / "adapter").glob("*.safetensors")
    files += (out / "language_model").glob("*.safetensors")
    return {f"{f.name}: {k}": v for f in files for k, v in load_file(f).items()}


def assert_equal_runs(one: Path, other: Path, *, num_steps: int = 6) -> None:
    """Losses, gradient norms and final weights within 1e-5."""
    assert len(history(one)) == num_steps
    torch.testing.assert_close(
        torch.tensor(history(other)), torch.tensor(history(one)), atol=1e-5, rtol=1e-5
    )
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_gradient_accumulation_in_two_processes_trains_like_one(two: Any, alone: Any) -> None:
    assert_equal_runs(alone("adapter"), two[0] / "accumulated")


def test_a_feature_cache_that_two_processes_fill_changes_nothing(two: Any, alone: Any) -> None:
    assert_equal_runs(alone("projector"), two[0] / "cached")


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("after", NEXT_STEP)
def test_two_processes_go_on_like_one_after(
    two: Any, alone: Any, learn: str, fsdp: bool, after: str
) -> None:
    folder, seen = two
    assert all("stopped at step 7 of 8" in one["error"] for one in seen[f"{learn} {fsdp} begun"])
    assert [one["steps"] for one in seen[f"{learn} {fsdp} ended"]] == [1, 1]
    wrapper = "FSDPMultiTokenForConditionalGeneration" if fsdp else "DistributedDataParallel"
    assert {one["wrapper"] for one in seen[f"{learn} {fsdp} ended"]} == {wrapper}
    one, other = alone(learn, WATCHED, **HELD_OUT), folder / f"watched {learn} {fsdp}"
    before = NEXT_STEP[after] - 1
    assert history(other)[before] == pytest.approx(history(one)[before], abs=1e-5, rel=1e-5)
    if after == "resume":
        assert_equal_runs(one, other, num_steps=8)


@pytest.mark.parametrize("learn", LEARN)
def test_no_process_keeps_weights_unsharded_after_an_evaluation(two: Any, learn: str) -> None:
    folder, seen = two
    for one in seen[f"{learn} True ended"]:
        assert one["num_pieces_after_evaluation"] == one["num_pieces"] > 10
        assert 0.4 < one["share"] < 0.6
    # of shards and of copies, the evaluations after the same four steps find the same losses
    ours, theirs = (
        [e["eval_loss"] for e in log(folder / f"watched {learn} {fsdp}") if "eval_loss" in e]
        for fsdp in (False, True)
    )
    assert len(ours) == 4
    assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("learn", ["adapter", "full"])
def test_the_best_checkpoint_is_the_result_of_shards_too(two: Any, learn: str) -> None:
    folder = two[0] / f"best {learn}"
    found = [e["eval_loss"] for e in log(folder) if "eval_loss" in e]
    assert len(found) == 3 and max(found) == found[0]
    best, result = weights(folder / "stages" / f"1-{learn}" / "checkpoint-1"), weights(folder)
    assert best.keys() == result.keys()
    assert all(torch.equal(result[key], best[key]) for key in best)


@pytest.mark.parametrize("learn", ["adapter", "full"])
def test_fsdp_of_tied_weights_trains_like_one_process(two: Any, alone: Any, learn: str) -> None:
    assert_equal_runs(alone(learn, is_tied=True), two[0] / f"{learn} tied")


@pytest.mark.parametrize("name", ["encoder", "encoder again"])
def test_a_whole_encoder_trains_in_two_processes_like_in_one(
    two: Any, alone: Any, name: str
) -> None:
    assert [one["wrapper"] for one in two[1][name]] == ["DistributedDataParallel"] * 2
    assert_equal_runs(alone("encoder", image=BEFORE_LAST), two[0] / name)


def test_an_encoder_with_layerdrop_trains_in_two_processes_like_in_one(
    two: Any, alone: Any
) -> None:
    # a layer that one process skips has no gradient, for which DDP would wait
    one = alone("speech", {"max_steps": 3})
    assert_equal_runs(one, two[0] / "speech again", num_steps=3)


def test_packs_of_two_processes_train_like_one_that_takes_both(two: Any, alone: Any) -> None:
    one = alone("adapter", PACKS_OF_TWO, packing=True)
    for name in ("packed", "packed pieces"):
        assert_equal_runs(one, two[0] / name)


def test_qlora_in_two_processes_trains_like_one(two: Any, alone: Any) -> None:
    pytest.importorskip("bitsandbytes")
    assert [one["wrapper"] for one in two[1]["qlora"]] == ["DistributedDataParallel"] * 2
    assert_equal_runs(alone("adapter", quantization="4bit"), two[0] / "qlora")


@pytest.mark.parametrize("name", ["no number", "no number in pieces"])
def test_a_loss_of_nan_in_one_process_stops_all_with_one_message(two: Any, name: str) -> None:
    (sentence,) = {one["error"] for one in two[1][name]}
    # of the rows 8 to 11 of the third step, the second process has the last two
    assert sentence.startswith(
        "MultiTokenError: the loss is nan at step 3, in the batch of the rows 10, 11; lower"
    )


def test_a_full_model_that_two_processes_trained_loads_in_one(two: Any) -> None:
    from multi_token.model import MultiTokenForConditionalGeneration

    folder, _ = two
    (file,) = (folder / "watched full True" / "language_model").glob("*.safetensors")
    model = MultiTokenForConditionalGeneration.from_pretrained(folder / "watched full True")
    expected = load_file(file)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.language_model.model.layers[0].mlp.up_proj.weight, expected)


@pytest.mark.parametrize(
    ("name", "learn", "args", "more"),
    [
        ("ddp stopped", "adapter", {}, {}),
        ("full stopped", "full", {}, {}),  # without fsdp as well
        ("packed stopped", "adapter", PACKS_OF_TWO, {"packing": True}),
    ],
)
def test_one_process_finishes_a_run_of_two(
    two: Any, alone: Any, fields_of: Fields, name: str, learn: str, args: Any, more: Any
) -> None:
    folder, seen = two
    assert all("stopped at step 3 of 6" in one["error"] for one in seen[name])
    fields = fields_of(folder / name, learn, {**ONE, **args}, **more)
    train(Recipe.model_validate(fields), console=Console(quiet=True))
    assert_equal_runs(alone(learn, args, **more), folder / name)


@pytest.mark.parametrize(
    ("name", "learn", "args", "more"),
    [
        ("by length", "projector", {}, {}),
        ("random", "projector", RANDOM, {}),
        ("packed twice", "adapter", PACKS_OF_TWO, {"packing": True}),
    ],
)
def test_two_processes_resume_within_the_second_epoch_with_its_rows(
    two: Any, alone: Any, name: str, learn: str, args: Any, more: Any
) -> None:
    folder, seen = two
    before, after = [key for key in seen if key.startswith(name.split(" twice")[0] + " on")]
    assert all("stopped at step 5 of 6" in one["error"] for one in seen[before])
    assert [one["steps"] for one in seen[after]] == [1, 1]
    assert_equal_runs(alone(learn, args, **more), folder / name)


def test_all_processes_leave_a_folder_that_another_run_uses(two: Any) -> None:
    folder, seen = two
    (sentence,) = {one["error"] for one in seen["in use"]}
    assert f"/in use is in use by process {os.getpid()} on " in sentence
    assert [path.name for path in (folder / "in use").iterdir()] == [".lock"]


def test_a_transformers_that_cannot_train_shards_is_refused_before_data_are_read(two: Any) -> None:
    _, seen = two
    (sentence,) = {one["error"] for one in seen["old"]}
    assert sentence.startswith("RecipeError: train.fsdp in several processes needs transformers 5.")


def test_processes_with_other_recipes_or_other_rows_are_refused(two: Any) -> None:
    _, seen = two
    for one in seen["other recipe"]:
        assert one["error"].startswith(
            "RecipeError: the recipe of process 1 differs from that of process 0"
        )
    for one in seen["other rows"]:
        assert (
            "the data (rows of rows.jsonl) of process 1 differs from that of process 0"
            in one["error"]
        )


def test_four_processes_train_like_one_and_finish_a_run_of_two(
    fields_of: Fields, alone: Any, two: Any, tmp_path: Path
) -> None:
    folder, seen = two
    begun = ("for four", "pieces for four", "packed for four")
    assert all("stopped at step 3 of 6" in one["error"] for name in begun for one in seen[name])
    packs = {"per_device_train_batch_size": 2}
    fields = {
        "replicas": fields_of(tmp_path / "replicas", "full", FOUR, fsdp={"replicas": 2}),
        "plain": fields_of(tmp_path / "plain", "projector", FOUR),
        "for four": fields_of(folder / "for four", "adapter", FOUR),
        "pieces for four": fields_of(folder / "pieces for four", "full", FOUR, fsdp=True),
        "packed for four": fields_of(folder / "packed for four", "adapter", packs, packing=True),
    }
    seen = processes(4, tmp_path, [{"name": k, "fields": f} for k, f in fields.items()])
    assert all(0.4 < one["share"] < 0.6 for one in seen["replicas"])
    assert all(0.2 < one["share"] < 0.3 for one in seen["pieces for four"])
    assert [one["steps"] for name in begun for one in seen[name]] == [3] * 12
    assert_equal_runs(alone("full"), tmp_path / "replicas")
    assert_equal_runs(alone("projector"), tmp_path / "plain")
    assert_equal_runs(alone("adapter"), folder / "for four")
    assert_equal_runs(alone("full"), folder / "pieces for four")
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_equal_runs(alone("adapter", accumulated, packing=True), folder / "packed for four")
