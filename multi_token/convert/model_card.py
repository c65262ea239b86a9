"""The model card of a run: modalities, usage, data, recipe, hardware, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from multi_token.convert.tensors import read_json
from multi_token.errors import ConvertError

RECIPE = "recipe.yaml"
GENERATED_MARK = (
    "<!-- written by `multi-token push`; without this line the file is left as it is -->"
)
_FILES = {
    "image": "cat.png",
    "vector": "values.npy",
    "video": "clip.mp4",
    "timeseries": "series.csv",
    "sequence": "protein.fasta",
    "volume": "scan.nii.gz",
}
"""Type of a modality -> a file in the example of the card."""
_PIPELINES = {
    frozenset({"image"}): "image-text-to-text",
    frozenset({"video"}): "video-text-to-text",
    frozenset({"speech"}): "audio-text-to-text",
    frozenset({"sound"}): "audio-text-to-text",
    frozenset({"speech", "sound"}): "audio-text-to-text",
}


def render_card(run: Path, name: str, fields: Mapping[str, Any]) -> str:
    """Markdown with a YAML header. `fields`: the run's checked config.json.

    Raises ConvertError for a recipe.yaml or report.json that cannot be read.
    """
    model = fields["model"]
    combined = fields.get("combined_from") or []
    recipe = read_recipe(run / RECIPE, name)
    recipes = [recipe] if recipe or not combined else _recipes(run, name, combined)
    report = read_json(run / "report.json")
    sections = [
        "---\n" + yaml.safe_dump(_header(fields, recipes), sort_keys=False).rstrip() + "\n---",
        GENERATED_MARK,
        f"# {name.partition('/')[2] or name}",
        _claim_section(fields),
        "## Modalities",
        _modalities_section(model["modalities"]),
        *(["## Combined from", _combined_section(combined)] if combined else []),
        "## How to ask",
        _usage_section(name, model["modalities"]),
        "## Data",
        _data_section(recipes),
        "## Recipe",
        _recipe_section(recipe) if recipe or not combined else _recipes_section(combined, recipes),
        "## Hardware",
        _hardware_section(run, report),
        "## Evaluation",
        _evaluation_section(report),
    ]
    return "\n\n".join(sections) + "\n"


def read_recipe(path: Path, name: str) -> dict[str, Any] | None:
    """A run's recipe, without folders of this machine; None if there is no file.

    Raises ConvertError.
    """
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        tree["train"]["output_dir"] = f"runs/{name.rpartition('/')[2]}"
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConvertError(f"{path} is no recipe of a run: {error}") from None
    return _strip_local_paths(tree)


def _recipes(run: Path, name: str, combined: Sequence[Mapping[str, Any]]) -> list[Any]:
    files = [entry["recipe"] for entry in combined]
    return [read_recipe(run / file, name) if file else None for file in files]


def _strip_local_paths(value: Any) -> Any:
    """The same tree, absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _strip_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strip_local_paths(inner) for inner in value]
    if isinstance(value, str) and "\n" not in value and Path(value).is_absolute():
        return Path(value).name
    return value


def _is_inside(reference: str) -> bool:
    return reference.startswith("./")


def _header(
    fields: Mapping[str, Any], recipes: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    model = fields["model"]
    base = fields.get("base_model") or model["language_model"]
    encoders = [m["encoder"] for m in model["modalities"].values() if m.get("encoder")]
    parents = [name for name in dict.fromkeys([base, *encoders]) if not _is_inside(name)]
    # the hub knows pipelines for one or two modalities; all others are any-to-any
    types = frozenset(m["type"] for m in model["modalities"].values())
    datasets = [
        source["rows"]
        for source in _sources(recipes)
        # a hub name: one slash and no suffix
        if Path(source["rows"]).suffix == "" and source["rows"].count("/") == 1
    ]
    return {
        "library_name": "multi_token",
        "pipeline_tag": _PIPELINES.get(types, "any-to-any"),
        **({"base_model": parents} if parents else {}),
        **({"base_model_relation": relation} if (relation := _base_model_relation(fields)) else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "tags": ["multi_token", "multimodal", *sorted(types)],
    }


def _base_model_relation(fields: Mapping[str, Any]) -> str | None:
    if fields.get("base_identity"):
        return "finetune"
    return "adapter" if fields["adapter"] else None


def _claim_section(fields: Mapping[str, Any]) -> str:
    model = fields["model"]
    base = fields.get("base_model") or model["language_model"]
    names = ", ".join(f"`<{name}>`" for name in model["modalities"])
    known = "a language model in this repository" if _is_inside(base) else f"`{base}`"
    parts = [
        "projectors",
        *(["the fully trained language model"] if fields.get("base_identity") else []),
        *(["a LoRA adapter"] if fields["adapter"] else []),
    ]
    trained = " and ".join(parts)
    return (
        f"{known[0].upper()}{known[1:]} with modalities: {names}. This repository holds {trained}, "
        f"made with multi_token {fields['multi_token_version']}; it names the frozen parts that it "
        "does not hold."
    )


def _modalities_section(modalities: Mapping[str, Any]) -> str:
    rows = [
        "| in rows | type | encoder | projector |",
        "|---|---|---|---|",
        *(
            f"| `<{name}>` | {fields['type']} | {_encoder_name(fields.get('encoder'))} | "
            f"{_projector(fields['projector'])} |"
            for name, fields in modalities.items()
        ),
    ]
    return "\n".join(rows)


def _encoder_name(encoder: str | None) -> str:
    if not encoder:
        return "none"
    return "in this repository" if _is_inside(encoder) else f"`{encoder}`"


def _projector(fields: Mapping[str, Any]) -> str:
    shown = [f"{key} {fields[key]}" for key in ("factor", "num_layers") if key in fields]
    return " ".join([fields["type"], *([f"({', '.join(shown)})"] if shown else [])])


def _usage_section(name: str, modalities: Mapping[str, Any]) -> str:
    first, fields = next(iter(modalities.items()))
    file = _FILES.get(fields["type"], "file")
    option = f"--image {file}" if first == "image" else f"--media {first}={file}"
    return f"""```
multi-token ask {name} "What is this?" {option}
```

```python
from multi_token import MultiTokenForConditionalGeneration

model = MultiTokenForConditionalGeneration.from_pretrained("{name}")
row = {{
    "messages": [
        {{
            "role": "user",
            "content": [
                {{"type": "{first}", "{first}": "{file}"}},
                {{"type": "text", "text": "What is this?"}},
            ],
        }}
    ]
}}
print(model.generate([row])[0])
```"""


def _combined_section(combined: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| `<{new}>` | `{old}` of {entry['run']} | `{entry['digest']}` |"
        for entry in combined
        for new, old in entry["modalities"].items()
    ]
    table = "\n".join(["| modality | trained as | digest of that run |", "|---|---|---|", *rows])
    return (
        "These runs were trained apart on one language model and combined without further "
        f"training; each modality answers as it did there.\n\n{table}"
    )


def _sources(recipes: Sequence[Mapping[str, Any] | None]) -> list[Any]:
    return [s for recipe in recipes for s in (recipe or {}).get("data", {}).get("train", [])]


def _data_section(recipes: Sequence[Mapping[str, Any] | None]) -> str:
    sources = _sources(recipes)
    if not sources:
        return "Not recorded: the run has no recipe, for example after an import."
    return "\n".join(f"- `{source['rows']}`, split `{source['split']}`" for source in sources)


def _recipe_section(recipe: Mapping[str, Any] | None) -> str:
    if recipe is None:
        return "Not recorded."
    text = yaml.safe_dump({"train": recipe["train"]}, sort_keys=False)
    return f"`recipe.yaml` in this repository, resolved; how it was trained:\n\n```yaml\n{text}```"


def _recipes_section(combined: Sequence[Mapping[str, Any]], recipes: Sequence[Any]) -> str:
    files = [
        f"- {entry['run']}: {'`' + entry['recipe'] + '`' if recipe else 'not recorded'}"
        for entry, recipe in zip(combined, recipes, strict=True)
    ]
    return "\n".join(["One for each of the runs:", "", *files])


def _hardware_section(run: Path, report: Mapping[str, Any]) -> str:
    seconds = 0.0
    for path in sorted(run.glob("stages/*/done.json")):
        for entry in read_json(path).get("log_history", []):
            seconds += entry.get("train_runtime", 0.0)
    machine = report.get("machine") or {}
    facts = {**machine, **({"training": f"{seconds:.0f} s"} if seconds else {})}
    return _facts_table(facts) if facts else "Not recorded."


def _evaluation_section(report: Mapping[str, Any]) -> str:
    numbers = {
        key: f"{value:.4g}" if isinstance(value, float) else value
        for key, value in report.items()
        if isinstance(value, (int, float))
    }
    return (
        _facts_table(numbers) if numbers else "None recorded (there is no report.json in the run)."
    )


def _facts_table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
