"""Tries the families of language models and writes the table of docs/language-models.md."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "language-models.md"
MARK = "<!-- families -->"


def part(name: str) -> ModuleType:
    """A module of tests/language_models, which is no package."""
    key = f"language_models_{name}"
    if key not in sys.modules:
        path = ROOT / "tests" / "language_models" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def answers(family: str, folder: Path, *, slow: bool) -> tuple[dict[str, str], list[str]]:
    """The cells of a family by heading, and a line for each sentence it is refused with."""
    trials = part("trials")
    part("families").save_tiny_model(family, folder)
    subject = trials.Subject(folder, trials.composed(folder))
    cells = trials.run(subject, trials.SLOW_COLUMNS if slow else trials.COLUMNS)
    lines = [
        f"- {family}{', ' + heading if heading else ''}: {said.replace(str(folder), 'FOLDER')}"
        for heading, said in subject.refused.items()
    ]
    return cells, lines


def headings(*, slow: bool) -> list[str]:
    """Those of the columns that are quick to try, or of the others."""
    trials = part("trials")
    return list(trials.SLOW_COLUMNS if slow else trials.COLUMNS)


def render() -> str:
    """The table, one row a family, and the sentences below it."""
    columns = [*headings(slow=False), *headings(slow=True)]
    rows, said = [["family", *columns], ["---"] * (1 + len(columns))], []
    for family in part("families").FAMILIES:
        cells, lines = {}, []
        for slow in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                more, sentences = answers(family, Path(folder), slow=slow)
            cells |= more
            lines += sentences
        rows.append([family, *(cells[heading] for heading in columns)])
        said += dict.fromkeys(lines)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n" + "\n".join(said)


def rendered(page: str) -> str:
    """The page with its table made again."""
    before, _, after = page.split(MARK)
    return f"{before}{MARK}\n{render()}\n{MARK}{after}"


def on_page(page: str, family: str) -> tuple[dict[str, str], list[str]]:
    """Return cells and sentences of a family as `answers` does, for all columns."""
    lines = page.split(MARK)[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    header, *body = [row for row in rows if len(row) == len(rows[0])]
    cells = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}
    said = [line for line in lines if line.startswith((f"- {family}:", f"- {family}, "))]
    return cells.get(family, {}), said


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
