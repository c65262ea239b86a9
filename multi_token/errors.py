"""Errors that multi_token raises on purpose.

MultiTokenError
|- RecipeError         a recipe with an unknown key, a wrong value or a conflict
|- RegistryError       an unknown, duplicate or broken modality or projector
|- RowError            a row that cannot become a sample: has `kind` and `row_id`
|- MediaError          a source that cannot be read or decoded: has `kind`
|- ChatTemplateError   a template that cannot be rendered or masked exactly
|- SpliceError         media embeddings and their positions disagree
|- LanguageModelError  a language model that cannot be loaded or lacks a capability
|- CheckpointError     a folder that is no checkpoint, or an incomplete one
|- ConvertError        a checkpoint that cannot be imported or exported
'- Interrupted         training was stopped by Ctrl-C, its state is saved
"""

from __future__ import annotations

import errno
from typing import Literal

RowKind = Literal[
    "format",  # the row has no accepted shape, an unknown role, no messages
    "item_count",  # more or fewer items than slots
    "missing_file",
    "undecodable",  # not an image, truncated, over the pixel limit, NaN in a vector
    "chat_template",  # the language model's template refuses the conversation
    "no_target",  # no supervised token
    "too_long",  # longer than max_tokens
]


class MultiTokenError(Exception):
    """Base class. The command line prints the message without a traceback and exits with 1."""


class RecipeError(MultiTokenError):
    """A recipe that cannot be used: the message names the key, and what to change."""


class RegistryError(MultiTokenError):
    """A name of no modality or projector, or of two."""


class MediaError(MultiTokenError):
    """A source that cannot be read or decoded.

    Args:
        message: One sentence: the item, what is wrong with it, and what to change.
        kind: `missing_file` if the bytes cannot be read; `undecodable` if they cannot be decoded,
            or are over a limit.
    """

    def __init__(self, message: str, kind: Literal["missing_file", "undecodable"]) -> None:
        super().__init__(message)
        self.kind: Literal["missing_file", "undecodable"] = kind

    def __reduce__(self) -> tuple[object, ...]:
        # Data workers pickle exceptions, and the default would drop the kind.
        return MediaError, (str(self), self.kind)


class RowError(MultiTokenError):
    """A row that cannot become a sample. The message begins with the row's id.

    Args:
        message: The fault and the remedy.
        kind: Kind of the fault, by which `data check` groups rows.
        row_id: The row's `id`, or its source and index.
    """

    def __init__(self, message: str, *, kind: RowKind, row_id: str) -> None:
        super().__init__(f"row {row_id}: {message}")
        self.kind: RowKind = kind
        self.row_id = row_id

    @property
    def sentence(self) -> str:
        """The message without its opening `row <id>: `."""
        return str(self).removeprefix(f"row {self.row_id}: ")

    def __reduce__(self) -> tuple[object, ...]:
        return _row_error, (str(self), self.kind, self.row_id)


def _row_error(message: str, kind: RowKind, row_id: str) -> RowError:
    error = RowError("", kind=kind, row_id=row_id)
    error.args = (message,)
    return error


class ChatTemplateError(MultiTokenError):
    """A chat template that cannot be rendered, or whose answers cannot be located exactly."""


class SpliceError(MultiTokenError):
    """Media embeddings and their positions disagree in number or width."""


class LanguageModelError(MultiTokenError):
    """A language model that cannot be loaded, or lacks a capability that the run needs."""


class CheckpointError(MultiTokenError):
    """A folder that is no checkpoint of multi_token, or an incomplete one."""


class ConvertError(MultiTokenError):
    """A checkpoint that cannot be mapped exactly from or to another format."""


class Interrupted(MultiTokenError):
    """Training was stopped by Ctrl-C or SIGTERM; its state is saved. The exit code is 130."""


_DEVICE_FAULTS = ("CUDA error", "CUDA driver error", "cuDNN error", "HIP error")
"""Prefixes of the messages by which torch reports a device that failed."""


def machine_fault(error: Exception) -> str | None:
    """Return a sentence on an error by which Python or torch reports a fault of the machine.

    That is a full disk, a device that failed, or a data worker that was killed. None: another
    error.
    """
    line = first_line(error)
    if isinstance(error, OSError):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return None
        return (
            f"{error.filename or 'the output'} could not be written: {error.strerror}; free some "
            "space on that disk, and start the same command again"
        )
    again = "Start the same command again; a run continues from its last complete checkpoint."
    # by name, since commands that need no torch must not import it
    if type(error).__name__ == "AcceleratorError" or line.startswith(_DEVICE_FAULTS):
        return (
            f"the device failed ({line}), and this process cannot use it any more. {again} If it "
            "fails again, CUDA_LAUNCH_BLOCKING=1 before the command makes torch name the operation"
        )
    if line.startswith("DataLoader worker (pid"):
        return (
            f"a data worker was killed ({line.strip(' .')}), as it happens when memory or /dev/shm "
            "is full; use fewer data workers (`train.args.dataloader_num_workers`, "
            f"`--num-workers`), or give them more memory. {again}"
        )
    return None


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, or its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
