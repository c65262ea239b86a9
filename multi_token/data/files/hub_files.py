"""Single files of a repository on the hub: rows in a file, and archives of media beside it."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from multi_token.data.files.unpack import open_root
from multi_token.data.parallel import pass_console
from multi_token.errors import MultiTokenError, first_line
from multi_token.hub import is_of_the_hub, limited_hub_waits

HUB_PREFIX = "hf://"
_FILE = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)")
_ARCHIVE = re.compile(r"\.(zip|tar|tgz|tar\.(gz|bz2|xz))$", re.IGNORECASE)


class HubFiles(NamedTuple):
    """Files of a data set's repository: `hf://owner/name@revision/folder/*.json`."""

    repository: str
    revision: str | None
    pattern: str

    @classmethod
    def of(cls, source: str) -> HubFiles:
        """Split a source. Raises MultiTokenError."""
        match = _FILE.fullmatch(source)
        if match is None:
            raise MultiTokenError(f"expected hf://owner/name/file, got {source}")
        return cls(*match.groups())

    def download(self) -> list[Path]:
        """Download the files, unless the hub's cache has them. Raises MultiTokenError."""
        folder = self._snapshot([self.pattern])
        # by pattern, as the hub chooses them, where a * matches a / as well
        files = [file for file in folder.rglob("*") if file.is_file()]
        found = [f for f in files if fnmatch(f.relative_to(folder).as_posix(), self.pattern)]
        if not found:
            names = ", ".join(self.names()[:20])
            raise MultiTokenError(
                f"{self.repository} on the hub has no file {self.pattern}; its files are {names}"
            )
        return sorted(found)

    def names(self) -> list[str]:
        """List the files of the repository; without a network, those in the hub's cache."""
        from huggingface_hub import HfApi

        try:
            with limited_hub_waits(self.repository):
                names = HfApi().list_repo_files(
                    self.repository, repo_type="dataset", revision=self.revision
                )
        except Exception as fault:
            # A hub that answers may refuse (no access, no such repository): the files of an earlier
            # day in the cache are not what was asked for.
            if not is_of_the_hub(fault):
                if isinstance(fault, (OSError, ValueError)):
                    raise self._not_fetched(fault) from None
                raise
            folder = self._snapshot([])
            names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
            pass_console().print(
                f"the hub does not answer ({first_line(fault)}): files of {self.repository} are "
                f"the {len(names)} in this machine's cache",
                highlight=False,
            )
        return sorted(name for name in names if not PurePosixPath(name).name.startswith("."))

    def media_root(self) -> str:
        """Return the root of the media of these rows: the archives beside them, or their folder.

        One archive, or several compressed tars, which are parts of one folder. Those in the folder
        of the rows come first. Raises MultiTokenError where `root` must say which one.
        """
        archives = [name for name in self.names() if _ARCHIVE.search(name)]
        folder = PurePosixPath(self.pattern).parent
        beside = [name for name in archives if PurePosixPath(name).parent == folder]
        archives = beside or archives
        if not archives:
            return str(self.download()[0].parent)
        are_plain = [name.lower().endswith((".zip", ".tar")) for name in archives]
        if len(archives) > 1 and any(are_plain):
            raise MultiTokenError(
                f"{self.repository} on the hub has the archives {', '.join(archives[:10])}; name "
                f"the one with the media, such as root: {self._url(archives[0])}"
            )
        pass_console().print(
            f"media of {self._url(self.pattern)} are read from {', '.join(archives)}; `root` names "
            "another place",
            highlight=False,
        )
        return open_root([file for name in archives for file in self._at(name).download()])

    def _at(self, pattern: str) -> HubFiles:
        return self._replace(pattern=pattern)

    def _url(self, name: str) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB_PREFIX}{self.repository}{revision}/{name}"

    def _snapshot(self, patterns: list[str]) -> Path:
        """Return the folder of the repository in the hub's cache, with the files of patterns."""
        from huggingface_hub import snapshot_download

        try:
            with limited_hub_waits(self.repository):
                return Path(
                    snapshot_download(
                        self.repository,
                        repo_type="dataset",
                        revision=self.revision,
                        allow_patterns=patterns,
                    )
                )
        except (OSError, ValueError) as error:
            raise self._not_fetched(error) from None

    def _not_fetched(self, error: Exception) -> MultiTokenError:
        return MultiTokenError(
            f"the data set {self.repository} could not be fetched from the hub: {first_line(error)}"
        )


def media_root_of(root: str) -> str:
    """Prepare the `root` of a source: a folder or archive here, or archives on the hub.

    Raises MultiTokenError: nothing is there, or an archive cannot be read.
    """
    if not root.startswith(HUB_PREFIX):
        return open_root(root)
    inside = re.match(r"(.+?\.(?:zip|tar))/(.+)", root, re.IGNORECASE)
    files = HubFiles.of(inside[1] if inside else root).download()
    return open_root(files) + (f"/{inside[2]}" if inside else "")
