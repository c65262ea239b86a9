"""docs/glossary.md holds: one term per concept, in names, docstrings, strings and docs."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("multi_token", "benchmarks", "deploy", "docs", "examples", "tests")
TEXTS = (".md", ".html", ".css", ".js", ".jinja", ".yaml", ".toml", "Makefile", "Dockerfile")

# Word -> the glossary's term. A word is between non-letters; `_` ends a word too.
NEVER = {
    r"senses?": "modality",
    r"keys? and values?": "KV cache",
    r"(?:no|not) numbers": "NaN or inf",
    r"anew": "again",
    r"so (?:many|much)": "N, or up to N",
    r"whoever|somebody|nobody|strangers?": "the client, the user, the request",
    r"behind": "after",
    r"mend(?:s|ed|ing)?": "fix",
    r"told": "reported, given, set",
    r"stands": "is",
    r"pictures?|films?": "image, video",
    r"blanked": "ablated",
    r"surrogates?": "media text",
    r"beginnings": "prefix",
    r"rooms?|the house": "package, module",
    r"unlearned|relearn(?:s|ed)?": "train",
    r"learn(?:s|ed) (?:tokens?|ids?|turns?|positions?|parameters?|parts?)": "supervised, trainable",
    r"what learns": "what is trained",
    r"made ready|come up|comes up|came up": "start",
}
PATTERN = re.compile(
    r"(?<![A-Za-z])(?:" + "|".join(f"({word})" for word in NEVER) + r")(?![A-Za-z])", re.IGNORECASE
)
TERMS = list(NEVER.values())

# Phrases of the field or of others in which such a word is right.
ALLOWED = re.compile(
    r"gives? any (?:Hugging Face )?language model new senses"  # the tagline
    r"|makes? (?:no )?sense|common sense|in (?:the|this) sense"
    r"|behind (?:a|the|your) (?:reverse )?prox(?:y|ies)"
    r"|in the house of|Which colour is behind it"  # sentences that examples train on
    r"|^USER nobody|lone surrogate"  # Docker; Unicode
    r"|[`\"]surrogates[`\"]"  # the old key of rows, which is answered with the new one
    # Seeds of random numbers: others would give other rows than those of the published results.
    r"|\"(?:held_out/|things/)?two_pictures\"|^f?\"?pictures/\{thing"
    # Questions of the golden records and their names.
    r"|\"(?:a|another|two) pictures?\"|\"two senses\"|\" in the picture \""
    r"|\"Is <vector> in the picture <image>\?\"|a picture of \{name\}"
    r"|This is a picture of a cat and a dog",  # the tiny tokenizer's text
    re.IGNORECASE,
)
OPENERS = re.compile(r"(?:What|Of|Whether|Who|Whose|Where)\b")

# Old names -> new, which have to be spelled; the glossary itself; and the history.
SPELL_OLD_NAMES = {
    "CHANGELOG.md",
    "docs/glossary.md",
    "docs/log.md",
    "multi_token/cli/__init__.py",
    "multi_token/recipe/renamed.py",
    "tests/recipe/test_renamed.py",
    "tests/test_words.py",
}
# Files of other projects.
FOREIGN = ("tests/templates/", "tests/reference/")


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    return [
        ROOT / name
        for name in listed.stdout.splitlines()
        if name.endswith(suffixes)
        and name not in SPELL_OLD_NAMES
        and not (name.startswith(FOREIGN) and not name.endswith(".py"))
        and ("/" not in name or name.startswith(tuple(f"{folder}/" for folder in FOLDERS)))
        and (ROOT / name).is_file()
    ]


def found_in(text: str) -> Iterator[tuple[str, str]]:
    """Words of a text that the glossary has another term for, with the term."""
    for match in PATTERN.finditer(ALLOWED.sub("", text)):
        yield match[0], TERMS[(match.lastindex or 1) - 1]


def faults_of_code(path: Path) -> Iterator[str]:
    """Names, strings (docstrings, help, errors) and comments of a Python file."""
    kinds = {tokenize.NAME, tokenize.STRING, tokenize.COMMENT}
    kinds |= {getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # f-strings since Python 3.12
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            words = token.string
            if token.type == tokenize.NAME:
                words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", words)
            for word, term in found_in(words):
                yield f"{path.relative_to(ROOT)}:{token.start[0]}: {word!r}: write {term}"


def test_code_uses_the_terms_of_the_glossary() -> None:
    faults = [fault for path in tracked(".py") for fault in faults_of_code(path)]
    assert not faults, f"{len(faults)} words\n" + "\n".join(faults)


def test_documents_use_the_terms_of_the_glossary() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{number}: {word!r}: write {term}"
        for path in tracked(*TEXTS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word, term in found_in(line)
    ]
    assert not faults, f"{len(faults)} words\n" + "\n".join(faults)


def test_docstrings_name_the_thing_first() -> None:
    """Docstrings of fields included: a string below an assignment."""
    faults = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.value.strip()[:60]}"
        for path in tracked(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and OPENERS.match(node.value.value.strip())
    ]
    assert not faults, f"{len(faults)} docstrings\n" + "\n".join(faults)


@pytest.mark.parametrize("word", NEVER)
def test_the_glossary_has_every_word_that_is_refused(word: str) -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    never = "\n".join(line.split("|")[-2] for line in lines if line.startswith("|"))
    assert re.search(rf"\b(?:{word})\b", never, re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A house of many rooms", ["rooms"]),
        ("new senses", ["senses"]),
        ("multi_token gives any language model new senses", []),
        ("that makes sense", []),
        ("no_such_sense", ["sense"]),
        ("essential, mendacious, filmed", []),
        (
            "keys and values that are no numbers, made anew",
            ["keys and values", "no numbers", "anew"],
        ),
        ("at most so many, so much", ["so many", "so much"]),
        ("whoever asks is told what stands behind it", ["whoever", "told", "stands", "behind"]),
        ("run behind a reverse proxy", []),
        ("strangers' pictures, mended", ["strangers", "pictures", "mended"]),
    ],
)
def test_words_are_found_where_they_are_words(text: str, words: list[str]) -> None:
    assert [word for word, _ in found_in(text)] == words
