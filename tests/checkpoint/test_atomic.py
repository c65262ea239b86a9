"""checkpoint/atomic.py: a file or folder is the old one or the new one, with the user's rights."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from multi_token.checkpoint.atomic import atomic_file, atomic_folder


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_and_folders_have_the_rights_that_the_umask_leaves(
    tmp_path: Path, umask: int
) -> None:
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_an_error_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    for write in (atomic_file, atomic_folder):
        name = "file" if write is atomic_file else "folder"
        with pytest.raises(ValueError, match="half"), write(tmp_path / name):
            raise ValueError("half written")
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_no_moment_is_without_the_old_or_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    replace = Path.replace

    def crash_after_first(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", crash)
        return replace(self, target)

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash_after_first)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
    kept = [path.read_text() for path in tmp_path.glob(".folder.*/file")]
    assert kept == ["old"]
