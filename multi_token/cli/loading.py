"""Options of all commands that load a run, defined once: `with_load_options`."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from multi_token.errors import MultiTokenError
from multi_token.hub import HubOptions, hub_options

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

LANGUAGE_MODEL = typer.Option(
    None, help="Path or hub name of the frozen language model, if it has moved."
)


@dataclass(frozen=True)
class LoadOptions:
    """How a command loads a run: the options that `with_load_options` adds."""

    language_model: str = LANGUAGE_MODEL
    device: str = typer.Option(
        None,
        help="cpu, cuda, mps; auto: the language model over all accelerators; FILE.json: device of "
        "each of its modules. Default: an accelerator, if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = typer.Option(
        None, help="Precision of the language model; default: as the run names it."
    )
    attn_implementation: str = typer.Option(
        None, help="Attention of the language model (sdpa, flash_attention_2, ...)."
    )
    quantization: Literal["4bit", "8bit", "int8"] = typer.Option(
        None, help="Open the language model in fewer bits; default: as the run names it."
    )
    token: str = typer.Option(
        None, help="Token of the hub. Visible in the process list: prefer HF_TOKEN."
    )
    cache_dir: str = typer.Option(None, help="Folder of downloads; default: that of HF_HOME.")
    local_files_only: bool = typer.Option(
        False, "--local-files-only", help="Download nothing; what is missing is an error."
    )

    @property
    def hub(self) -> HubOptions:
        """Options of downloads."""
        return HubOptions(self.token, self.cache_dir, self.local_files_only)

    @property
    def precision(self) -> dict[str, str]:
        """Options that change answers, without those that were not given."""
        names = ("dtype", "attn_implementation", "quantization")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def with_load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `load` of a command by the options of `LoadOptions`."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "load"]
    shared = list(inspect.signature(LoadOptions, eval_str=True).parameters.values())
    names = [field.name for field in fields(LoadOptions)]

    @wraps(command)
    def run(**given: Any) -> None:
        load = LoadOptions(**{name: given.pop(name) for name in names})
        with hub_options(load.hub):
            command(load=load, **given)

    run.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    del run.__wrapped__  # type: ignore[attr-defined] # typer would ask it for annotations
    return run


def load_run(
    run: Path, load: LoadOptions, *, embeddings_only: bool = False
) -> MultiTokenForConditionalGeneration:
    """Load a run as the options of a command say. Raises MultiTokenError."""
    import torch

    from multi_token.checkpoint.load import read_config
    from multi_token.model import MultiTokenForConditionalGeneration

    read_config(run)  # a folder that is no run is refused before anything heavy is loaded
    device, device_map = load.device, None
    if device == "auto" or (device or "").endswith(".json"):
        if embeddings_only:
            raise MultiTokenError(
                f"--device {device} is for the layers of a language model, which run in the vLLM "
                "server here; name one device"
            )
        device, device_map = None, "auto" if device == "auto" else _device_map(Path(str(device)))
    elif device is None and torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
        if "LOCAL_RANK" in os.environ:  # of torchrun: a device for each process
            device += f":{int(os.environ['LOCAL_RANK']) % torch.accelerator.device_count()}"
    return MultiTokenForConditionalGeneration.from_pretrained(
        run,
        language_model=load.language_model,
        device=device,
        device_map=device_map,
        embeddings_only=embeddings_only,
        dtype=load.dtype,
        attn_implementation=load.attn_implementation,
        quantization_config=load.quantization,
        token=load.token,
        cache_dir=load.cache_dir,
        local_files_only=load.local_files_only,
    )


def _device_map(path: Path) -> dict[str, int | str]:
    """Read a JSON file of {module: device}. Raises MultiTokenError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MultiTokenError(f"--device {path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, (int, str)) for v in found.values()):
        raise MultiTokenError(
            f"--device {path}: expected {{module: device}} for the language model, such as "
            '{"model.embed_tokens": 0, "model.layers.0": 1, ...}'
        )
    return found
