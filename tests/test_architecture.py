"""Rules of the repository that a machine can check. A failure names the file and the rule."""

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

# A package may import packages of its own line and of the lines above it.
LAYERS = [
    ["types", "errors"],
    ["distributed", "hub", "registry", "report"],
    ["media"],
    ["projectors"],
    ["modalities"],
    ["recipe", "chat", "splice", "collate"],
    ["language_model", "encoders"],
    ["processor"],
    ["checkpoint"],
    ["data"],
    ["generate"],
    ["model"],
    ["evaluate", "convert", "testing"],
    ["train"],
    ["demo", "serve", "ray_data", "hf"],
    ["cli"],
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
# Arrows that still point upwards, to be turned round. The list only shrinks.
UPWARDS: set[tuple[str, str]] = set()

# Formats of others: reads ours, and only these packages may ask for it.
CONVERT_USERS = {"convert", "demo", "cli", "hf"}

MAX_LINES = 500
MIN_LINES = 100
# Commands, plug-ins and formats: one file each, however short.
MAY_BE_SHORT = (
    "multi_token/cli/",
    "multi_token/modalities/",
    "multi_token/projectors/",
    "multi_token/data/files/",
    "multi_token/convert/efficientnet_lite.py",  # a pickle, which only convert/ may open
)
NAMELESS = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}
NETWORK = {"aiohttp", "ftplib", "http", "httpcore", "httpx", "requests", "socket", "ssl"}
NETWORK |= {"urllib", "urllib3"}
SPEAKS_TO_A_NETWORK = {"multi_token/media/fetch.py", "multi_token/media/safe_http.py"}
SPEAKS_TO_A_NETWORK |= {"multi_token/serve/engines/vllm/client.py"}  # to its engines
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


def package_of(path: Path) -> str:
    """`multi_token/media/fetch.py` -> media; `multi_token/model.py` -> model."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def code_of_packages() -> list[Path]:
    """Every file but `__init__` and `__main__`, which import all packages."""
    entries = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    return [p for p in python_files("multi_token") if p not in entries]


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


def imported_packages(path: Path) -> Iterator[tuple[str, int]]:
    """Packages (or top-level modules) of multi_token that a file imports, wherever in it."""
    for name, line in imported(path):
        parts = name.split(".")
        if parts[0] == "multi_token" and len(parts) > 1 and parts[1] in LEVEL:
            yield parts[1], line


@cache
def file_graph() -> dict[str, set[str]]:
    """Dotted module name -> modules of multi_token that it imports, inside functions too."""
    names = {module_of(path) for path in python_files("multi_token")} - {"multi_token"}
    graph = {}
    for path in code_of_packages():
        found = set()
        for name, _ in imported(path):
            target = name if name in names else name.rpartition(".")[0]
            found |= {target} & names
        graph[module_of(path)] = found - {module_of(path)}
    return graph


def module_of(path: Path) -> str:
    """`multi_token/media/__init__.py` -> multi_token.media."""
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


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


def test_every_package_has_its_layer() -> None:
    refuse(
        [
            f"{name_of(path)}: package {package_of(path)!r} is missing from LAYERS"
            for path in code_of_packages()
            if package_of(path) not in LEVEL
        ]
    )


def test_packages_import_only_layers_below_them() -> None:
    faults = []
    for path in code_of_packages():
        package = package_of(path)
        for other, line in imported_packages(path):
            if LEVEL[other] > LEVEL.get(package, 0) and (package, other) not in UPWARDS:
                faults.append(f"{name_of(path)}:{line}: {package!r} imports {other!r} above it")
    refuse(faults)


def test_no_two_files_import_each_other() -> None:
    """Imports inside functions and under TYPE_CHECKING count."""
    try:
        list(TopologicalSorter(file_graph()).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {' -> '.join(error.args[1])}")


def test_only_the_edges_import_convert() -> None:
    refuse(
        [
            f"{name_of(path)}:{line}: only {', '.join(sorted(CONVERT_USERS))} may import 'convert'"
            for path in code_of_packages()
            for other, line in imported_packages(path)
            if other == "convert" and package_of(path) not in CONVERT_USERS
        ]
    )


def test_no_file_is_a_splinter() -> None:
    """A short module with one importer belongs into it; a package that exports it is none."""
    importers: dict[str, set[str]] = {}
    for name, imports in file_graph().items():
        for other in imports:
            importers.setdefault(other, set()).add(name)
    faults = []
    for path in code_of_packages():
        name = name_of(path)
        if path.name == "__init__.py" or name.startswith(MAY_BE_SHORT):
            continue
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        users = importers.get(module_of(path), set()) - {module_of(path.parent / "__init__.py")}
        if num_lines < MIN_LINES and len(users) == 1:
            faults.append(f"{name}: {num_lines} lines and only {min(users)} imports it; merge them")
    refuse(faults)


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
    for path in code_of_packages():
        inside = package_of(path) == "convert"
        for name, line in imported(path):
            if name.split(".")[0] in PICKLES:
                faults.append(f"{name_of(path)}:{line}: no pickles here ({name})")
        for name, call in calls(path):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == "torch.load" and not (inside and keywords.get("weights_only") == "True"):
                faults.append(
                    f"{name_of(path)}:{call.lineno}: torch.load is allowed in convert/ only, with "
                    "weights_only=True; weights of ours are safetensors"
                )
            if keywords.get("allow_pickle") == "True":
                faults.append(f"{name_of(path)}:{call.lineno}: no allow_pickle=True")
    refuse(faults)


def test_only_fetch_and_its_neighbour_open_sockets() -> None:
    refuse(
        [
            f"{name_of(path)}:{line}: imports {name}; only media/ speaks to a network"
            for path in code_of_packages()
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
    for path in code_of_packages():
        if package_of(path) in NAMES_FAMILIES:
            continue
        for word, line in words(path):
            if found := FAMILIES.search(word):
                faults.append(
                    f"{name_of(path)}:{line}: names {found[0]!r}; quirks of a language model live "
                    "in language_model/loading.py"
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
            continue  # removed but still in the index, or an image
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := MACHINE_PATH.search(line):
                faults.append(f"{name}:{number}: {found[0]} is a folder of one machine")
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

    assert sorted(multi_token._HOMES) == sorted({*multi_token.__all__} - {"__version__", "train"})
    for name, home in multi_token._HOMES.items():
        module, _, attribute = home.partition(":")
        inside = getattr(importlib.import_module(module), attribute)
        # asked for twice: a folder of the same name would take the place of the first answer
        for _ in range(2):
            assert getattr(multi_token, name) is inside, f"multi_token.{name} is not {home}"


@pytest.mark.parametrize(
    "before",
    ["pass", "import multi_token.train.run", "import multi_token.train", "import multi_token.cli"],
)
def test_train_is_public_in_any_order_of_imports(before: str, tmp_path: Path) -> None:
    """A recipe that is refused at once shows that the function was reached."""
    code = (
        f"{before}\nfrom multi_token import MultiTokenError, load_recipe, train\n"
        "import multi_token.train.run as run\nassert callable(run.train)\n"
        "try:\n    train(None)\nexcept MultiTokenError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "expected the path of a YAML file" in done.stdout


def test_the_plug_in_template_and_example_import_public_names_alone() -> None:
    """`multi_token` and its kit `multi_token.testing`: all other modules may move."""
    files = [
        *(PACKAGE / "cli" / "templates").rglob("*.py.jinja"),
        *(ROOT / "examples" / "plugin_heartbeat").rglob("*.py"),
    ]
    assert len(files) >= 4
    for path in files:
        text = path.read_text(encoding="utf-8")
        modules = re.findall(r"^(?:from|import) (multi_token(?:\.[\w.]+)?)\b", text, re.MULTILINE)
        assert {*modules} <= {"multi_token", "multi_token.testing"}, path


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
