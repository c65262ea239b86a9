"""Media inside of archives: `root` of paths is a .zip, a .tar or a folder in one."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from PIL import Image

from multi_token.data.feature_cache.keys import item_key
from multi_token.data.files import unpack
from multi_token.data.files.unpack import open_root
from multi_token.errors import MediaError, MultiTokenError
from multi_token.media import archive
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import source_stamp
from multi_token.modalities.image import ImageModality
from multi_token.types import Media


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def png(width: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 2)).save(buffer, format="PNG")
    return buffer.getvalue()


FILES = {"a/1.png": png(), "a/ö.txt": "ö".encode() * 500, "b.bin": bytes(range(256)) * 40}


def pack(path: Path, files: dict[str, bytes] | None = None, compression: int = 0) -> str:
    files = FILES if files is None else files
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("a/", b"")
            for name, data in files.items():
                file.writestr(name, data)
        return str(path)
    kind: Any = "w:gz" if path.suffix == ".gz" else "w"
    with tarfile.open(path, kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}" if kind == "w" else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("name", ["stored.zip", "deflated.zip", "plain.tar", "packed.tar.gz"])
def test_media_paths_are_files_in_the_archive(tmp_path: Path, name: str) -> None:
    root = pack(tmp_path / name, compression=8 if name == "deflated.zip" else 0)
    fetch = pickle.loads(pickle.dumps(Fetch(root=open_root(root))))  # noqa: S301
    for member, data in FILES.items():
        assert fetch.read(member) == data
        assert fetch.read(Path(member)) == fetch.read(f"./a/../{member}") == data
    with fetch.open("b.bin") as file:
        file.seek(-256, io.SEEK_END)
        assert file.read(10) == bytes(range(10)) and file.tell() == 256 * 39 + 10
        file.seek(5)
        assert file.read() == FILES["b.bin"][5:] and file.read() == b""
    assert Fetch(root=fetch.root).read("data:,x") == b"x"
    if name != "packed.tar.gz":
        assert fetch.local_path("b.bin") is None
        assert Fetch(root=open_root(f"{root}/a")).read("1.png") == FILES["a/1.png"]


def test_headers_stamps_and_keys_of_features_work_for_files_in_an_archive(tmp_path: Path) -> None:
    root = pack(tmp_path / "images.zip")
    fetch = Fetch(root=open_root(root))
    image = ImageModality(encoder="none")
    assert image.size_from_header("a/1.png", fetch) == (3, 2)
    stamp, key = (
        source_stamp("a/1.png", fetch),
        item_key(Media("image", "a/1.png"), image, fetch, ""),
    )
    assert stamp[1:] and stamp[-1] == "a/1.png"
    assert key != item_key(Media("image", "a/1.png"), image, Fetch(root=str(tmp_path)), "")
    pack(tmp_path / "images.zip", {"a/1.png": png(40), "more": bytes(999)})
    assert source_stamp("a/1.png", fetch) != stamp
    assert image.size_from_header("a/1.png", fetch) == (40, 2), "a changed archive is read again"


@pytest.mark.parametrize("name", ["images.zip", "images.tar"])
def test_a_path_that_leaves_the_archive_or_is_not_in_it_is_refused(
    tmp_path: Path, name: str
) -> None:
    fetch = Fetch(root=open_root(pack(tmp_path / name)))
    for source in ("../secret", "/etc/passwd", "a/../../x"):
        with pytest.raises(MediaError, match="leads out of the archive"):
            fetch.read(source)
    with pytest.raises(MediaError, match=rf"no file c.png in .*{name}, which has 3 files, such as"):
        fetch.read("c.png")
    with pytest.raises(MediaError, match="b.bin in .* has 10,240 bytes or more, and the limit"):
        Fetch(root=fetch.root, max_bytes=10).read("b.bin")
    with pytest.raises(MediaError, match="not read here"):
        Fetch(root=fetch.root, allow_paths=False).read("b.bin")


def test_the_names_of_an_archive_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pack(tmp_path / "images.zip")
    open_root(root)
    assert (tmp_path / ".images.zip.index").is_file()

    def refuse(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(archive, "index_archive", refuse)
    monkeypatch.setattr(unpack, "index_archive", refuse)
    archive._open_archive.cache_clear()
    assert Fetch(root=open_root(root)).read("b.bin") == FILES["b.bin"]
    monkeypatch.undo()
    (tmp_path / ".images.zip.index").write_bytes(b"cut short")
    archive._open_archive.cache_clear()
    assert Fetch(root=root).read("b.bin") == FILES["b.bin"], "without an index, names are read"


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_an_archive_that_is_cut_short_is_one_sentence(tmp_path: Path, name: str) -> None:
    root = Path(pack(tmp_path / name))
    root.write_bytes(root.read_bytes()[: root.stat().st_size // 2])
    with pytest.raises(MultiTokenError, match=f"{name} cannot be (read|unpacked).* cut short"):
        open_root(str(root))


def test_a_damaged_file_in_an_archive_is_undecodable(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        root = Path(pack(tmp_path / f"{method}.zip", compression=method))
        data = bytearray(root.read_bytes())
        at = data.index(b"b.bin") + len(b"b.bin")
        data[at + 20] ^= 255
        root.write_bytes(bytes(data))
        with pytest.raises(MediaError, match=r"b.bin in .* is damaged or cut short"):
            Fetch(root=open_root(str(root))).read("b.bin")
    root = pack(tmp_path / "l.zip", compression=zipfile.ZIP_LZMA)
    with pytest.raises(MediaError, match="packed by method 14, expected a plain .zip"):
        Fetch(root=open_root(root)).read("b.bin")


def test_compressed_tars_are_unpacked_once_and_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "_LARGE", 0)
    for i in (1, 2):
        pack(tmp_path / f"videos_{i}.tar.gz", {f"{i}.mp4": bytes([i])})
    root = open_root(str(tmp_path / "videos_*.tar.gz"))
    assert [Fetch(root=root).read(f"{i}.mp4") for i in (1, 2)] == [b"\1", b"\2"]
    said = "".join(capsys.readouterr().err.split())
    assert f"2archivesasvideos_1.tar.gzisunpackedonceinto{tmp_path}/cache/multi_token_unp" in said
    inode = (Path(root) / "1.mp4").stat().st_ino
    assert (Path(open_root(str(tmp_path / "videos_*.tar.gz"))) / "1.mp4").stat().st_ino == inode
    with pytest.raises(
        MultiTokenError, match=r"evil.tar.gz has a member outside of its own folder"
    ):
        open_root(pack(tmp_path / "evil.tar.gz", {"../../evil": b""}))
    assert not list(tmp_path.rglob("evil"))
    with pytest.raises(MultiTokenError, match="no folder or archive at .*none.zip, which `root`"):
        open_root(str(tmp_path / "none.zip"))
