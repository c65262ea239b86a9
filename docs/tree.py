"""Renders the tree of the README from each folder's first sentence: `make fix` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARK = "<!-- tree -->"

OTHERS = {
    "multi_token/recipes": "ready recipes, one file each (`multi-token recipes list`)",
    "tests": "mirror of the package; test_architecture.py and test_docs.py hold the rules",
    "examples": "whole jobs on real parts, each with a report; and a plug-in package",
    "benchmarks": "the measurements of our claims, and the scripts that make them",
    "deploy": "gateways before engines of vLLM, as containers",
    "docs": "decisions with their reasons, and the log of experiments",
}


def render(root: Path = ROOT) -> str:
    """The tree as a fenced block."""
    lines = [("multi_token/", "")]
    lines += _folder(root / "multi_token", depth=1)
    lines += [(f"{name}/", text) for name, text in OTHERS.items() if (root / name).is_dir()]
    width = max(len(name) for name, _ in lines) + 2
    body = "\n".join(f"{name:{width}}{text}".rstrip() for name, text in lines)
    return f"```\n{body}\n```"


def rendered(readme: str, root: Path = ROOT) -> str:
    """The README with its tree made again."""
    before, _, after = readme.split(MARK)
    return f"{before}{MARK}\n{render(root)}\n{MARK}{after}"


def _folder(folder: Path, depth: int) -> list[tuple[str, str]]:
    lines = []
    for inner in sorted(p for p in folder.iterdir() if (p / "__init__.py").is_file()):
        if inner.name != "templates":
            lines.append((f"{'  ' * depth}{inner.name}/", _purpose(inner / "__init__.py")))
            lines += _folder(inner, depth + 1)
    return lines


def _purpose(path: Path) -> str:
    """The first sentence of the file's docstring, as far as its first line."""
    if not path.is_file():
        return ""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition(". ")[0].removesuffix(".")


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
