"""modalities/volume.py: the same slices of a volume in any orientation and format."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import source_stamp
from multi_token.modalities.image import ImageModality
from multi_token.modalities.volume import VolumeModality
from multi_token.testing.encoders import tiny_image_encoder

SHAPE = (12, 10, 8)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
"""In RAS+ order."""
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])


def volume(**fields: Any) -> VolumeModality:
    return VolumeModality(encoder="none", **{"num_slices": 4, "window": (0, 2000), **fields})


def pixels(source: Any, **fields: Any) -> np.ndarray:
    """Grey values of the slices [slices, height, width]; the header promises as many."""
    modality = volume(**fields)
    images = modality.load(source, Fetch())
    assert all(image.mode == "RGB" for image in images)
    assert modality.size_from_header(source, Fetch()) == len(images)
    return np.stack([np.asarray(image)[..., 0] for image in images])


def refusal(source: Any, **fields: Any) -> str:
    with pytest.raises(MediaError) as caught:
        volume(**fields).load(source, Fetch())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def grey(values: np.ndarray, low: float = -1000, high: float = 1000) -> np.ndarray:
    scaled = (values.astype(np.float32) - low) / (high - low)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def dicom(folder: Path, number: int, **changes: Any) -> None:
    """Write the slice `number` of VOXELS, as a scanner stores it: LPS, rescaled."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    one = pydicom.Dataset()
    one.file_meta = meta
    one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    one.Modality, one.SeriesInstanceUID = "CT", "1.2.3"
    # Rows run to posterior and columns to left, both against RAS+.
    stored = VOXELS[::-1, ::-1, number].T + 1000
    one.Rows, one.Columns = stored.shape
    one.PixelSpacing, one.SliceThickness = [1.0, 1.0], 1.0
    one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    one.ImagePositionPatient = [-11.0, -9.0, float(number)]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    one.RescaleSlope, one.RescaleIntercept = 1, -1000
    one.PixelData = stored.astype("<i2").tobytes()
    for key, value in changes.items():
        setattr(one, key, value)
    # Names are in another order than places.
    one.save_as(folder / f"{97 * number % 101}.dcm", enforce_file_format=True)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    for number in range(SHAPE[2]):
        dicom(folder, number)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_slices_are_those_of_the_canonical_array_as_radiologists_see_them() -> None:
    source = nib.Nifti1Image(VOXELS, AFFINE).to_bytes()
    places = [1, 3, 5, 7]
    axial = np.stack([grey(VOXELS[::-1, ::-1, k].T) for k in places])
    assert np.array_equal(pixels(source), axial)
    coronal = np.stack([grey(VOXELS[::-1, j, ::-1].T) for j in (1, 3, 6, 8)])
    assert np.array_equal(pixels(source, axis="coronal"), coronal)
    sagittal = np.stack([grey(VOXELS[i, ::-1, ::-1].T) for i in (1, 4, 7, 10)])
    assert np.array_equal(pixels(source, axis="sagittal"), sagittal)
    assert np.array_equal(pixels(VOXELS), axial), "an array is in RAS+ order"
    assert len(pixels(source, num_slices=99)) == SHAPE[2], "no slice is taken twice"


def test_a_file_of_any_orientation_gives_the_same_slices(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, AFFINE)
    expected = {axis: pixels(image, axis=axis) for axis in ("axial", "coronal", "sagittal")}
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            stored = image.as_reoriented(np.stack([axes, flips], axis=1))
            assert np.array_equal(nib.as_closest_canonical(stored).get_fdata(), VOXELS)
            for axis, slices in expected.items():
                assert np.array_equal(pixels(stored.to_bytes(), axis=axis), slices)
    stored.to_filename(tmp_path / "a.nii.gz")
    assert np.array_equal(pixels(str(tmp_path / "a.nii.gz")), expected["axial"])
    second = nib.Nifti2Image(VOXELS, AFFINE).to_bytes()
    assert np.array_equal(pixels(gzip.compress(second)), expected["axial"])


def test_a_dicom_series_gives_the_slices_of_its_nifti(series: Path, tmp_path: Path) -> None:
    expected = pixels(nib.Nifti1Image(VOXELS, AFFINE).to_bytes())
    assert np.array_equal(pixels(str(series)), expected)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in series.iterdir():
            archive.write(path, f"study/{path.name}")
    assert np.array_equal(pixels(file.getvalue()), expected)
    dicom(tmp_path, 5)
    alone = pixels((tmp_path / "81.dcm").read_bytes())
    assert np.array_equal(alone[0], grey(VOXELS[::-1, ::-1, 5].T)) and len(alone) == 1
    one, other = (volume().content(str(folder), Fetch()) for folder in (series, tmp_path))
    assert one != other


def test_a_radiograph_is_shown_as_it_is_stored(tmp_path: Path) -> None:
    dicom(tmp_path, 0, ImageOrientationPatient=None, ImagePositionPatient=None)
    expected = grey(VOXELS[::-1, ::-1, 0].T)
    assert np.array_equal(pixels(str(tmp_path))[0], expected)


def test_windows_scale_values_and_thick_slices_get_square_pixels() -> None:
    image = nib.Nifti1Image(VOXELS, np.diag([1.0, 1.0, 3.0, 1.0]))
    image.header.set_slope_inter(2.0, 10.0)
    found = pixels(image.to_bytes(), window="lung")
    assert np.array_equal(found[0], grey(VOXELS[::-1, ::-1, 1].T * 2.0 + 10, -1350, 150))
    coronal = volume(axis="coronal").load(image.to_bytes(), Fetch())[0]
    assert coronal.size == (SHAPE[0], 3 * SHAPE[2])
    low, high = np.percentile(VOXELS, [0.5, 99.5])
    plain = nib.Nifti1Image(VOXELS, AFFINE).to_bytes()
    assert np.array_equal(pixels(plain, window=None)[0], grey(VOXELS[::-1, ::-1, 1].T, low, high))


def test_features_are_those_of_the_image_encoder_slice_by_slice(tmp_path: Path) -> None:
    encoder = tiny_image_encoder(tmp_path / "clip")
    modality = VolumeModality(encoder=encoder, num_slices=3, features="patches")
    image = ImageModality(encoder=encoder, features="patches")
    slices = modality.load(VOXELS, Fetch())
    item = modality.prepare(slices)
    assert item.num_features == modality.num_features_from_header(VOXELS, Fetch()) == 3 * 16
    thin = modality.prepare(slices[:1])
    with torch.no_grad():
        ours = modality.build_encoder()(**modality.collate([thin, item]))
        theirs = image.build_encoder()(**image.collate([image.prepare(one) for one in slices]))
    torch.testing.assert_close(ours.values[1], theirs.values.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert ours.mask is not None and ours.mask.sum(1).tolist() == [16, 48]


def test_files_without_one_volume_in_space_are_refused(series: Path, tmp_path: Path) -> None:
    four = nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), AFFINE).to_bytes()
    assert "is 4-D, 3 volumes over time" in refusal(four)
    one = nib.Nifti1Image(VOXELS[..., None], AFFINE).to_bytes()
    assert len(pixels(one)) == 4, "a single time is left out"
    nowhere = nib.Nifti1Image(VOXELS, None).to_bytes()
    assert "has no affine matrix" in (said := refusal(nowhere)) and "write it with one" in said
    assert "no affine matrix" in refusal(gzip.compress(nowhere))
    assert "has 960 voxels, and the limit is 900" in refusal(VOXELS, max_voxels=900)
    assert "is no volume; expected NIfTI" in refusal(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    assert "has no files" in refusal(str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.txt").write_text("x")
    assert "has no DICOM images" in refusal(str(tmp_path / "empty"))
    for number, changes, sentence in (
        (3, {}, "lacks slices: the gaps between them are 1 to 2 mm"),
        (2, {"SeriesInstanceUID": "9.9"}, "slices of 2 series or sizes"),
        (2, {"ImagePositionPatient": None}, "without ImagePositionPatient"),
        (2, {"ImagePositionPatient": [-11.0, -9.0, 0.0]}, "several slices at one place"),
        (2, {"NumberOfFrames": 2}, "several frames or colours"),
    ):
        folder = tmp_path / f"{sentence[:9]} {number}"
        folder.mkdir()
        for place in (0, 1):
            dicom(folder, place)
        dicom(folder, number, **changes)
        assert sentence in refusal(str(folder))


def test_damaged_volumes_are_refused_with_one_sentence(series: Path) -> None:
    chance = np.random.default_rng(0)
    plain = nib.Nifti1Image(VOXELS, AFFINE).to_bytes()
    packed, image = gzip.compress(plain), next(series.glob("*.dcm")).read_bytes()
    for data in (plain, packed, image):
        refusal(data[: len(data) // 2])
        for _ in range(100):
            damaged = bytearray(data)
            for at in chance.integers(0, min(len(data), 600), 3):
                damaged[at] = chance.integers(256)
            for read in (volume().load, volume().size_from_header):
                try:
                    read(bytes(damaged), Fetch())
                except MediaError as error:
                    assert "\n" not in str(error)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_by_its_header() -> None:
    header = nib.Nifti1Image(VOXELS, AFFINE).to_bytes()[:352]
    bomb = gzip.compress(header + bytes(64 << 20), compresslevel=9)
    assert "unpacks to more than" in refusal(bomb)


def test_an_image_of_nibabel_is_taken_as_datasets_decodes_it() -> None:
    image = nib.Nifti1Image(VOXELS, AFFINE)
    assert np.array_equal(pixels(image), pixels(image.to_bytes()))
    assert isinstance(volume().load(image, Fetch())[0], Image.Image)
    other = nib.Nifti1Image(VOXELS + 1, AFFINE)
    assert volume().content(image, Fetch()) != volume().content(other, Fetch())


def test_what_was_kept_of_a_series_is_not_used_after_a_change_of_one_slice(tmp_path: Path) -> None:
    for number in range(2):
        dicom(tmp_path, number)
    stamp = source_stamp(str(tmp_path), Fetch())
    assert source_stamp(str(tmp_path), Fetch()) == stamp
    # in place: the folder itself stays as it is
    os.utime(next(tmp_path.iterdir()), ns=(1, 1))
    assert source_stamp(str(tmp_path), Fetch()) != stamp
