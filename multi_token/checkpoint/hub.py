"""Local folder of a hub name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from multi_token.errors import CheckpointError
from multi_token.hub import hub_arguments, limited_hub_waits

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    only: Sequence[str] | None = None,
) -> Path:
    """The folder of a path, or of a hub name (`user/run`, `user/run@revision`) after its download.

    An existing folder wins over a repository of the same name. `only`: patterns of the files to
    download. A name that is neither is returned as a path, whose absence the caller reports.

    Raises CheckpointError for a download that fails or a revision of a folder.
    """
    # the text as typed, since Path makes user/run of ./user/run, which is a hub name
    path, text = Path(name), name if isinstance(name, str) else Path(name).as_posix()
    repository, at, named = text.partition("@")
    if path.exists() or not _NAME.fullmatch(repository) or (at and not named):
        if revision is not None:
            raise CheckpointError(
                f"a revision ({revision}) is for a hub name such as user/run, and {text} is "
                f"{'a folder' if path.exists() else 'none'}; leave the revision out"
            )
        return path
    if revision and named and revision != named:
        raise CheckpointError(f"{text} names another revision than {revision!r}; leave one out")
    from huggingface_hub import snapshot_download

    revision = revision or named or None
    try:
        with limited_hub_waits(repository, CheckpointError):
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=list(only) if only else None,
                    **hub_arguments(),
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
