"""`multi-token modalities`: lists modalities, checks one, and writes the package of a new one."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multi_token.errors import MultiTokenError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multi_token.registry import Entry
    from multi_token.testing import Result

modalities_app = typer.Typer(help="List modalities, check one, start a new one.")

_TEMPLATES = {
    "pyproject.toml": "pyproject.toml.jinja",
    "README.md": "README.md.jinja",
    "{module}.py": "module.py.jinja",
    "test_{name}.py": "test.py.jinja",
}


@modalities_app.callback(invoke_without_command=True)
def modalities(context: typer.Context) -> None:
    """List the installed modalities with their state: ready, missing extra, broken."""
    if context.invoked_subcommand is not None:
        return
    table = Table("name", "from", "state", "what it reads", title="Modalities")
    for entry in _entries():
        style = "green" if entry.state == "ready" else "red"
        # As Text, because docstrings and messages have brackets that are not markup.
        table.add_row(
            entry.name,
            Text(entry.owner),
            Text(entry.state, style=style),
            Text("\n".join(filter(None, (entry.summary, entry.fault))), overflow="fold"),
        )
    Console(highlight=False).print(table)


@modalities_app.command()
def check(
    name: str = typer.Argument(None, help="Name of a modality, as the list shows it."),
    all_names: bool = typer.Option(False, "--all", help="Check every installed modality."),
) -> None:
    """Check all that a modality promises, on a small example of its own.

    Exit code 0: every claim holds. 1: at least one does not.
    """
    # Either a name or `--all`, and not both.
    if (name is None) != all_names:
        raise MultiTokenError("expected the name of a modality, or --all")
    entries = _entries() if all_names else [_entry(name)]
    console = Console(highlight=False)
    failed = [entry.name for entry in entries if not _print_and_check(console, entry)]
    skipped = [entry.name for entry in entries if entry.state == "missing extra"]
    if skipped:
        console.print(f"not checked, for a missing extra: {', '.join(skipped)}")
    if failed:
        console.print(f"broken: {', '.join(failed)}", style="red")
        raise typer.Exit(1)


@modalities_app.command()
def new(
    name: str = typer.Argument(..., help="Name of the modality in recipes, such as heartbeat."),
    out: Path = typer.Option(None, help="New or empty folder. Default: multi-token-NAME here."),
) -> None:
    """Write a small package with a modality of your own: one file that works, and its test."""
    _check_name(name)
    out = out or Path(f"multi-token-{name.replace('_', '-')}")
    write_package(name, out)
    console = Console(stderr=True, highlight=False)
    for line in (
        f"{out}: the modality is multi_token_{name}.py",
        f"pip install {out}",
        f"multi-token modalities check {name}",
    ):
        console.print(line, markup=False, soft_wrap=True)


def write_package(name: str, out: Path) -> None:
    """Write the files of a new modality into a new or empty folder. Raises MultiTokenError."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise MultiTokenError(f"{out} is there already; expected a new or empty folder")
    words = {
        "name": name,
        "dashed": name.replace("_", "-"),
        "module": f"multi_token_{name}",
        "cls": "".join(part.capitalize() for part in name.split("_")),
    }
    # StrictUndefined: a misspelt name in a template is an error.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    templates = files("multi_token.cli.templates")
    out.mkdir(parents=True, exist_ok=True)
    for target, template in _TEMPLATES.items():
        text = environment.from_string(templates.joinpath(template).read_text(encoding="utf-8"))
        (out / target.format(**words)).write_text(text.render(words), encoding="utf-8")


def _check_name(name: str) -> None:
    from multi_token import registry
    from multi_token.modalities.base import Modality
    from multi_token.recipe.model import ModelSpec
    from multi_token.registry import validate_fields

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise MultiTokenError(
            f"{name!r} cannot name a modality: expected small letters, digits and single _, as in "
            "heartbeat or left_camera"
        )
    if name in registry.registered_names("modality"):
        owner = registry.entry("modality", name, Modality).owner
        raise MultiTokenError(f"modality {name!r} is owned by {owner}; choose another name")
    # Rows have keys of their own, such as `messages`, and a recipe refuses them as names.
    any_modality = {"type": "vector", "dim": 1}
    validate_fields(
        ModelSpec,
        {"language_model": "any", "modalities": {name: any_modality}},
        where="a new modality",
    )


def _entries() -> list[Entry]:
    from multi_token import registry
    from multi_token.modalities.base import Modality

    return [
        registry.entry("modality", name, Modality) for name in registry.registered_names("modality")
    ]


def _entry(name: str) -> Entry:
    from multi_token import registry
    from multi_token.modalities.base import Modality

    if name not in registry.registered_names("modality"):
        registry.resolve("modality", name)  # raises with the nearest known name
    entry = registry.entry("modality", name, Modality)
    if entry.state == "missing extra":
        raise MultiTokenError(f"modality {name!r} cannot be checked: {entry.fault}")
    return entry


def _print_and_check(console: Console, entry: Entry) -> bool:
    """Check a modality with the conformance kit; prints each claim."""
    from huggingface_hub.utils import disable_progress_bars

    from multi_token.testing import Result, check_named

    if entry.state == "missing extra":
        return True
    if entry.state == "broken":
        results: Sequence[Result] = [Result("it can be imported", False, entry.fault)]
    else:
        # the tiny models' weights load in no time; transformers asks the hub's library for bars
        disable_progress_bars()
        with tempfile.TemporaryDirectory() as folder:
            results = check_named(entry.name, Path(folder))
    table = Table("claim", "", "what was seen", title=f"{entry.name} ({entry.owner})")
    for result in results:
        mark = Text("holds", style="green") if result.passed else Text("BROKEN", style="bold red")
        table.add_row(result.claim, mark, Text(result.detail, overflow="fold"))
    console.print(table)
    return all(result.passed for result in results)
