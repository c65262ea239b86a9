"""train/packing.py: full packs, equal for all processes, every row once, and the same again."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from multi_token.errors import Interrupted, LanguageModelError, RecipeError
from multi_token.language_model.segment_attention import SEGMENT_ATTENTION
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import TrainSpec
from multi_token.train import stage as stage_module
from multi_token.train.families import SharedMediaGroup, find_shared_media_groups
from multi_token.train.packing import (
    PackingPlan,
    PackSampler,
    best_fit,
    group_into_steps,
    packing_plan,
)
from multi_token.train.resume import last_checkpoint
from multi_token.train.run import train
from multi_token.types import Conversation, Media, Message, Text

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)


def realistic(num_rows: int, seed: int = 0) -> list[int]:
    """Log-normal, median 120 tokens, a few long ones, as conversations have."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(torch.randn(num_rows, generator=generator) * 0.7 + math.log(120))
    return [int(n) for n in drawn.clamp(16, 1024)]


def rows_of(sampler: PackSampler, epoch: int) -> list[int]:
    return sorted(row for step in sampler.steps(epoch) for pack in step for row in pack)


@pytest.mark.parametrize("num_processes", [1, 2, 8])
def test_packs_of_realistic_rows_are_full_equal_and_hold_every_row_once(num_processes: int) -> None:
    rows = PackingPlan(realistic(4000), max_tokens=2048)
    sampler = PackSampler(rows, seed=0, num_processes=num_processes)
    assert sampler.use >= 0.97
    for epoch in range(3):
        steps = sampler.steps(epoch)
        assert len(steps) == len(sampler)
        assert rows_of(sampler, epoch) == list(range(4000))
        for step in steps:
            sizes = [rows.tokens_of(pack) for pack in step]
            assert len(step) == num_processes
            assert max(sizes) <= 2048 and min(sizes) >= 0.97 * max(sizes)


def test_items_have_a_budget_of_their_own() -> None:
    lengths = realistic(500)
    num_items = [i % 3 for i in range(500)]
    rows = PackingPlan(lengths, 2048, num_items, max_items=10)
    sampler = PackSampler(rows, seed=0, num_processes=2)
    packs = [pack for step in sampler.steps(0) for pack in step]
    assert rows_of(sampler, 0) == list(range(500))
    assert all(sum(num_items[row] for row in pack) <= 10 for pack in packs)
    assert max(rows.tokens_of(pack) for pack in packs) <= 2048
    fewest = sum(num_items) / 10
    assert sum(lengths) / 2048 < 0.9 * fewest, "items are what fills a pack here"
    assert len(packs) <= 1.06 * fewest


def test_a_row_goes_into_the_fullest_pack_that_has_room() -> None:
    rows = PackingPlan([6, 5, 4, 3, 2], max_tokens=10)
    assert best_fit(rows, range(5)) == [(0, 2), (1, 3, 4)]


def test_the_plan_depends_on_seed_and_epoch_alone() -> None:
    rows = PackingPlan(realistic(300), max_tokens=1024)
    one, other = (PackSampler(rows, seed=3, num_processes=2, process=p) for p in (0, 1))
    mine, theirs = list(one), list(other)
    assert len(mine) == len(theirs) == len(one)
    assert sorted(row for pack in (*mine, *theirs) for row in pack) == list(range(300))
    one.set_epoch(1)
    second = list(one)
    assert second != mine
    companions = [{frozenset(pack) for pack in epoch} for epoch in (mine, second)]
    assert len(companions[0] & companions[1]) <= 0.1 * len(mine)
    again = PackSampler(rows, seed=3, num_processes=2)
    again.set_epoch(1)
    assert list(again) == second
    assert list(PackSampler(rows, seed=4, num_processes=2)) != mine


def test_every_epoch_has_as_many_packs_as_the_first() -> None:
    """With windows so small that luck differs between epochs."""
    rows = PackingPlan(realistic(60), max_tokens=1024)
    numbers = set()
    for seed in range(10):
        sampler = PackSampler(rows, seed=seed, num_processes=2, window=12)
        numbers.add(len(sampler))
        for epoch in range(6):
            assert len(sampler.steps(epoch)) == len(sampler)
            assert rows_of(sampler, epoch) == list(range(60))
    assert len(numbers) > 1, "the windows were not small enough for this test"


def test_few_rows_are_dealt_to_all_processes_or_refused() -> None:
    rows = PackingPlan([10, 20, 30, 40], max_tokens=100)
    (step,) = group_into_steps(rows, best_fit(rows, range(4)), 4)
    assert sorted(step) == [(0,), (1,), (2,), (3,)]
    with pytest.raises(RecipeError, match="4 rows cannot be 5 packs"):
        PackSampler(rows, seed=0, num_processes=5)


def test_budgets_below_a_row_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.pack_tokens is 50, but a row has 60 tokens"):
        PackingPlan([60, 20], max_tokens=50)
    with pytest.raises(RecipeError, match=r"train\.pack_items is 2, but a row has 3 items"):
        PackingPlan([60, 20], 60, [3, 0], max_items=2)


def test_a_pack_has_by_default_the_tokens_of_a_batch() -> None:
    stages = [{"name": "one", "learn": {"projectors": 1e-3}}]

    def budget(lengths: list[int], **fields: Any) -> Any:
        spec = TrainSpec.model_validate({"output_dir": "run", "stages": stages, **fields})
        return packing_plan(spec, lengths, [], num_rows=4)

    assert budget([10, 20, 30]) is None
    assert budget([10, 20, 30], packing=True).max_tokens == 80
    assert budget([10, 20, 300], packing=True).max_tokens == 440
    assert budget([1, 1, 1, 1, 1, 100], packing=True).max_tokens == 100
    assert budget([10, 20, 30], packing=True, pack_tokens=64).max_tokens == 64


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=QUIET)


def losses(out: Path) -> list[float]:
    (done,) = (out / "stages").glob("1-*/done.json")
    return [e["loss"] for e in json.loads(done.read_text())["log_history"] if "loss" in e]


ADAPTER = {"name": "adapter", "learn": {"projectors": 1e-2, "adapter": 1e-2}}


def test_a_pack_of_all_rows_trains_as_their_batch_does(
    mixed_fields: Fields, tmp_path: Path
) -> None:
    stages = [{**ADAPTER, "args": {"max_steps": 4, "per_device_train_batch_size": 6}}]
    trained(mixed_fields(tmp_path / "padded", stages=stages))
    model = trained(mixed_fields(tmp_path / "packed", stages=stages, packing=True))
    found, expected = losses(tmp_path / "packed"), losses(tmp_path / "padded")
    assert len(found) == 4 and found == pytest.approx(expected, rel=1e-4)
    assert model.language_model.get_base_model().config._attn_implementation == "sdpa"


def test_accumulated_packs_train_as_one_batch_does(mixed_fields: Fields, tmp_path: Path) -> None:
    """Each epoch is one step, however its rows are packed."""
    whole = {"max_steps": 4, "per_device_train_batch_size": 6}
    trained(mixed_fields(tmp_path / "padded", stages=[{**ADAPTER, "args": whole}]))
    parts = {"max_steps": 4, "gradient_accumulation_steps": 8}
    trained(
        mixed_fields(
            tmp_path / "packed", stages=[{**ADAPTER, "args": parts}], packing=True, pack_tokens=64
        )
    )
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-4)


class _InterruptAt(TrainerCallback):
    """Sends this process the signal that Ctrl-C sends, at one step."""

    def __init__(self, trainer: Any, step: int, seen: list[str]) -> None:
        self.trainer, self.step, self.seen = trainer, step, seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model = self.trainer.multi_token_model.language_model
        self.seen.append(
            getattr(model, "get_base_model", lambda: model)().config._attn_implementation
        )
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(
    mixed_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """In the first epoch, and in a later one, which is packed otherwise."""
    stages = [{**ADAPTER, "args": {"max_steps": 7}}]
    packing: dict[str, Any] = {"stages": stages, "packing": True, "pack_tokens": 64}
    trained(mixed_fields(tmp_path / "whole", **packing, pack_items=3))

    bar, seen = stage_module.ProgressBarCallback, []

    def bar_and_signal(trainer: Any, console: Any, title: str) -> Any:
        trainer.add_callback(_InterruptAt(trainer, step, seen))
        assert len(trainer.get_train_dataloader()) in (3, 4)
        return bar(trainer, console, title)

    fields = mixed_fields(tmp_path / "cut", **packing, pack_items=3)
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "ProgressBarCallback", bar_and_signal)
        with pytest.raises(Interrupted, match=f"stopped at step {step + 1} of 7"):
            trained(fields)
    assert set(seen) == {SEGMENT_ATTENTION}
    checkpoint = last_checkpoint(tmp_path / "cut" / "stages" / "1-adapter")
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{step + 1}"
    trained(fields)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name in ("projectors.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("cut", "whole"))
        assert ours and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_packing_on_a_model_that_leaks_is_refused_before_rows_are_read(
    recipe_fields: Fields, families: Any, tmp_path: Path
) -> None:
    families.save_tiny_model("Mamba2", tmp_path / "mamba2")
    fields = recipe_fields(tmp_path / "run", packing=True)
    fields["model"]["language_model"] = str(tmp_path / "mamba2")
    with pytest.raises(LanguageModelError, match="Mamba2ForCausalLM cannot take packed rows"):
        trained(fields)


def test_a_sampling_strategy_beside_packing_is_refused(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run", packing=True)
    fields["train"]["args"]["train_sampling_strategy"] = "group_by_length"
    with pytest.raises(RecipeError, match="packs are batches of their own"):
        trained(fields)


def test_families_stay_together_and_count_what_they_share_once() -> None:
    spec = TrainSpec.model_validate(
        {
            "output_dir": "run",
            "stages": [{"name": "one", "learn": {"projectors": 1e-3}}],
            "packing": True,
            "share_media": True,
            "pack_tokens": 100,
            "pack_items": 4,
        }
    )
    lengths, num_items = [50, 40, 60, 70, 30, 80, 90], [1, 1, 1, 2, 1, 0, 1]
    families = [SharedMediaGroup((0, 2), 40, 1), SharedMediaGroup((1, 3, 4, 6), 25, 1)]
    rows = packing_plan(spec, lengths, num_items, num_rows=4, shared_media=families)
    assert rows is not None
    assert list(rows.units) == [(5,), (0, 2), (1, 3, 4), (6,)], "the second one fills two packs"
    assert list(rows.lengths) == [80, 70, 90, 90]
    assert list(rows.num_items) == [0, 1, 2, 1]
    sampler = PackSampler(rows, seed=0)
    packs = list(sampler)
    assert sorted(row for pack in packs for row in pack) == list(range(7))
    assert [0, 2] in packs and [1, 3, 4] in packs


def test_rows_are_a_family_only_if_their_samples_begin_alike(model: Any, data: Path) -> None:
    def row(picture: str, *texts: str) -> Any:
        parts = (Text(texts[0]), Media("image", str(data / picture)), Text(texts[1]))
        said = Message("assistant", (Text("yes"),))
        return model.processor(Conversation((Message("user", parts), said), id=picture))

    samples = [
        row("red.png", "Look: ", " is it red?"),
        row("red.png", "Tell me, ", " is it blue?"),
        row("blue.png", "Look: ", " what is it?"),
        row("blue.png", "Look: ", " is it one?"),
        row("green.png", "Look: ", " what is it?"),
    ]
    asked: list[int] = []

    def read(index: int) -> Any:
        asked.append(index)
        return samples[index]

    keys = ["red", "red", "blue", "blue", "green"]
    (family,) = find_shared_media_groups(keys, read)
    assert family.rows == (2, 3) and family.num_items == 1
    place = samples[2].media_spans[0]
    assert family.num_tokens >= place.start + place.length
    assert asked == [0, 1, 2, 3], "a row on its own is not read"
    assert find_shared_media_groups([None] * 5, read) == []


def test_shared_media_train_as_rows_on_their_own_do(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "images": [str(data / f"{colour}.png")],
            "messages": [
                {"role": "user", "content": f"Here is <image>. {text}"},
                {"role": "assistant", "content": answer},
            ],
        }
        for colour in ("red", "blue")
        for text, answer in (("Is it red?", "yes"), ("What is it?", colour), ("One?", "no"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"max_steps": 4, "per_device_train_batch_size": 6, "use_cpu": True, "logging_steps": 1}
    for name, share in (("rows", False), ("shared", True)):
        fields = recipe_fields(
            tmp_path / name, stages=[ADAPTER], args=args, packing=True, share_media=share
        )
        fields["data"]["train"] = [{"rows": str(path)}]
        trained(fields)
    assert len(losses(tmp_path / "rows")) == 4
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "rows"), rel=1e-4)
