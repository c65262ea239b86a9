"""Tries the families of chat templates and writes the table of docs/chat-templates.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "chat-templates.md"
MARK = "<!-- families -->"
HEADER = (
    "family",
    "from",
    "contents",
    "turns located by",
    "written by the model before an answer",
    "end of turn",
    "system",
    "tool",
    "TRL's twin also marks",
    "prompt at inference",
)


def part(name: str) -> ModuleType:
    """A module of tests/templates, which is no package."""
    key = f"chat_template_{name}"
    if key not in sys.modules:
        path = ROOT / "tests" / "templates" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def render() -> str:
    """The table, one row per family."""
    rows = [_row(family) for family in part("families").FAMILIES.values()]
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rendered(page: str) -> str:
    """The page with its table rendered again."""
    before, _, after = page.split(MARK)
    return f"{before}{MARK}\n{render()}\n{MARK}{after}"


def _row(family: Any) -> list[str]:
    trials = part("trials")
    chat, shape = trials.chat_of(family), trials.shape_of(family)
    talk = trials.conversation(2)
    origin = "TRL" if trials.is_from_trl(family.name) else "ours"
    contents = "parts" if shape.takes_content_parts else "text"
    found = "generation tags" if shape.is_tagged else "markers"
    row = [family.name, origin, contents, found]
    if trials.refusal(chat, talk) is not None:
        return [*row, "", "none: refused", "", "", "", ""]
    text, spans = shape.render_with_spans(trials.plain(talk))
    texts = [text[span.start : span.end] for span in spans]
    heads = [text.partition("It is cat")[0] for text in texts]
    ends = [text.partition(f"It is cat {i}.")[2] for i, text in enumerate(texts)]
    system = trials.refusal(chat, trials.conversation(2, system=True)) is None
    roles = ("user", "assistant", "tool", "assistant")
    tool = trials.refusal(chat, trials.conversation(1, roles=roles)) is None
    return [
        *row,
        _by_turn(heads),
        _by_turn(ends),
        "yes" if system else "refused",
        "yes" if tool else "refused",
        _besides(family, trials.plain(talk)),
        _asked_with(family, trials.plain(talk)[:-1]),
    ]


def _by_turn(texts: list[str]) -> str:
    first, last = (_code(text) for text in texts)
    return first if first == last else f"{first}; in the last turn {last}"


def _besides(family: Any, messages: list[dict[str, str]]) -> str:
    trials = part("trials")
    if trials.twin(family.name) is None:
        return "no twin"
    shape = trials.shape_of(family)
    text, spans = shape.render_with_spans(messages)
    marked = trials.marked_by_twin(family, messages)
    around = [
        mark.partition(text[span.start : span.end])
        for mark, span in zip(marked.marks, spans, strict=True)
    ]
    befores, afters = [b for b, _, _ in around], [b for _, _, b in around]
    says = [
        f"{_by_turn(texts)} {where}"
        for texts, where in ((befores, "before"), (afters, "after"))
        if any(texts)
    ]
    if marked.text != text:
        says.append("(it also writes that into the text)")
    return ", ".join(says) or "nothing"


def _asked_with(family: Any, messages: list[dict[str, str]]) -> str:
    """Describe the prompt at inference: the template's own generation prompt, or a part of it."""
    trials = part("trials")
    shape = trials.shape_of(family)
    own = shape.render(messages, add_generation_prompt=True)
    text, end = shape.render_prompt(messages)
    ours = text[:end]
    if own == ours:
        return "its own prompt"
    return f"its own without {_code(own.removeprefix(ours))}"


def _code(text: str) -> str:
    """As code inside a table's cell; blanks and line breaks are shown."""
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`" if shown.strip() else f"`{shown.replace(' ', '␣')}`" if shown else "nothing"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
