"""Jobs for Ray Data: classes that `Dataset.map_batches` runs in actors on any number of machines.

    rows.map_batches(PredictRows, fn_constructor_kwargs={"run": "runs/siglip"}, num_gpus=1, ...)

Nothing here imports Ray. A batch is a dict of arrays or an Arrow table; the result is the same with
more columns. A row does not depend on the others, so rows may arrive in any order, and a batch may
be computed again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from multi_token.data.feature_cache.encode import (
    RowSource,
    encode_rows,
    random_preprocessing,
    sample_items,
)
from multi_token.data.feature_cache.policy import cache_folder, frozen_encoders, open_cache
from multi_token.data.rows import row_id_of
from multi_token.errors import RecipeError, RowError
from multi_token.evaluate.predict import OnBadRow, Work, answers, batches_of, read_rows, scores
from multi_token.evaluate.row_job import RowResult
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import load_recipe
from multi_token.recipe.train import FeatureCacheSpec
from multi_token.train.prepare import initial_encoders

_NAME = "batch"
_TEXTS = ("answer", "error")
"""Columns of texts that are added."""


class _ModelRows:
    """A trained run in an actor, and the way of a batch through it."""

    def __init__(
        self,
        run: str,
        *,
        root: str | None = None,
        batch_size: int = 8,
        on_bad_row: OnBadRow = "skip",
        language_model: str | None = None,
        device: str | None = None,
    ) -> None:
        """Load the run.

        Args:
            run: Folder or hub name of a trained run.
            root: Folder of relative media paths; default: the current one.
            batch_size: Rows that the model takes together, of those that Ray gives.
            on_bad_row: `skip` writes the sentence into the column `error`; `raise` ends the job.
            language_model: Path or hub name of the frozen language model, if it has moved.
            device: Device of the model; default: the accelerator that Ray has given to the actor.
        """
        if device is None and torch.accelerator.is_available():
            device = str(torch.accelerator.current_accelerator())
        self.model = MultiTokenForConditionalGeneration.from_pretrained(
            run, language_model=language_model, device=device
        )
        self.processor = replace(self.model.require_processor(), fetch=Fetch(root=root))
        self.batch_size = batch_size
        self.on_bad_row: OnBadRow = on_bad_row

    def _results(self, batch: Any, work: Work, *, prompt_only: bool) -> list[Mapping[str, Any]]:
        """Return fields and `error` of each row, in the order of the batch."""
        rows = _rows(batch)
        found: dict[int, RowResult] = {}

        def keep(results: Sequence[RowResult]) -> None:
            for result in results:
                if isinstance(result.found, RowError) and self.on_bad_row == "raise":
                    raise result.found
                found[result.index] = result

        read = read_rows(
            rows, range(len(rows)), self.processor, source=_NAME, prompt_only=prompt_only
        )
        batches = batches_of(
            iter(read), batch_size=self.batch_size, window=max(1, len(rows)), on_bad=keep
        )
        for results in work(batches):
            keep(results)
        return [_fields(found[index]) for index in range(len(rows))]


class PredictRows(_ModelRows):
    """Adds a column `answer`: a last assistant turn of a row is left out, and generated.

    A bad row has an empty answer, and its sentence in the column `error`.
    """

    def __init__(
        self,
        run: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Load the run.

        Args:
            run: Folder or hub name of a trained run.
            max_new_tokens: Longest answer, in tokens.
            temperature: 0: greedy; above 0: sampled.
            seed: Seed of sampled answers, which also depend on the batch.
            **options: `root` (folder of relative media paths), `batch_size` (default 8),
                `on_bad_row` (default `skip`), `language_model`, `device`.
        """
        super().__init__(run, **options)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed

    def __call__(self, batch: Any) -> Any:
        """Answer the rows of a batch.

        Args:
            batch: Columns of rows of any accepted shape.

        Returns:
            The batch with the columns `answer` and `error`.
        """
        # of the content: batches have no number, and may be computed again
        seed = self.seed + zlib.crc32(str(_rows(batch)[:1]).encode())
        work = answers(
            self.model,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=seed,
        )
        found = self._results(batch, work, prompt_only=True)
        return _with_columns(
            batch,
            answer=[fields.get("answer", "") for fields in found],
            error=[fields["error"] for fields in found],
        )


class EvaluateRows(_ModelRows):
    """Adds columns `loss` and `exact`: the scores of `multi-token evaluate rows`.

    `loss` is the mean cross entropy of the supervised tokens; `exact` is the share of a row's
    answers that greedy decoding would write. Both are NaN for a bad row.
    """

    def __call__(self, batch: Any) -> Any:
        """Score the rows of a batch.

        Args:
            batch: Columns of rows with answers.

        Returns:
            The batch with the columns `loss`, `exact` and `error`.
        """
        found = self._results(batch, scores(self.model), prompt_only=False)
        columns = {name: [f.get(name, np.nan) for f in found] for name in ("loss", "exact")}
        return _with_columns(batch, **columns, error=[fields["error"] for fields in found])


class EncodeRows:
    """Encodes the media of rows into the feature cache of a recipe, as `data encode` does.

    The folder of the cache must be shared by the machines. Each batch writes a file of features, so
    give large ones (`batch_size=1024`).
    """

    def __init__(
        self, recipe: str, *, out: str | None = None, root: str | None = None, **overrides: Any
    ) -> None:
        """Load the frozen encoders of a recipe.

        Args:
            recipe: Path of a YAML file.
            out: Folder for the features; default: the cache of the recipe.
            root: Folder of relative media paths; default: the current one.
            **overrides: Keys of the recipe with `__` for dots, such as `train__args={...}`.
        """
        given = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        loaded = load_recipe(recipe, given)
        self.modalities = loaded.model.modalities
        self.encoders = frozen_encoders(loaded, lambda: initial_encoders(loaded))
        folder = cache_folder(loaded) if out is None else Path(out).expanduser()
        spec = loaded.train.feature_cache or FeatureCacheSpec()
        self.cache = open_cache(folder, spec, Console(stderr=True))
        self.fetch = Fetch(root=root)
        self._is_checked = False

    def __call__(self, batch: Any) -> Any:
        """Encode the items of a batch that the cache lacks.

        Args:
            batch: Columns of rows of any accepted shape.

        Returns:
            `id` and `error` of each row; the error is empty if its items were encoded.
        """
        rows = _rows(batch)
        source = RowSource(rows, self.fetch, _NAME)
        if not self._is_checked:
            items, _ = sample_items([source], self.modalities)
            reason = random_preprocessing(items, self.modalities)
            if reason is not None:
                raise RecipeError(reason)
            # a batch of texts alone shows nothing
            self._is_checked = bool(items)
        # other actors write into the folder too
        self.cache.refresh()
        report = encode_rows(
            [source], self.modalities, self.encoders, self.cache, console=Console(quiet=True)
        )
        errors = {problem.index: problem.message for problem in report.problems}
        ids = [row_id_of(index, row, _NAME) for index, row in enumerate(rows)]
        texts = [errors.get(index, "") for index in range(len(rows))]
        return {"id": np.array(ids, object), "error": np.array(texts, object)}


def _rows(batch: Any) -> list[dict[str, Any]]:
    """Columns -> rows."""
    if not isinstance(batch, Mapping):
        return batch.to_pylist()
    columns = [[_plain(value) for value in values] for values in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    """Lists for arrays of anything but numbers: an array of numbers is one media item."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _fields(result: RowResult) -> Mapping[str, Any]:
    if isinstance(result.found, RowError):
        return {"error": result.found.sentence}
    return {**result.found, "error": ""}


def _with_columns(batch: Any, **columns: list[Any]) -> Any:
    if isinstance(batch, Mapping):
        # objects: numpy would fill all texts to one width
        types = {name: object if name in _TEXTS else float for name in columns}
        return {**batch, **{name: np.array(v, types[name]) for name, v in columns.items()}}
    for name, values in columns.items():
        batch = batch.append_column(name, [values])
    return batch
