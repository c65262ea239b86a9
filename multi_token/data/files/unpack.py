"""Compressed files, unpacked once into the cache: rows and media then have random access."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from multi_token.checkpoint.atomic import atomic_folder, lock_file
from multi_token.data.files.index import cache_folder
from multi_token.data.parallel import pass_console, progress_bar
from multi_token.errors import MultiTokenError
from multi_token.media.hashing import digest

PACKED = {".gz": "gzip", ".zst": "zstd"}
"""Suffix of a compressed file -> its name in Arrow."""
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
