"""Many families of language models, as tiny models: the claims of the table in the docs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    # PEFT, of experts that it would adapt if their parameters were asked for, and of GPT-2's layers
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def table() -> ModuleType:
    path = ROOT / "docs" / "language_models.py"
    spec = importlib.util.spec_from_file_location("language_models_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = table()
trials, families = TABLE.part("trials"), TABLE.part("families")
PAGE = TABLE.PAGE.read_text(encoding="utf-8")
of_each_family = pytest.mark.parametrize("family", families.FAMILIES)
REGENERATE = "the table is old: run `python docs/language_models.py`"


def compare(family: str, folder: Path, *, slow: bool) -> None:
    cells, said = TABLE.answers(family, folder, slow=slow)
    on_page, sentences = TABLE.on_page(PAGE, family)
    assert {heading: on_page.get(heading) for heading in cells} == cells, REGENERATE
    tried = {f"- {family}, {heading}" for heading in cells} | {f"- {family}"}
    assert [s for s in sentences if s.partition(":")[0] in tried] == said, REGENERATE


@of_each_family
def test_a_family_does_what_its_row_says(family: str, tmp_path: Path) -> None:
    compare(family, tmp_path, slow=False)


@pytest.mark.slow
@of_each_family
def test_a_family_trains_on_four_bits_as_its_row_says(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    compare(family, tmp_path, slow=True)


def test_the_table_has_one_row_for_each_family_and_every_column() -> None:
    columns = TABLE.headings(slow=False) + TABLE.headings(slow=True)
    header, _, *rows = [line for line in PAGE.split(TABLE.MARK)[1].splitlines() if "|" in line]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["family", *columns]
    assert [row.strip("| ").partition(" |")[0] for row in rows] == list(families.FAMILIES)


def test_every_refused_cell_has_its_sentence_below_the_table() -> None:
    for family in families.FAMILIES:
        cells, sentences = TABLE.on_page(PAGE, family)
        about = {
            s.partition(":")[0].removeprefix(f"- {family}").removeprefix(", ") for s in sentences
        }
        refused = {heading for heading, cell in cells.items() if not cell.startswith("yes")}
        if about == {""}:
            assert refused == set(cells), "refused as a whole"
        else:
            assert refused <= about


# Ways to reach further than a model was trained for, by transformers' names; the original context
# is shorter than the prompts, so that what they do is seen.
LONG: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", LONG)
def test_scaled_positions_change_nothing_in_what_is_promised(kind: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 10_000.0, **LONG[kind]}
    families.save_tiny_model("Llama", tmp_path, rope_parameters=rope)
    model = trials.composed(tmp_path)
    assert max(len(sample.input_ids) for sample in trials.prompts(model)) > 16
    plain = families.tiny_model("Llama")
    ids = torch.arange(20, 52)[None]
    with torch.no_grad():
        scaled = model.language_model(input_ids=ids).logits
        assert not trials.same(scaled, plain(input_ids=ids).logits, within=1e-2)
    columns = {h: t for h, t in trials.COLUMNS.items() if h not in ("LoRA", "save")}
    assert set(trials.run(trials.Subject(tmp_path, model), columns).values()) == {"yes"}


def test_positions_that_depend_on_the_longest_row_are_said_and_prompts_answered_by_length(
    tmp_path: Path,
) -> None:
    rope = {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 4.0}
    families.save_tiny_model("Llama", tmp_path, max_position_embeddings=32, rope_parameters=rope)
    model = trials.composed(tmp_path)
    lengths = [len(sample.input_ids) for sample in trials.prompts(model)]
    assert min(lengths) < 32 < max(lengths)
    (said,) = model.capabilities.notes()
    assert "a row of more than 32 tokens" in said
    subject = trials.Subject(tmp_path, model)
    assert trials.batch_equals_single(subject) == "yes, by length"
    with pytest.warns(UserWarning, match="each length is a batch of its own"):
        model.generate(trials.ROWS, max_new_tokens=2)
    short = trials.prompts(model)[:1]
    assert model.capabilities.can_batch_lengths(len(short[0].input_ids) + 4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_tied_to_the_embeddings_or_not_stays_so(tied: bool, tmp_path: Path) -> None:
    families.save_tiny_model("Llama", tmp_path, tie_word_embeddings=tied)
    model = trials.composed(tmp_path)
    head = model.language_model.lm_head.weight
    assert (head is model.get_input_embeddings().weight) == tied
    columns = {h: trials.COLUMNS[h] for h in ("text", "loss", "LoRA", "save")}
    assert set(trials.run(trials.Subject(tmp_path, model), columns).values()) == {"yes"}


@pytest.mark.parametrize("family", ["Gemma", "Granite", "Falcon-H1"])
def test_the_first_layer_gets_media_as_large_as_text_wherever_the_model_scales(
    family: str, tmp_path: Path
) -> None:
    """Inside the embedding module (Gemma), for ids and embeddings (Granite), for ids alone."""
    families.save_tiny_model(family, tmp_path)
    model = trials.composed(tmp_path)
    trials.size_of_tokens(trials.Subject(tmp_path, model))
    num_ids = model.get_input_embeddings().weight.shape[0]

    def first(**inputs: Any) -> Any:
        with torch.no_grad():
            output = model.language_model(**inputs, output_hidden_states=True, use_cache=False)
        return output.hidden_states[0]

    text = first(input_ids=torch.arange(num_ids)[None])
    rows = [trials.row("?", vector) for vector in (trials.FIRST, trials.SECOND, trials.FIRST)]
    batch = trials.batch_of(model, rows)
    embeds = model.embed(batch["input_ids"], batch["media"])
    media = first(inputs_embeds=embeds.detach()).flatten(0, 1)
    media = media[batch["media"]["vector"]["positions"]]
    torch.testing.assert_close(
        media.square().mean().sqrt(), text.square().mean().sqrt(), rtol=1e-3, atol=0
    )
