"""A hub name becomes a folder on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from multi_token.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    only: Sequence[str] | None = None,
) -> Path:
    """A folder, or a hub name (`user/run`, `user/run@revision`) -> the folder it is or becomes.

    A folder that is there wins over a repository of the same name. `only`: patterns of the files to
    fetch. What is neither is handed back as it came, for the caller to say what it expected there.

    Raises CheckpointError.
    """
    # as it was typed: Path would make user/run of ./user/run
    path, text = Path(name), name if isinstance(name, str) else Path(name).as_posix()
    repository, at, named = text.partition("@")
    if path.exists() or not _NAME.fullmatch(repository) or (at and not named):
        if revision is not None:
            raise CheckpointError(
                f"a revision ({revision}) belongs to a hub name such as user/run, and {text} is "
                f"{'a folder here' if path.exists() else 'none'}"
            )
        return path
    if revision and named and revision != named:
        raise CheckpointError(f"{text} names one revision, and {revision!r} is another")
    return _download(repository, revision or named or None, only)


def _download(repository: str, revision: str | None, only: Sequence[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(only) if only else None
            )
        )
    except (OSError, ValueError) as error:
        # the hub's errors of a missing repository, revision, permission or network are OSErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"there is no folder {repository} here, and the hub's repository of that name{at} "
            f"could not be fetched: {reason}"
        ) from None
