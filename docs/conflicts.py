"""Renders the table of conflicts in docs/recipe.md: `make fix` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from multi_token.recipe.conflicts import CONFLICTS

PAGE = Path(__file__).resolve().parent / "recipe.md"
MARK = "<!-- conflicts -->"


def render() -> str:
    """The table: settings that exclude each other, the reason and the remedy."""
    lines = ["| settings | reason | remedy |", "|---|---|---|"]
    for conflict in CONFLICTS:
        settings = " with ".join(f"`{_as_typed(setting)}`" for setting in conflict.settings)
        reason, _, remedy = _placeholders(conflict.message).partition("; ")
        lines.append(f"| {settings} | {reason} | {remedy} |")
    return "\n".join(lines)


def rendered(page: str) -> str:
    """The page with its table rendered again."""
    before, _, after = page.split(MARK)
    return f"{before}{MARK}\n{render()}\n{MARK}{after}"


def _as_typed(setting: str) -> str:
    """A path of `Settings` as a path of a recipe."""
    setting = re.sub(r"^stage\.", "train.stages.*.", setting)
    return re.sub(r"^args\.", "train.args.", setting)


def _placeholders(message: str) -> str:
    """`{stage.name!r}` -> NAME."""
    return re.sub(r"\{.*?(\w+)\]?(?:!r)?\}", lambda field: field[1].upper(), message)


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
