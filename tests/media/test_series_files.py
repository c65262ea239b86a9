"""media/series.py on files: the values are those that each format's own library reads."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyedflib
import pytest
import soundfile
import wfdb

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import source_stamp
from multi_token.modalities.timeseries import TimeseriesModality
from multi_token.testing.files import recordings

WFDB_NAMES = ["I", "aVR", "V 1"]
EDF_RATES = {"EEG Fpz-Cz": 256, "Resp": 100}


def series(**fields: Any) -> TimeseriesModality:
    return TimeseriesModality(**{"max_steps": 4000, **fields})


def load(source: Any, **fields: Any) -> np.ndarray:
    """The series; the header alone promises as many steps."""
    modality = series(**fields)
    found = modality.load(source, Fetch())
    assert modality.size_from_header(source, Fetch()) == len(found)
    return found


def refusal(source: Any, **fields: Any) -> str:
    with pytest.raises(MediaError) as caught:
        series(**fields).load(source, Fetch())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_edf(path: Path, kind: int) -> str:
    """Ten seconds of two channels with different rates and units, and an annotation."""
    writer = pyedflib.EdfWriter(str(path), 2, file_type=kind)
    high = 8_388_607 if path.suffix == ".bdf" else 32_767
    headers = []
    for (name, rate), unit in zip(EDF_RATES.items(), ("uV", "mV"), strict=True):
        head = {"label": name, "dimension": unit, "sample_frequency": rate, "transducer": ""}
        head |= {"physical_max": 300.0, "physical_min": -300.0, "prefilter": ""}
        headers.append({**head, "digital_max": high, "digital_min": -high - 1})
    writer.setSignalHeaders(headers)
    noise = np.random.default_rng(0)
    writer.writeSamples([noise.normal(size=10 * rate) * 50 for rate in EDF_RATES.values()])
    if kind != pyedflib.FILETYPE_EDF:
        writer.writeAnnotation(1.0, -1, "spindle")
    writer.close()
    return str(path)


@pytest.fixture(scope="module")
def edf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_edf(tmp_path_factory.mktemp("edf") / "a.edf", pyedflib.FILETYPE_EDFPLUS)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WFDB record of 101 steps in each format that wfdb writes, and in two that it only reads."""
    folder = tmp_path_factory.mktemp("wfdb")
    values = np.random.default_rng(0).normal(size=(101, 3)).cumsum(0)
    for kind in ("16", "24", "32", "80", "212"):
        wfdb.wrsamp(
            f"rec{kind}",
            fs=500,
            units=["mV", "mV", "uV"],
            sig_name=WFDB_NAMES,
            p_signal=values,
            fmt=[kind] * 3,
            write_dir=str(folder),
        )
    digits = np.fromfile(folder / "rec16.dat", "<i2")
    digits.astype(">i2").tofile(folder / "rec61.dat")
    (digits.astype("i4") + 32768).astype("<u2").tofile(folder / "rec160.dat")
    for kind in ("61", "160"):
        header = (folder / "rec16.hea").read_text()
        header = header.replace("rec16", f"rec{kind}").replace(".dat 16 ", f".dat {kind} ")
        (folder / f"rec{kind}.hea").write_text(header)
    return folder


@pytest.mark.parametrize("suffix", ["edf", "bdf"])
def test_edf_and_bdf_give_the_values_of_pyedflib(tmp_path: Path, suffix: str) -> None:
    kind = pyedflib.FILETYPE_EDFPLUS if suffix == "edf" else pyedflib.FILETYPE_BDFPLUS
    path = write_edf(tmp_path / f"a.{suffix}", kind)
    with pyedflib.EdfReader(path) as reader:
        theirs = [reader.readSignal(i).astype(np.float32) for i in range(2)]
    for place, name in enumerate(EDF_RATES):
        assert np.array_equal(load(path, channel_names=[name])[:, 0], theirs[place])
    part = load({"path": path, "start": 2.5, "end": 3.25}, channel_names=["Resp"])
    assert np.array_equal(part[:, 0], theirs[1][250:325])
    assert load(path, channels=2, rate=50.0).shape == (500, 2), "each channel is resampled"


def test_an_edf_without_annotations_and_one_that_was_not_stopped_are_read(tmp_path: Path) -> None:
    path = Path(write_edf(tmp_path / "a.edf", pyedflib.FILETYPE_EDF))
    whole = load(str(path), channels=2, rate=100.0)
    data = bytearray(path.read_bytes())
    data[236:244] = b"-1      "  # the number of data records
    assert np.array_equal(load(bytes(data), channels=2, rate=100.0), whole)


def test_channels_of_different_rates_need_a_rate_or_a_choice(edf: str) -> None:
    said = refusal(edf, channels=2)
    assert "the channels EEG Fpz-Cz and Resp" in said and "256 and 100 steps a second" in said
    assert "set `rate` in the recipe" in said


def test_a_missing_channel_is_refused_with_the_nearest_name(edf: str) -> None:
    assert "no channel 'EEG Fpz-Pz': did you mean 'EEG Fpz-Cz'?" in refusal(
        edf, channel_names=["EEG Fpz-Pz"]
    )
    assert load(edf, channel_names=["eeg fpz-cz"]).shape == (2560, 1)


def test_units_are_scaled_to_that_of_the_recipe_or_refused(edf: str) -> None:
    given = load(edf, channel_names=["Resp"])
    micro = load(edf, channel_names=["Resp"], unit="uV")
    np.testing.assert_allclose(micro, 1000 * given, rtol=1e-6)
    assert "channel Resp of" in (said := refusal(edf, channel_names=["Resp"], unit="mmHg"))
    assert "is in mV, and the recipe says `unit: mmHg`" in said


def test_a_rate_that_contradicts_the_file_is_refused(edf: str) -> None:
    source = {"path": edf, "sampling_rate": 200}
    assert "256 steps a second, and the row says 200" in refusal(
        source, channel_names=["EEG Fpz-Cz"]
    )


@pytest.mark.parametrize("kind", ["16", "24", "32", "61", "80", "160", "212"])
def test_wfdb_records_give_the_values_of_wfdb(records: Path, kind: str) -> None:
    name = str(records / f"rec{kind}")
    theirs = wfdb.rdrecord(name).p_signal.astype(np.float32)
    for source in (name, f"{name}.hea", f"{name}.dat"):
        assert np.array_equal(load(source, channels=3), theirs)
    part = {"path": name, "start": 0.01, "end": 0.05}
    assert np.array_equal(load(part, channel_names=["V 1", "I"]), theirs[5:25, [2, 0]])
    header, samples = (Path(f"{name}.{suffix}").read_bytes() for suffix in ("hea", "dat"))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"folder/rec{kind}.hea", header)
        archive.writestr(f"folder/rec{kind}.dat", samples)
    assert np.array_equal(load(file.getvalue(), channels=3), theirs)
    assert "send a ZIP archive of its .hea and .dat" in refusal(header, channels=3)


def test_a_wfdb_header_opens_only_files_beside_it(records: Path, tmp_path: Path) -> None:
    header = (records / "rec16.hea").read_text()
    for outside in ("../rec16.dat", "/etc/passwd", "a/b.dat"):
        (tmp_path / "rec.hea").write_text(header.replace("rec16.dat", outside))
        assert "which is not beside it" in refusal(str(tmp_path / "rec"), channels=3)
    (tmp_path / "rec.hea").write_text(header)
    assert "no file at" in refusal(str(tmp_path / "rec"), channels=3)


def test_a_wfdb_header_with_impossible_numbers_is_refused(records: Path, tmp_path: Path) -> None:
    header = (records / "rec16.hea").read_text()
    (tmp_path / "rec16.dat").write_bytes((records / "rec16.dat").read_bytes())
    line = header.splitlines()[1]
    gain = line.split()[2]
    for old, new in (
        ("rec16 3 500 101", "rec16 3 5e 101"),
        ("rec16 3 500 101", "rec16 3 0 101"),
        ("rec16 3 500 101", "rec16 3 500 102"),
        ("rec16 3 500 101", "rec16/4 3 500 101"),
        ("rec16 3 500 101", "rec16 9 500 101"),
        (gain, f"{gain.split('(')[0]}({'9' * 400})/mV"),
        (gain, "e(0)/mV"),
        (gain, "1e999(0)/mV"),
        ("rec16.dat 16 ", "rec16.dat 516 "),
        ("rec16.dat 16 ", "rec16.dat 16:5 "),
        ("rec16.dat 16 ", "rec16.dat 16+1 "),
    ):
        assert old in header
        (tmp_path / "rec16.hea").write_text(header.replace(old, new, 1))
        refusal(str(tmp_path / "rec16"), channels=3)


@pytest.mark.parametrize("changed", ["rec16.hea", "rec16.dat"])
def test_what_was_kept_of_a_record_is_not_used_after_a_change_of_any_of_its_files(
    records: Path, changed: str
) -> None:
    names = ("rec16", "rec16.hea", "rec16.dat")
    sources = [str(records / name) for name in names]
    sources += [{"path": "rec16", "sampling_rate": 250}, {"path": "rec16.hea"}]
    fetch = Fetch(root=str(records))
    before = [source_stamp(source, fetch) for source in sources]
    assert before == [source_stamp(source, fetch) for source in sources]
    os.utime(records / changed, ns=(1, 1))
    for source, stamp in zip(sources, before, strict=True):
        assert source_stamp(source, fetch) != stamp


def test_the_stamp_of_a_record_at_an_address_downloads_nothing() -> None:
    address = "https://127.0.0.1:9/rec16.hea"
    assert source_stamp(address, Fetch()) == [address]
    assert source_stamp("M" * 5000, Fetch()) == ["M" * 5000]


def test_a_wav_gives_its_channels_unmixed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (1000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", values, 500, subtype="FLOAT")
    path = str(tmp_path / "a.wav")
    assert np.array_equal(load(path, channels=2), values)
    assert np.array_equal(load({"path": path, "start": 1}, channels=2), values[500:])
    assert "has 2 channels" in refusal(path, channels=1)


@pytest.mark.parametrize(
    "file", ["comma.csv", "semicolon.csv", "tab.tsv", "plain.parquet", "groups.parquet"]
)
def test_tables_give_the_columns_that_pandas_wrote(tmp_path: Path, file: str) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    table = pd.DataFrame(values, columns=["time", "x, m", "y"])
    path = tmp_path / file
    if file == "comma.csv":
        table.to_csv(path, index=False)
    elif file == "semicolon.csv":
        table.to_csv(path, index=False, sep=";", decimal=",")
    elif file == "tab.tsv":
        table.to_csv(path, index=False, sep="\t")
    else:
        table.to_parquet(path, row_group_size=7 if file == "groups.parquet" else None)
    expected = values[:, [2, 1]].astype(np.float32)
    chosen = {"channel_names": ["y", "x, m"]}
    assert np.array_equal(load(str(path), **chosen), expected)
    part = {"path": str(path), "sampling_rate": 10, "start": 1, "end": 2.5}
    assert np.array_equal(load(part, **chosen), expected[10:25])
    assert "has 3 channels (time, x, m, y)" in refusal(str(path), channels=2)
    assert "its rate is unknown; give `sampling_rate`" in refusal(
        {"path": str(path), "start": 1}, **chosen
    )


def test_a_table_without_names_is_read_by_place_and_a_bad_cell_is_named() -> None:
    assert load(b"1,2\n3,4\n\n5,6\n", channels=2).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert load(b"1\n2\n3\n", channels=1).tolist() == [[1], [2], [3]]
    assert "row 1, column 2" in refusal(b"x,y\n1,2\n3,fast\n", channels=2)
    assert "is no table of numbers" in refusal(b"x,y\n1,2\n3,\n", channels=2)
    assert "holds nan at step 1" in refusal(b"x,y\n1,2\n3,nan\n", channels=2)
    said = refusal(b"\x00\x01\x02 not a text", channels=2)
    assert "expected .npy, CSV (UTF-8), Parquet, EDF" in said


def test_a_part_of_an_array_is_read_without_the_rest(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    for order in ("C", "F"):
        np.save(tmp_path / "a.npy", np.asarray(values, order=order))  # type: ignore[arg-type]
        source = {"path": str(tmp_path / "a.npy"), "sampling_rate": 100, "start": 1, "end": 2}
        few = Fetch(max_bytes=1000)  # less than the file: only the part counts
        assert np.array_equal(series(channels=2).load(source, few), values[100:200])
        assert len(load(source, channels=2, rate=50.0)) == 50
    for wrong in ({"start": 4}, {"end": 9}, {"start": 2, "end": 1}, {"start": -1}):
        refusal({**source, "end": None, "start": None, **wrong}, channels=2)


def test_a_second_of_a_recording_of_gigabytes_is_read_without_the_rest(tmp_path: Path) -> None:
    """Sparse files: their gigabytes of zeros take no disk, and are over the limit of bytes."""
    whole = recordings()
    num_records = 40_000_000  # of one second and 200 bytes
    edf = bytearray(whole["edf"][:768])
    edf[236:244] = f"{num_records:<8}".encode()
    with zipfile.ZipFile(io.BytesIO(whole["zip"])) as archive:
        header = archive.read("a.hea").decode()
    (tmp_path / "a.hea").write_text(header.replace("a 2 100 100", "a 2 100 2000000000"))
    for name, start, size in (
        ("a.edf", bytes(edf), 768 + 200 * num_records),
        ("a.dat", b"", 8_000_000_000),
    ):
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(size)
    few = Fetch(max_bytes=10_000)
    for name, rate in (("a.edf", 50), ("a", 100)):
        source = {"path": str(tmp_path / name), "start": 12_345_678, "end": 12_345_679}
        modality = series(channels=2)
        assert modality.size_from_header(source, few) == rate
        assert not modality.load(source, few).any()


def test_a_rate_that_falls_is_filtered_first() -> None:
    """A tone above half the new rate would become a tone that was never there."""
    time, new = np.arange(5000) / 500, np.arange(1000) / 100
    slow, fast = (np.sin(2 * np.pi * hertz * time) for hertz in (10, 180))
    given = {"array": 3 + np.stack([slow, fast], axis=1), "sampling_rate": 500}
    found = load(given, channels=2, rate=100.0, max_steps=5000) - 3
    expected = np.sin(2 * np.pi * 10 * new)
    assert np.abs(found[:, 0] - expected).max() < 1e-3
    assert np.abs(found[50:-50, 1]).max() < 1e-3
    assert np.abs(np.interp(new, time, fast)).max() > 0.5, "interpolation alone folds it"
    constant = load({"array": [[7.0]] * 999, "sampling_rate": 97}, channels=1, rate=13.0)
    np.testing.assert_allclose(constant, 7.0, rtol=1e-6)


def test_a_claimed_rate_costs_no_memory() -> None:
    assert len(load({"array": [[1.0], [2.0]], "sampling_rate": 1e12}, channels=1, rate=1.0)) == 1


def test_damaged_recordings_are_refused_with_one_sentence(edf: str, records: Path) -> None:
    chance = np.random.default_rng(0)
    table = io.BytesIO()
    pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}).to_parquet(table)
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros((50, 2)), 100, format="WAV")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for suffix in ("hea", "dat"):
            file.write(records / f"rec212.{suffix}", f"rec212.{suffix}")
    whole = [Path(edf).read_bytes(), table.getvalue(), sound.getvalue(), archive.getvalue()]
    for data in whole:
        assert "\n" not in refusal(data[: len(data) // 2], channels=2, rate=50.0)
        for _ in range(150):
            damaged = bytearray(data)
            for at in chance.integers(0, min(len(data), 700), 3):
                damaged[at] = chance.integers(256)
            modality = series(channels=2, rate=50.0)
            for read in (modality.load, modality.size_from_header):
                try:
                    read(bytes(damaged), Fetch())
                except MediaError as error:
                    assert "\n" not in str(error)
