"""A folder that appears whole or not at all.

Border: names and renames folders; it does not know what is written into them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multi_token.errors import ConvertError


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which becomes `out` at the end and vanishes after a fault.

    Raises ConvertError if something is at `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} is there already and not empty; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are their maker's alone
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
