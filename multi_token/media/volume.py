"""NIfTI and DICOM -> a volume of voxels in RAS+ order, and its slices as images.

RAS+: the axes of the array run to the patient's right, to anterior and to superior.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from multi_token.errors import MediaError
from multi_token.media.errors import DAMAGE, missing_file, require_package, undecodable
from multi_token.media.fetch import Fetch, source_name
from multi_token.media.unpack import GZIP_MAGIC, ZIP_MAGIC, gunzip, unzip

Axis = Literal["axial", "coronal", "sagittal"]
AXES: Mapping[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""View -> the axis of the array that its slices follow one another on."""
MAX_VOXELS = 512 * 512 * 1024
_NIFTI_HEADER_BYTES = 540
_TRAILING_BYTES = 1 << 20
_DICOM_MAGIC = b"DICM"
_PERCENTILES = (0.5, 99.5)
_SAMPLED_VOXELS = 1 << 21
_SPACING_SLACK = 1.5
"""Ratio of two gaps between slices from which on a slice is missing."""
_SQUARE_SLACK = 1.01


@dataclass(frozen=True)
class Volume:
    """Voxels in RAS+ order; a value is `voxels * slope + intercept`."""

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    """Millimetres between voxels along each axis."""
    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True)
class _Stored:
    """Voxels as a file holds them, and the affine matrix of their places (RAS+, millimetres)."""

    shape: tuple[int, ...]
    affine: np.ndarray
    voxels: np.ndarray | None
    slope: float = 1.0
    intercept: float = 0.0


def read_volume(source: Any, fetch: Fetch, *, max_voxels: int = MAX_VOXELS) -> Volume:
    """Return the volume of a source in RAS+ order.

    | source | meaning |
    |---|---|
    | path, URL, bytes | NIfTI (.nii, .nii.gz), a DICOM file, or a ZIP of DICOM files |
    | path of a folder | a DICOM series |
    | nibabel image | as decoded by `datasets` |
    | array [x, y, z] | voxels in RAS+ order, 1 mm apart |

    Raises:
        MediaError: The source cannot be read, has no orientation, is 4-D or is over the limit.
    """
    if isinstance(source, np.ndarray):
        _check_shape(source.shape, "the array", max_voxels)
        return Volume(source, (1.0, 1.0, 1.0))
    stored = _read(source, fetch, max_voxels, header_only=False)
    assert stored.voxels is not None
    nib = require_package("nibabel", "volume")
    orientation = nib.io_orientation(stored.affine)
    # Flips and swaps are views, so a volume is in memory once.
    voxels = nib.apply_orientation(stored.voxels, orientation)
    steps = np.sqrt((stored.affine[:3, :3] ** 2).sum(0))
    spacing = [1.0, 1.0, 1.0]
    for stored_axis, step in enumerate(steps):
        spacing[int(orientation[stored_axis, 0])] = float(step)
    return Volume(voxels, (spacing[0], spacing[1], spacing[2]), stored.slope, stored.intercept)


def volume_shape(
    source: Any, fetch: Fetch, *, max_voxels: int = MAX_VOXELS
) -> tuple[int, int, int]:
    """Return the shape of the volume that `read_volume` gives, from headers. Raises MediaError."""
    if isinstance(source, np.ndarray):
        _check_shape(source.shape, "the array", max_voxels)
        return source.shape  # type: ignore[return-value]
    stored = _read(source, fetch, max_voxels, header_only=True)
    axes = require_package("nibabel", "volume").io_orientation(stored.affine)[:, 0]
    shape = [0, 0, 0]
    for axis, size in zip(axes, stored.shape, strict=True):
        shape[int(axis)] = size
    return shape[0], shape[1], shape[2]


def volume_files(source: Any, fetch: Fetch) -> list[Path]:
    """Return the files of a DICOM series that is named by its folder; [] for other sources."""
    folder = fetch.local_path(source)
    if folder is None or not fetch.allow_paths or not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise missing_file(f"the folder {folder} has no files; name one with a DICOM series")
    return files


def slices(
    volume: Volume, places: Sequence[int], *, axis: Axis, window: tuple[float, float] | None
) -> list[Image.Image]:
    """Return slices of a volume as grey RGB images with square pixels.

    Oriented as radiologists see them: axial with the patient's right at the left and anterior at
    the top, coronal the same with superior at the top, sagittal with anterior at the left.

    Args:
        volume: Voxels in RAS+ order.
        places: Slices to take, counted from inferior, posterior or left.
        axis: View.
        window: Values that become black and white; None for the 0.5th and 99.5th percentile.
    """
    low, high = window or _percentiles(volume)
    number = AXES[axis]
    across, down = (1, 2) if number == 0 else (0, 2) if number == 1 else (0, 1)
    images = []
    for place in places:
        values = np.take(volume.voxels, place, axis=number).astype(np.float32)
        values = values * np.float32(volume.slope) + np.float32(volume.intercept)
        # Both axes of a view run against RAS+: to the left (or posterior), and downwards.
        values = values[::-1, ::-1].T
        scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255
        # NaN marks the outside in statistical maps.
        grey = np.nan_to_num(scaled, nan=0.0).round().astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(grey))
        images.append(_square_pixels(image, volume.spacing[across], volume.spacing[down]))
    return images


def _square_pixels(image: Image.Image, across: float, down: float) -> Image.Image:
    """The image as RGB, enlarged along the axis of thick slices. An encoder sees true shapes."""
    least = min(across, down)
    if max(across, down) > least * _SQUARE_SLACK:
        size = (round(image.width * across / least), round(image.height * down / least))
        image = image.resize(size, Image.Resampling.BILINEAR)
    return image.convert("RGB")


def _percentiles(volume: Volume) -> tuple[float, float]:
    flat = volume.voxels.reshape(-1) if volume.voxels.flags.c_contiguous else volume.voxels
    # A sample at equal steps is enough for percentiles, and takes no second copy of the volume.
    step = max(1, round((volume.voxels.size / _SAMPLED_VOXELS) ** (1 / flat.ndim)))
    sample = flat[(slice(None, None, step),) * flat.ndim]
    low, high = np.nanpercentile(sample.astype(np.float64), _PERCENTILES)
    ends = sorted(float(end) * volume.slope + volume.intercept for end in (low, high))
    return ends[0], ends[1]


def _check_shape(shape: Sequence[int], label: str, max_voxels: int) -> None:
    if len(shape) == 4 and shape[3] > 1:
        raise undecodable(
            f"{label} is 4-D, {shape[3]} volumes over time or directions; write one of them as a "
            "file (nibabel: image.slicer[..., 0])"
        )
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise undecodable(f"{label} has the shape {list(shape)}, expected [x, y, z]")
    num_voxels = int(np.prod(shape, dtype=np.int64))
    if num_voxels > max_voxels:
        raise undecodable(
            f"{label} has {num_voxels:,} voxels, and the limit is {max_voxels:,}; make it smaller, "
            "or raise `max_voxels`"
        )


def _read(source: Any, fetch: Fetch, max_voxels: int, *, header_only: bool) -> _Stored:
    label = source_name(source) or "the volume"
    if hasattr(source, "dataobj") and hasattr(source, "affine"):
        return _of_image(source, label, max_voxels, header_only)
    if files := volume_files(source, fetch):
        return _read_dicom([fetch.read(file) for file in files], label, max_voxels, header_only)
    with fetch.open(source) as file:
        start = file.read(_NIFTI_HEADER_BYTES)
        file.seek(0)
        if start[128:132] == _DICOM_MAGIC:
            return _read_dicom([file.read()], label, max_voxels, header_only)
        if start.startswith(ZIP_MAGIC):
            members = list(unzip(file.read(), label, fetch.max_bytes).values())
            return _read_dicom(members, label, max_voxels, header_only)
        return _read_nifti(file, start, label, max_voxels, header_only)


def _damaged(label: str, kind: str, error: object) -> MediaError:
    return undecodable(
        f"{label} is {kind} that is truncated or damaged ({' '.join(str(error).split())[:200]}); "
        "copy or download it again"
    )


def _read_nifti(
    file: BinaryIO, start: bytes, label: str, max_voxels: int, header_only: bool
) -> _Stored:
    nib = require_package("nibabel", "volume")
    is_packed = start.startswith(GZIP_MAGIC)
    if is_packed:
        start = _start_of_gzip(file.read(1 << 16), label)
        file.seek(0)
    kinds = {348: (nib.Nifti1Image, nib.Nifti1Header), 540: (nib.Nifti2Image, nib.Nifti2Header)}
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")} & kinds.keys()
    if not sizes:
        raise undecodable(
            f"{label} is no volume; expected NIfTI (.nii, .nii.gz), DICOM, or a folder or ZIP of "
            "DICOM files"
        )
    image_class, header_class = kinds[sizes.pop()]
    errors = (nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError, *DAMAGE)
    try:
        header = header_class.from_fileobj(io.BytesIO(start))
        shape = header.get_data_shape()
        _check_shape(shape, label, max_voxels)
        if header["sform_code"] == 0 and header["qform_code"] == 0:
            raise undecodable(
                f"{label} has no affine matrix (sform and qform codes are 0), so its orientation "
                "is unknown; write it with one (nibabel.Nifti1Image(voxels, affine))"
            )
        if header_only:
            return _Stored(_three(shape), _checked(header.get_best_affine(), label), None)
        data = file.read()
        if is_packed:
            # Bounded by the header: a small file can unpack to gigabytes.
            num_bytes = math.prod(shape) * header.get_data_dtype().itemsize
            data = gunzip(data, label, int(header["vox_offset"]) + num_bytes + _TRAILING_BYTES)
        return _of_image(image_class.from_bytes(data), label, max_voxels, header_only)
    except MediaError:
        raise
    except errors as error:
        raise _damaged(label, "a NIfTI file", error) from None


def _start_of_gzip(data: bytes, label: str) -> bytes:
    try:
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        return unpacker.decompress(data, _NIFTI_HEADER_BYTES)
    except zlib.error as error:
        raise _damaged(label, "a gzip file", error) from None


def _of_image(image: Any, label: str, max_voxels: int, header_only: bool) -> _Stored:
    """The voxels of a nibabel image, without a copy in float64."""
    _check_shape(image.shape, label, max_voxels)
    if image.affine is None:
        raise undecodable(f"{label} has no affine matrix, so its orientation is unknown")
    affine = _checked(image.affine, label)
    if header_only:
        return _Stored(_three(image.shape), affine, None)
    proxy = image.dataobj
    raw = proxy.get_unscaled() if hasattr(proxy, "get_unscaled") else np.asanyarray(proxy)
    if raw.dtype.kind not in "biuf":
        raise undecodable(f"{label} holds {raw.dtype} voxels; expected one number each")
    slope, intercept = (getattr(proxy, name, None) for name in ("slope", "inter"))
    return _Stored(
        _three(image.shape),
        affine,
        raw.reshape(_three(image.shape)),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _three(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape with three axes: a flat image is one slice, a single time is left out."""
    return (*shape[:3], *(1,) * (3 - len(shape)))


def _checked(affine: Any, label: str) -> np.ndarray:
    affine = np.asarray(affine, dtype=np.float64)
    steps = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(steps)) < 1e-9:
        raise undecodable(f"{label} has an affine matrix that is no orientation in space")
    return affine


def _read_dicom(files: Sequence[bytes], label: str, max_voxels: int, header_only: bool) -> _Stored:
    pydicom = require_package("pydicom", "volume")
    files = [data for data in files if data[128:132] == _DICOM_MAGIC]
    # pydicom raises AttributeError for an element that a header lacks.
    errors = (
        pydicom.errors.InvalidDicomError,
        pydicom.errors.BytesLengthException,
        NotImplementedError,
        AttributeError,
        *DAMAGE,
    )
    try:
        with warnings.catch_warnings():
            # Scanners write values that the standard forbids; those that matter are checked.
            warnings.simplefilter("ignore")
            return _stack_dicom(pydicom, files, label, max_voxels, header_only)
    except MediaError:
        raise
    except errors as error:
        raise _damaged(label, "a DICOM image", error) from None


def _stack_dicom(
    pydicom: Any, files: Sequence[bytes], label: str, max_voxels: int, header_only: bool
) -> _Stored:
    read = [pydicom.dcmread(io.BytesIO(data), stop_before_pixels=header_only) for data in files]
    read = [one for one in read if "Rows" in one]
    if not read:
        raise undecodable(f"{label} has no DICOM images")
    ordered, affine = _ordered(read, label)
    first = ordered[0]
    shape = (int(first.Columns), int(first.Rows), len(ordered))
    _check_shape(shape, label, max_voxels)
    if header_only:
        return _Stored(shape, affine, None)
    voxels = np.empty(shape, np.float32)
    for place, one in enumerate(ordered):
        slope = float(one.get("RescaleSlope", 1) or 1)
        voxels[..., place] = one.pixel_array.T * slope + float(one.get("RescaleIntercept", 0) or 0)
    if first.get("PhotometricInterpretation") == "MONOCHROME1":  # white is low
        voxels = voxels.max() + voxels.min() - voxels
    return _Stored(shape, affine, voxels)


def _ordered(read: Sequence[Any], label: str) -> tuple[list[Any], np.ndarray]:
    """The files of one series in the order of their places, and the affine of the volume."""
    first = read[0]
    counts = ("NumberOfFrames", "SamplesPerPixel")
    if any(int(one.get(name) or 1) > 1 for one in read for name in counts):
        raise undecodable(
            f"{label} is a DICOM with several frames or colours; convert it to NIfTI (dcm2niix)"
        )
    series = {(str(one.get("SeriesInstanceUID", "")), one.Rows, one.Columns) for one in read}
    if len(series) > 1:
        raise undecodable(
            f"{label} has slices of {len(series)} series or sizes; give a folder for each series"
        )
    across, down = (1.0, 1.0)
    if first.get("PixelSpacing"):
        down, across = (float(step) for step in first.PixelSpacing)
    directions = first.get("ImageOrientationPatient")
    if directions is None or any(one.get("ImagePositionPatient") is None for one in read):
        if len(read) > 1:
            raise undecodable(
                f"{label} has slices without ImagePositionPatient, so their order is unknown"
            )
        # A radiograph: shown as it is stored, as an axial slice would be.
        return list(read), np.diag([-across, -down, 1.0, 1.0])
    row, column = np.array(directions, float).reshape(2, 3)
    normal = np.cross(row, column)
    ordered = sorted(read, key=lambda one: float(np.dot(one.ImagePositionPatient, normal)))
    places = [np.array(one.ImagePositionPatient, float) for one in ordered]
    step = normal * float(first.get("SliceThickness") or 1.0)
    if len(places) > 1:
        gaps = [float(np.dot(b - a, normal)) for a, b in itertools.pairwise(places)]
        if min(gaps) < 1e-4:
            raise undecodable(f"{label} has several slices at one place; give one series")
        if max(gaps) > _SPACING_SLACK * min(gaps):
            raise undecodable(
                f"{label} lacks slices: the gaps between them are {min(gaps):g} to {max(gaps):g} mm"
            )
        step = (places[-1] - places[0]) / (len(places) - 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across, column * down, step
    affine[:3, 3] = places[0]
    # DICOM's axes run to left and posterior, RAS+ to right and anterior.
    return ordered, _checked(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, label)
