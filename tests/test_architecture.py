"""The rules of the house that a machine can check. A failure names the file and the rule.

Border: reads the source as text and syntax trees; runs the package only to see what it imports.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "multi_token"

# A room may import rooms of its own line and of the lines above it.
LAYERS = [
    ["types", "errors"],
    ["registry", "hub", "references", "page"],
    ["media"],
    ["projectors", "resample", "modalities"],
    ["marks", "chat_template", "chat", "collate", "splice", "data_spec", "train_spec", "recipe"],
    ["drive", "attention", "capabilities", "quantization", "language_model", "probe", "encoders"],
    ["reader", "model", "language_model_folder"],
    ["checkpoint", "generate", "data", "evaluate", "train", "testing"],
    ["demo", "serve", "cli"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Methods that a PreTrainedModel must have lead to rooms behind it: allowed inside functions only.
DOORS = {("model", "checkpoint"), ("model", "generate")}
# Formats of others: reads ours, and only these rooms may ask for it.
CONVERT_USERS = {"convert", "checkpoint", "demo", "cli"}

MAX_LINES = 400
NAMELESS = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}
NETWORK = {"aiohttp", "ftplib", "http", "httpcore", "httpx", "requests", "socket", "ssl"}
NETWORK |= {"urllib", "urllib3"}
SPEAKS_TO_A_NETWORK = {"multi_token/media/fetch.py", "multi_token/media/address.py"}
SPEAKS_TO_A_NETWORK |= {"multi_token/serve/bench.py"}  # to the server that it measures
SPEAKS_TO_A_NETWORK |= {"multi_token/serve/vllm_wire.py"}  # to the engines that it was given
PICKLES = {"cloudpickle", "dill", "joblib", "pickle", "shelve"}
FAMILIES = re.compile(
    r"llama|qwen|gemma|mistral|mixtral|smollm|falcon|deepseek|olmo|granite|mamba|lfm2|cohere"
    r"|gpt[-_]?(2|j|neo|oss)|\bphi[-_]?\d|\[/?inst\]",
    re.IGNORECASE,
)
# Home of their quirks; the demo's own model; tiny models of several families to test with.
NAMES_FAMILIES = {"language_model", "demo", "testing"}
MACHINE_PATH = re.compile(r"(?<![\w./-])/(work|farm|root|opt)/")


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def room_of(path: Path) -> str:
    """`multi_token/media/fetch.py` -> media; `multi_token/chat.py` -> chat."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def code_of_rooms() -> list[Path]:
    """Every file of the package but its two doors, which name all rooms."""
    doors = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    return [p for p in python_files("multi_token") if p not in doors]


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, wherever in it, with their lines."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield ".".join([*base, alias.name]), node.lineno


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms that a file imports, doors left out."""
    inside_functions = {
        node.lineno
        for function in ast.walk(tree_of(path))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, ast.stmt)
    }
    for name, line in imported(path):
        parts = name.split(".")
        if parts[0] != "multi_token" or len(parts) < 2 or parts[1] not in {*LEVEL, "convert"}:
            continue
        if (room_of(path), parts[1]) in DOORS and line in inside_functions:
            continue
        yield parts[1], line


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name: `torch.load`, `print`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def words(path: Path) -> Iterator[tuple[str, int]]:
    """Identifiers and strings of a file, docstrings left out, with their lines."""
    prose = {
        id(node.value)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree_of(path)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.alias)):
            yield node.name, line
        elif isinstance(node, ast.Constant) and id(node) not in prose:
            yield str(node.value), line


def refuse(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(sorted(faults))


def test_every_room_has_its_place_in_the_layers() -> None:
    refuse(
        [
            f"{name_of(path)}: room {room_of(path)!r} has no place in LAYERS"
            for path in code_of_rooms()
            if room_of(path) not in {*LEVEL, "convert"}
        ]
    )


def test_rooms_import_only_what_stands_before_them() -> None:
    faults = []
    for path in code_of_rooms():
        room = room_of(path)
        for other, line in imported_rooms(path):
            if "convert" in (room, other) or room not in LEVEL:
                continue
            if LEVEL[other] > LEVEL[room]:
                faults.append(
                    f"{name_of(path)}:{line}: {room!r} imports {other!r}, which stands after it"
                )
    refuse(faults)


def test_no_two_rooms_need_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for path in code_of_rooms():
        graph.setdefault(room_of(path), set()).update(
            other for other, _ in imported_rooms(path) if other != room_of(path)
        )
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"rooms import each other in a circle: {' -> '.join(error.args[1])}")


def test_only_the_edges_ask_for_convert() -> None:
    refuse(
        [
            f"{name_of(path)}:{line}: only {', '.join(sorted(CONVERT_USERS))} may import 'convert'"
            for path in code_of_rooms()
            for other, line in imported_rooms(path)
            if other == "convert" and room_of(path) not in CONVERT_USERS
        ]
    )


def test_every_file_says_what_it_is_for() -> None:
    refuse(
        [
            f"{name_of(path)}: a file opens with a docstring: what it is for, where its border is"
            for path in python_files("multi_token", "tests", "benchmarks", "docs", "examples")
            if not ast.get_docstring(tree_of(path))
        ]
    )


def test_no_file_is_longer_than_the_wall() -> None:
    faults = []
    for path in python_files("multi_token", "tests", "benchmarks", "docs"):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_LINES:
            faults.append(f"{name_of(path)}: {num_lines} lines, the wall is {MAX_LINES}")
    refuse(faults)


def test_no_file_has_a_name_that_says_nothing() -> None:
    refuse(
        [
            f"{name_of(path)}: {path.stem!r} says nothing; name the step"
            for path in python_files("multi_token", "tests", "benchmarks")
            if NAMELESS & set(path.stem.split("_"))
        ]
    )


def test_the_package_does_not_print() -> None:
    refuse(
        [
            f"{name_of(path)}:{call.lineno}: no print(); the command line talks through rich"
            for path in python_files("multi_token")
            for name, call in calls(path)
            if name == "print"
        ]
    )


def test_pickles_are_opened_only_in_convert() -> None:
    faults = []
    for path in code_of_rooms():
        inside = room_of(path) == "convert"
        for name, line in imported(path):
            if name.split(".")[0] in PICKLES:
                faults.append(f"{name_of(path)}:{line}: no pickles here ({name})")
        for name, call in calls(path):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == "torch.load" and not (inside and keywords.get("weights_only") == "True"):
                faults.append(
                    f"{name_of(path)}:{call.lineno}: torch.load stands only in convert/, with "
                    "weights_only=True; weights of ours are safetensors"
                )
            if keywords.get("allow_pickle") == "True":
                faults.append(f"{name_of(path)}:{call.lineno}: no allow_pickle=True")
    refuse(faults)


def test_only_fetch_and_its_neighbour_open_sockets() -> None:
    refuse(
        [
            f"{name_of(path)}:{line}: imports {name}; only media/ speaks to a network"
            for path in code_of_rooms()
            if name_of(path) not in SPEAKS_TO_A_NETWORK
            for name, line in imported(path)
            if name.split(".")[0] in NETWORK
        ]
    )


def test_no_error_is_swallowed() -> None:
    faults = []
    for path in python_files("multi_token", "tests", "benchmarks"):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            where = f"{name_of(path)}:{node.lineno}"
            if node.type is None:
                faults.append(f"{where}: a bare except; name what is caught")
            elif ast.unparse(node.type) in {"Exception", "BaseException"} and all(
                isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body
            ):
                faults.append(f"{where}: every error is caught and forgotten")
    refuse(faults)


def test_core_code_names_no_family_of_language_models() -> None:
    """Behaviour comes from a field or a probe, never from a model's name. Prose may name them."""
    faults = []
    for path in code_of_rooms():
        if room_of(path) in NAMES_FAMILIES:
            continue
        for word, line in words(path):
            if found := FAMILIES.search(word):
                faults.append(
                    f"{name_of(path)}:{line}: names {found[0]!r}; quirks of a language model live "
                    "in language_model.py"
                )
    refuse(faults)


def test_the_repository_holds_no_path_of_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    faults = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in path.read_bytes()[:4096]:
            continue  # removed but still in the index, or a picture
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := MACHINE_PATH.search(line):
                faults.append(f"{name}:{number}: {found[0]} is a folder of somebody's machine")
    refuse(faults)


def loaded_after(code: str, *names: str) -> list[str]:
    """Which of the named packages are loaded after `code` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nsys.stdout.write(' '.join({set(names)} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return sorted(run.stdout.split())


def test_importing_the_package_loads_no_torch() -> None:
    assert loaded_after("import multi_token", "torch", "transformers", "datasets", "peft") == []


def test_importing_the_command_line_loads_no_transformers() -> None:
    heavy = loaded_after("import multi_token.cli", "transformers", "datasets", "peft")
    assert heavy == [], f"multi_token/cli imports {heavy} at its top; import them in the command"


def test_constructing_modalities_loads_no_transformers() -> None:
    code = (
        "from multi_token.modalities.image import ImageModality\n"
        "ImageModality(encoder='some/encoder')"
    )
    assert loaded_after(code, "transformers") == []


def test_public_names_are_what_their_homes_hold() -> None:
    import multi_token

    assert sorted(multi_token._HOMES) == sorted({*multi_token.__all__} - {"__version__"})
    for name, home in multi_token._HOMES.items():
        inside = getattr(importlib.import_module(home), name)
        # asked for twice: a folder of the same name would take the place of the first answer
        for _ in range(2):
            assert getattr(multi_token, name) is inside, f"multi_token.{name} is not {home}.{name}"


def test_the_command_line_starts() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "multi_token", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert "train" in run.stdout


@pytest.mark.slow
def test_a_built_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    import zipfile

    build = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    run = subprocess.run([sys.executable, *build], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("multi_token/")}
    here = {name_of(p) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    refuse(
        [f"{name}: not in the wheel; see package-data in pyproject.toml" for name in here - packed]
    )
