"""`multi-token import`, `export` and `push`: foreign formats, and the hub."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

import typer
from rich.console import Console
from rich.filesize import decimal

from multi_token.cli.loading import LANGUAGE_MODEL
from multi_token.errors import ConvertError

# no README, images or optimizer states, which repositories of the hub hold too
_NEEDED_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin", "*.model")
_EXPECTED = (
    "expected one of: a folder that sshh12/multi_token trained (config.json with `modality_builder`"
    "), LLaVA in transformers' format (config.json of type llava or llava_next), or in LLaVA's own "
    "(mm_projector.bin, or LoRA beside a config.json with `mm_vision_tower`)"
)


class ExportFormat(str, Enum):
    """Export formats of a run."""

    merged = "merged"
    language_model = "language-model"
    llava = "llava"


def import_run(
    source: str = typer.Argument(
        ...,
        help="Folder or hub name: of sshh12/multi_token, or LLaVA (of transformers, or its own).",
    ),
    out: Path = typer.Option(..., help="The new run's folder."),
    language_model: str = typer.Option(
        None,
        help="Path or hub name of the base model, if the source's name for it cannot be loaded.",
    ),
    encoder: str = typer.Option(
        None, help="Path or hub name of the encoder, if its own name cannot be loaded."
    ),
    chat_template: str = typer.Option(
        None, help="File with a chat template, if the base model's own cannot be used."
    ),
    revision: str = typer.Option(None, help="Branch, tag or commit of a hub name."),
) -> None:
    """Make a run of a checkpoint in another format, which is recognized by its files."""
    from multi_token.checkpoint.load import read_config

    console = Console(stderr=True, highlight=False, markup=False)
    with console.status(f"importing {source}"):
        parts = {"language_model": language_model, "encoder": encoder}
        import_source(source, out, revision=revision, chat_template=chat_template, **parts)
    fields = read_config(out)
    slots = ", ".join(f"<{name}>" for name in fields["model"]["modalities"])
    trained = "projectors and an adapter" if fields["adapter"] else "projectors"
    base = fields["model"]["language_model"]
    console.print(f"{out}: {slots}; {trained} on {base}", soft_wrap=True)


def import_source(
    source: str | os.PathLike[str],
    out: Path,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    **parts: str | None,
) -> None:
    """Import a folder or hub name; its files decide the format, never its name.

    `parts`: `language_model` and `encoder`, where the source's own names cannot be loaded.
    Nothing is written unless everything can be mapped. Raises ConvertError or CheckpointError.
    """
    from multi_token.checkpoint.hub import local_folder
    from multi_token.checkpoint.save import MODEL_TYPE
    from multi_token.convert.llava import import_llava, is_llava
    from multi_token.convert.original import import_original, is_original
    from multi_token.convert.tensors import read_json

    folder = local_folder(source, revision=revision, only=_NEEDED_FILES)
    if not folder.is_dir():
        raise ConvertError(
            f"there is no folder {folder}, and the name is not one of a hub repository (user/name)"
        )
    fields = read_json(folder / "config.json")
    kind = fields.get("model_type")
    if kind == MODEL_TYPE:
        raise ConvertError(f"{folder} is a run of multi_token already; it needs no import")
    if is_original(fields):
        import_original(folder, out, chat_template=chat_template, **parts)
    elif is_llava(fields) or (folder / "mm_projector.bin").is_file():
        if chat_template is not None:
            raise ConvertError("--chat-template is for folders of sshh12/multi_token, not LLaVA's")
        import_llava(folder, out, **parts)
    else:
        held = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
        raise ConvertError(
            f"{folder} has no format that can be imported: it holds {shown or 'nothing'}"
            + (f", and config.json is of type {kind!r}" if kind else "")
            + f"; {_EXPECTED}"
        )


def export(
    run: str = typer.Argument(..., help="The folder or hub name of a run."),
    to: ExportFormat = typer.Option(
        ...,
        help="merged: a run with its language model inside. language-model: the same, for vLLM and "
        "other engines. llava: transformers' LLaVA.",
    ),
    out: Path = typer.Option(..., help="A new or empty folder."),
    language_model: str = LANGUAGE_MODEL,
    revision: str = typer.Option(None, help="Branch, tag or commit of a hub name."),
) -> None:
    """Write a run in a format that other software loads."""
    from multi_token.convert.export import export as convert

    console = Console(stderr=True, highlight=False, markup=False)
    with console.status(f"exporting {run}"):
        convert(run, out, to=to.value, revision=revision, language_model=language_model)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(f"{out}: {to.value}, {decimal(size)}", soft_wrap=True)


def push(
    run: Path = typer.Argument(..., help="The folder of a run."),
    name: str = typer.Argument(..., help="The repository: user/name."),
    private: bool = typer.Option(False, "--private", help="Make a new repository private."),
    revision: str = typer.Option(None, help="Branch to upload to; made if it is missing."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Write the card and list the files; upload nothing."
    ),
) -> None:
    """Upload a run's result to the hub, with a model card."""
    from multi_token.convert.push import push as upload

    console = Console(stderr=True, highlight=False, markup=False)
    with console.status("reading the run" if dry_run else f"uploading to {name}"):
        files = upload(run, name, private=private, revision=revision, dry_run=dry_run)
    # on stdout, for scripts; all else goes to stderr
    for path, size in files.items():
        typer.echo(f"{decimal(size):>10}  {path}")
    card = f"the card is {run / 'README.md'}; nothing was uploaded"
    console.print(card if dry_run else f"uploaded to {name}", soft_wrap=True)
