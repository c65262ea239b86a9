"""convert/combine.py: rows of each run give its logits to the bit; all else is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from multi_token import combine
from multi_token.checkpoint.load import read_config
from multi_token.checkpoint.save import save
from multi_token.cli import app
from multi_token.collate import Collator
from multi_token.convert.export import export
from multi_token.convert.push import push
from multi_token.data.formats import to_conversation
from multi_token.encoders import attach_lora
from multi_token.errors import ConvertError, MultiTokenError
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec, LoraSpec, Trainable, TrainableEncoder
from multi_token.testing import tiny_language_model
from multi_token.train.parameter_groups import freeze_and_unfreeze
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)
PROJECTORS = {
    "linear": {"type": "linear"},
    "mlp": {"type": "mlp"},
    "expand": {"type": "expand", "factor": 2},
    "stack": {"type": "stack", "factor": 3},
    "pool": {"type": "pool", "factor": 2, "grid": True},
    "shuffle": {"type": "pixel_shuffle", "factor": 2},
    "resample": {"type": "resample", "num_queries": 3},
}
ANOTHER_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
VECTOR = {"type": "vector", "dim": 5, "projector": {"type": "expand", "factor": 2}}


def model_of(language_model: Path | str, modalities: dict[str, Any], **fields: Any) -> Any:
    """A model whose projectors have random weights, one of them with a closed form."""
    spec = ModelSpec.model_validate(
        {"language_model": str(language_model), "modalities": modalities, **fields}
    )
    model = MultiTokenForConditionalGeneration.from_spec(spec)
    next(iter(model.projectors.values())).add_closed_form()  # type: ignore[operator]
    with torch.no_grad():
        for tensor in model.projectors.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.1)
    return model


def images(parts: Path, names: Sequence[str]) -> dict[str, Any]:
    image = {"type": "image", "encoder": str(parts / "clip"), "features": "patches"}
    return {name: {**image, "projector": PROJECTORS[name]} for name in names}


@pytest.fixture(scope="module")
def runs(parts: Path, mixed_fields: Fields, tmp_path_factory: Any) -> Path:
    """`a` sees in four ways, `b` in three, `c` feels a pulse: encoders of b and c were trained."""
    folder = tmp_path_factory.mktemp("runs")
    language_model = parts / "language_model"
    torch.manual_seed(1)
    save(
        model_of(language_model, images(parts, ["linear", "mlp", "expand", "stack"])), folder / "a"
    )
    b = model_of(language_model, images(parts, ["pool", "shuffle", "resample"]))
    lora = LoraSpec(r=2)
    attach_lora("pool", b.encoder("pool"), lora)
    trained = {
        "pool": TrainableEncoder(lr=1e-5, lora=lora),
        "shuffle": TrainableEncoder(lr=1e-5, last_layers=1),
    }
    freeze_and_unfreeze(b, Trainable(encoders=trained))
    with torch.no_grad():
        for parameter in b.encoders.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save(b, folder / "b")
    pulse = {"pulse": {"type": "pulse", "projector": {"type": "expand", "factor": 2}}}
    save(model_of(language_model, pulse), folder / "c")
    Recipe.model_validate(mixed_fields(folder / "secret")).save(folder / "a" / "recipe.yaml")
    return folder


def logits(run: Path, questions: Sequence[Any]) -> Tensor:
    """Logits of one batch. A question: the modalities and sources of its items."""
    model = MultiTokenForConditionalGeneration.from_pretrained(run)
    processor = model.require_processor()
    samples = []
    for items in questions:
        content = [{"type": name, name: source} for name, source in items]
        content.append({"type": "text", "text": "What is this?"})
        answer = {"role": "assistant", "content": "a red square"}
        row = {"messages": [{"role": "user", "content": content}, answer]}
        samples.append(processor(to_conversation(row, list(model.modalities), row_id="row")))
    batch = Collator(model.modalities, processor.chat.filler_id)(samples)
    with torch.no_grad():
        found = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            media=batch["media"],
        )
    return found.logits


def seen(data: Path, names: Sequence[str]) -> list[Any]:
    """A question for each name, and one with all of them."""
    colours = ("red", "blue", "green", "white")
    items = [(name, str(data / f"{c}.png")) for name, c in zip(names, colours, strict=False)]
    return [*([item] for item in items), items]


def test_rows_of_each_run_give_its_logits_to_the_bit(
    runs: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all"
    origins = combine([runs / name for name in "abc"], out, rename={"expand": "wide"})
    assert origins == {
        **dict.fromkeys(("linear", "mlp", "wide", "stack"), str(runs / "a")),
        **dict.fromkeys(("pool", "shuffle", "resample"), str(runs / "b")),
        "pulse": str(runs / "c"),
    }
    pulse = ("pulse", [1.0, 0.0, 2.0, 0.0, -1.0])
    for name, old, new in (
        ("a", ["linear", "mlp", "expand", "stack"], ["linear", "mlp", "wide", "stack"]),
        ("b", ["pool", "shuffle", "resample"], None),
    ):
        before = logits(runs / name, [*seen(data, old), []])
        assert before.std() > 0.1 and before[0].ne(before[-1]).any()
        assert torch.equal(logits(out, [*seen(data, new or old), []]), before)
    assert torch.equal(logits(out, [[pulse], []]), logits(runs / "c", [[pulse], []]))
    # rows with modalities of all three: what a row shows counts, and its own logits stay
    both = [("linear", str(data / "red.png")), ("pool", str(data / "red.png")), pulse]
    mixed = logits(out, [both, both[1:]])
    assert mixed.isfinite().all() and not torch.equal(mixed[0], mixed[1])


@pytest.mark.slow
def test_a_combined_run_is_asked_exported_pushed_and_trained_further(
    runs: Path, data: Path, mixed_fields: Fields, tmp_path: Path
) -> None:
    out = tmp_path / "all"
    words = ["combine", *(str(runs / name) for name in "ac"), "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--rename", "linear=image"], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert f"<image> of {runs / 'a'}" in done.output and "<pulse> of" in done.output
    fields = read_config(out)
    assert [(e["run"], e["modalities"]) for e in fields["combined_from"]] == [
        ("a", {"image": "linear", "mlp": "mlp", "expand": "expand", "stack": "stack"}),
        ("c", {"pulse": "pulse"}),
    ]
    asked = CliRunner().invoke(
        app, ["ask", str(out), "?", "--image", str(data / "red.png"), "--device", "cpu"]
    )
    assert asked.exit_code == 0 and asked.output.strip()

    # an engine's export keeps the provenance, and its card has the recipe of each run
    export(out, tmp_path / "exported", to="language-model")
    assert read_config(tmp_path / "exported")["combined_from"] == fields["combined_from"]
    shutil.copytree(out / "recipes", tmp_path / "exported" / "recipes")
    files = push(tmp_path / "exported", "ada/all", dry_run=True)
    assert "recipes/1-a.yaml" in files
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "combined without further training" in card and "| `<image>` | `linear` of a |" in card
    assert "rows.jsonl`, split `train`" in card and "secret" not in card

    # trained further on rows with both: only what the recipe names changes
    recipe = mixed_fields(tmp_path / "joint", init_from=str(out))
    recipe["model"]["modalities"] = fields["model"]["modalities"]
    recipe["train"]["stages"][0]["learn"] = {"projectors": {"image": 1e-2, "pulse": 1e-2}}
    model = train(Recipe.model_validate(recipe), console=QUIET)
    assert set(model.modalities) == {"image", "mlp", "expand", "stack", "pulse"}


def test_combined_runs_combine_again_with_their_first_names(
    runs: Path, data: Path, tmp_path: Path
) -> None:
    combine([runs / "a", runs / "c"], tmp_path / "ac", rename={"linear": "image"})
    # `pulse` is the same in both, and kept once
    combine([runs / "c", runs / "b"], tmp_path / "cb")
    combine([tmp_path / "ac", tmp_path / "cb"], tmp_path / "all", rename={"image": "photo"})
    fields = read_config(tmp_path / "all")
    assert set(fields["model"]["modalities"]) == {
        *("photo", "mlp", "expand", "stack", "pulse", "pool", "shuffle", "resample")
    }
    entries = fields["combined_from"]
    assert [entry["run"] for entry in entries] == ["a", "c", "b"]
    assert entries[0]["modalities"]["photo"] == "linear"
    assert (tmp_path / "all" / entries[0]["recipe"]).is_file()
    photo, old = ("photo", str(data / "red.png")), ("linear", str(data / "red.png"))
    assert torch.equal(logits(tmp_path / "all", [[photo]]), logits(runs / "a", [[old]]))


@pytest.fixture(scope="module")
def clash(parts: Path, runs: Path, tmp_path_factory: Any) -> Path:
    """Another run with a modality `linear`."""
    folder = tmp_path_factory.mktemp("clash") / "other"
    torch.manual_seed(2)
    save(model_of(parts / "language_model", images(parts, ["linear"])), folder)
    return folder


def test_a_name_of_two_runs_is_asked_for_and_renamed_in_the_run_that_is_named(
    runs: Path, clash: Path, data: Path, tmp_path: Path
) -> None:
    a, out = runs / "a", tmp_path / "out"
    with pytest.raises(ConvertError, match=rf"both have a modality 'linear'.*--rename {clash}:lin"):
        combine([a, clash], out)
    with pytest.raises(ConvertError, match=rf"write {a}:linear=eye or {clash}:linear=eye"):
        combine([a, clash], out, rename={"linear": "eye"})
    with pytest.raises(ConvertError, match="no modality 'liner': did you mean 'linear'"):
        combine([a, clash], out, rename={"liner": "eye"})
    with pytest.raises(ConvertError, match="elsewhere is none of the runs"):
        combine([a, clash], out, rename={"elsewhere:linear": "eye"})
    with pytest.raises(MultiTokenError, match="'chosen' cannot name a modality"):
        combine([a, clash], out, rename={f"{clash}:linear": "chosen"})
    with pytest.raises(ConvertError, match="both have a modality 'mlp'"):
        combine([a, clash], out, rename={f"{clash}:linear": "mlp"})
    assert not out.exists()
    combine([a, clash], out, rename={f"{clash}:linear": "eye"})
    shown = str(data / "red.png")
    assert torch.equal(logits(out, [[("eye", shown)]]), logits(clash, [[("linear", shown)]]))
    assert torch.equal(logits(out, [[("linear", shown)]]), logits(a, [[("linear", shown)]]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"language_model": "seed"}, "which has the same shape but other weights"),
        ({"language_model": "wide"}, "which has hidden_size 48 instead of 32"),
        ({"language_model": "template"}, "their chat templates differ"),
        ({"language_model": "tokenizer"}, "the tokenizers of .* differ"),
        ({"chat_template": ANOTHER_TEMPLATE}, "their chat templates differ"),
        ({"dtype": "bfloat16"}, "model.dtype is 'float32' in the first and 'bfloat16'"),
        ({"attn_implementation": "eager"}, "model.attn_implementation is None in the first"),
    ],
)
def test_another_language_model_is_refused_by_what_differs(
    runs: Path, parts: Path, change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    kind, other = change.get("language_model"), tmp_path / "language_model"
    if kind == "template":
        tiny_language_model(other, template="llama3")
    elif kind == "tokenizer":
        shutil.copytree(parts / "language_model", other)
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        tokenizer["model"]["merges"].pop()  # the same vocabulary
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif kind:
        seed, hidden_size = (1, 32) if kind == "seed" else (0, 48)
        tiny_language_model(other, seed=seed, hidden_size=hidden_size)
    fields = {"language_model": str(other if kind else parts / "language_model")}
    fields |= {key: value for key, value in change.items() if key != "language_model"}
    save(model_of(modalities={"vector": VECTOR}, **fields), tmp_path / "run")
    with pytest.raises(ConvertError, match=sentence):
        combine([runs / "a", tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_language_model_under_two_names_is_the_same(
    runs: Path, parts: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(parts / "language_model", tmp_path / "copy")
    save(model_of(tmp_path / "copy", {"vector": VECTOR}), tmp_path / "run")
    combine([runs / "a", tmp_path / "run"], tmp_path / "out")
    fields = read_config(tmp_path / "out")
    assert fields["model"]["language_model"] == str(parts / "language_model")
    shown = [[("vector", [1.0, 0.0, 0.0, 2.0, 0.0])]]
    assert torch.equal(logits(tmp_path / "out", shown), logits(tmp_path / "run", shown))


def test_adapters_are_refused_unless_they_are_one(
    runs: Path, parts: Path, data: Path, tmp_path: Path
) -> None:
    first = model_of(parts / "language_model", images(parts, ["linear"]))
    first.language_model = attach_adapter(first.language_model, AdapterSpec(r=2))
    with torch.no_grad():
        for parameter in adapter_parameters(first):
            parameter.normal_(std=0.1)
    save(first, tmp_path / "first")
    with pytest.raises(ConvertError, match=r"first trained an adapter.*no adapter fits both"):
        combine([tmp_path / "first", runs / "c"], tmp_path / "out")
    # a modality that was trained later, while the adapter stayed frozen
    second = model_of(parts / "language_model", {"vector": VECTOR})
    second.language_model = first.language_model
    save(second, tmp_path / "second")
    combine([tmp_path / "first", tmp_path / "second"], tmp_path / "out")
    shown = {"first": [[("linear", str(data / "red.png"))], []]}
    shown["second"] = [[("vector", [1.0, 0.0, 0.0, 2.0, 0.0])], []]
    for name, questions in shown.items():
        assert torch.equal(logits(tmp_path / "out", questions), logits(tmp_path / name, questions))
    with torch.no_grad():
        next(iter(adapter_parameters(second))).add_(0.1)
    save(second, tmp_path / "second")
    with pytest.raises(ConvertError, match="first and .*second trained an adapter"):
        combine([tmp_path / "first", tmp_path / "second"], tmp_path / "again")


def test_a_trained_language_model_is_refused_and_what_was_trained_on_it_is_not(
    runs: Path, parts: Path, data: Path, tmp_path: Path
) -> None:
    full = model_of(parts / "language_model", images(parts, ["linear"]))
    full.trained_language_model = True
    with torch.no_grad():
        for parameter in full.language_model.parameters():
            parameter.add_(0.01)
    save(full, tmp_path / "full")
    with pytest.raises(ConvertError, match=r"full trained the language model itself"):
        combine([tmp_path / "full", runs / "c"], tmp_path / "out")
    on_it = model_of(tmp_path / "full" / "language_model", {"vector": VECTOR})
    save(on_it, tmp_path / "on_it")
    combine([tmp_path / "full", tmp_path / "on_it"], tmp_path / "out")
    shown = [[("linear", str(data / "red.png"))], []]
    assert torch.equal(logits(tmp_path / "out", shown), logits(tmp_path / "full", shown))


def test_incomplete_or_too_few_runs_are_refused(runs: Path, tmp_path: Path) -> None:
    for chosen in ([runs / "a"], [runs / "a", f"{runs}/./a"]):
        with pytest.raises(ConvertError, match="two or more different runs"):
            combine(chosen, tmp_path / "out")
    broken = Path(shutil.copytree(runs / "c", tmp_path / "broken"))
    (broken / "encoders.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"encoders.safetensors does not fit.*pulse are missing"):
        combine([runs / "a", broken], tmp_path / "out")
    for text in ("image", "=photo", "image="):
        done = CliRunner().invoke(
            app, ["combine", str(runs / "a"), str(broken), "--out", "x", "--rename", text]
        )
        assert "expected --rename OLD=NEW" in str(done.exception)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConvertError, match="not empty; choose another --out"):
        combine([runs / "a", runs / "b"], tmp_path / "full")
