"""Check that a foreign tokenizer can be loaded and that its template can be supervised."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from multi_token.chat.format import ChatFormat
from multi_token.errors import ChatTemplateError, ConvertError
from multi_token.types import Conversation, Message, Text

_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def check_tokenizer_packages(name: str) -> None:
    """Raise ConvertError for a SentencePiece tokenizer that this installation cannot read.

    transformers would say something about tiktoken instead.
    """
    folder = Path(name)
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return
    missing = [package for module, package in _PACKAGES.items() if not _is_installed(module)]
    if missing:
        raise ConvertError(
            f"the tokenizer of {name} is a SentencePiece model, and reading it needs "
            f"{' and '.join(missing)}: pip install 'multi_token[convert]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def check_maskable(chat: ChatFormat) -> None:
    """Raise ConvertError for a template whose answers cannot be told from the rest exactly."""
    turns = (Message("user", (Text("Hello"),)), Message("assistant", (Text("Good day"),)))
    try:
        chat.tokenize(Conversation(turns, id="a sample"), [])
    except ChatTemplateError as error:
        raise ConvertError(
            f"the language model's chat template cannot be used: {error}; give one with "
            "--chat-template FILE"
        ) from None
