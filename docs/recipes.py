"""Renders the table of docs/recipes.md from the headers of the recipes: `make fix` writes it."""

from __future__ import annotations

from pathlib import Path

from multi_token.cli.recipes import HEADER_FIELDS, ready_recipes

PAGE = Path(__file__).resolve().parent / "recipes.md"
MARK = "<!-- recipes -->"


def rendered(page: str) -> str:
    """The page with its table made again."""
    before, _, after = page.split(MARK)
    lines = ["| recipe | " + " | ".join(field.lower() for field in HEADER_FIELDS) + " |"]
    lines.append("| --- " * (len(HEADER_FIELDS) + 1) + "|")
    for name, recipe in ready_recipes().items():
        cells = [f"`{name}`: {recipe.header['title']}"]
        cells += [recipe.header[field].replace("|", "\\|") for field in HEADER_FIELDS]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"{before}{MARK}\n{table}\n{MARK}{after}"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
