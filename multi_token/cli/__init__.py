"""The command `multi-token`: one file per group of commands, heavy imports inside them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from multi_token import __version__
from multi_token.cli.ask import ask, chat
from multi_token.cli.combine import combine
from multi_token.cli.convert import export, import_run, push
from multi_token.cli.data import data_app
from multi_token.cli.demo import demo
from multi_token.cli.env import env
from multi_token.cli.evaluate import evaluate_app
from multi_token.cli.init import init
from multi_token.cli.modalities import modalities_app
from multi_token.cli.predict import predict
from multi_token.cli.recipes import recipes_app
from multi_token.cli.schema import schema
from multi_token.cli.serve import serve
from multi_token.cli.train import train
from multi_token.errors import Interrupted, MultiTokenError, machine_fault

RENAMED_OPTIONS = {
    ("serve", "--backend"): "`--backend` is gone: `serve RUN` generates in this process, and "
    "`serve RUN --engine-url URL` in a vLLM server",
    ("serve", "--cache-tokens"): "`--cache-tokens` is now called `--prefix-cache-tokens`",
    ("serve", "--cache-megabytes"): "`--cache-megabytes` is now called `--media-cache-mb`",
    **{
        (command, "--set"): "`--set KEY=VALUE` is now `KEY=VALUE`, after the other arguments"
        for command in ("check", "show", "encode")
    },
    ("serve", "--engine-wait"): "`--engine-wait` is now called `--engine-startup-timeout`",
}
"""(Command, option) of an earlier version -> the sentence that names the option to use now."""

REMOVED_COMMANDS = {
    "bench": "`bench serve` is now `python benchmarks/client_load.py` in the repository",
}
"""Command of an earlier version -> the sentence that says what to run now."""

# Typer ships its own copy of click since 0.26 and exports few of its errors: this class is
# `UsageError`, whichever copy it is of.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class CommandGroup(TyperGroup):
    """Answers options and commands of earlier versions with the new name."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            within: Any = getattr(error, "ctx", None) or ctx
            key = (str(within.info_name), str(getattr(error, "option_name", "")))
            if key not in RENAMED_OPTIONS:
                raise
            raise _UsageError(RENAMED_OPTIONS[key], within) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in REMOVED_COMMANDS and args[0] not in self.commands:
            raise _UsageError(REMOVED_COMMANDS[args[0]], ctx)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="multi-token",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(init)
app.command()(train)
app.command()(chat)
app.command()(ask)
app.command()(predict)
app.command()(serve)
app.command("import")(import_run)
app.command()(combine)
app.command()(export)
app.command()(push)
app.add_typer(data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(modalities_app, name="modalities")
app.add_typer(recipes_app, name="recipes")
app.command()(schema)
app.command()(env)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Give any language model new senses: train, ask, and look at your data."""


def main() -> None:
    """Run the command line; an error that the user can fix is printed without a traceback."""
    # tokenizers warn about forked data workers, which is harmless here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT reads a deprecated attribute of transformers, which a user cannot change
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # the profiler that `--plan` measures memory with would log its start and its end
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # PEFT imports bitsandbytes in every run, and it warns of a kernel that only 4 bits would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        code = _run_command(Console(stderr=True))
    except Exception as error:
        _exit_one_of_several(1, error)
        raise
    _exit_one_of_several(code)
    sys.exit(code)


def _exit_one_of_several(code: int, error: Exception | None = None) -> None:
    # loaded only by commands that use torch; an import here would take seconds in all others
    if distributed := sys.modules.get("multi_token.distributed"):
        distributed.exit_without_teardown(code, error)


def _run_command(console: Console) -> int:
    """Run the command of `sys.argv`, print what a user can fix, and return the exit code."""
    try:
        app()
    except SystemExit as leave:  # typer ends every command with it
        if isinstance(leave.code, str):  # a library or plug-in may give a sentence
            console.print(leave.code, highlight=False, markup=False)
            return 1
        return leave.code or 0
    except Interrupted as error:
        console.print(str(error), highlight=False, markup=False)
        return 130
    except MultiTokenError as error:
        _print_error(console, str(error))
        return 1
    except (RuntimeError, OSError) as error:
        if (sentence := machine_fault(error)) is None:
            raise
        _print_error(console, sentence)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0


def _print_error(console: Console, sentence: str) -> None:
    # one call, so that lines of several processes do not mix
    text = Text.assemble(("error: ", "bold red"), sentence)
    console.print(text, highlight=False, soft_wrap=True)
