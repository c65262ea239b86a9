"""Renders the facts of the built-in modalities into docs/facts.md and their pages."""

from __future__ import annotations

from pathlib import Path

from multi_token import registry

FOLDER = Path(__file__).resolve().parent
MARK = "<!-- facts -->"


def pages() -> dict[Path, str]:
    """Page -> its text between the marks."""
    known = {
        name: registry.resolve("modality", name).fact_names
        for name in registry.registered_names("modality")
        if name in registry._BUILT_INS["modality"]
    }
    rows = [
        f"| `{name}` | `{fact}` | {meaning} |"
        for name, facts in known.items()
        for fact, meaning in facts.items()
    ]
    table = "\n".join(["| type | fact | meaning |", "|---|---|---|", *rows])
    found = {FOLDER / "facts.md": table}
    for name, facts in known.items():
        listed = ", ".join(f"`{fact}`" for fact in facts)
        sentence = "`facts` writes numbers of an item as text before it ([facts](../facts.md)): "
        found[FOLDER / "modalities" / f"{name}.md"] = (
            f"{sentence}{listed}." if facts else "It has no facts to write as text."
        )
    return found


def rendered(page: str, text: str) -> str:
    """The page with its text rendered again."""
    before, _, after = page.split(MARK)
    return f"{before}{MARK}\n{text}\n{MARK}{after}"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(rendered(path.read_text(encoding="utf-8"), text), encoding="utf-8")
