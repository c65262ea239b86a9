"""`multi-token chat` and `ask`: conversations with a trained run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from multi_token.cli.loading import LoadOptions, load_run, with_load_options
from multi_token.errors import MultiTokenError

if TYPE_CHECKING:
    from multi_token.chat.format import ChatFormat
    from multi_token.modalities.base import Modality, OpenAIKind
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.types import Media, Message, Part

MAX_NEW_TOKENS = typer.Option(256, help="Longest answer, in tokens.")
TEMPERATURE = typer.Option(0.0, help="0: greedy; above 0: sampled.")
TEMPLATE_KWARGS = typer.Option(
    None,
    "--chat-template-kwargs",
    metavar="JSON",
    help="Values of the chat template's variables, over those of the run: "
    '{"enable_thinking": false}.',
)
_SYSTEM = typer.Option(None, help="A system message.")


def set_template_kwargs(model: MultiTokenForConditionalGeneration, text: str | None) -> None:
    """Give the model's chat template the values of `--chat-template-kwargs`.

    Raises MultiTokenError.
    """
    if text is None or model.processor is None:
        return
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise MultiTokenError(
            f'--chat-template-kwargs expects a JSON object ({{"enable_thinking": false}}), got '
            f"{text!r}"
        )
    model.processor = replace(model.processor, chat=model.processor.chat.with_kwargs(found))


def _options(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    # 0 means greedy here; transformers refuses it as a temperature
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    return {"max_new_tokens": max_new_tokens, **sampling}


def _items(
    run: Path, media: list[str] | None, by_kind: Mapping[OpenAIKind, list[Path] | None]
) -> list[Media]:
    """Return the items of the options: `--media NAME=SOURCE`, and `--image PATH` by its kind."""
    from multi_token.checkpoint.load import read_config, read_spec
    from multi_token.types import Media

    items: list[Media] = []
    if any(by_kind.values()):
        # before the weights, which may take minutes to load
        modalities = read_spec(run, read_config(run)).modalities
        for kind, paths in by_kind.items():
            items += [
                Media(modality_for(kind, path, modalities), str(path)) for path in paths or []
            ]
    for item in media or []:
        name, equals, source = item.partition("=")
        if not equals:
            raise MultiTokenError(
                f"expected --media NAME=SOURCE (--media vector=x.npy), got {item!r}"
            )
        items.append(Media(name, source))
    return items


def modality_for(kind: OpenAIKind, path: Path, modalities: Mapping[str, Modality]) -> str:
    """Return the name of the modality that takes an item of this kind. Raises MultiTokenError.

    As in the server, a modality of the kind's own name comes first.
    """
    suffix = path.suffix.lower()
    reads = {
        name
        for name, modality in modalities.items()
        if any(suffix in files.suffixes for files in modality.file_kinds())
    }
    fitting = [name for name, m in modalities.items() if kind in m.openai_kinds]
    if kind in fitting:
        return kind
    # several: those of the file's own format; none: a modality that reads such files
    fitting = [name for name in fitting if name in reads] or fitting or sorted(reads)
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(f"{name} ({m.type})" for name, m in modalities.items())
    found = f"{', '.join(fitting)} take" if fitting else "no modality of this run takes"
    raise MultiTokenError(
        f"{found} --{kind} {path.name}; name one of {known}: "
        f"--media {(fitting or [*modalities])[0]}={path}"
    )


@with_load_options
def ask(
    run: Path = typer.Argument(..., help="The folder of a trained run."),
    question: str = typer.Argument(..., help="What to ask."),
    image: list[Path] = typer.Option(None, help="Path of an image; repeatable."),
    audio: list[Path] = typer.Option(None, help="Path of audio; repeatable."),
    video: list[Path] = typer.Option(None, help="Path of a video; repeatable."),
    document: list[Path] = typer.Option(None, help="Path of a document; repeatable."),
    media: list[str] = typer.Option(
        None, help="NAME=SOURCE, for any modality of the run; repeatable."
    ),
    system: str = _SYSTEM,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    chat_template_kwargs: str = TEMPLATE_KWARGS,
    *,
    load: LoadOptions,
) -> None:
    """Ask one question about some items and print the answer."""
    from multi_token.generate import single_question as as_conversation

    items = _items(
        run, media, {"image": image, "audio": audio, "video": video, "document": document}
    )
    model = load_run(run, load)
    set_template_kwargs(model, chat_template_kwargs)
    conversation = as_conversation(question, items, system=system)
    typer.echo(model.generate([conversation], **_options(max_new_tokens, temperature))[0])


@with_load_options
def chat(
    run: Path = typer.Argument(..., help="The folder of a trained run."),
    system: str = _SYSTEM,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    chat_template_kwargs: str = TEMPLATE_KWARGS,
    *,
    load: LoadOptions,
) -> None:
    """Talk in the terminal. /image PATH (or /NAME SOURCE) adds an item to the next message."""
    from multi_token.types import Conversation, Message, Text

    console = Console(highlight=False)
    model = load_run(run, load)
    set_template_kwargs(model, chat_template_kwargs)
    slash = ", ".join(f"/{name} SOURCE" for name in model.modalities)
    console.print(f"[dim]{slash} adds an item; /reset starts again; /exit leaves[/dim]")
    start = [Message("system", (Text(system),))] if system else []
    messages: list[Message] = list(start)
    waiting: list[Media] = []
    for line in _read_lines(console):
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            messages, waiting = list(start), []
            continue
        try:
            if command.startswith("/"):
                waiting.append(_checked_item(model, command[1:], rest.strip()))
                console.print(f"[dim]{len(waiting)} item(s) go with the next message[/dim]")
                continue
            parts: list[Part] = [p for item in waiting for p in (item, Text("\n"))]
            turn = Message("user", (*parts, Text(line)))
            answers = model.generate(
                [Conversation((*messages, turn), id="chat")],
                streamer=_TerminalStreamer(model.require_processor().chat),
                **_options(max_new_tokens, temperature),
            )
        except MultiTokenError as error:
            # waiting items are kept, and go with the question when it is asked again
            console.print(str(error), style="red", markup=False)
            continue
        messages += [turn, Message("assistant", (Text(answers[0]),))]
        waiting = []


class _TerminalStreamer:
    """A streamer of transformers: prints an answer while it is generated."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.ids: list[int] = []
        self.shown = ""

    def put(self, value: Any) -> None:
        """Print the text of one more id [1]; the ids of a prompt of embeddings are empty."""
        self.ids += value.flatten().tolist()
        text = self.chat.decode(self.ids, partial=True)
        # a character whose bytes are in several tokens decodes to U+FFFD until the last of them
        if not text.endswith("\ufffd") and text.startswith(self.shown):
            self._write(text)

    def end(self) -> None:
        """Print the rest of the answer."""
        self._write(self.chat.decode(self.ids) + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text[len(self.shown) :])
        sys.stdout.flush()
        self.shown = text


def _read_lines(console: Console) -> Iterator[str]:
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line:
            yield line


def _checked_item(model: MultiTokenForConditionalGeneration, name: str, source: str) -> Media:
    from multi_token.registry import did_you_mean
    from multi_token.types import Media

    names = list(model.modalities)
    if name not in names and name in ("image", "audio", "video", "document"):
        name = modality_for(name, Path(source), model.modalities)
    elif name not in names:
        raise MultiTokenError(
            f"unknown command /{name}{did_you_mean(name, [*names, 'reset', 'exit'])}; this run has "
            f"{', '.join(names)}"
        )
    item = Media(name, source)
    # a path that cannot be read is reported now, and not with the question
    model.require_processor().prepare(item, row_id="chat")
    return item
