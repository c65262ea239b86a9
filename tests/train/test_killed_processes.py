"""Processes and data workers killed by SIGKILL: it is reported, and the run resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import yaml

from multi_token.train.resume import last_checkpoint
from tests.train.bits import assert_same_bits
from tests.train.launchers import ROOT

pytestmark = pytest.mark.slow

Fields = Callable[..., dict[str, Any]]
NUM_STEPS = 12
PATIENCE = 240.0
"""Seconds after which processes that should have ended by themselves are ended."""


def two_processes(
    recipe: Path,
    *,
    line: str | None = None,
    killed: Collection[int] = (),
    killed_workers: Collection[int] = (),
) -> list[tuple[int, str]]:
    """Exit code and stderr of each of two processes that train a recipe together.

    Those of `killed`, and data workers of `killed_workers`, get SIGKILL once the first one has
    printed `line`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **together, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as of_second:
        both = [
            subprocess.Popen(
                [sys.executable, "-m", "multi_token", "train", str(recipe)],
                cwd=ROOT,
                env={**env, "RANK": rank, "LOCAL_RANK": rank},
                stderr=stderr,
                text=True,
            )
            for rank, stderr in (("0", subprocess.PIPE), ("1", of_second))
        ]
        first, second = both
        too_long = threading.Timer(PATIENCE, lambda: [process.kill() for process in both])
        too_long.start()
        said = []
        with first:
            assert first.stderr is not None
            for printed in first.stderr:
                said.append(printed)
                if line is not None and printed.startswith(line):
                    for rank in killed:
                        both[rank].kill()
                    for rank in killed_workers:
                        for child in children(both[rank].pid):
                            os.kill(child, signal.SIGKILL)
        second.wait()
        too_long.cancel()
        of_second.seek(0)
        return [(first.returncode, "".join(said)), (second.returncode, of_second.read())]


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are found in /proc")
def test_a_data_worker_killed_in_one_process_ends_both_and_the_checkpoint_is_kept(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 400)
    args = {"use_cpu": True, "per_device_train_batch_size": 1, "save_steps": 2, "report_to": []}
    fields = recipe_fields(
        tmp_path / "run",
        closed_form=None,
        stages=[{"name": "adapter", "learn": {"adapter": 1e-2}}],
        args={**args, "logging_steps": 1, "dataloader_num_workers": 1, "max_steps": 190},
    )
    fields["data"] = {"train": [{"rows": str(tmp_path / "rows.jsonl")}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    # within an epoch of 200 steps, of which a worker reads two ahead
    first, second = two_processes(path, line="adapter 5/190", killed_workers=[1])
    assert (first[0], second[0]) == (1, 1), first[1] + second[1]
    assert "error: a data worker was killed (DataLoader worker (pid" in second[1]
    assert "error: process 0 lost another process of this run" in first[1]
    assert "Traceback" not in first[1] + second[1]
    kept = last_checkpoint(tmp_path / "run" / "stages" / "1-adapter")
    assert kept is not None and int(kept.name.removeprefix("checkpoint-")) >= 4


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_processes_killed_together_or_alone_resume_to_the_same_bits(
    recipe_fields: Fields, tmp_path: Path, fsdp: bool
) -> None:
    def recipe(name: str) -> Path:
        stage = {"name": "adapter", "learn": {"projectors": 1e-2, "adapter": 1e-2}}
        if fsdp:
            stage = {"name": "adapter", "learn": {"projectors": 1e-2, "language_model": 1e-2}}
        fields = recipe_fields(
            tmp_path / name,
            stages=[stage],
            args={
                "use_cpu": True,
                "per_device_train_batch_size": 1,
                "max_steps": NUM_STEPS,
                "save_steps": 1,
                "logging_steps": 1,
                "report_to": [],
            },
            adapter={"r": 4, "lora_dropout": 0.2},
            fsdp=fsdp,
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    ended = two_processes(recipe("whole"))
    assert [code for code, _ in ended] == [0, 0], ended[0][1]

    cut = recipe("cut")
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    both_at = chance.randrange(2, 6)
    one_at, one = chance.randrange(both_at + 2, NUM_STEPS - 1), chance.randrange(2)
    print(f"both killed at step {both_at}, process {one} at {one_at} (seed {seed})")  # noqa: T201

    ended = two_processes(cut, line=f"adapter {both_at}/{NUM_STEPS}", killed=[1, 0])
    assert [code for code, _ in ended] == [-signal.SIGKILL] * 2

    ended = two_processes(cut, line=f"adapter {one_at}/{NUM_STEPS}", killed=[one])
    assert "resuming from" in ended[0][1]
    assert ended[one][0] == -signal.SIGKILL
    code, said = ended[1 - one]
    assert code == 1, said[-2000:]
    assert f"error: process {1 - one} lost another process of this run" in said
    assert "Traceback" not in said
    assert not (tmp_path / "cut" / "config.json").exists()

    ended = two_processes(cut)
    assert [code for code, _ in ended] == [0, 0], ended[0][1]
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
