"""Local folder of a hub name, and a limit on the wait for a hub that stops answering."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multi_token.errors import CheckpointError

HUB_WAIT_S = 60.0
"""Longest wait for the next bytes of the hub."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def limit_hub_waits(seconds: float = HUB_WAIT_S) -> None:
    """Limit each wait of this process for the hub; huggingface_hub waits without end by default.

    The limit is set in the client that huggingface_hub, transformers and datasets share. Requests
    with a limit of their own keep it.
    """
    from huggingface_hub import get_session

    session = get_session()
    if getattr(session, "multi_token_waits_s", None) == seconds:
        return

    def limit(request: Any) -> None:
        # here, since huggingface_hub passes `timeout=None` with most requests
        given = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: given.get(kind) or seconds for kind in kinds}

    hooks = session.event_hooks
    hooks["request"].append(limit)
    session.event_hooks = hooks
    session.multi_token_waits_s = seconds  # type: ignore[attr-defined]


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

    limit_hub_waits()
    revision = revision or named or None
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
