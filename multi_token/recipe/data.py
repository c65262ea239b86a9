"""The `data` section of a recipe: rows, and their order."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class StrictModel(BaseModel):
    """Base of all recipe sections: fields are frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataSource(StrictModel):
    """A source of rows."""

    rows: str
    """A file of rows, `shards/*.parquet` or a folder of such files, a folder of media files, one of
    `save_to_disk` (datasets), or a hub name; docs/files.md lists all."""
    split: str = "train"
    """Split to read, if the source has several, or a part of it: `train[:95%]`, `train[1000:]`."""
    weight: float | None = Field(default=None, gt=0)
    """With `data.stream`: weight of the source in the mixture; default: 1."""


class StreamSpec(StrictModel):
    """Rows that are read during training and not before; see docs/streaming.md."""

    window: int = Field(default=1024, ge=1)
    """Number of rows that are shuffled together; `1` keeps their order."""


class DataSpec(StrictModel):
    """The `data` section of a recipe."""

    train: list[DataSource] = Field(min_length=1)
    eval: list[DataSource] = Field(default_factory=list)
    """Held-out rows: their loss, answers to some of them and the blind test, every `eval_steps`."""
    stream: StreamSpec | None = None
    """Read rows during training and not before: `true`, or a section. Every stage then needs
    `max_steps`."""
    max_tokens: int = Field(default=2048, ge=1)
    """Longest row, in tokens. A longer one is a bad row (`on_bad_row`) and never cut."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """`raise`: stop, and report which rows are bad; `skip`: leave them out and count them."""
    lengths: Literal["decode", "headers"] = "decode"
    """Source of row lengths before training. `decode`: every row is read as in training, which
    finds all bad rows. `headers`: from media headers where possible (docs/lengths.md); a damaged
    file then ends the run when training reads it."""

    @field_validator("stream", mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value
