"""`multi-token data check`, `data show`, `data encode`: options, tables and exit codes."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multi_token.errors import MultiTokenError, RecipeError, RowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multi_token.data.row_source import RowSource
    from multi_token.data.rows import Row
    from multi_token.data.scan import Bin, ScanReport
    from multi_token.processor import MultiTokenProcessor
    from multi_token.recipe.data import DataSource
    from multi_token.recipe.recipe import Recipe
    from multi_token.types import Conversation, Sample

PROMPT_STYLE, SUPERVISED_STYLE, MEDIA_STYLE = "dim", "bold green", "bold magenta"

data_app = typer.Typer(
    no_args_is_help=True, help="Check rows, show them, and encode their media before training."
)

Data = Annotated[
    str,
    typer.Argument(
        help="A .json, .jsonl, .parquet or .tar file, a pattern or folder of such files, a folder "
        "of save_to_disk, or a hub name.",
    ),
]
RecipePath = Annotated[
    str, typer.Option("--recipe", "-r", help="Recipe that will train on these rows.")
]
Override = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Other values for keys of the recipe."),
]
Reading = Annotated[
    list[str] | None,
    typer.Option(
        "--read",
        metavar="KEY=VALUE",
        help="A key by which columns become conversations, as in a source of the recipe: "
        "format=captions, media.image=photo; repeatable. Default: those of the recipe's source "
        "with these rows.",
    ),
]
Split = Annotated[str, typer.Option(help="Split to read, if there are several.")]
NumShards = Annotated[
    int | None,
    typer.Option(min=1, help="Number of processes that share the rows; default: torchrun's, or 1."),
]
Shard = Annotated[
    int | None, typer.Option(min=0, help="Number of this process, from 0; default: torchrun's.")
]


@data_app.command()
def check(
    data: Data,
    recipe: RecipePath,
    clean: Annotated[
        str | None, typer.Option(help="Write the good rows to this .jsonl file.", metavar="OUT")
    ] = None,
    split: Split = "train",
    examples: Annotated[int, typer.Option(help="Rows to print per kind of problem.", min=0)] = 5,
    num_workers: Annotated[int, typer.Option(help="Data workers that read rows.", min=0)] = 0,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Store lengths of good rows in this folder, so that training reads no media for "
            "them; default with several shards: the run's `lengths`.",
        ),
    ] = None,
    num_shards: NumShards = None,
    shard: Shard = None,
    reading: Reading = None,
    override: Override = None,
) -> None:
    """Read every row as training does; report problems, and a histogram of lengths.

    Several processes and machines may share the rows; the last one to finish reports on all rows.
    Exit code 0: every row is good. 1: at least one is bad, or there are no rows.
    """
    from multi_token.data.dataset import RowReader
    from multi_token.data.lengths import LengthStore
    from multi_token.data.scan import scan
    from multi_token.data.sources import lengths_folder
    from multi_token.recipe.recipe import load_recipe

    share, num_shares = shard_of(shard, num_shards)
    # before the rows, which may take an hour to read
    if clean is not None:
        _check_target(clean)
    processor, source = _open(data, split, recipe, override, reading)
    rows = source.rows
    known = None
    if keep is not None or num_shares > 1:
        run = lengths_folder(load_recipe(recipe, override or ()))
        known = LengthStore(Path(keep).expanduser() if keep is not None else run, processor)
    look = partial(
        scan,
        rows,
        RowReader(replace(processor, once=True), processor.modalities),
        source=data,
        num_workers=num_workers,
        known=known,
    )
    # every n-th row: neighbours often cost alike, so blocks would end at different times
    report = look(indices=range(share, len(rows), num_shares))

    console = Console(highlight=False)
    if known is not None and num_shares > 1:
        console.print(
            f"shard {share} of {num_shares}: {report.num_rows:,} of {len(rows):,} rows, "
            f"{len(report.problems):,} bad"
        )
        of = f"{Path(data).name} {split} {len(rows)}"
        if not known.finish(share, num_shares, of=of):
            console.print("the last shard to finish reports on all rows")
            return
        known.refresh()
        # lengths of good rows of all shards are stored now, so this reads the bad ones only
        report = look()
    _print_report(console, report, examples)
    if clean is not None:
        _write_clean_rows(rows, report.good_indices, clean, data=data, processor=processor)
        console.print(f"{len(report.good_indices):,} good rows written to {clean}", markup=False)
    # for scripts: a training job should not start on bad rows
    if report.problems or not report.num_rows:
        raise typer.Exit(1)


@data_app.command()
def show(
    data: Data,
    row: Annotated[str, typer.Argument(help="Index of the row, from 0, or its id.")],
    recipe: RecipePath,
    split: Split = "train",
    reading: Reading = None,
    override: Override = None,
) -> None:
    """Print one row as the model gets it: prompt, supervised text, media with their tokens."""
    from multi_token.data.formats import to_conversation
    from multi_token.data.rows import row_id_of
    from multi_token.types import Length

    processor, source = _open(data, split, recipe, override, reading)
    rows = source.rows
    # by index or id: messages about rows name either
    index = _find_row(rows, row, data)
    conversation = to_conversation(
        rows[index], processor.modalities, row_id=row_id_of(index, rows[index], data)
    )
    sample = processor(conversation)
    length = Length.of(sample)

    console = Console(highlight=False)
    console.print(f"row {conversation.id} (index {index} of {len(rows):,})", markup=False)
    console.print(
        f"{length.num_tokens:,} tokens, {length.num_supervised:,} supervised, "
        f"{length.num_media:,} media\n"
    )
    render = partial(render_sample, tokenizer=processor.tokenizer, marks=not console.is_terminal)
    console.print(render(sample))
    if sample.rejected is not None:
        num_tokens = Length.of(sample.rejected).num_tokens
        console.print(
            f"\nAbove: the chosen answer. Below: the rejected answer, {num_tokens:,} tokens.\n"
        )
        console.print(render(sample.rejected))
    elif conversation.rejected is not None:
        console.print("\nThis is the chosen answer; only stages with `dpo` read the rejected one.")
    if sample.media_spans:
        console.print(_media_table(conversation, [span.length for span in sample.media_spans]))


@data_app.command()
def encode(
    recipe: Annotated[str, typer.Argument(help="A YAML file.")],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the features; default: `train.feature_cache.path`, or the run's "
            "`cache`.",
        ),
    ] = None,
    num_shards: NumShards = None,
    shard: Shard = None,
    examples: Annotated[int, typer.Option(help="Unreadable items to print.", min=0)] = 5,
    override: Override = None,
) -> None:
    """Encode every media item of a recipe's rows into its feature cache; resumes where it stopped.

    Several processes and machines may write into one folder. Exit code 1: an item or a row could
    not be read.
    """
    from multi_token.data.feature_cache.encode import (
        encode_rows,
        random_preprocessing,
        sample_items,
    )
    from multi_token.data.feature_cache.policy import cache_folder, frozen_encoders, open_cache
    from multi_token.data.row_source import open_rows, show_note
    from multi_token.data.sources import num_readers
    from multi_token.recipe.recipe import load_recipe
    from multi_token.recipe.train import FeatureCacheSpec
    from multi_token.train.prepare import initial_encoders

    share, num_shares = shard_of(shard, num_shards)
    loaded = load_recipe(recipe, override or ())
    spec = loaded.train.feature_cache or FeatureCacheSpec()
    closed_form = loaded.train.closed_form
    sources = [*loaded.data.train, *loaded.data.eval]
    sources += (closed_form.rows or []) if closed_form is not None else []
    modalities = loaded.model.modalities
    row_sources = [open_rows(s, modalities, seed=loaded.train.seed) for s in sources]
    for source in row_sources:
        show_note(source.note)
    first, _ = sample_items(row_sources, modalities)
    # before the encoders are loaded, which takes longer
    reason = random_preprocessing(first, modalities)
    if reason is not None:
        raise RecipeError(reason)
    encoders = frozen_encoders(loaded, partial(initial_encoders, loaded))
    console = Console(stderr=True, highlight=False)
    folder = Path(out).expanduser() if out is not None else cache_folder(loaded)
    cache = open_cache(folder, spec, console)
    num_rows = sum(len(source.rows) for source in row_sources)
    report = encode_rows(
        row_sources,
        modalities,
        encoders,
        cache,
        share=share,
        num_shares=num_shares,
        num_workers=num_readers(loaded, num_rows // num_shares),
        console=console,
    )
    for problem in report.problems[:examples]:
        console.print(
            f"skipped row {problem.row_id}: {problem.message}", markup=False, soft_wrap=True
        )
    if 0 < examples < len(report.problems):
        console.print(f"and {len(report.problems) - examples:,} more")
    # other processes may have written meanwhile, and the count below is the folder's
    cache.refresh()
    of = "" if num_shares == 1 else f" (shard {share} of {num_shares})"
    console.print(
        f"{report.num_items:,} items in {report.num_rows:,} rows{of}: {report.num_encoded:,} "
        f"encoded, {report.num_already_cached:,} there already or repeated, "
        f"{len(report.problems):,} skipped; {len(cache):,} in {folder}",
        markup=False,
        soft_wrap=True,
    )
    if folder != cache_folder(loaded):
        option = shlex.quote(f"train.feature_cache={{path: {folder}}}")
        console.print(f"train with it: {option}", markup=False, soft_wrap=True)
    if report.problems:
        raise typer.Exit(1)


def shard_of(shard: int | None, num_shards: int | None) -> tuple[int, int]:
    """Return shard and number of shards, from the options or torchrun's environment."""
    if (shard is None) != (num_shards is None):
        raise MultiTokenError("--shard and --num-shards belong together; give both or neither")
    if shard is None or num_shards is None:
        # the variables of torchrun, so that `torchrun -m multi_token data check` needs no options
        shard, num_shards = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if shard >= num_shards:
        raise MultiTokenError(
            f"expected --shard from 0 to {num_shards - 1}, since --num-shards is {num_shards}, "
            f"got {shard}"
        )
    return shard, num_shards


def _open(
    data: str, split: str, recipe: str, override: list[str] | None, reading: list[str] | None
) -> tuple[MultiTokenProcessor, RowSource]:
    """Open rows as the recipe reads them, with the recipe's processor."""
    from multi_token.data.row_source import open_rows, show_note
    from multi_token.processor import build_processor
    from multi_token.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, override or ())
    # the data first, so that a wrong name is reported without loading a tokenizer
    source = open_rows(
        source_of(data, split, loaded, reading), loaded.model.modalities, seed=loaded.train.seed
    )
    show_note(source.note)
    return replace(build_processor(loaded), fetch=source.fetch), source


def source_of(
    data: str, split: str, recipe: Recipe | None, reading: Sequence[str] | None
) -> DataSource:
    """Return the recipe's source of these rows, else one of its own; `reading` sets its keys."""
    from multi_token.recipe.data import DataSource
    from multi_token.recipe.recipe import set_overrides
    from multi_token.registry import validate_fields

    named = [] if recipe is None else [*recipe.data.eval, *recipe.data.train]
    found = next((s for s in named if (s.rows, s.split) == (data, split)), None)
    fields = {"rows": data, "split": split}
    if found is not None:
        fields = found.model_dump(mode="json", exclude_defaults=True, exclude={"weight"})
    # what is read as a format is not read by turns as well
    keys = {one.partition("=")[0].partition(".")[0] for one in reading or ()}
    for key, other in (("format", "turns"), ("turns", "format")):
        if key in keys:
            fields.pop(other, None)
    return validate_fields(DataSource, set_overrides(fields, reading or ()), where="--read")


def _find_row(rows: Sequence[Row], wanted: str, data: str) -> int:
    # 0012 is an id, since an index has no leading zeros
    if wanted.isdecimal() and str(int(wanted)) == wanted and int(wanted) < len(rows):
        return int(wanted)
    for index in range(len(rows)):
        try:
            found = rows[index].get("id")
        except RowError:  # a line that is not JSON has no id; `data check` reports it
            continue
        if found is not None and str(found) == wanted:
            return index
    raise MultiTokenError(
        f"no row of {data} has the index or id {wanted!r}; it has {len(rows):,} rows, from index 0"
    )


def _check_target(clean: str) -> None:
    """Raise MultiTokenError for a file that `--clean` cannot write."""
    target = Path(clean)
    if target.suffix.lower() != ".jsonl":
        raise MultiTokenError(f"--clean writes a .jsonl file, got {clean!r}")
    if not target.resolve().parent.is_dir():
        raise MultiTokenError(f"no folder {target.resolve().parent} to write {target.name} into")


def _write_clean_rows(
    rows: Sequence[Row],
    good_indices: Sequence[int],
    clean: str,
    *,
    data: str,
    processor: MultiTokenProcessor,
) -> None:
    from multi_token.data.files.jsonl import write_jsonl
    from multi_token.data.files.open import media_root
    from multi_token.data.scan import first_relative_path

    start = Path(media_root(data) or "").resolve()
    # relative paths start at the folder of the file that names them
    if Path(clean).resolve().parent != start:
        lost = first_relative_path(rows, good_indices, modalities=processor.modalities)
        if lost is not None:
            raise MultiTokenError(
                f"relative media paths ({lost}) start at {start} and would break in {clean}; "
                f"write the file there: --clean {start / Path(clean).name}"
            )
    write_jsonl(rows, good_indices, clean)


def _print_report(console: Console, report: ScanReport, examples: int) -> None:
    from multi_token.data.scan import histogram

    if report.problems:
        console.print(_problem_table(report, examples))
    if report.lengths:
        console.print(_length_table(histogram(report.lengths.table[:, 0].tolist())))
    total = report.total
    share = total.num_supervised / total.num_tokens if total.num_tokens else 0.0
    console.print(
        f"{report.num_rows:,} rows: {len(report.good_indices):,} good, "
        f"{len(report.problems):,} bad\n"
        f"{total.num_tokens:,} tokens in good rows: {total.num_supervised:,} supervised "
        f"({share:.1%}), {total.num_media:,} media"
    )
    if not report.num_rows:
        console.print("There are no rows.")


def _problem_table(report: ScanReport, examples: int) -> Table:
    table = Table("problem", "rows", "row", "what is wrong", title="Problems", show_lines=True)
    for kind, problems in report.by_kind.items():
        shown = problems[:examples] or [None]
        for i, problem in enumerate(shown):
            table.add_row(
                kind if i == 0 else "",
                f"{len(problems):,}" if i == 0 else "",
                # Text, since ids and messages hold brackets that rich would take for markup
                Text(problem.row_id, overflow="fold") if problem else "",
                Text(problem.message, overflow="fold") if problem else "",
            )
        if 0 < examples < len(problems):
            table.add_row("", "", f"and {len(problems) - examples:,} more", "")
    return table


def _length_table(bins: Sequence[Bin]) -> Table:
    table = Table("tokens", "rows", "", title="Length of good rows")
    highest = max(b.count for b in bins)
    for b in bins:
        # at least one block, so that a bin with a single row is visible
        bar = "█" * max(round(30 * b.count / highest), 1 if b.count else 0)
        table.add_row(f"{b.low:,} - {b.high:,}", f"{b.count:,}", bar)
    return table


def render_sample(sample: Sample, tokenizer: Any, *, marks: bool = False) -> Text:
    """Render a sample as the model gets it: prompt dim, supervised text green, `[image x 4]`.

    With `marks`, supervised text also is between `⟦` and `⟧`, for terminals without colour.
    """
    from multi_token.types import IGNORE_INDEX

    ids: list[int] = sample.input_ids.tolist()
    supervised: list[bool] = (sample.labels != IGNORE_INDEX).tolist()
    starts = {span.start: span for span in sample.media_spans}
    opening, closing = ("⟦", "⟧") if marks else ("", "")
    text = Text.assemble(
        ("prompt", PROMPT_STYLE),
        "  ",
        (f"{opening}supervised{closing}", SUPERVISED_STYLE),
        "  ",
        ("[media x tokens]", MEDIA_STYLE),
        "\n\n",
    )
    position = 0
    while position < len(ids):
        if span := starts.get(position):
            text.append(f"[{span.modality} x {span.length}]", style=MEDIA_STYLE)
            # a span of no tokens still must not loop for ever
            position += max(span.length, 1)
            continue
        end = position + 1
        while end < len(ids) and end not in starts and supervised[end] == supervised[position]:
            end += 1
        # a run of ids at a time: one token alone may be half of a UTF-8 letter
        decoded = str(tokenizer.decode(ids[position:end]))
        if supervised[position]:
            text.append(f"{opening}{decoded}{closing}", style=SUPERVISED_STYLE)
        else:
            text.append(decoded, style=PROMPT_STYLE)
        position = end
    return text


def _media_table(conversation: Conversation, lengths: Sequence[int]) -> Table:
    from multi_token.media.fetch import shorten

    table = Table("modality", "tokens", "source")
    for media, num_tokens in zip(conversation.media, lengths, strict=True):
        source = media.source
        in_memory = isinstance(source, (bytes, bytearray))
        text = f"{len(source):,} bytes" if in_memory else shorten(source)
        table.add_row(media.modality, f"{num_tokens:,}", Text(text, overflow="fold"))
    return table
