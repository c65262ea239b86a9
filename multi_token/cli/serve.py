"""`multi-token serve`: serve a trained run over HTTP, with OpenAI's API and a chat page."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from multi_token.cli.loading import LoadOptions, load_run, with_load_options
from multi_token.errors import MultiTokenError

KEYS_VARIABLE = "MULTI_TOKEN_API_KEYS"
ENGINE_KEY_VARIABLE = "MULTI_TOKEN_ENGINE_KEY"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@with_load_options
def serve(
    run: Path = typer.Argument(..., help="Folder of a trained run."),
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on. Any but a loopback address needs an API key."
    ),
    port: int = typer.Option(8000, help="Port to listen on; 0 picks a free one."),
    api_key: list[str] = typer.Option(
        None,
        help="API key clients must send; repeatable. Visible in the process list: prefer "
        "--api-key-file.",
    ),
    api_key_file: Path = typer.Option(
        None,
        help="File with one API key per line. Keys in the environment variable "
        f"{KEYS_VARIABLE}, separated by commas, are valid too.",
    ),
    name: str = typer.Option(None, help="Model name in the API; default: name of the run folder."),
    max_batch: int = typer.Option(8, help="Maximum number of concurrent generations."),
    max_queue: int = typer.Option(
        None, help="Maximum number of generations that wait; default: 4 x --max-batch."
    ),
    deadline: float = typer.Option(300.0, help="Time limit of a request, in seconds."),
    media_memory_mb: int = typer.Option(
        2048,
        help="Memory of request bodies and media until the media are embedded, in MiB, at least "
        "1513; requests wait for it.",
    ),
    media_cache_mb: int = typer.Option(
        256, min=0, help="Size of the cache of media embeddings, in MiB; 0 disables the cache."
    ),
    prefix_cache_tokens: int = typer.Option(
        None,
        min=0,
        help="Size of the prefix cache, in tokens of finished requests; default: 2048, 0 disables "
        "the cache. Not with --engine-url.",
    ),
    workers: int = typer.Option(2, help="Number of processes that decode media."),
    allow_url_host: list[str] = typer.Option(
        None, help="Host that media may be fetched from; repeatable. Default: none."
    ),
    engine_url: list[str] = typer.Option(
        None,
        help="URL of a vLLM server that runs the language model of this export; repeatable. The "
        f"environment variable {ENGINE_KEY_VARIABLE} has its API key. Default: the local engine.",
    ),
    engine_startup_timeout: float = typer.Option(
        0.0, help="Time to wait at startup for the first vLLM server, in seconds."
    ),
    engine_step_timeout: float = typer.Option(
        120.0,
        help="Time that a prefill or decode step of the local engine, or a part of a media "
        "encoder, may take, in seconds; then /health is 503, and after three times that the server "
        "exits with code 1.",
    ),
    examples: bool = typer.Option(
        False,
        help="Show rows of the run's data on the chat page, to every client: up to six as "
        "examples, and the training report with its samples.",
    ),
    shutdown_timeout: float = typer.Option(
        30.0, help="Time for running requests to finish after SIGTERM, in seconds."
    ),
    *,
    load: LoadOptions,
) -> None:
    """Serve a run over HTTP: OpenAI's chat completions with media of all its modalities."""
    # before the model is loaded, which may take minutes
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MultiTokenError(
            f"`multi-token serve` needs packages that are not installed ({', '.join(missing)}): "
            'pip install "multi_token[serve]"'
        )
    from multi_token.media.fetch import MIB
    from multi_token.registry import validate_fields
    from multi_token.serve.server import DrainingServer
    from multi_token.serve.service import Service
    from multi_token.serve.settings import ServeSettings

    fields = {
        "host": host,
        "port": port,
        "api_keys": _keys(api_key, api_key_file),
        "name": name or run.resolve().name,
        "max_batch": max_batch,
        "max_queue": max_queue,
        "deadline_s": deadline,
        "media_memory_bytes": media_memory_mb * MIB,
        "media_cache_bytes": media_cache_mb * MIB,
        "prefix_cache_tokens": prefix_cache_tokens,
        "num_workers": workers,
        "run_folder": run.resolve(),
        "show_examples": examples,
        "allowed_url_hosts": allow_url_host or (),
        "engine_urls": engine_url or (),
        "engine_key": os.environ.get(ENGINE_KEY_VARIABLE) or None,
        "engine_startup_timeout_s": engine_startup_timeout,
        "engine_step_timeout_s": engine_step_timeout,
        "shutdown_timeout_s": shutdown_timeout,
    }
    settings = validate_fields(ServeSettings, fields, where="serve")
    # INFO of every library would hide the server's own lines
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("multi_token.serve").setLevel(logging.INFO)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"loading {run} ...")
    uses_vllm = bool(settings.engine_urls)
    if uses_vllm:
        from multi_token.serve.engines.vllm.golden import read_golden

        read_golden(run)  # refuses a folder that was not exported, before loading any weights
    model = load_run(run, load, embeddings_only=uses_vllm)
    service = Service(model, settings)
    server = DrainingServer(service, on_started=lambda: _print_address(console, server, service))
    server.run()
    # uvicorn only logs an error of the startup and returns
    if isinstance(service.start_error, MultiTokenError):
        raise service.start_error
    # a supervisor replaces a process that failed
    if service.watchdog.error is not None:
        raise service.watchdog.error
    if not server.started:
        raise MultiTokenError(
            f"the server did not start on {settings.host}:{settings.port}; see the log lines above"
        )


def _keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """Collect API keys from option, file and environment. Raises MultiTokenError."""
    keys = list(given or ())
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MultiTokenError(
                f"cannot read {file}: {error}; expected a file with one API key per line"
            ) from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            # Without this check an empty file would start a server that needs no key.
            raise MultiTokenError(f"{file} contains no API key; expected one per line")
        keys += found
    keys += [key for key in re.split(r"[\s,]+", os.environ.get(KEYS_VARIABLE, "")) if key]
    return tuple(dict.fromkeys(keys))


def _print_address(console: Console, server: Any, service: Any) -> None:
    settings = service.settings
    modalities = ", ".join(
        f"{name} ({kind})" for name, kind in service.message_parser.type_names.items()
    )
    key = " -H 'Authorization: Bearer '$KEY" if settings.api_keys else ""
    body = f'{{"model": "{settings.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    console.print(
        f"{settings.name} listens on {server.url}; modalities: {modalities or 'none (text only)'}"
    )
    console.print(f"chat page: {server.url}/")
    header = f"{key} -H 'Content-Type: application/json'"
    console.print(f"curl {server.url}/v1/chat/completions{header} -d '{body}'")
