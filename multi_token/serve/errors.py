"""The error of the server: what went wrong, as an HTTP status and OpenAI's `error` object.

Border: it names kinds and cleans texts; who finds a fault writes its message. Nothing that a client
reads holds a path or an address of memory.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from multi_token.errors import MultiTokenError

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
    "timeout_error",
]

MAX_MESSAGE_CHARS = 300
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")
# a name with two slashes in it, one that begins with a slash, or one with a drive letter
_PATH = re.compile(r"(?<![\w:/])(?:~|\.{1,2})?/[\w.\-~+]+(?:/[\w.\-~+]*)*|\b[A-Za-z]:\\\S+")


class ServeError(MultiTokenError):
    """A request that is refused or fails. `message` is cleaned; the original stands in the log.

    `status`: of HTTP. `type`, `param`, `code`: as in OpenAI's error object. `retry_after`: seconds
    after which the same request may succeed, where that is known. `retry`: whether a client should
    try again by itself (`x-should-retry`); None leaves it to the client.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: ErrorType | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        retry: bool | None = None,
    ) -> None:
        self.message = sanitize(message)
        super().__init__(self.message)
        self.status = status
        self.type: ErrorType = type or _type_of(status)
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.retry = retry

    def as_json(self, error_id: str | None = None) -> dict[str, Any]:
        """OpenAI's object, with the id under which the log has the whole story."""
        fields: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": None if self.param is None else sanitize(self.param),
            "code": self.code,
        }
        if error_id is not None:
            fields["error_id"] = error_id
        return {"error": fields}


def _type_of(status: int) -> ErrorType:
    if status == 401:
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    if status == 429:
        return "rate_limit_error"
    if status in (408, 504):
        return "timeout_error"
    return "invalid_request_error" if status < 500 else "server_error"


def sanitize(text: str) -> str:
    """Printable ASCII of one line, at most 300 characters, without paths and addresses."""
    text = _ADDRESS.sub("(address)", text)
    text = _PATH.sub("(path)", text)
    text = "".join(c if " " <= c <= "~" else ("?" if c.isprintable() else " ") for c in text)
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 3] + "..."
