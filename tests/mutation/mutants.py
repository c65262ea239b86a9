"""Mutants: single changes of a source file by mutmut's operators, and the drawn sample."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import libcst as cst
from libcst import matchers
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation import mutators

# Left out: strings (words of messages) and `name = None`, which any test notices.
_OPERATORS: list[tuple[type, Callable[[Any], Any]]] = [
    (cst.BaseNumber, mutators.operator_number),
    (cst.Name, mutators.operator_name),
    (cst.AugAssign, mutators.operator_augmented_assignment),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.Call, mutators.operator_symmetric_string_methods_swap),
    (cst.Call, mutators.operator_unsymmetrical_string_methods_swap),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.IfExp, mutators.operator_if_exp),
]


@dataclass(frozen=True)
class Mutant:
    """One change of a file: its line, without a trailing comment, and the change in that line."""

    module: str
    number: int
    line: str
    change: str
    source: str

    @property
    def key(self) -> str:
        """Name of the mutant; stays when lines move or comments change."""
        return f"{self.module}|{self.line}|{self.change}"

    def __str__(self) -> str:
        return f"{self.module}:{self.number}: {self.line}\n    {self.change}"


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Return every change of a file, in an order that stays when lines move."""
    tree = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    finder = _Finder()
    tree.visit(finder)
    lines = _lines_of(source)
    found: dict[str, Mutant] = {}
    for old, new, words, number in finder.found:
        changed = tree.module.deep_replace(old, new)
        change = words or f"{_code(tree.module, old)} -> {_code(tree.module, new)}"
        if changed.code != source:
            mutant = Mutant(module, number, lines[number - 1], change, changed.code)
            while mutant.key in found and found[mutant.key].source != changed.code:
                # The same change at another place in this line, or in an equal line.
                nth = int(mutant.change[len(change) :].strip(" ()#") or 1) + 1
                mutant = replace(mutant, change=f"{change} (#{nth})")
            found.setdefault(mutant.key, mutant)
    return sorted(found.values(), key=lambda m: hashlib.sha256(m.key.encode()).hexdigest())


def _lines_of(source: str) -> list[str]:
    """Return the lines, without blanks around them and without trailing comments."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            lines[number - 1] = lines[number - 1][:column]
    return [line.strip() for line in lines]


class _Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, str, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom)) or _is_assertion(node):
            return False
        if matchers.matches(node, matchers.If(test=matchers.Name("TYPE_CHECKING"))):
            return False
        if isinstance(node, cst.FormattedString) and self._is_raised(node):
            return False
        for new, words in _changes(node):
            line = self.get_metadata(PositionProvider, node).start.line
            self.found.append((node, new, words, line))
        return True

    def _is_raised(self, node: cst.CSTNode) -> bool:
        """Return True for a text that is the message of an error."""
        at: cst.CSTNode | None = node
        while at is not None and not isinstance(at, (cst.Raise, cst.BaseCompoundStatement)):
            at = self.get_metadata(ParentNodeProvider, at, None)
        return isinstance(at, cst.Raise)


def _changes(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, str]]:
    """Yield replacements of a node, each with a description if its code would be too long."""
    for kind, operator in _OPERATORS:
        if isinstance(node, kind):
            yield from ((new, "") for new in operator(node))
    if isinstance(node, (cst.If, cst.While, cst.CompIf)):
        inside = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), inside)), "condition negated"
    if isinstance(node, cst.Call):
        for i, argument in enumerate(node.args):
            if argument.keyword is not None and not _is_assertion(argument):
                left = [*node.args[:i], *node.args[i + 1 :]]
                yield node.with_changes(args=left), f"{argument.keyword.value} left out"


def _is_assertion(node: cst.CSTNode) -> bool:
    """Return True for `strict=True` of a zip: it refuses what never occurs, so no test sees it."""
    return matchers.matches(node, matchers.Arg(keyword=matchers.Name("strict")))


def _code(module: cst.Module, node: cst.CSTNode) -> str:
    code = module.code_for_node(node)
    return " ".join(re.sub(r"^\s*#.*$", "", code, flags=re.MULTILINE).split())
