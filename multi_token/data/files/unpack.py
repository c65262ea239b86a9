"""Compressed files, unpacked once into the cache, and archives that media paths start from."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from multi_token.checkpoint.atomic import atomic_folder, lock_file
from multi_token.data.files.index import LARGE, stored_index
from multi_token.data.parallel import pass_console, progress_bar
from multi_token.errors import MultiTokenError
from multi_token.media.archive import (
    INDEX_KIND,
    Index,
    cache_folder,
    index_archive,
    split_archive,
)
from multi_token.media.hashing import digest

PACKED = {".gz": "gzip", ".zst": "zstd"}
"""Suffix of a compressed file -> its name in Arrow."""
_TAR = re.compile(r"\.(tgz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
"""End of the name of a compressed tar, as Python 3.11 reads it."""
_BLOCK = 1 << 20
_LARGE = 1 << 26
"""Bytes of a file that takes seconds to unpack."""


def unpacked_file(path: Path) -> Path:
    """Return the unpacked copy of `rows.jsonl.gz`, under the name without its last suffix.

    Raises MultiTokenError for a file that is damaged or cut short.
    """

    def unpack(folder: Path, step: Callable[[int], None]) -> None:
        import pyarrow

        with (folder / path.stem).open("wb") as out, path.open("rb") as raw:
            packed = pyarrow.CompressedInputStream(raw, PACKED[path.suffix.lower()])
            reported = 0
            while block := packed.read(_BLOCK):
                out.write(block)
                step(raw.tell() - reported)
                reported = raw.tell()

    return _unpack_once([path], unpack) / path.stem


def unpacked_tars(paths: Sequence[Path]) -> Path:
    """Return the folder with the files of compressed tars, such as `videos_1.tar.gz`.

    Raises MultiTokenError for a tar that is damaged, cut short, or has a member outside of it.
    """

    def unpack(folder: Path, step: Callable[[int], None]) -> None:
        for path in paths:
            with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
                reported = 0
                for member in tar:
                    # `data`: refuses absolute paths, paths with `..` and links that leave `folder`
                    tar.extract(member, folder, filter="data")
                    step(raw.tell() - reported)
                    reported = raw.tell()
                    # `tarfile` keeps an object for each header that it has read
                    tar.members = []  # type: ignore[attr-defined]

    return _unpack_once(paths, unpack)


def open_root(root: str | Sequence[Path]) -> str:
    """Prepare the root of media paths for `Fetch`.

    | `root`                             | media are read from                                   |
    |------------------------------------|-------------------------------------------------------|
    | a folder                           | the folder                                            |
    | `images.zip`, `images.tar`         | inside the archive, whose index is stored             |
    | `images.zip/train2017`             | a folder in the archive                               |
    | `videos.tar.gz`, `videos_*.tar.gz` | the cache of `datasets`, where they are unpacked once |

    Files that are known already may be given as paths.

    Raises MultiTokenError: nothing is there, or the archive cannot be read.
    """
    if isinstance(root, str):
        # not resolved: files in the hub's cache are links to files without a suffix
        where = os.path.abspath(os.path.expanduser(root))
        named = [Path(where)]
        files = named if named[0].exists() else sorted(map(Path, glob.glob(where)))
    else:
        files, where = list(root), str(root[0])
    if len(files) <= 1 and (found := split_archive(str(files[0]) if files else where)):
        stored_index(found[0], INDEX_KIND, _index_with_bar)
        return str(files[0]) if files else where
    if len(files) == 1 and files[0].is_dir():
        return str(files[0])
    if files and all(_TAR.search(file.name) for file in files):
        return str(unpacked_tars(files))
    raise MultiTokenError(
        f"no folder or archive at {where}, which `root` names; expected a folder, a .zip, a .tar, "
        "or one or more .tar.gz (.tgz, .tar.bz2, .tar.xz)"
    )


def _index_with_bar(path: Path) -> Index:
    size = path.stat().st_size
    console = pass_console(quiet=size < LARGE)
    try:
        with progress_bar(console, f"Reading names in {path.name} (bytes)", size) as step:
            return index_archive(path, step)
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise MultiTokenError(
            f"{path} cannot be read as an archive: {error}; it may be cut short, so copy it again"
        ) from error


def _unpack_once(
    paths: Sequence[Path], unpack: Callable[[Path, Callable[[int], None]], None]
) -> Path:
    """Return the folder with the content of these files; one process of the machine fills it."""
    paths = [path.resolve() for path in paths]
    stats = [path.stat() for path in paths]
    size = sum(stat.st_size for stat in stats)
    key = digest(
        *(f"{p}\0{s.st_size}\0{s.st_mtime_ns}".encode() for p, s in zip(paths, stats, strict=True))
    )
    folder = cache_folder("unpacked") / key
    if folder.is_dir():
        return folder
    name = paths[0].name if len(paths) == 1 else f"{len(paths)} archives as {paths[0].name}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            lock_file(lock, wait=True)
            if folder.is_dir():  # another process unpacked it meanwhile
                return folder
            console = pass_console(quiet=size < _LARGE)
            console.print(f"{name} is unpacked once into {folder}", highlight=False)
            bar = progress_bar(console, f"Unpacking {name} (bytes)", size)
            with bar as step, atomic_folder(folder) as partial:
                unpack(partial, step)
    except tarfile.FilterError as error:
        raise MultiTokenError(
            f"{name} has a member outside of its own folder ({error}); pack it again without"
        ) from error
    # gzip raises EOFError for a file that is cut short, zlib.error is no OSError
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise MultiTokenError(
            f"{paths[0] if len(paths) == 1 else name} cannot be unpacked into {folder.parent}: "
            f"{error}; it may be damaged or cut short, or the disk full"
        ) from error
    return folder
