"""Chat templates by name, and the variables of a template (`enable_thinking`) as its defaults."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from multi_token.errors import ChatTemplateError
from multi_token.registry import did_you_mean

_TEMPLATES = files("multi_token.chat") / "templates"
_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# transformers gives these to every template, so they are no choice of the user
_GIVEN = re.compile(
    r"messages|add_generation_prompt|tools|documents|raise_exception|strftime_now|\w+_token"
)


@functools.cache
def template_names() -> list[str]:
    """Names that `model.chat_template` takes in place of Jinja text, sorted."""
    found = (path.name.partition(".") for path in _TEMPLATES.iterdir())
    return sorted(name for name, _, suffix in found if suffix == "jinja")


@functools.cache
def named_template(name: str) -> str:
    """Jinja text of a name. Raises ChatTemplateError for an unknown one."""
    if name not in template_names():
        raise ChatTemplateError(
            f"chat_template {name!r} is neither Jinja text, nor a file, nor a known name"
            f"{did_you_mean(name, template_names())} (known: {', '.join(template_names())})"
        )
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


@functools.lru_cache(maxsize=64)
def template_variables(source: str) -> frozenset[str]:
    """Variables of a template that a user may set, such as `enable_thinking`."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_TAG.sub("", source))
        found = meta.find_undeclared_variables(tree)
    except TemplateError:  # rendering reports it, with the conversation
        return frozenset()
    # jinja2 lists names that a loop sets too; one that the template asks for (`is defined`) stays
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    own -= {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    return frozenset(name for name in found - own if not _GIVEN.fullmatch(name))


def with_variables(source: str, variables: Mapping[str, Any]) -> str:
    """Return the template with values for variables that its caller does not set.

    Raises:
        ChatTemplateError: For a variable that the template does not have, or a value that is no
            JSON.
    """
    known = template_variables(source)
    for name in variables:
        if name not in known:
            raise ChatTemplateError(
                f"chat_template_kwargs: the chat template has no variable {name!r}"
                f"{did_you_mean(name, known)} (it has {', '.join(sorted(known)) or 'none'})"
            )
    # In the text, so that every program that renders an exported template renders it alike. The
    # line break is cut again: templates are rendered with `trim_blocks`.
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in variables.items()
    ]
    return "".join(lines) + source


def _literal(value: Any) -> str:
    """Return a JSON value as a literal of Jinja."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, str):
        return ascii(value)
    if isinstance(value, Mapping):
        pairs = (f"{_literal(str(key))}: {_literal(one)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_literal, value)) + "]"
    raise ChatTemplateError(
        f"chat_template_kwargs: {value!r} is no value of JSON; use true, false, a number, a text, "
        "a list or a mapping"
    )
