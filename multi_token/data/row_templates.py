"""Jinja templates over the columns of a row, in the sandbox that chat templates use too."""

from __future__ import annotations

import ast
import functools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context

from multi_token.data.rows import as_list, type_name
from multi_token.errors import first_line
from multi_token.registry import did_you_mean

DRAW = "_draw"
"""Variable by which `pick` draws: a text that is the same in every process and epoch."""
OPEN, CLOSE = "\ue001", "\ue002"
"""Letters around the name of a slot of a template itself, not of a value of the row."""
_MANY_COLUMNS = 20
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class TemplateFault(ValueError):
    """A template that a row cannot fill: the sentence names both, without the row's id."""


@dataclass(frozen=True)
class RowTemplate:
    """A template, compiled once in each process; picklable.

    `{{ expression }}` alone keeps its value, such as a list; everything else becomes a text.
    `where` names the template in messages (`turns.0.user`).
    """

    text: str
    where: str

    def __post_init__(self) -> None:
        self.compiled()

    @property
    def shown(self) -> str:
        """The template as its author wrote it."""
        return self.text.replace(OPEN, "<").replace(CLOSE, ">")

    @property
    def columns(self) -> frozenset[str]:
        """Columns that the template names."""
        return _columns(self.text)

    def compiled(self) -> Callable[[Mapping[str, Any]], Any]:
        """Return the function that fills the template. Raises TemplateFault."""
        try:
            return _compile(self.text)
        except TemplateSyntaxError as error:
            raise TemplateFault(
                f"`{self.where}` is no template that Jinja reads ({first_line(error)}): "
                f"{self.shown}"
            ) from None

    def fill(self, row: Mapping[str, Any], **others: Any) -> Any:
        """Return the value for a row; `others` are variables beside the columns and `row`.

        Raises TemplateFault.
        """
        return _run(self.compiled(), {"row": row, **row, **others}, row, self)


@dataclass(frozen=True)
class RowCondition:
    """The `where` of a source: an expression over the columns of a row; picklable."""

    text: str
    where: str = "where"

    def __post_init__(self) -> None:
        try:
            _compile_condition(self.text)
        except TemplateSyntaxError as error:
            raise TemplateFault(
                f"`where` is no expression that Jinja reads ({first_line(error)}): {self.text}"
            ) from None

    @property
    def shown(self) -> str:
        """The expression."""
        return self.text

    @property
    def columns(self) -> set[str] | None:
        """Columns that the expression reads; None if only a row tells."""
        from jinja2 import meta

        used = meta.find_undeclared_variables(_environment().parse("{{ " + self.text + " }}"))
        return None if "row" in used else used

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Return whether the row is one of the source. Raises TemplateFault."""
        found = _run(_compile_condition(self.text), {"row": row, **row}, row, self)
        return bool(found)


def _run(
    compiled: Callable[[Mapping[str, Any]], Any],
    variables: Mapping[str, Any],
    row: Mapping[str, Any],
    of: RowTemplate | RowCondition,
) -> Any:
    try:
        return compiled(variables)
    except TemplateFault as fault:
        raise TemplateFault(f"{fault} (`{of.where}`: {of.shown})") from None
    except SecurityError as error:
        raise TemplateFault(
            f"`{of.where}` reaches for Python, which templates may not ({first_line(error)}): "
            f"{of.shown}"
        ) from None
    except UndefinedError as error:
        raise TemplateFault(f"{_missing(error, row)} (`{of.where}`: {of.shown})") from None
    # a filter or an operator may raise anything on a value that it was not meant for
    except (
        *(TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
        *(TypeError, ValueError),
    ) as error:
        raise TemplateFault(
            f"`{of.where}` cannot be computed ({first_line(error)}): {of.shown}"
        ) from None


def missing_column(name: str, row: Mapping[str, Any]) -> str:
    """Say that a row has no such column, with the nearest name."""
    columns = list(map(str, row))
    shown = ", ".join(columns[:_MANY_COLUMNS]) + (", ..." if len(columns) > _MANY_COLUMNS else "")
    return f"no column {name!r}{did_you_mean(name, columns)} (it has {shown or 'none'})"


def _missing(error: UndefinedError, row: Mapping[str, Any]) -> str:
    name = re.fullmatch(r"'(\w+)' is undefined", first_line(error))
    return missing_column(name[1], row) if name else first_line(error)


class _Sandbox(ImmutableSandboxedEnvironment):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # values of a row may be images or arrays, whose methods write files
        plain = type(obj).__module__.partition(".")[0] in ("builtins", "jinja2", "datetime")
        return plain and super().is_safe_attribute(obj, attr, value)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_written)
    environment.filters |= {
        "fromjson": _from_json,
        "fromliteral": _from_literal,
        "pick": _pick,
        "common": _common,
        "lettered": _lettered,
        "letter": _letter,
    }
    return environment


@functools.lru_cache(maxsize=256)
def _compile(text: str) -> Callable[[Mapping[str, Any]], Any]:
    environment = _environment()
    body = environment.parse(text).body
    output = body[0] if len(body) == 1 and isinstance(body[0], nodes.Output) else None
    alone = output is not None and len(output.nodes) == 1
    if alone and output is not None and not isinstance(output.nodes[0], nodes.TemplateData):
        stripped = text.strip()
        expression = stripped.removeprefix("{{").removesuffix("}}").strip("-+ \n\t")
        try:
            return _valued(environment.compile_expression(expression, undefined_to_none=False))
        except TemplateSyntaxError:
            pass  # such as `{{ a }}{# comment #}`, which is rendered below
    template = environment.from_string(text)
    return lambda variables: template.render(variables)


def _valued(expression: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
    def value(variables: Mapping[str, Any]) -> Any:
        found = expression(variables)
        # compile_expression hands an undefined value out, which a rendered one would have raised
        return str(found) if isinstance(found, StrictUndefined) else found

    return value


@functools.lru_cache(maxsize=256)
def _columns(text: str) -> frozenset[str]:
    from jinja2 import meta

    tree = _environment().parse(text)
    of_row = [
        found.attr if isinstance(found, nodes.Getattr) else found.arg
        for found in tree.find_all((nodes.Getattr, nodes.Getitem))
        if isinstance(found.node, nodes.Name) and found.node.name == "row"
    ]
    named = [name.value if isinstance(name, nodes.Const) else name for name in of_row]
    return frozenset(
        {*meta.find_undeclared_variables(tree), *(name for name in named if isinstance(name, str))}
    )


@functools.lru_cache(maxsize=32)
def _compile_condition(text: str) -> Callable[[Mapping[str, Any]], Any]:
    return _valued(_environment().compile_expression(text, undefined_to_none=False))


@pass_context
def _written(context: Any, value: Any) -> Any:
    check_text(value, context.get("row", {}))
    return value


def check_text(value: Any, row: Mapping[str, Any]) -> None:
    """Refuse a value of a row whose text would be Python's spelling of it. Raises TemplateFault."""
    # a null column of a table would be written as the word None
    if value is None:
        raise TemplateFault("a column is empty (null)")
    if isinstance(value, (bytes, bytearray)):
        raise TemplateFault("a value is bytes, which are no text; name a column of texts")
    if not isinstance(value, Mapping) and as_list(value) is None:
        return
    column = next((name for name, given in row.items() if given is value), "COLUMN")
    raise TemplateFault(
        f"a value is {type_name(value)}, which is no text; name the entry that is meant in "
        f'`turns`, such as `{{assistant: "{{{{ {column}{_first_entry(value)} }}}}"}}`'
    )


def _first_entry(value: Any) -> str:
    """Return how a template names the first entry of a value, such as `.text[0]`."""
    if isinstance(value, Mapping):
        return next((f".{key}{_first_entry(entry)}" for key, entry in value.items()), "")
    items = as_list(value)
    return f"[0]{_first_entry(items[0])}" if items else ""


def draw(of: str, num: int) -> int:
    """Draw one of `num` by a text: the same in every process, epoch and version of Python."""
    return zlib.crc32(of.encode("utf-8", "surrogatepass")) % num


@pass_context
def _pick(context: Any, value: Any) -> Any:
    """One of a list, drawn by the seed and the row; any other value as it is.

    Of objects with a `raw` text, as data sets of COCO's captions have them, that one counts.
    """
    value = _entry(value, "raw")
    items = as_list(value)
    if items is None:
        return value
    if not items:
        raise TemplateFault("`pick` got an empty list")
    return _entry(items[draw(f"{context.get(DRAW, '')} pick", len(items))], "raw")


def _entry(value: Any, *keys: str) -> Any:
    """Return the entry of an object under the first of `keys` it has; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    return next((value[key] for key in keys if value.get(key) is not None), value)


@pass_context
def _common(context: Any, value: Any) -> Any:
    """The most common of a list, the first of several; any other value as it is.

    Of objects with an `answer`, as VQA data sets have them, or a `text`, as in SQuAD, that one
    counts.
    """
    value = _entry(value, "text")
    items = as_list(value)
    if items is None:
        return value
    items = [_entry(item, "answer", "text") for item in items]
    if any(isinstance(item, Mapping) for item in items):
        check_text(value, context.get("row", {}))
    if not items:
        raise TemplateFault("`common` got an empty list")
    return Counter(items).most_common(1)[0][0]


def _from_json(value: Any) -> Any:
    return json.loads(value)


def _from_literal(value: Any) -> Any:
    """The value of a text that Python would print, such as "{'NORM': 100.0}"."""
    try:
        return ast.literal_eval(value)
    except SyntaxError as error:
        raise ValueError(str(error)) from None


def _options(value: Any) -> list[str]:
    # some data sets hold the list as the text that Python prints
    if isinstance(value, str) and value.startswith("["):
        value = _from_literal(value)
    return [str(item) for item in as_list(value) or () if item is not None]


def _lettered(value: Any) -> str:
    """The choices of a question, one a line after its letter."""
    return "\n".join(f"{_LETTERS[i]}. {text}" for i, text in enumerate(_options(value)))


def _letter(answer: Any, choices: Any) -> str:
    """The letter of an answer that is a number or the text of a choice, else the answer."""
    options = _options(choices)
    if isinstance(answer, str) and answer in options:
        return _LETTERS[options.index(answer)]
    if isinstance(answer, int) or (isinstance(answer, str) and answer.isdecimal()):
        if not 0 <= int(answer) < len(options):
            raise TemplateFault(f"answer {answer} is the number of none of {len(options)} choices")
        return _LETTERS[int(answer)]
    if not isinstance(answer, str):
        raise TemplateFault(f"the answer is {type_name(answer)}")
    return answer
