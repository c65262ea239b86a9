"""Joins runs whose modalities were trained apart on one frozen language model, without training.

The result names the same language model and holds all projectors and trained encoders, so rows of
each run give the logits of that run, to the bit. Files alone are read: no weights of the language
model are loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multi_token import __version__
from multi_token.checkpoint.atomic import staged_folder
from multi_token.checkpoint.fingerprint import fingerprint_difference
from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.load import read_config, read_spec, run_digest
from multi_token.checkpoint.save import (
    ADAPTER,
    CONFIG,
    ENCODER_WEIGHTS,
    MODEL_TYPE,
    PROJECTORS,
    SCHEMA,
    write_tensors,
)
from multi_token.convert.model_card import RECIPE
from multi_token.convert.tensors import read_json, read_tensors
from multi_token.errors import ConvertError
from multi_token.language_model.loading import load_tokenizer
from multi_token.recipe.model import ModelSpec
from multi_token.registry import did_you_mean, validate_fields

RECIPES = "recipes"
"""Folder of a combined run with the recipes of its runs."""
STAGES = "stages"
"""Folder of a run with a checkpoint after each stage, in `NAME/result`."""
_NAMED_APART = {"modalities", "language_model", "revision", "chat_template", "dtype"}
"""Fields of `model` that are compared in another way than by value, or not at all."""


@dataclass(frozen=True)
class _Run:
    """One of the runs, as its files have it."""

    name: str
    folder: Path
    fields: Mapping[str, Any]
    spec: ModelSpec
    tensors: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    """File -> modality -> its tensors."""

    @classmethod
    def read(cls, run: str | os.PathLike[str]) -> _Run:
        fields, folder = read_config(run), local_folder(run)
        spec = read_spec(folder, fields)
        tensors = {}
        for file in (PROJECTORS, ENCODER_WEIGHTS):
            of_file: dict[str, dict[str, Tensor]] = {}
            found = read_tensors(folder / file) if (folder / file).is_file() else {}
            for key, tensor in found.items():
                name, _, inner = key.partition(".")
                of_file.setdefault(name, {})[inner] = tensor
            # an encoder without an entry, or an entry without tensors, is a damaged run
            expected = spec.modalities if file == PROJECTORS else fields["encoders"]
            if differing := sorted(expected.keys() ^ of_file.keys()):
                raise ConvertError(
                    f"{folder / file} does not fit its {CONFIG}: tensors of "
                    f"{', '.join(differing)} are missing or unknown; copy the run again"
                )
            tensors[file] = of_file
        return cls(os.fspath(run), folder, fields, spec, tensors)

    def part(self, name: str) -> tuple[Any, Any, bool]:
        """Settings, trained encoder and closed form of a modality, to be compared."""
        settings = self.spec.modalities[name].model_dump(mode="json")
        return settings, self.fields["encoders"].get(name), name in self.fields["closed_form"]

    def has_equal(self, name: str, other: _Run, its_name: str) -> bool:
        """Is a modality the same in another run, to the bit?"""
        if self.part(name) != other.part(its_name):
            return False
        for file, of_file in self.tensors.items():
            mine, theirs = of_file.get(name, {}), other.tensors[file].get(its_name, {})
            if mine.keys() != theirs.keys():
                return False
            if not all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()):
                return False
        return True


def combine(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    rename: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Join runs on one frozen language model into a run with the modalities of all.

    A modality that two runs have alike, to the bit, is kept once.

    Args:
        runs: Two or more folders or hub names of runs.
        out: The new run's folder.
        rename: Modality -> its name in the result. `RUN:modality`, with the run as in `runs`, where
            several runs have the modality.

    Returns:
        Modality of the result -> the run that it comes from.

    Raises:
        ConvertError: If the runs have different language models, chat templates, adapters or
            settings, or modalities of one name.
        CheckpointError: If one of the runs is incomplete.
    """
    names = [os.fspath(run) for run in runs]
    if len(names) < 2 or len({local_folder(name).resolve() for name in names}) < len(names):
        raise ConvertError(f"combine takes two or more different runs, got {', '.join(names)}")
    read = [_Run.read(run) for run in runs]
    for other in read[1:]:
        _check_same_language_model(read[0], other)
    origins = _named(read, _renames(read, rename or {}))
    with staged_folder(Path(out)) as partial:
        _write(read, origins, partial)
    return {name: run.name for name, (run, _) in origins.items()}


def _check_same_language_model(first: _Run, other: _Run) -> None:
    """Raise ConvertError, unless a prompt of text gives the same ids and logits in both runs."""
    both = f"{first.name} and {other.name} cannot be combined"
    ours, theirs = first.fields.get("identity"), other.fields.get("identity")
    if not ours or not theirs:
        lacking = other.name if ours else first.name
        raise ConvertError(f"{both}: {lacking} has no fingerprint of its language model")
    a, b = first.spec, other.spec
    same_name = (a.language_model, a.revision) == (b.language_model, b.revision)
    # the hashes of layers are None if they are quantized
    is_same = same_name or (ours["layers"] is not None and theirs["layers"] is not None)
    difference = fingerprint_difference(ours, theirs)
    if difference or not is_same:
        trained = [run.name for run in (first, other) if run.fields.get("base_identity")]
        reason = (
            f"{', '.join(trained)} trained the language model itself, and the modalities of the "
            "other run do not fit it; train those on it, with `model.language_model` or "
            "`train.init_from`"
            if trained
            else f"{other.name} is of {_named_model(b)}, which has "
            f"{difference or 'quantized layers without a fingerprint'}, and {first.name} of "
            f"{_named_model(a)}; train them on one language model"
        )
        raise ConvertError(f"{both}: {reason}")
    settings = [a.model_dump(mode="json"), b.model_dump(mode="json")]
    compared = [(key, settings[0][key], settings[1][key]) for key in settings[0]]
    pairs = [pair for pair in compared if pair[0] not in _NAMED_APART]
    pairs.append(("dtype", ours["dtype"], theirs["dtype"]))
    if a.quantization is not None:  # whose products are in `dtype`
        pairs.append(("dtype", a.dtype, b.dtype))
    for key, before, now in pairs:
        if before != now:
            raise ConvertError(
                f"{both}: model.{key} is {before!r} in the first and {now!r} in the second; train "
                "one of them again with the other's value"
            )
    _check_same_prompts(first, other, both, may_differ=not same_name)
    _check_same_adapter(first, other, both)


def _named_model(spec: ModelSpec) -> str:
    return spec.language_model + (f" at revision {spec.revision}" if spec.revision else "")


def _check_same_prompts(first: _Run, other: _Run, both: str, *, may_differ: bool) -> None:
    a, b = first.spec, other.spec
    templates = [a.chat_template, b.chat_template]
    if may_differ or templates[0] != templates[1]:
        ours, theirs = (load_tokenizer(s.language_model, s.revision) for s in (a, b))
        if ours.get_vocab() != theirs.get_vocab() or _rules(ours) != _rules(theirs):
            raise ConvertError(
                f"{both}: the tokenizers of {_named_model(a)} and {_named_model(b)} differ; train "
                "them on one language model"
            )
        templates = [a.chat_template or ours.chat_template, b.chat_template or theirs.chat_template]
    if templates[0] != templates[1]:
        raise ConvertError(
            f"{both}: their chat templates differ, so their prompts do; train one of them again "
            "with the other's `model.chat_template`"
        )


def _rules(tokenizer: Any) -> Any:
    """Merges and rules of a fast tokenizer; others are compared by their vocabulary alone."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return core and core.to_str()


def _check_same_adapter(first: _Run, other: _Run, both: str) -> None:
    """Raise ConvertError for adapters that differ (docs/decisions/0034)."""
    with_adapter = [run for run in (first, other) if run.fields["adapter"]]
    if not with_adapter:
        return
    if len(with_adapter) == 2:
        configs = [read_json(run.folder / ADAPTER / "adapter_config.json") for run in with_adapter]
        files = [run.folder / ADAPTER / "adapter_model.safetensors" for run in with_adapter]
        mine, theirs = (read_tensors(file) for file in files)
        for config in configs:
            config.pop("base_model_name_or_path", None)
        is_same = configs[0] == configs[1] and mine.keys() == theirs.keys()
        if is_same and all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()):
            return
    trained = " and ".join(run.name for run in with_adapter)
    raise ConvertError(
        f"{both}: {trained} trained an adapter, which changes the language model for all "
        "modalities, and no adapter fits both; combine runs of projectors alone (such as the "
        "folder of an earlier stage), then train one adapter with `train.init_from` and rows of "
        "both"
    )


def _renames(runs: Sequence[_Run], rename: Mapping[str, str]) -> list[dict[str, str]]:
    """Old name -> new name of each run."""
    found: list[dict[str, str]] = [{} for _ in runs]
    for target, new in rename.items():
        where, _, old = target.rpartition(":")
        named = [run for run in runs if not where or _is_same_name(run.name, where)]
        if not named:
            known = ", ".join(run.name for run in runs)
            raise ConvertError(f"rename {target}={new}: {where} is none of the runs ({known})")
        holders = [run for run in named if old in run.spec.modalities]
        if not holders:
            known = list(dict.fromkeys(name for run in named for name in run.spec.modalities))
            raise ConvertError(
                f"rename {target}={new}: there is no modality {old!r}{did_you_mean(old, known)} "
                f"(known: {', '.join(known)})"
            )
        if len(holders) > 1:
            ways = " or ".join(f"{run.name}:{old}={new}" for run in holders)
            raise ConvertError(f"rename {target}={new}: several runs have {old!r}; write {ways}")
        found[runs.index(holders[0])][old] = new
    return found


def _is_same_name(name: str, typed: str) -> bool:
    return os.path.normpath(name) == os.path.normpath(typed)


def _named(
    runs: Sequence[_Run], renames: Sequence[Mapping[str, str]]
) -> dict[str, tuple[_Run, str]]:
    """Modality of the result -> the run that has it, and its name there."""
    origins: dict[str, tuple[_Run, str]] = {}
    for run, renamed in zip(runs, renames, strict=True):
        for old in run.spec.modalities:
            new = renamed.get(old, old)
            if new not in origins:
                origins[new] = (run, old)
                continue
            before, its_name = origins[new]
            if not run.has_equal(old, before, its_name):
                raise ConvertError(
                    f"{before.name} and {run.name} both have a modality {new!r}, and they differ; "
                    f"give one of them another name: --rename {run.name}:{old}=NAME"
                )
    return origins


def _write(runs: Sequence[_Run], origins: Mapping[str, tuple[_Run, str]], out: Path) -> None:
    first = runs[0]
    section = first.spec.model_dump(mode="json")
    section["modalities"] = {
        new: run.spec.modalities[old].model_dump(mode="json") for new, (run, old) in origins.items()
    }
    # names of modalities are checked with the whole section
    spec = validate_fields(ModelSpec, section, where="the combined run")
    for file in (PROJECTORS, ENCODER_WEIGHTS):
        tensors = {
            f"{new}.{key}": tensor
            for new, (run, old) in origins.items()
            for key, tensor in run.tensors[file].get(old, {}).items()
        }
        if tensors:
            write_tensors(out / file, tensors)
    if first.fields["adapter"]:
        shutil.copytree(first.folder / ADAPTER, out / ADAPTER)
    fields = {
        "model_type": MODEL_TYPE,
        "schema": SCHEMA,
        "multi_token_version": __version__,
        "model": spec.model_dump(mode="json"),
        "identity": first.fields["identity"],
        # a run's own trained language model is a frozen one here, named by its folder
        "base_identity": None,
        "base_model": next((b for run in runs if (b := run.fields.get("base_model"))), None),
        "adapter": first.fields["adapter"],
        "closed_form": sorted(n for n, (r, old) in origins.items() if r.part(old)[2]),
        "encoders": {
            name: run.fields["encoders"][old]
            for name, (run, old) in sorted(origins.items())
            if old in run.fields["encoders"]
        },
        "combined_from": _provenance(runs, origins, out),
    }
    (out / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _provenance(
    runs: Sequence[_Run], origins: Mapping[str, tuple[_Run, str]], out: Path
) -> list[dict[str, Any]]:
    """One entry for each run that was trained; copies their recipes into `out`."""
    entries: list[dict[str, Any]] = []
    for run in runs:
        new_names = {old: new for new, (origin, old) in origins.items() if origin is run}
        folder, stage = run.folder.resolve(), ""
        if folder.name == "result" and folder.parent.parent.name == STAGES:
            stage, folder = f"/{folder.parent.name}", folder.parents[2]
        own = {
            # a path of this machine means nothing elsewhere
            "run": folder.name + stage if Path(run.name).exists() else run.name,
            "digest": run_digest(run.folder),
            "recipe": str(folder / RECIPE) if (folder / RECIPE).is_file() else None,
            "modalities": {old: old for old in run.spec.modalities},
        }
        # of a combined run, the runs that it came from, whose recipes are inside of it
        for entry in run.fields.get("combined_from") or [own]:
            kept = {
                new_names[name]: first_name
                for name, first_name in entry["modalities"].items()
                if name in new_names
            }
            if not kept:  # all of it comes from another of the runs
                continue
            recipe = entry["recipe"]
            if recipe is not None:
                label = re.sub(r"[^\w.-]+", "-", entry["run"])
                copied = f"{RECIPES}/{len(entries) + 1}-{label}.yaml"
                (out / RECIPES).mkdir(exist_ok=True)
                shutil.copyfile(run.folder / recipe, out / copied)
                recipe = copied
            entries.append({**entry, "modalities": kept, "recipe": recipe})
    return entries
