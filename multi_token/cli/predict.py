"""`multi-token predict`: answers to a file of rows, by any number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console

from multi_token.cli.ask import (
    MAX_NEW_TOKENS,
    TEMPERATURE,
    TEMPLATE_KWARGS,
    set_template_kwargs,
)
from multi_token.cli.data import NumShards, Reading, Shard, shard_of, source_of
from multi_token.cli.loading import LoadOptions, load_run, with_load_options
from multi_token.cli.serve import ENGINE_KEY_VARIABLE

if TYPE_CHECKING:
    from multi_token.data.row_source import RowSource
    from multi_token.evaluate.predict import OnBadRow, Work
    from multi_token.evaluate.row_job import JobReport, RowJob
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe
    from multi_token.serve.engines.vllm.engine import VllmEngine

OUT = typer.Option(..., help="File of the results in the order of the rows: .jsonl or .parquet.")
NUM_WORKERS = typer.Option(
    None, min=0, help="Data workers that read rows; default: 0 on a CPU, else up to 8."
)
ON_BAD_ROW = typer.Option(
    None,
    help="raise: end at a row that cannot be read. skip: write its error as its result. Default: "
    "`data.on_bad_row` of the run.",
)
_MOST_WORKERS = 8


@with_load_options
def predict(
    run: Path = typer.Argument(..., help="The folder of a trained run."),
    rows: str = typer.Argument(
        ..., help="Rows of any accepted shape; a last assistant turn is left out."
    ),
    out: Path = OUT,
    split: str = typer.Option("train", help="Split to read, if there are several."),
    batch_size: int = typer.Option(8, min=1, help="Rows per batch."),
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = typer.Option(0, help="Seed of sampled answers."),
    chat_template_kwargs: str = TEMPLATE_KWARGS,
    on_bad_row: Literal["raise", "skip"] = ON_BAD_ROW,
    reading: Reading = None,
    num_workers: int = NUM_WORKERS,
    num_shards: NumShards = None,
    shard: Shard = None,
    engine_url: list[str] = typer.Option(
        None,
        help="URL of a vLLM server that runs the language model of this export; repeatable. Media "
        f"are encoded here. The environment variable {ENGINE_KEY_VARIABLE} has its API key.",
    ),
    engine_concurrency: int = typer.Option(
        64, min=1, help="Prompts in flight on each vLLM server."
    ),
    engine_timeout: float = typer.Option(
        60.0, min=0, help="Time to wait while no vLLM server is up, in seconds."
    ),
    *,
    load: LoadOptions,
) -> None:
    """Answer a file of rows. A killed command resumes, and several processes may share the rows.

    Under `torchrun`, or with --num-shards and --shard on any machines, each process answers its
    share into OUT.parts, and the last one to finish writes OUT.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    # a vLLM server rounds in another way, and samples with other random numbers
    settings["engine"] = "vllm" if engine_url else "local"
    settings |= load.precision
    if temperature > 0:
        settings["seed"] = seed
    if chat_template_kwargs is not None:
        settings["chat_template_kwargs"] = chat_template_kwargs
    source = open_run_rows(run, rows, split, reading)
    job, console = open_job(
        "predict", run, source, out, ("answer",), settings, split, (shard, num_shards)
    )
    if job.is_joined:
        console.print(f"{job.num_done:,} of {len(job.rows):,} rows are answered already")
        return
    from multi_token.evaluate.predict import answers, run_work

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if engine_url:
        from multi_token.serve.engines.vllm.golden import read_golden

        read_golden(run)  # refuses a folder that was not exported, before loading any weights
    model = load_run(run, load, embeddings_only=bool(engine_url))
    set_template_kwargs(model, chat_template_kwargs)
    with ExitStack() as stack:
        if engine_url:
            engine = stack.enter_context(_started_engine(model, run, engine_url, engine_timeout))
            from multi_token.serve.engines.vllm.answers import EngineAnswers

            work: Work = EngineAnswers(
                engine, max_in_flight=engine_concurrency, timeout_s=engine_timeout, **sampling
            )
        else:
            work = answers(model, **sampling)
        run_work(
            job,
            work,
            replace(model.require_processor(), fetch=source.fetch),
            source=rows,
            batch_size=batch_size,
            num_workers=workers_for(model, num_workers),
            on_bad_row=bad_row_rule(run, on_bad_row),
            console=console,
            description="Answering",
        )
    finish(job, console)


@contextmanager
def _started_engine(
    model: MultiTokenForConditionalGeneration, run: Path, urls: Sequence[str], timeout_s: float
) -> Iterator[VllmEngine]:
    from multi_token.registry import validate_fields
    from multi_token.serve.engines.vllm.engine import build_vllm_engine
    from multi_token.serve.settings import ServeSettings

    fields = {
        "run_folder": run.resolve(),
        "engine_urls": urls,
        "engine_key": os.environ.get(ENGINE_KEY_VARIABLE) or None,
        "engine_startup_timeout_s": timeout_s,
    }
    engine = build_vllm_engine(model, validate_fields(ServeSettings, fields, where="predict"))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def open_run_rows(run: Path, rows: str, split: str, reading: Sequence[str] | None) -> RowSource:
    """Open rows for the modalities of a run, read as its recipe reads them."""
    from multi_token.checkpoint.hub import local_folder
    from multi_token.checkpoint.load import read_config, read_spec
    from multi_token.data.row_source import open_rows, show_note

    fields = read_config(run)  # refuses what is no run
    recipe = _recipe_of(run)
    # the run's config alone: the rows are opened before the model, which takes longer
    modalities = read_spec(local_folder(run), fields).modalities
    seed = 0 if recipe is None else recipe.train.seed
    source = open_rows(source_of(rows, split, recipe, reading), modalities, seed=seed)
    show_note(source.note)
    return source


def _recipe_of(run: Path) -> Recipe | None:
    """Return the recipe of a run in a folder or on the hub; None for an imported run without one.

    Raises RecipeError for a recipe that cannot be read.
    """
    from multi_token.checkpoint.hub import local_folder
    from multi_token.recipe.recipe import load_recipe

    path = local_folder(run) / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def open_job(
    command: str,
    run: Path,
    source: RowSource,
    out: Path,
    columns: tuple[str, ...],
    settings: Mapping[str, Any],
    split: str,
    shard: tuple[int | None, int | None],
) -> tuple[RowJob, Console]:
    """Open the output of a job, before the model, which takes longer to load."""
    from multi_token.checkpoint.load import run_digest
    from multi_token.evaluate.row_job import RowJob

    share, num_shares = shard_of(*shard)
    # of the processes of torchrun, one prints
    is_quiet = int(os.environ.get("RANK", "0")) > 0
    console = Console(stderr=True, quiet=is_quiet, highlight=False, soft_wrap=True, markup=False)
    job = RowJob(
        out,
        source.rows,
        columns=columns,
        settings={"command": command, "run": run_digest(run), "split": split, **settings},
        share=share,
        num_shares=num_shares,
        console=console,
    )
    if job.num_done and not job.is_joined:
        console.print(f"{job.num_done:,} of {len(job.rows):,} rows are answered already")
    return job, console


def workers_for(model: Any, given: int | None) -> int:
    """Return the number of data workers: on a CPU none, since all cores generate."""
    from multi_token.report.machine import num_cores

    if given is not None or model.device.type == "cpu":
        return given or 0
    return min(_MOST_WORKERS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def bad_row_rule(run: Path, given: OnBadRow | None) -> OnBadRow:
    """Return the rule that was given, else that of the run's recipe."""
    if given is not None:
        return given
    recipe = _recipe_of(run)
    return "raise" if recipe is None else recipe.data.on_bad_row


def finish(job: RowJob, console: Console, **options: Any) -> JobReport | None:
    """Join the parts of all processes, if this is the last one, and print the totals."""
    report = job.join(**options)
    # the process that joins prints, whichever it is
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if report is None:
        console.print(f"{job.name} is done; the last process to finish writes {job.out}")
        return None
    for sentence in report.examples:
        console.print(f"bad {sentence}")
    bad = f", {report.num_bad:,} of them bad rows" if report.num_bad else ""
    console.print(f"{report.num_rows:,} results written to {job.out}{bad}")
    return report
