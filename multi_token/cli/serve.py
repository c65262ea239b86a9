"""`multi-token serve`: a trained run answers many people over HTTP.

Border: options in, a running server out; everything behind that is serve/'s.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from multi_token.serve.settings import ServeSettings

KEYS_VARIABLE = "MULTI_TOKEN_API_KEYS"
ENGINE_KEY_VARIABLE = "MULTI_TOKEN_ENGINE_KEY"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    run: Path = typer.Argument(..., help="The folder of a trained run."),
    host: str = typer.Option("127.0.0.1", help="Where to listen; others than this need a key."),
    port: int = typer.Option(8000, help="The port; 0 takes a free one."),
    api_key: list[str] = typer.Option(
        None, help="Who sends it is answered; several times for several. Others can see it here."
    ),
    api_key_file: Path = typer.Option(
        None, help=f"A file with a key a line. {KEYS_VARIABLE}: keys with commas between them."
    ),
    name: str = typer.Option(None, help="What the model is called; default: the run's folder."),
    max_batch: int = typer.Option(8, help="Answers that are written at once."),
    max_queue: int = typer.Option(None, help="Answers that may wait; default: 4 x --max-batch."),
    deadline: float = typer.Option(300.0, help="The longest that a request may take, in seconds."),
    media_cache_mb: int = typer.Option(
        256, min=0, help="Media embeddings kept for items that come again, in MiB; 0: none."
    ),
    prefix_cache_tokens: int = typer.Option(
        None,
        min=0,
        help="Tokens of finished requests kept for prompts with the same prefix; default: 2048, 0: "
        "none. Not with --engine-url.",
    ),
    workers: int = typer.Option(2, help="Processes that decode media."),
    allow_url_host: list[str] = typer.Option(
        None, help="A host that media may be fetched from; default: none."
    ),
    engine_url: list[str] = typer.Option(
        None,
        help="A vLLM server with the language model of an export, repeatable; its key: "
        f"{ENGINE_KEY_VARIABLE}. Default: generate in this process.",
    ),
    engine_startup_timeout: float = typer.Option(
        0.0, help="Time that the start waits for the first vLLM server, in seconds."
    ),
    examples: bool = typer.Option(
        True, help="Whether the chat page shows some rows of the run's training."
    ),
    shutdown_timeout: float = typer.Option(
        30.0, help="The longest that answers go on after SIGTERM, in seconds."
    ),
    language_model: str = typer.Option(
        None, help="Where the frozen language model is, if it has moved."
    ),
    device: str = typer.Option(None, help="cpu, cuda, mps; default: the best there is."),
) -> None:
    """Answer over HTTP as OpenAI's chat completions do, with media of every sense of the run."""
    from multi_token.errors import MultiTokenError

    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MultiTokenError(
            f"`multi-token serve` needs {', '.join(missing)}, which is not installed: pip install "
            '"multi_token[serve]"'
        )
    settings = _settings(
        host=host,
        port=port,
        api_keys=_keys(api_key, api_key_file),
        name=name or run.resolve().name,
        max_batch=max_batch,
        max_queue=max_queue,
        deadline_s=deadline,
        media_cache_bytes=media_cache_mb * 1024 * 1024,
        prefix_cache_tokens=prefix_cache_tokens,
        num_workers=workers,
        run_folder=run.resolve(),
        show_examples=examples,
        allowed_url_hosts=tuple(allow_url_host or ()),
        engine_urls=tuple(engine_url or ()),
        engine_key=os.environ.get(ENGINE_KEY_VARIABLE) or None,
        engine_startup_timeout_s=engine_startup_timeout,
        shutdown_timeout_s=shutdown_timeout,
    )
    _run(run, settings, language_model, device)


def _keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The keys of the option, the file and the environment. Raises MultiTokenError."""
    from multi_token.errors import MultiTokenError

    keys = list(given or ())
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MultiTokenError(
                f"cannot read {file}: {error}; expected a file with a key a line"
            ) from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise MultiTokenError(f"{file} holds no key; expected one a line")
        keys += found
    keys += [key for key in re.split(r"[\s,]+", os.environ.get(KEYS_VARIABLE, "")) if key]
    return tuple(dict.fromkeys(keys))


def _settings(**fields: Any) -> ServeSettings:
    """Raises MultiTokenError in one sentence that names the option."""
    from pydantic import ValidationError

    from multi_token.errors import MultiTokenError
    from multi_token.serve.settings import ServeSettings

    try:
        return ServeSettings(**fields)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    raise MultiTokenError(f"{where}: {message}" if where else message)


def _run(
    run: Path, settings: ServeSettings, language_model: str | None, device: str | None
) -> None:
    import logging
    import sys

    from rich.console import Console

    from multi_token.cli.ask import _load
    from multi_token.errors import MultiTokenError
    from multi_token.serve.server import DrainingServer
    from multi_token.serve.service import Service

    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("multi_token.serve").setLevel(logging.INFO)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"loading {run} ...")
    uses_vllm = bool(settings.engine_urls)
    if uses_vllm:
        from multi_token.serve.engines.vllm.golden import read_golden

        read_golden(run)  # a folder without it is refused before anything is loaded
    model = _load(run, language_model, device, with_layers=not uses_vllm)
    service = Service(model, settings)
    server = DrainingServer(service, on_started=lambda: _print_address(console, server, service))
    server.run()
    if isinstance(service.start_error, MultiTokenError):
        raise service.start_error
    if not server.started:
        raise MultiTokenError(
            f"the server did not start on {settings.host}:{settings.port}; the lines above say why"
        )


def _print_address(console: Any, server: Any, service: Any) -> None:
    """Where it listens, what it senses, and a line to try."""
    settings = service.settings
    senses = ", ".join(
        f"{name} ({kind})" for name, kind in service.message_parser.type_names.items()
    )
    key = " -H 'Authorization: Bearer '$KEY" if settings.api_keys else ""
    body = f'{{"model": "{settings.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    console.print(f"{settings.name} listens on {server.url}; senses: {senses or 'none'}")
    console.print(f"chat page: {server.url}/")
    header = f"{key} -H 'Content-Type: application/json'"
    console.print(f"curl {server.url}/v1/chat/completions{header} -d '{body}'")
