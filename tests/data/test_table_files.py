"""Tables by index: .csv, .tsv, Arrow, compressed texts and arrays of vectors with labels."""

from __future__ import annotations

import gzip
import multiprocessing
import pickle
import time
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow
import pytest
from pyarrow import feather

from multi_token.data.files import csv as csv_rows
from multi_token.data.files.arrow import ArrowRows
from multi_token.data.files.index import stored_index
from multi_token.data.files.open import load_rows
from multi_token.data.row_stream import open_stream
from multi_token.errors import MultiTokenError, RowError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


PTB_XL = (
    "ecg_id,age,report,scp_codes,filename_hr,strat_fold\r\n"
    '1,56.0,"sinusrhythmus, ok","{\'NORM\': 100.0}",records500/00000/00001_hr,3\r\n'
    '2,,"zwei\r\nZeilen ""hier""",{},records500/00000/00002_hr,10\r\n'
)


def test_a_csv_file_gives_rows_with_quoted_line_breaks_and_numbers(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "ptbxl.csv", b"\xef\xbb\xbf" + PTB_XL.encode()))
    assert list(rows) == [
        {
            "ecg_id": 1,
            "age": 56.0,
            "report": "sinusrhythmus, ok",
            "scp_codes": "{'NORM': 100.0}",
            "filename_hr": "records500/00000/00001_hr",
            "strat_fold": 3,
        },
        {
            "ecg_id": 2,
            "age": None,
            "report": 'zwei\r\nZeilen "hier"',
            "scp_codes": "{}",
            "filename_hr": "records500/00000/00002_hr",
            "strat_fold": 10,
        },
    ]
    assert rows[-1]["ecg_id"] == 2
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)  # noqa: S301 - a data worker's copy


def test_a_column_is_numbers_only_if_writing_them_gives_the_same_letters(tmp_path: Path) -> None:
    text = "a,b,c,d,e\n007,0.10,1,1.5,nan\n8,2,x,2,1.0\n"
    rows = load_rows(write(tmp_path / "t.csv", text))
    assert rows[0] == {"a": "007", "b": "0.10", "c": "1", "d": 1.5, "e": "nan"}
    assert rows[1] == {"a": "8", "b": "2", "c": "x", "d": 2, "e": "1.0"}


def test_a_tsv_file_of_common_voice_keeps_its_quotes(tmp_path: Path) -> None:
    text = 'path\tsentence\na.mp3\t"Hello, he said\n\nb.mp3\tIt is 5" wide\nc.mp3\tBye"\n'
    rows = load_rows(write(tmp_path / "train.tsv", text))
    assert [row["sentence"] for row in rows] == ['"Hello, he said', 'It is 5" wide', 'Bye"']
    rows = load_rows(write(tmp_path / "quoted.tsv", 'path\tsentence\na.mp3\t"two\nlines"\n'))
    assert [row["sentence"] for row in rows] == ["two\nlines"]


def test_an_open_quote_of_a_tsv_file_does_not_swallow_the_rows_after_it(tmp_path: Path) -> None:
    sentences = ['"Hello he said', "middle", 'bye"', "x"]
    lines = [f"{i}.mp3\t{sentence}\t2\n" for i, sentence in enumerate(sentences)]
    rows = load_rows(write(tmp_path / "train.tsv", "path\tsentence\tup\n" + "".join(lines)))
    assert [row["sentence"] for row in rows] == sentences
    text = 'path\tsentence\na.mp3\t"a\ttab"\nb.mp3\t"and\nlines"\n'
    rows = load_rows(write(tmp_path / "quoted.tsv", text))
    assert [row["sentence"] for row in rows] == ["a\ttab", "and\nlines"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("semicolons.csv", "a;b\n1;2\n", "line 1 of .*semicolons.csv has no comma, but a semi"),
        ("tabs.csv", "a\tb\n1\t2\n", "no comma, but a tab: .*, or name the file .tsv"),
        ("commas.tsv", "a,b\n1,2\n", "has no tab, but a comma"),
        ("numbers.csv", "1,2\n3,4\n", "line 1 of .*: '1' is no name; write a name for each"),
        ("names.csv", "a.jpg,A cat\nb.jpg,A dog\n", "'a.jpg' is no name; write a name for each"),
        ("double.csv", "a,a\n3,4\n", "'a' is there twice"),
        ("empty.csv", "", "is empty; write the names of the columns"),
        ("utf16.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        ("latin.csv", "größe,b\n1,2\n".encode("latin-1"), "line 1 of .* is not UTF-8"),
        ("quote.csv", 'a,b\n1,2\n3,"4\n5,6\n', "line 3 of .*quote.csv begins a record that is not"),
    ],
)
def test_a_file_of_another_form_is_one_sentence(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(MultiTokenError, match=message):
        load_rows(write(tmp_path / name, text))


def test_a_ragged_or_badly_encoded_record_is_a_bad_row_with_its_line(tmp_path: Path) -> None:
    text = 'a,b\n1,"x\ny"\n1,2,3\n5,gr\xfcn\n6,7\n'.encode("latin-1")
    rows = load_rows(write(tmp_path / "t.csv", text))
    assert rows[3] == {"a": 6, "b": "7"}
    with pytest.raises(RowError, match="line 4 of .*t.csv has 3 fields, but line 1 names 2") as bad:
        rows[1]
    assert (bad.value.kind, bad.value.row_id) == ("format", "t.csv[1]")
    with pytest.raises(RowError, match=r"line 5 of .*t.csv is not UTF-8 \(byte 0xfc\)"):
        rows[2]


def test_the_index_of_a_large_csv_file_is_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_rows, "_LARGE", 1)
    file = write(tmp_path / "ptbxl.csv", PTB_XL)
    first = list(load_rows(file))
    scans: list[Path] = []
    scan = csv_rows.CsvRows._scan
    monkeypatch.setattr(
        csv_rows.CsvRows, "_scan", lambda rows, path, q: scans.append(path) or scan(rows, path, q)
    )
    assert list(load_rows(file)) == first and not scans
    write(tmp_path / "ptbxl.csv", PTB_XL + "3,1.0,a,b,c,1\n")
    assert len(load_rows(file)) == 3 and scans


def test_processes_that_start_together_build_one_index(tmp_path: Path) -> None:
    file, built = Path(write(tmp_path / "a.csv", "a\n1\n")), tmp_path / "built"

    def build(path: Path) -> dict[str, np.ndarray]:
        with built.open("a") as out:
            out.write("x")
        time.sleep(0.2)
        return {"starts": np.arange(3)}

    def start() -> None:
        assert stored_index(file, "test", build)["starts"].tolist() == [0, 1, 2]

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert built.read_text() == "x"


def arrow(path: Path, **options: Any) -> str:
    table = pyarrow.table({"number": range(10), "text": [f"t{i}" for i in range(10)]})
    if path.suffix == ".feather":
        feather.write_feather(table, path, chunksize=3, **options)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table, max_chunksize=3)
    return str(path)


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "packed.feather"])
def test_arrow_files_of_both_formats_give_rows(tmp_path: Path, name: str) -> None:
    packed = "lz4" if name.startswith("packed") else "uncompressed"
    file = arrow(tmp_path / name, **({"compression": packed} if "feather" in name else {}))
    rows, stream = load_rows(file), open_stream(file)
    for index in (7, 0, 9, 3):
        assert rows[index] == stream.row(index).row == {"number": index, "text": f"t{index}"}
    assert len(rows) == 10
    shard = pickle.loads(pickle.dumps(ArrowRows(Path(file))))  # noqa: S301 - a data worker's copy
    assert shard[8]["number"] == 8
    assert shard.is_mapped == (packed == "uncompressed")


@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_an_arrow_file_that_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    file = Path(arrow(tmp_path / name))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(MultiTokenError, match="cannot be read as Arrow"):
        load_rows(str(file))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.tsv.zst"])
def test_a_compressed_text_is_unpacked_once_into_the_cache(tmp_path: Path, name: str) -> None:
    text = b'{"a": 1}\n' if ".jsonl" in name else b"a\n1\n"
    if name.endswith(".gz"):
        packed = gzip.compress(text)
    else:
        packed = pyarrow.compress(text, codec="zstd", asbytes=True)
    file = write(tmp_path / name, packed)
    assert list(load_rows(file)) == [{"a": 1}] == [open_stream(file).row(0).row]
    (copy,) = (tmp_path / "cache").rglob("rows.*")
    copy.write_bytes(copy.read_bytes().replace(b"1", b"2"))
    assert list(load_rows(file)) == [{"a": 2}], "the copy is read again, not the packed file"
    file = write(tmp_path / name, packed[: len(packed) // 2])
    with pytest.raises(MultiTokenError, match=f"{name} cannot be unpacked .* cut short"):
        load_rows(file)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_an_array_of_vectors_has_the_labels_of_a_file_beside_it(
    tmp_path: Path, suffix: str
) -> None:
    np.save(tmp_path / "v.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    lines = {
        ".csv": "label,n\ncat,1\ndog,2\ncow,3\n",
        ".jsonl": '{"label": "cat"}\n{"label": "dog"}\n{"label": "cow"}\n',
        ".txt": "cat\ndog\ncow\n",
    }
    write(tmp_path / f"v{suffix}", lines[suffix])
    rows = pickle.loads(pickle.dumps(load_rows(str(tmp_path / "v.npy"))))  # noqa: S301
    assert [row["label"] for row in rows] == ["cat", "dog", "cow"]
    assert rows[1]["vector"].tolist() == [2.0, 3.0] and rows[1]["vector"].dtype == np.float32
    np.save(tmp_path / "v.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(MultiTokenError, match=rf"4 vectors, but v{suffix} beside it has 3 rows"):
        load_rows(str(tmp_path / "v.npy"))


def test_labels_of_vectors_end_at_line_breaks_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.zeros((4, 2)))
    labels = ["a\u2028b", "", "c\x0cd\x85", "größe"]
    for text in ("\n".join(labels), "\r\n".join([*labels, ""]), "\ufeff" + "\n".join(labels)):
        write(tmp_path / "v.txt", text)
        assert [row["label"] for row in load_rows(str(tmp_path / "v.npy"))] == labels
    write(tmp_path / "v.txt", "a\nb\ngröße\nd".encode("latin-1"))
    rows = load_rows(str(tmp_path / "v.npy"))
    assert rows[3]["label"] == "d"
    with pytest.raises(RowError, match=r"line 3 of .*v.txt is not UTF-8 \(byte 0xf6\)"):
        rows[2]


def test_an_array_of_another_shape_or_with_two_label_files_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.zeros(3))
    with pytest.raises(MultiTokenError, match=r"shape \[3\] and type float64, expected numbers of"):
        load_rows(str(tmp_path / "v.npy"))
    np.save(tmp_path / "v.npy", np.zeros((3, 2)))
    assert load_rows(str(tmp_path / "v.npy"))[2].keys() == {"vector"}
    for name in ("v.csv", "v.txt"):
        write(tmp_path / name, "a\n1\n2\n3\n")
    with pytest.raises(MultiTokenError, match="v.csv and v.txt beside it, expected one"):
        load_rows(str(tmp_path / "v.npy"))


def test_a_table_beside_files_of_rows_in_a_folder_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", '{"series": "a.csv"}\n')
    write(tmp_path / "a.csv", "t,v\n1,2\n")
    np.save(tmp_path / "b.npy", np.zeros((3, 2)))
    assert list(load_rows(str(tmp_path))) == [{"series": "a.csv"}]
    (tmp_path / "rows.jsonl").unlink()
    assert list(load_rows(str(tmp_path))) == [{"t": 1, "v": 2}]
