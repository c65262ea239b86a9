"""Facts of the machine and packages that a report was measured with."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine_facts() -> dict[str, str]:
    """Return processor, cores, system, package versions and date; nothing leaves the machine."""
    cpu = platform.processor() or platform.machine()
    # On Linux, `platform` knows the architecture only.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = named[0] if named else cpu
    return {
        "cpu": cpu,
        "cores": str(num_cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    # in a container or under taskset, os.cpu_count() counts all cores of the machine
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
