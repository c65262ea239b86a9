"""A plug-in modality whose items are commands to the process that decodes them.

`test_pool.py` copies this file to another folder, so that the file is found like a user's plug-in.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from typing import Any, Literal

import numpy as np
import torch

from multi_token.errors import MediaError
from multi_token.modalities.base import Encoder, Modality
from multi_token.types import Prepared

num_asked = 0


class TrialModality(Modality):
    """Items are commands: `spin`, `abort`, `read PATH`, ..."""

    type: Literal["trial"] = "trial"

    def named_file(self, source: Any) -> Any:
        return None if isinstance(source, str) and source.startswith("do ") else source

    def load(self, source: Any, fetch: Any) -> str:
        global num_asked
        if not isinstance(source, bytes | str):
            return repr(source)
        text = source.decode("latin-1") if isinstance(source, bytes) else source[3:]
        order, _, rest = text.partition(" ")
        if order == "spin":
            while True:
                pass
        if order == "sleep":
            time.sleep(float(rest))
        if order == "abort":
            os.abort()
        if order == "exit":
            os._exit(0)
        if order == "segfault":
            ctypes.string_at(0)
        if order == "recurse":
            return self.load(source, fetch)
        if order == "fill":
            return str(len(bytearray(b"x") * int(rest)))
        if order == "fill_torch":
            return str(torch.ones(int(rest), dtype=torch.uint8).max())
        if order == "raise":
            raise RuntimeError(f"<object at 0x7fffdeadbeef> of /home/user/{rest}")
        if order == "interrupt":
            raise KeyboardInterrupt
        if order == "refuse":
            message = f"<object at 0x7fffdeadbeef> of /home/user/{rest}: \x1b[31m\u00e9"
            raise MediaError(message, "undecodable")
        if order == "read":
            with open(rest, "rb") as file:
                return file.read().decode("latin-1")
        if order == "write":
            open(rest, "wb").close()
        if order == "list":
            return " ".join(os.listdir(rest))
        if order == "remove":
            os.remove(rest)
        if order == "fetch":
            return fetch.read(rest).decode("latin-1")
        if order == "connect":
            socket.create_connection(("127.0.0.1", int(rest))).close()
        if order == "run":
            return subprocess.run(rest.split(), capture_output=True, text=True).stdout
        if order == "environment":
            return " ".join(f"{k}={v}" for k, v in os.environ.items())
        if order == "print":
            sys.stdout.write("x" * int(rest))
            sys.stdout.flush()
            sys.stderr.write("x" * int(rest))
        if order == "count":
            num_asked += 1
            return str(num_asked)
        if order == "letters":
            return "x" * int(rest)
        return order

    def prepare(self, raw: str) -> Prepared:
        values = torch.tensor(np.frombuffer(raw.encode("latin-1"), dtype=np.uint8).copy())
        return Prepared({"values": values, "one": torch.tensor(1.5)}, num_features=len(values))

    def build_encoder(self) -> Encoder:
        raise NotImplementedError
