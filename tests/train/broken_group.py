"""Ends one of two processes while a collective is pending: its teardown would abort.

Arguments: `end`, the file by which both processes meet, and the name of the error to raise or "".
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys

import torch
from torch import distributed

import multi_token.distributed
from multi_token import errors
from multi_token.cli import app, main

held: list[object] = []


class KillsPeer:
    """Kills the peer when the interpreter drops this object, and waits for the abort.

    The interpreter is ending by then. The pending collective fails in a thread of gloo, whose
    callback needs the GIL.
    """

    def __init__(self, peer: subprocess.Popen[bytes]) -> None:
        # kept here, since the interpreter empties modules before it drops this object
        self.peer, self.pause = peer, signal.pause

    def __del__(self) -> None:
        self.peer.kill()
        self.pause()


@app.command("end")
def end(meeting: str, error: str) -> None:
    """Join the other process, begin a collective that it never joins, and raise the error."""
    atexit.register(print, "a tracker ends its run")
    # the peer ends when its stdin does, so it never outlives this process
    peer = subprocess.Popen(
        [sys.executable, "-m", "tests.train.broken_group", *sys.argv[1:]],
        env={**os.environ, "RANK": "1"},
        stdin=subprocess.PIPE,
    )
    distributed.init_process_group("gloo", f"file://{meeting}", rank=0, world_size=2)
    assert multi_token.distributed.num_processes() == 2
    work = distributed.all_reduce(torch.ones(1), async_op=True)
    assert work is not None
    held.extend([distributed.group.WORLD, work.get_future().then(print), KillsPeer(peer)])
    if error:
        raise {**vars(errors), "ValueError": ValueError}[error]("lost another process")


if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=1, world_size=2)
        sys.stdin.read()
        os._exit(0)
    main()
