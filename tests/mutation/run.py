"""`make mutate`: changes single things in the code and counts the changes that a test notices.

Each mutant is written into a copy of the repository, and the tests of its file run on it in a
forked process, which finds torch and other libraries loaded. `runs/mutation.jsonl` keeps the
results: an interrupted run goes on, and a mutant that lived is tried again when its tests change.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = Path(__file__).with_name("targets.yaml")
RESULTS = ROOT / "runs" / "mutation.jsonl"
# pytest warns about plugins that are loaded before it can rewrite them, as preloaded ones are.
ARGS = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
ARGS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
NOT_PRELOADED = ("multi_token", "tests", "conftest", "_pytest", "pytest", "__main__", "__mp_main__")

console = Console(highlight=False, soft_wrap=True)


def copied(folder: Path) -> None:
    """Copy the files of the repository into a folder."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def outcome_of(tests: list[str], folder: Path, limit_s: float, loaded: Path | None = None) -> str:
    """Run the tests in a fork of this process: `passed`, `failed` or `late`.

    `loaded`: a file for the names of the modules that the tests load, to load them once here.
    """
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            status = _run_tests(tests, folder, loaded)
        finally:
            os._exit(status)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _end_group(pid)
            return "passed" if status == 0 else "failed"
        time.sleep(0.02)
    _end_group(pid)
    os.waitpid(pid, 0)
    return "late"


def _run_tests(tests: list[str], folder: Path, loaded: Path | None) -> int:
    os.setsid()  # so that processes which a broken test leaves running can be ended with it
    quiet = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
        del sys.modules[name]
    status = int(pytest.main([*ARGS, f"--basetemp={folder / 'temporary'}", *tests]))
    if loaded is not None:
        loaded.write_text("\n".join(sys.modules))
    return status


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def preload(loaded: Path) -> None:
    """Import the modules that the tests import, except our own code, so that forks have them."""
    for name in loaded.read_text().splitlines():
        if name not in sys.modules and not name.startswith(NOT_PRELOADED):
            with contextlib.suppress(Exception):  # modules that cannot be imported by their names
                importlib.import_module(name)


def digest(*paths: Path) -> str:
    """Return a hash of Python files that stays when comments or docstrings change."""
    code = ""
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None
        code += ast.dump(tree)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


class Results:
    """Known outcomes of mutants, one line of JSON each; the last one of a key counts."""

    def __init__(self) -> None:
        RESULTS.parent.mkdir(exist_ok=True)
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        self.known = {entry["key"]: entry for entry in map(json.loads, lines)}

    def of(self, mutant: Mutant, code: str, tests: str) -> str | None:
        """Return the known outcome, or None if the code changed, or the tests of one that lived."""
        entry = self.known.get(mutant.key)
        if entry is None or entry["code"] != code:
            return None
        return entry["outcome"] if entry["outcome"] != "passed" or entry["tests"] == tests else None

    def add(self, mutant: Mutant, code: str, tests: str, outcome: str) -> None:
        entry = {"key": mutant.key, "code": code, "tests": tests, "outcome": outcome}
        self.known[mutant.key] = entry
        with RESULTS.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def outcomes(
    module: str, tests: list[str], number: int, folder: Path, results: Results
) -> Iterator[tuple[Mutant, str]]:
    """Yield the drawn mutants of one file, each with its outcome."""
    path = folder / module
    source = path.read_text(encoding="utf-8")
    names = [test.partition("::")[0] for test in tests]
    code, guards = digest(path), digest(*(folder / name for name in names))
    drawn = mutants_of(module, source)[:number]
    limit_s = 0.0
    for place, mutant in enumerate(drawn):
        outcome = results.of(mutant, code, guards)
        if outcome is None:
            if not limit_s:
                limit_s = _limit_s(module, tests, folder)
            path.write_text(mutant.source, encoding="utf-8")
            # Python knows compiled files by the second, in which several mutants may be written.
            os.utime(path, (1_000_000_000 + place,) * 2)
            outcome = outcome_of(tests, folder, limit_s)
            results.add(mutant, code, guards, outcome)
            path.write_text(source, encoding="utf-8")
        yield mutant, outcome


def _limit_s(module: str, tests: list[str], folder: Path) -> float:
    """Return the seconds that the tests may take on a mutant: 10, and 4 times those they need."""
    loaded = folder / "loaded.txt"
    for _ in range(2):  # the second time with everything loaded
        start = time.monotonic()
        if outcome_of(tests, folder, 600, loaded) != "passed":
            console.print((folder / "output.txt").read_text()[-3000:], markup=False)
            raise SystemExit(f"the tests of {module} fail on the code as it is")
        seconds = time.monotonic() - start
        preload(loaded)
    console.print(f"{module}: its tests take {seconds:.1f} s", style="dim")
    return 10 + 4 * seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="make mutate", description=__doc__)
    parser.add_argument("modules", nargs="*", help="parts of the names of files, instead of all")
    parser.add_argument("-n", type=int, default=40, help="mutants of each file, 0 for all")
    parser.add_argument("--bar", type=float, default=95.0, help="percent that must be noticed")
    args = parser.parse_args()

    targets: dict[str, Any] = yaml.safe_load(TARGETS.read_text(encoding="utf-8"))
    accepted = {f"{e['file']}|{e['line']}|{e['change']}": e["why"] for e in targets["accepted"]}
    results = Results()
    stale: set[str] = set()
    table = Table("mutants", "noticed", "no change", "lived", "of the rest", "file")
    lived: list[Mutant] = []
    sums = [0, 0, 0, 0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        os.chdir(folder)
        sys.path[:] = [name, *(p for p in sys.path if p not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:1])
        for module, tests in targets["files"].items():
            if args.modules and not any(part in module for part in args.modules):
                continue
            counts = [0, 0, 0, 0]
            existing = {mutant.key for mutant in mutants_of(module, (folder / module).read_text())}
            stale |= {key for key in accepted if key.startswith(f"{module}|")} - existing
            for mutant, outcome in outcomes(module, tests, args.n or 10**6, folder, results):
                kind = 3 if mutant.key not in accepted else 2
                kind = 1 if outcome != "passed" else kind
                counts[0] += 1
                counts[kind] += 1
                if kind == 3:
                    lived.append(mutant)
                    console.print(escape(str(mutant)))
            sums = [a + b for a, b in zip(sums, counts, strict=True)]
            table.add_row(*map(str, counts), percent(counts), module.removeprefix("multi_token/"))
    table.add_row(*map(str, sums), percent(sums), "all", style="bold")
    console.print(table)
    if stale:
        raise SystemExit("\n".join(["accepted in targets.yaml, but no mutant:", *sorted(stale)]))
    if sums[0] - sums[2] and 100 * sums[1] / (sums[0] - sums[2]) < args.bar:
        raise SystemExit(f"under {args.bar:g} %: see the mutants that lived, above")


def percent(counts: list[int]) -> str:
    num, noticed, accepted, _ = counts
    return f"{100 * noticed / (num - accepted):.1f} %" if num > accepted else "-"


if __name__ == "__main__":
    main()
