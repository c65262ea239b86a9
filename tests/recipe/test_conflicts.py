"""recipe/conflicts.py: each row of the table fires alone, and is in the documentation."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from multi_token.errors import RecipeError
from multi_token.recipe.conflicts import CONFLICTS, Conflict
from multi_token.recipe.recipe import parse_recipe

Fields = Callable[..., dict[str, Any]]
DOCS = Path(__file__).resolve().parents[2] / "docs"

STREAM = "data.stream=true"
WEIGHTED = "[{rows: rows.jsonl, weight: 2}]"
SORTED = "train.args.train_sampling_strategy=group_by_length"
DPO, DISTILLATION = "train.stages.0.dpo={}", "train.stages.0.distillation={}"
ADAPTER = "train.stages.0.learn.adapter=1e-4"
FULL = "train.stages.0.learn.language_model=1e-5"
LORA = "{encoders: {image: {lr: 1e-5, lora: {r: 4}}}}"
TWO = "train.stages=[{name: a, learn: %s}, {name: b, learn: %s}]"

# Overrides that stand without conflict, the one that makes it, and what its message names.
EXAMPLES: list[tuple[list[str], str, str]] = [
    (["data.lengths=headers"], "data.on_bad_row=skip", "set on_bad_row to raise"),
    ([STREAM], "data.lengths=headers", "leave one of them out"),
    ([], f"data.train={WEIGHTED}", "`weight` of 'rows.jsonl' under `data.train`"),
    ([STREAM], "train.stages.0.data=[{rows: a.json}]", "`data` of its own, and `data.stream`"),
    ([], f"train.stages.0.data={WEIGHTED}", "`weight` of 'rows.jsonl' is a source's part"),
    ([], f"data.eval={WEIGHTED}", "`weight` of 'rows.jsonl' under `data.eval`"),
    ([], "train.args.eval_strategy=epoch", "eval_strategy=epoch needs rows"),
    ([], "train.args.load_best_model_at_end=true", "load_best_model_at_end needs evaluations"),
    ([], "train.args.save_strategy=best", "save_strategy=best needs evaluations"),
    (
        [TWO % ("{projectors: 1}", "{projectors: 1}")],
        "train.stages.1.args.use_cpu=false",
        "'use_cpu' is for all stages",
    ),
    ([STREAM], "train.stages.0.args={max_steps: null}", "stage 'projector' trains on a stream"),
    ([STREAM], SORTED, "strategy is 'group_by_length', which needs the lengths"),
    ([STREAM], "train.feature_cache=auto", "as `path`, or set it to false"),
    ([STREAM, "data.max_tokens=120"], "train.packing=true", r"is None, .*max_tokens \(120\)"),
    (["train.packing=true"], "train.args.auto_find_batch_size=true", "one pack; set `pack_tokens`"),
    (["train.packing=true"], SORTED, "is 'group_by_length', but `train.packing`"),
    ([], "train.pack_tokens=64", "`pack_tokens` needs `packing: true`"),
    ([], "train.pack_items=4", "`pack_items` needs `packing: true`"),
    (["train.packing={share: true}"], 'model.modalities.image.facts="{width} "', "text that only"),
    (["train.fsdp=true"], "model.quantization=4bit", r"quantization \(4bit\) stores integers"),
    (["train.fsdp=true"], "train.stages.0.args.fsdp=true", "keep `train.fsdp`"),
    (["train.fsdp=true"], "train.args.deepspeed=zero.json", "`deepspeed` of `args`"),
    (
        ["train.fsdp=true", DISTILLATION],
        "train.stages.0.distillation.missing=cross_entropy",
        "teacher of stage 'projector'",
    ),
    ([DPO], "train.fsdp=true", "`fsdp` and the `dpo` of stage 'projector'"),
    ([DPO], "train.packing=true", "`packing` and the `dpo` of stage 'projector'"),
    ([DPO], STREAM, "`data.stream` and the `dpo` of stage 'projector'"),
    ([DPO], DISTILLATION, "`distillation` and `dpo` of stage 'projector'"),
    ([DPO, "train.stages.0.dpo.label_smoothing=0.1"], "train.stages.0.dpo.loss=ipo", "not for ipo"),
    ([DISTILLATION], FULL, "'projector' has `distillation` from the language model"),
    ([ADAPTER], FULL, "`adapter` and `language_model` of stage 'projector'"),
    (
        [TWO % ("{language_model: 1e-5}", "{adapter: 1e-4}")],
        TWO % ("{adapter: 1e-4}", "{language_model: 1e-5}"),
        "'b' trains `language_model` after stage 'a'",
    ),
    (["model.quantization=4bit"], FULL, r"`model.quantization` \(4bit\) stores in integers"),
    (
        [ADAPTER, "train.adapter.use_dora=true"],
        "model.quantization=8bit",
        "`use_dora` reads complete weights, .* use 4bit",
    ),
    (
        ["train.stages.0.learn.projector_biases=1"],
        "train.stages.0.learn={adapter: 1, projector_biases: 1}",
        "needs `projectors`",
    ),
    (
        [f"train.stages.0.learn={LORA}"],
        "train.stages.0.learn.encoders.image.last_layers=1",
        "of the encoder of 'image'",
    ),
    ([TWO % (LORA, LORA)], "train.stages.1.learn.encoders.image.lora.r=8", "in stage 'b' than"),
    (
        ["train.feature_cache=true"],
        "train.stages.0.learn.encoders={image: 1e-5}",
        "stage 'projector' trains the encoder of 'image'",
    ),
    (["train.init_from=elsewhere"], "train.init_from=RUN", "the run's own `output_dir`"),
]


def id_of(value: object) -> str | None:
    return " with ".join(value.settings) if isinstance(value, Conflict) else None


@pytest.mark.parametrize(
    ("conflict", "base", "override", "sentence"),
    [(row, *example) for row, example in zip(CONFLICTS, EXAMPLES, strict=True)],
    ids=id_of,
)
def test_a_row_of_the_table_fires_alone_and_the_recipe_passes_without_it(
    conflict: Conflict,
    base: list[str],
    override: str,
    sentence: str,
    recipe_fields: Fields,
    tmp_path: Path,
) -> None:
    text = yaml.safe_dump(recipe_fields(tmp_path / "run"))
    parse_recipe(text, base)
    with pytest.raises(RecipeError, match=sentence) as refused:
        parse_recipe(text, [*base, override.replace("RUN", str(tmp_path / "run"))])
    fixed_text = re.split(r"\{.*?\}", conflict.message)
    pattern = "recipe: " + ".*".join(re.escape(part) for part in fixed_text)
    assert re.fullmatch(pattern, str(refused.value)), "another row fires too"


def test_all_conflicts_of_a_recipe_are_reported_at_once(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    text = yaml.safe_dump(recipe_fields(tmp_path / "run"))
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, ["train.pack_tokens=64", "data.lengths=headers", STREAM])
    assert len(str(refused.value).splitlines()) == 2


def test_a_stream_needs_packs_that_hold_its_longest_row(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    text = yaml.safe_dump(recipe_fields(tmp_path / "run"))
    packed = [STREAM, "data.max_tokens=120", "train.packing=true"]
    parse_recipe(text, [*packed, "train.pack_tokens=120"])
    with pytest.raises(RecipeError, match=r"pack_tokens is 119, .*\(120\)"):
        parse_recipe(text, [*packed, "train.pack_tokens=119"])


def test_a_stream_uses_a_feature_cache_that_is_filled_already(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    text = yaml.safe_dump(recipe_fields(tmp_path / "run"))
    parse_recipe(text, [STREAM, "train.feature_cache={path: features}"])
    for cache in ("true", "{path: features, auto: true}"):
        with pytest.raises(RecipeError, match="would be filled from all rows"):
            parse_recipe(text, [STREAM, f"train.feature_cache={cache}"])


def test_the_documentation_shows_the_table() -> None:
    spec = importlib.util.spec_from_file_location("conflicts_page", DOCS / "conflicts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert module.rendered(page) == page, "the table of docs/recipe.md is old: run `make fix`"
