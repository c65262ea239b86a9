"""ServeError: an HTTP status and OpenAI's error object.

Messages are cleaned before a client sees them: no paths, no memory addresses, one line of ASCII.
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

_TYPES: dict[int, ErrorType] = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
MAX_MESSAGE_CHARS = 300
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")
# A word that starts with /, ./, ../ or ~/, or with a drive letter. A slash inside of a word stays:
# and/or, image/png, org/model.
_PATH = re.compile(r"(?<![\w:/])(?:~|\.{1,2})?/[\w.\-~+]+(?:/[\w.\-~+]*)*|\b[A-Za-z]:\\\S+")


class ServeError(MultiTokenError):
    """A request is refused or fails. `message` is cleaned.

    `status`: HTTP status. `type`, `param`, `code`: fields of OpenAI's error object. `retry_after`:
    seconds until the same request may succeed, if known. `retry`: value of `x-should-retry`; None
    leaves the decision to the client.
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
        default: ErrorType = "invalid_request_error" if status < 500 else "server_error"
        self.type: ErrorType = type or _TYPES.get(status, default)
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.retry = retry

    def as_json(self, error_id: str | None = None) -> dict[str, Any]:
        """OpenAI's error object. `error_id`: id of the request in the access log."""
        fields: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": None if self.param is None else sanitize(self.param),
            "code": self.code,
        }
        if error_id is not None:
            fields["error_id"] = error_id
        return {"error": fields}


def sanitize(text: str) -> str:
    """Reduce a text to one line of printable ASCII, at most 300 characters, without paths."""
    text = _ADDRESS.sub("(address)", text)
    text = _PATH.sub("(path)", text)
    # ASCII only: control characters and bidirectional marks would forge lines in a log or terminal.
    text = "".join(c if " " <= c <= "~" else ("?" if c.isprintable() else " ") for c in text)
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 3] + "..."
