"""The command line with little memory: `python scarce_memory.py MIB train recipe.yaml ...`."""

import resource
import sys
from pathlib import Path

import torch

from multi_token.cli import main
from multi_token.train import run  # noqa: F401 - its libraries are to be there

torch.set_num_threads(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
