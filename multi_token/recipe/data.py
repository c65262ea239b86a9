"""The `data` section of a recipe: rows, and their order."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class StrictModel(BaseModel):
    """Base of all recipe sections: fields are frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Format = Literal[
    "messages",
    "sharegpt",
    "prompt_completion",
    "preferences",
    "requests",
    "pairs",
    "alpaca",
    "query_response",
    "qa",
    "transcripts",
    "captions",
    "summaries",
]
TurnRole = Literal["system", "user", "assistant", "chosen", "rejected"]


class DataSource(StrictModel):
    """A source of rows, and how its columns become conversations; see docs/rows.md."""

    rows: str
    """A file of rows, `shards/*.parquet` or a folder of such files, a folder of media files, one of
    `save_to_disk` (datasets), or a hub name; docs/files.md lists all."""
    split: str = "train"
    """Split to read, if the source has several, or a part of it: `train[:95%]`, `train[1000:]`,
    every 20th row as `train[::20]`, and the others as `train[not ::20]`."""
    weight: float | None = Field(default=None, gt=0)
    """With `data.stream`: weight of the source in the mixture; default: 1."""
    format: Format | None = None
    """Form of the rows (docs/rows.md has all); default: by the columns of the first rows."""
    turns: list[dict[TurnRole, str]] = Field(default_factory=list)
    """Turns as Jinja templates over the columns of a row, in order, instead of a `format`:
    `[{user: "<image> {{ question }}"}, {assistant: "{{ answer }}"}]`. `chosen` and `rejected` are
    the two answers of a preference row."""
    media: dict[str, str] = Field(default_factory=dict)
    """Modality -> column of its items, or a template that makes a path or a list of paths; default:
    by the names of the columns."""
    media_texts: dict[str, str] = Field(default_factory=dict)
    """Modality -> template of the text of its items, for the teacher of a distillation."""
    slots: dict[str, str] = Field(default_factory=dict)
    """Spelling of a slot in these rows -> modality, such as `{"<image>": video}`."""
    root: str | None = None
    """Folder or archive (.zip, .tar) where relative media paths start, and which none may leave;
    default: the folder of the rows."""
    where: str | None = None
    """Jinja expression over the columns: rows for which it does not hold are not of the source."""
    question: list[str] = Field(default_factory=list)
    """With a format that has no question of its own (`captions`, `transcripts`, `summaries`), or in
    `turns` as `{{ question }}`: a text or several, of which each row gets one, by `train.seed`."""

    @field_validator("question", mode="before")
    @classmethod
    def _question_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("turns")
    @classmethod
    def _check_turns(cls, turns: list[dict[TurnRole, str]]) -> list[dict[TurnRole, str]]:
        for index, turn in enumerate(turns):
            if len(turn) != 1:
                raise ValueError(
                    f"turn {index} has the roles {', '.join(turn) or 'none'}, expected one, as in "
                    '{user: "<image> {{ question }}"}'
                )
        roles = [role for turn in turns for role in turn]
        if roles and roles[-1:] != ["assistant"] and sorted(roles[-2:]) != ["chosen", "rejected"]:
            raise ValueError(
                f"the turns are {', '.join(roles)}; expected an assistant turn at the end, or "
                "`chosen` and `rejected`"
            )
        if roles and "user" not in roles:
            raise ValueError("the turns have no user turn")
        if roles.count("chosen") > 1 or roles.count("rejected") > 1:
            raise ValueError("the turns have `chosen` or `rejected` twice")
        return turns

    @model_validator(mode="after")
    def _check_keys(self) -> DataSource:
        # here and not in conflicts.py, because commands build a source without a recipe
        if self.turns and self.format is not None:
            raise ValueError("`turns` and `format` exclude each other; leave one of them out")
        asks = self.format in (None, "captions", "transcripts", "summaries")
        if self.question and not self.turns and not asks:
            raise ValueError(
                f"`question` is for captions, transcripts and summaries; rows of `{self.format}` "
                "have questions of their own"
            )
        return self


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
