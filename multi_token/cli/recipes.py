"""`multi-token recipes`: the recipes that come with the package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multi_token.errors import MultiTokenError
from multi_token.registry import did_you_mean

HEADER_FIELDS = ("What you get", "Data", "Hardware", "Memory and time", "Status")
"""Fields of the comment that each recipe opens with, in this order."""
_JOBS = ("job.yaml", "job.sbatch")
_FOLDER = files("multi_token") / "recipes"
_FIELD = re.compile(rf"({'|'.join(HEADER_FIELDS)}): +(.*)")

recipes_app = typer.Typer(no_args_is_help=True, help="List, show and copy ready recipes.")


@dataclass(frozen=True)
class ReadyRecipe:
    """A file of `multi_token/recipes`: a recipe, or a job that starts one."""

    name: str
    """Name of the file without its ending."""
    file_name: str
    text: str
    header: dict[str, str]
    """`HEADER_FIELDS` -> their text; `title`: the first line."""


def _names(incomplete: str) -> list[str]:
    return [name for name in ready_recipes() if name.startswith(incomplete)]


_NAME = typer.Argument(..., help="Name of a recipe, as the list shows it.", autocompletion=_names)


def ready_recipes() -> dict[str, ReadyRecipe]:
    """Return all recipes of the package by name."""
    found = {}
    for path in sorted(_FOLDER.iterdir(), key=lambda path: path.name):
        name, _, kind = path.name.partition(".")
        if kind not in ("yaml", *_JOBS):
            continue
        text = path.read_text(encoding="utf-8")
        found[name] = ReadyRecipe(name, path.name, text, read_header(text))
    return found


def read_header(text: str) -> dict[str, str]:
    """Return the fields of the comment at the start of a recipe; `title` is its first line."""
    header: dict[str, str] = {}
    field = "title"
    for line in text.splitlines():
        if line.startswith("#!"):
            continue
        if line[:2] not in ("#", "# "):
            break
        line = line.removeprefix("#").strip()
        if match := _FIELD.fullmatch(line):
            field, line = match[1], match[2]
        elif not line:
            field = ""
        if field:
            header[field] = f"{header[field]} {line}" if field in header else line
    return header


@recipes_app.command("list")
def list_command() -> None:
    """List the recipes with what they train and how far each has been tried."""
    table = Table("name", "what you get", "status")
    for name, recipe in ready_recipes().items():
        table.add_row(
            name,
            Text(recipe.header["What you get"], overflow="fold"),
            recipe.header["Status"].partition(":")[0].rstrip("."),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print("multi-token recipes copy NAME writes one here", style="dim")


@recipes_app.command()
def show(name: str = _NAME) -> None:
    """Print a recipe."""
    typer.echo(_recipe(name).text, nl=False)


@recipes_app.command()
def copy(
    name: str = _NAME,
    dest: Path = typer.Argument(None, help="New file, or a folder; default: this folder."),
) -> None:
    """Write a recipe into a file of your own, to change and to train."""
    recipe = _recipe(name)
    target = dest if dest is not None else Path(recipe.file_name)
    if target.is_dir():
        target /= recipe.file_name
    texts = {target: recipe.text}
    # rows that come with a recipe lie beside it
    for path in _FOLDER.iterdir():
        if path.name == f"{recipe.name}.jsonl":
            texts[target.with_name(path.name)] = path.read_text(encoding="utf-8")
    for path, text in texts.items():
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise MultiTokenError(f"{path} is there already; name another file") from None
        except OSError as error:
            raise MultiTokenError(f"cannot write {path}: {error.strerror}") from None
        typer.echo(str(path))


def _recipe(name: str) -> ReadyRecipe:
    known = ready_recipes()
    found = known.get(name) or known.get(name.partition(".")[0])
    if found is None:
        raise MultiTokenError(
            f"no recipe {name!r}{did_you_mean(name, known)}; `multi-token recipes list` has all"
        )
    return found
