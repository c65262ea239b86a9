"""The `data` section of a recipe: rows, and their order."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class StrictModel(BaseModel):
    """Base of all recipe sections: unknown keys are refused, fields are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSource(StrictModel):
    """Rows from one place."""

    rows: str
    """A .json, .jsonl, .parquet or .tar (WebDataset) file, `shards/*.parquet` or a folder of such
    files, a folder saved by `datasets`, or a hub name."""
    split: str = "train"
    """Which split, where the source has several."""
    weight: float | None = Field(default=None, gt=0)
    """With `data.stream`: this source's part of the rows, in any unit; default: 1."""


class StreamSpec(StrictModel):
    """Rows are read while training goes on, and not before; see docs/streaming.md."""

    window: int = Field(default=1024, ge=1)
    """So many rows at a time are put in random order; `1` leaves them as they come."""


class DataSpec(StrictModel):
    """Rows to train on."""

    train: list[DataSource] = Field(min_length=1)
    eval: list[DataSource] = Field(default_factory=list)
    """Held-out rows: their loss, answers to some of them and the blind test, every `eval_steps`."""
    stream: StreamSpec | None = None
    """Do not read all rows before training, but on the way: `true`, or a section. A stage then
    needs `max_steps`."""
    max_tokens: int = Field(default=2048, ge=1)
    """A longer row is never cut: see `on_bad_row`."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """`raise`: stop and say which rows are bad; `skip`: leave them out whole and count them."""
    lengths: Literal["decode", "headers"] = "decode"
    """How long rows are, before training: `decode`: each is read as training will read it, which
    finds every bad one; `headers`: headers tell it where they can (docs/lengths.md), and a damaged
    file ends the run when training meets it. Needs `on_bad_row: raise`."""

    @field_validator("stream", mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value
